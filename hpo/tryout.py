"""An objective tried before anything runs: a network for every corner of the space, one of them on a batch.

What would otherwise fail, or silently go wrong, in the middle of a study is said here: what cannot be built, a loss
that is not one number, a `build` that gives another network each time, code that changes torch's settings or seeds.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from hpo import optim
from hpo.data import Data, Split, prediction
from hpo.errors import InputError
from hpo.plan import Plan, guarded


def try_out(plan: Plan, data: Data) -> nn.Module | None:
    """Build a network and its optimizer for every corner of the space, and train the first on one batch.

    Return the first; None where the objective trains in its own way. Raises InputError.
    """
    objective = plan.objective
    if objective.train is not None:
        return None
    preprocess = guarded(plan, "preprocess", lambda: objective.preprocess(data.train))
    head = Split(inputs={n: x[:8] for n, x in data.train.inputs.items()}, targets=data.train.targets[:8])
    batch = guarded(plan, "preprocess", lambda: head.through(preprocess))
    first = None
    for params in plan.space.corners():
        searched = plan.space.searched(params).items()
        shown = ", ".join(f"{name}={value}" for name, value in searched) or "its fixed params"

        def build(params: Mapping[str, Any] = params, shown: str = shown) -> nn.Module:
            with _settings_stay(plan, "build"):
                return guarded(plan, f"build with {shown}", lambda: objective.build(params, data.info))

        module = build()
        optimizer = guarded(
            plan,
            f"optimizer {params['optimizer']} with {shown}",
            lambda params=params, module=module: optim.make(params, module.parameters()),
        )
        if first is None:
            first = module
            _require_same_network(plan, build)
            with _settings_stay(plan, "a training step"):
                _train_once(plan, module, optimizer, batch, params)
    assert first is not None
    return first


def _require_same_network(plan: Plan, build: Callable[[], nn.Module]) -> None:
    """Raise InputError unless equal params and seeds give equal networks, and other seeds other weights."""
    modules, states = [], []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        modules.append(build())
        states.append(torch.get_rng_state())
    one, two = ([(n, type(m), [*map(_shape, m.parameters())]) for n, m in x.named_modules()] for x in modules[:2])
    if one != two:
        differing = next((a[0] or b[0] for a, b in zip(one, two, strict=False) if a != b), "their number")
        raise InputError(
            f"objective {plan.spec.objective}: build gives another network each time for the same params and seed "
            f"(layers differ at {differing}); draw from torch's generator only, and let params decide the structure"
        )
    if torch.equal(states[0], states[2]):
        raise InputError(
            f"objective {plan.spec.objective}: build sets torch's seed itself, so all trials would begin with the same "
            "weights and their own seeds mean nothing; remove its torch.manual_seed"
        )


def _shape(tensor: torch.Tensor) -> torch.Size:
    return tensor.shape


_SETTINGS: Mapping[str, Callable[[], Any]] = {
    "torch's default dtype": torch.get_default_dtype,
    "whether torch computes gradients": torch.is_grad_enabled,
    "torch's number of threads": torch.get_num_threads,
    "torch's determinism": torch.are_deterministic_algorithms_enabled,
}


@contextmanager
def _settings_stay(plan: Plan, what: str) -> Iterator[None]:
    """Raise InputError where the user's code changes what holds for the whole process: other trials train in it too."""
    before = {name: look() for name, look in _SETTINGS.items()}
    yield
    for name, look in _SETTINGS.items():
        if look() != before[name]:
            raise InputError(
                f"objective {plan.spec.objective}: {what} changes {name} from {before[name]} to {look()}; "
                "set it back, other trials train in the same process"
            )


def _train_once(plan: Plan, module: nn.Module, optimizer: Any, batch: Split, params: Mapping[str, Any]) -> None:
    module.train()
    outputs = guarded(plan, "forward", lambda: module(*batch.inputs.values()))
    loss = guarded(plan, "loss", lambda: plan.objective.loss(outputs, batch.targets, params))
    if not isinstance(loss, torch.Tensor) or loss.ndim != 0:
        came = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else repr(loss)
        raise InputError(
            f"objective {plan.spec.objective}: loss must return one number (a tensor of no dimensions), "
            f"but got {came}; take its mean"
        )
    guarded(plan, "loss.backward", loss.backward)
    guarded(plan, f"a step of optimizer {params['optimizer']}", optimizer.step)
    predicted = guarded(plan, "forward", lambda: prediction(outputs).detach())
    for name, metric in plan.objective.metrics().items():
        guarded(plan, f"metric {name}", lambda metric=metric: float(metric(predicted, batch.targets)))
    guarded(plan, "head", lambda: plan.objective.head()(predicted))
