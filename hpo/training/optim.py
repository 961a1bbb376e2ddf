"""The engine's own hyperparameters, and torch.optim's optimizers made of them."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from hpo.errors import Fault, broken_rules, did_you_mean, is_number
from hpo.light import without_compiler
from hpo.training import schedules
from hpo.training.memory import is_out_of_memory

DEFAULTS: Mapping[str, Any] = {"optimizer": "adam", "learning_rate": 1e-3, "batch_size": 64}
"""What every study has, whatever its objective says."""
ARGUMENTS: Mapping[str, str] = {
    "learning_rate": "lr",
    "weight_decay": "weight_decay",
    "momentum": "momentum",
    "nesterov": "nesterov",
    "dampening": "dampening",
    "beta1": "betas",
    "beta2": "betas",
    "eps": "eps",
    "alpha": "alpha",
    "rho": "rho",
    "amsgrad": "amsgrad",
    "centered": "centered",
}
"""Names of the optimizer's hyperparameters, and the argument of torch.optim's class each one is."""
MAX_GRAD_NORM = "max_grad_norm"
"""The largest norm of all gradients together (torch.nn.utils.clip_grad_norm_); 0, or not named: no clipping."""
ACCUMULATION = "accumulation_steps"
"""How many batches make one optimizer step: their gradients are those of all their rows at once."""
without_compiler(torch.optim.Optimizer, "add_param_group", "zero_grad", "state_dict", "load_state_dict")

NAMES = (*dict.fromkeys([*DEFAULTS, *ARGUMENTS, *schedules.DEFAULTS, MAX_GRAD_NORM, ACCUMULATION]),)


def optimizer_class(name: str) -> type[torch.optim.Optimizer] | None:
    """Return the class of torch.optim of that name, in whatever case it is written (`adamw`, `SGD`); None: no such."""
    classes = _classes()
    return classes.get(str(name).lower())


def _classes() -> dict[str, type[torch.optim.Optimizer]]:
    return {
        key.lower(): value
        for key, value in vars(torch.optim).items()
        if isinstance(value, type) and issubclass(value, torch.optim.Optimizer) and value is not torch.optim.Optimizer
    }


def gives_sparse(network: nn.Module) -> bool:
    """Whether some of a network's gradients are sparse: those of its embeddings, if they are to be."""
    return any(isinstance(each, nn.Embedding | nn.EmbeddingBag) and each.sparse for each in network.modules())


def make(params: Mapping[str, Any], weights: Iterable[nn.Parameter], *, sparse: bool = False) -> torch.optim.Optimizer:
    """Return the optimizer that `params` name, with those of its hyperparameters that they hold.

    A parameter that this optimizer does not take (`momentum` with adam) is left out: in a space that searches over
    optimizers it belongs to another one. `fused` is on wherever torch has it: it is the faster code for the same step,
    but takes no `sparse` gradients.
    """
    cls = optimizer_class(params["optimizer"])
    assert cls is not None, "hpo.runner.prepare refuses unknown optimizers"
    accepted = inspect.signature(cls).parameters
    arguments: dict[str, Any] = {}
    for name, argument in ARGUMENTS.items():
        if name in params and argument in accepted and argument != "betas":
            arguments[argument] = params[name]
    if "betas" in accepted and ("beta1" in params or "beta2" in params):
        default = accepted["betas"].default
        # torch takes 0, but not beside a float
        arguments["betas"] = (float(params.get("beta1", default[0])), float(params.get("beta2", default[1])))
    weights = list(weights)
    if "fused" in accepted and not sparse and all(_has_fused(str(params["optimizer"]).lower(), w) for w in weights):
        arguments["fused"] = True
    return cls(weights, **arguments)


def step(optimizer: torch.optim.Optimizer) -> None:
    """Do an optimizer's step without what torch puts around it: an import of its compiler, and hooks that nobody set.

    That import takes one to two seconds; the hooks, the profiler's among them, a quarter of a small network's step.
    """
    cls: Any = type(optimizer)  # which mypy takes for no key of a cache
    with torch.no_grad():
        _bare_step(cls)(optimizer)


@cache
def _bare_step(cls: Any) -> Callable[[torch.optim.Optimizer], Any]:
    bare: Callable[[torch.optim.Optimizer], Any] = inspect.unwrap(cls.step)
    return bare


def _has_fused(name: str, weight: Tensor) -> bool:
    return weight.is_floating_point() and _works_fused(name, weight.device, weight.dtype)


