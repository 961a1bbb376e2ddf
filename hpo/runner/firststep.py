"""One step of one network, held against what the engine expects of an objective's forward, loss, metrics and head.

What is wrong is said with the shapes and dtypes that came: of what torch itself says of it, the reader would have to
guess which tensor was meant.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_structure, tree_unflatten

from hpo.errors import InputError
from hpo.runner.prepare import Plan, guarded
from hpo.study.data import Data, Split, prediction
from hpo.study.objective import Params
from hpo.training import optim

_OF_DTYPES = ("dtype", "scalar type", "Double", "Long", "same type", "be cast")
"""Words of torch's messages about dtypes."""


def module_from(plan: Plan, what: str, call: Callable[[], Any]) -> nn.Module:
    """Return what `call`, the objective's method `what`, gives, if it is a module. Raises InputError."""
    made = guarded(plan, what, call)
    if isinstance(made, nn.Module):
        return made
    name = what.partition(" ")[0]
    raise InputError(
        f"objective {plan.spec.objective}: {name} must return a torch.nn.Module, but returned {came(made)}"
    )


def fixed_from(plan: Plan, what: str, call: Callable[[], Any]) -> nn.Module:
    """Return the module of `call`, which is never trained, so that it must have nothing that could be.

    Random weights would be others in each process: the exported ones not those of the trials. Raises InputError.
    """
    made = module_from(plan, what, call)
    if names := [name for name, weight in made.named_parameters() if weight.requires_grad]:
        raise InputError(
            f"objective {plan.spec.objective}: {what} must return a module that needs no training, but got the "
            f"parameters {', '.join(names[:5])}; have build return what is trained, keep fixed numbers in buffers "
            "(register_buffer), and freeze weights that are loaded (module.requires_grad_(False))"
        )
    return made


def came(value: Any) -> str:
    """Return what a value is, in a few words."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, type):
        return f"the class {value.__name__}: make one, {value.__name__}(...)"
    if isinstance(value, str | int | float | None):
        return f"{value!r:.60}"
    return f"a {type(value).__name__}"


def try_forward(plan: Plan, module: nn.Module, batch: Split) -> Any:
    """Return `module`'s outputs of `batch`, in the mode that it is in. Raises InputError."""
    outputs = _called(plan, "forward", lambda: module(*batch.inputs.values()), batch.inputs)
    _require_outputs(plan, outputs, len(batch))
    return outputs


def try_step(plan: Plan, module: nn.Module, optimizer: Any, batch: Split, params: Params) -> Any:
    """Train `module` on `batch`, once; return its outputs. Raises InputError."""
    module.train()
    outputs = try_forward(plan, module, batch)
    _refuse_all_pairs(plan, outputs, batch.targets, params)
    given = _given(outputs, batch.targets)
    loss = _called(plan, "loss", lambda: plan.objective.loss(outputs, batch.targets, params), given, params)
    if not isinstance(loss, Tensor) or loss.ndim != 0:
        raise InputError(
            f"objective {plan.spec.objective}: loss must return one number (a tensor of no dimensions), "
            f"but got {came(loss)}; take its mean"
        )
    _called(plan, "loss.backward", loss.backward, given)
    guarded(plan, f"a step of optimizer {params['optimizer']}", lambda: optim.step(optimizer))
    return outputs


def try_measuring(plan: Plan, data: Data, outputs: Any, batch: Split, losses: Sequence[Params]) -> None:
    """Try metrics and head on `outputs`, and them and the loss of each of the `losses` params on targets of all kinds.

    Of all targets the least and the largest are tried too: a class that is out of range would else fail, or on a GPU
    end the process, in the middle of a study. Raises InputError.
    """
    predicted = guarded(plan, "forward", lambda: prediction(outputs).detach())
    for targets in (batch.targets, _extremes(data)[torch.arange(len(batch)) % (2 * len(data.splits))]):
        given = _given(predicted, targets)
        for params in losses:
            with torch.no_grad():
                _called(
                    plan,
                    "loss",
                    partial(plan.objective.loss, outputs, targets, params),
                    given,
                    params,
                )
            _require_probabilities(plan, targets, params)
        for name, metric in plan.objective.metrics().items():
            call = lambda metric=metric, targets=targets: metric(predicted, targets)  # noqa: E731
            _require_number(plan, name, _called(plan, f"metric {name}", call, given))
    head = fixed_from(plan, "head", plan.objective.head)
    _called(plan, "head", lambda: head(predicted), {"outputs": predicted})


def _called(
    plan: Plan, what: str, call: Callable[[], Any], given: Mapping[str, Tensor], params: Params | None = None
) -> Any:
    """Return what `call` gives; raise InputError that says what it was given."""
    try:
        return guarded(plan, what, call)
    except InputError as error:
        hint = missing_param(error, params) if params is not None else ""
        raise InputError(f"{error}; given {_shown(given)}{hint or _as_float(error, given)}") from error.__cause__


def missing_param(error: InputError, params: Params) -> str:
    """Return what to do about an `error` that came from reading a param that is not there, as it seems."""
    cause = error.__cause__
    if isinstance(cause, KeyError) and cause.args and cause.args[0] not in params:
        return f"; there is no param {cause.args[0]!r}: if it is to be one, add it to the objective's `defaults`"
    return ""