@cache
def _works_fused(name: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch has a fused step of an optimizer for such weights, tried on one number.

    Not wherever the class takes `fused`: torch 2.11's Adagrad has it on a CPU only, and MPS has that of some.
    """
    weight = nn.Parameter(torch.zeros(1, device=device, dtype=dtype))
    weight.grad = torch.zeros_like(weight)
    arguments: dict[str, Any] = {"fused": True}
    try:
        step(_classes()[name]([weight], **arguments))
    except (RuntimeError, NotImplementedError) as error:
        if is_out_of_memory(error):
            raise
        return False
    return True


def faults(values: Mapping[str, list[Any]]) -> list[Fault]:
    """Return what is wrong with the engine's own params, given every value (or both ends) that each can have."""
    found = []
    known = _classes()
    optimizers = [str(name) for name in values["optimizer"]]
    for name in optimizers:
        if name.lower() not in known:
            message = f"there is no torch.optim class {name!r}{did_you_mean(name.lower(), known)}"
            found.append(Fault(path=("params", "optimizer"), message=message))
        elif issubclass(known[name.lower()], torch.optim.LBFGS):
            message = f"{name} computes the loss several times in a step, which hpo does not do; choose another one"
            found.append(Fault(path=("params", "optimizer"), message=message))
    accepted = {
        a for name in optimizers if name.lower() in known for a in inspect.signature(known[name.lower()]).parameters
    }
    for name in values:
        argument = ARGUMENTS.get(name)
        if argument and accepted and argument not in accepted:
            what = f"{' and '.join(optimizers)} takes no {argument}"
            message = f"{what}; remove it, or choose an optimizer that does; an objective's own needs another name"
            found.append(Fault(path=("params", name), message=message))
    known_schedules = ", ".join(schedules.NAMES)
    rules = {
        "schedule": (lambda v: v in schedules.NAMES, f"one of {known_schedules}"),
        "schedule_pct_start": (lambda v: is_number(v) and 0 < v < 1, "a number in (0, 1)"),
        "schedule_step_size": (lambda v: is_number(v) and v > 0, "a number of epochs above 0"),
        "schedule_gamma": (lambda v: is_number(v) and v > 0, "a number above 0"),
        MAX_GRAD_NORM: (lambda v: is_number(v) and v >= 0, "a number of at least 0 (0: no clipping)"),
        "batch_size": (lambda v: type(v) is int and v >= 1, "a whole number of at least 1"),
        ACCUMULATION: (lambda v: type(v) is int and v >= 1, "a whole number of at least 1"),
        "learning_rate": (lambda v: is_number(v) and v > 0, "a number above 0"),
        "weight_decay": (lambda v: is_number(v) and v >= 0, "a number of at least 0"),
        "momentum": (lambda v: is_number(v) and v >= 0, "a number of at least 0"),
        "beta1": (lambda v: is_number(v) and 0 <= v < 1, "a number in [0, 1)"),
        "beta2": (lambda v: is_number(v) and 0 <= v < 1, "a number in [0, 1)"),
        "dampening": (is_number, "a number"),
        "eps": (lambda v: is_number(v) and v >= 0, "a number of at least 0"),
        "alpha": (lambda v: is_number(v) and v >= 0, "a number of at least 0"),
        "rho": (lambda v: is_number(v) and 0 <= v <= 1, "a number in [0, 1]"),
        **{name: (lambda v: v in (True, False), "true or false") for name in ("nesterov", "amsgrad", "centered")},
    }
    return found + broken_rules(rules, values)


TOGETHER = ("optimizer", "nesterov", "momentum", "dampening")
"""What torch refuses by its combination."""


def faults_together(configurations: Iterable[Mapping[str, Any]]) -> list[Fault]:
    """Return what is wrong with the engine's own params together, given all `configurations` of TOGETHER."""
    for params in configurations:
        momentum, dampening = params.get("momentum", 0), params.get("dampening", 0)
        if str(params.get("optimizer")).lower() != "sgd" or not params.get("nesterov"):
            continue
        if not (is_number(momentum) and is_number(dampening)):  # which is said already
            continue
        if momentum <= 0 or dampening != 0:
            got = f"dampening can be {dampening:g}" if momentum > 0 else f"momentum can be {momentum:g}"
            got = got if momentum > 0 or "momentum" in params else "there can be none"
            rule = "sgd takes nesterov: true only with a momentum above 0 and no dampening"
            hint = "let it have no other, or make one depend on another (`when`)"
            return [Fault(path=("params", "nesterov"), message=f"{rule}, but {got}; {hint}")]
    return []