def _as_float(error: InputError, given: Mapping[str, Tensor]) -> str:
    odd = [name for name, x in given.items() if x.dtype == torch.float64 or not x.is_floating_point()]
    if odd and any(word in str(error) for word in _OF_DTYPES):
        return f"; networks compute in float32: give {', '.join(odd)} as .float()"
    return ""


def _given(outputs: Any, targets: Tensor) -> dict[str, Tensor]:
    return {"outputs": prediction(outputs), "targets": targets}


def _shown(given: Mapping[str, Tensor]) -> str:
    return ", ".join(f"{name} {_described(x)}" + _range(name, x) for name, x in given.items())


def _described(x: Tensor) -> str:
    return f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}"


def _range(name: str, x: Tensor) -> str:
    return f" from {x.min().item():g} to {x.max().item():g}" if name == "targets" and x.numel() else ""


def _require_outputs(plan: Plan, outputs: Any, n_rows: int) -> None:
    leaves = tree_leaves(outputs)
    rule = f"objective {plan.spec.objective}: forward must return a tensor, or a tuple of tensors,"
    if wrong := [x for x in leaves if not isinstance(x, Tensor)]:
        inside = "" if wrong[0] is outputs else f" in a {type(outputs).__name__}"
        raise InputError(f"{rule} but returned {came(wrong[0])}{inside}")
    if not leaves:
        raise InputError(f"{rule} but returned an empty {type(outputs).__name__}")
    odd = next((x for x in leaves if x.ndim == 0 or (x is leaves[0] and len(x) != n_rows)), None)
    if odd is not None:
        raise InputError(
            f"{rule} with a row for each of the {n_rows} rows that it is given, but returned {_described(odd)}"
        )


def _refuse_all_pairs(plan: Plan, outputs: Any, targets: Tensor, params: Params) -> None:
    """Raise InputError for a loss that broadcasts outputs and targets to all pairs of rows, which trains to the mean.

    Such a loss stays the same when the targets' rows change places.
    """
    predicted = prediction(outputs)
    try:
        shape = np.broadcast_shapes(predicted.shape, targets.shape)  # torch's own imports SymPy: half a second
    except ValueError:
        return
    other = (targets != targets[:1]).reshape(len(targets), -1).any(1).nonzero()[:, 0]
    if math.prod(shape) <= max(predicted.numel(), targets.numel()) or not len(other):
        return
    mixed = targets.clone()
    mixed[1::2] = targets[other[0]]
    mixed[::2] = targets[0]
    generator = torch.Generator().manual_seed(0)
    some = [0.05 + 0.9 * torch.rand(x.shape, generator=generator).to(x.dtype) for x in tree_leaves(outputs)]
    some = tree_unflatten(some, tree_structure(outputs))

    def loss(rows: Tensor) -> Tensor:
        return torch.as_tensor(plan.objective.loss(some, rows, params), dtype=torch.float64)

    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own, of just that
            as_they_are, moved, same = loss(mixed), loss(mixed.roll(1, 0)), loss(targets[:1].expand_as(targets))
    except Exception:  # what is wrong with it is said where it is called in earnest
        return
    if torch.allclose(as_they_are, moved, rtol=1e-6) and not torch.allclose(as_they_are, same, rtol=1e-3):
        raise InputError(
            f"objective {plan.spec.objective}: loss compares each row's output with every row's target: outputs "
            f"{_described(predicted)} and targets {_described(targets)} are broadcast to {shape}; give both one "
            f"shape (targets.unsqueeze(1), say, or outputs.squeeze(1))"
        )


def _extremes(data: Data) -> Tensor:
    """Return of each split the targets' rows that hold the least and the largest number."""
    rows = []
    for split in data.splits.values():
        flat = split.targets.reshape(len(split), -1)
        flat = flat.to(torch.uint8) if flat.dtype == torch.bool else flat  # of which torch takes no minimum
        rows += [split.targets[flat.min(1).values.argmin()], split.targets[flat.max(1).values.argmax()]]
    return torch.stack(rows)


def _require_probabilities(plan: Plan, targets: Tensor, params: Params) -> None:
    least, most = targets.min().item(), targets.max().item()
    if params.get("loss") == "bce" and not (least >= 0 and most <= 1):
        raise InputError(
            f"objective {plan.spec.objective}: bce takes targets from 0 to 1, but they go from {least:g} to {most:g}"
        )


def _require_number(plan: Plan, name: str, value: Any) -> None:
    if (isinstance(value, Tensor) and value.numel() == 1) or isinstance(value, int | float):
        return
    raise InputError(
        f"objective {plan.spec.objective}: metric {name} must give one number, but gives {came(value)}; have it take "
        'an average (average="macro", multioutput="uniform_average")'
    )


_SETTINGS: Mapping[str, Callable[[], Any]] = {
    "torch's default dtype": torch.get_default_dtype,
    "whether torch computes gradients": torch.is_grad_enabled,
    "torch's number of threads": torch.get_num_threads,
    "torch's determinism": torch.are_deterministic_algorithms_enabled,
}


@contextmanager
def settings_stay(plan: Plan, what: str) -> Iterator[None]:
    """Raise InputError where the user's code changes what holds for the whole process: other trials train in it too."""
    before = {name: look() for name, look in _SETTINGS.items()}
    yield
    for name, look in _SETTINGS.items():
        if look() != before[name]:
            raise InputError(
                f"objective {plan.spec.objective}: {what} changes {name} from {before[name]} to {look()}; "
                "set it back, other trials train in the same process"
            )
