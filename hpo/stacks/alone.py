"""A step of a network alone, which its step in a stack must equal; and what rules out that it can.

In training a network may do what it does not when it is evaluated: draw masks, count, add an output for the loss.
"""

import random
from collections.abc import Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from hpo.stacks.structure import own_state, tensors
from hpo.stacks.tensor_modules import NotStackable as NotStackable
from hpo.stacks.tensor_modules import has_dropout, masks_of_a_step, tensor_dropout
from hpo.stacks.trying import Trying
from hpo.study.data import Split, batch_sizes
from hpo.study.objective import Objective, Params
from hpo.training.evaluation import in_full
from hpo.training.kinds import PLAIN
from hpo.training.memory import is_out_of_memory
from hpo.training.stack import Member, Precision, Task
from hpo.training.torch_settings import has_drawn, random_states, set_random_states

Rounding = Literal["float64", "float32", "tf32", "bf16"]
"""How sums are rounded: the `Precision` of a task, but for networks in double precision, which none of them changes."""
_TOLERANCES: Mapping[Rounding, float] = {"float64": 1e-9, "float32": 1e-4, "tf32": 1e-2, "bf16": 5e-2}
"""How much outputs in a stack may differ from those alone: other kernels round otherwise, at the most by so much."""
_STEP_TOLERANCES: Mapping[Rounding, float] = {"float64": 1e-9, "float32": 3e-4, "tf32": 5e-2, "bf16": 0.5}
"""How much the gradients of a step may differ, as a share of the largest number in each."""
_OF_ALL: Mapping[Rounding, float] = {"float64": 1e-12, "float32": 2e-5, "tf32": 1e-2, "bf16": 0.5}
"""How much they may differ beside, as a share of the largest number in all: a small one may be a difference of large
ones, and be nothing but what they are rounded by, as the gradient of a bias before BatchNorm is."""
OUTSIDE = "its forward or loss changes what is neither a weight nor a buffer"
NOT_ALONE = "its outputs in a stack are not those alone"


@dataclass(frozen=True, kw_only=True, eq=False)
class Alone:
    """What a network's first step gives, by its own names."""

    gradients: Mapping[str, Tensor]
    untrained: frozenset[str]
    """The weights on which the loss does not depend: torch.optim leaves them as they are, without weight decay too."""
    buffers: Mapping[str, Tensor]
    is_random: bool
    """Whether it draws from torch's generators but for dropout, so that another time it gives something else."""
    draws: bool
    """Whether it draws random numbers at all: those, or dropout's, of layers or of functions."""

    def is_like(self, got: Mapping[str, Tensor], rounding: Rounding) -> bool:
        """Whether `got`, gradients and buffers in a stack, are these."""
        for expected, least in ((self.gradients, 0.0), (self.buffers, 1.0)):
            there = {name: each for name, each in expected.items() if name in got or expected is self.gradients}
            most = max(least, _largest(there.values()))
            for name, each in there.items():
                bound = _STEP_TOLERANCES[rounding] * _largest([each]) + _OF_ALL[rounding] * most
                if not _close(got[name], each, min(bound, _STEP_TOLERANCES[rounding] * most)):
                    return False
        return True


def step_alone(task: Task, module: nn.Module, params: Params, example: Split) -> Alone:
    """Return what `module` gives in training on `example`, and leave it as it is.

    Raises NotStackable for what a stack would not do as the network does it, TrialError as `Task.guarding` does.
    """
    weights = {name: w for name, w in module.named_parameters() if w.requires_grad}
    types = {str(w.dtype).removeprefix("torch.") for w in weights.values()}
    if types not in ({"float32"}, {"float64"}):
        raise NotStackable(f"its weights are {' and '.join(sorted(types))}, not all float32 or all float64")
    if any(w._backward_hooks or w._post_accumulate_grad_hooks for w in weights.values()):
        raise NotStackable("a hook changes the gradients of its weights")
    before = {name: tensor.detach().clone() for name, tensor in tensors(module).items()}
    trained = _trained(module)
    outside, drawn = _outside(task, module), random_states(task.device)
    with task.guarding(), Trying() as trying:
        with task.autocast(), masks_of_a_step():
            outputs = module.train()(*example.inputs.values())
        loss = task.objective.loss(in_full(outputs), example.targets, params)
    if trying.lists:
        raise NotStackable("it makes Python's numbers of a batch, which would be the first batch's in each step")
    if trying.counts:
        raise NotStackable("its forward or loss asks how many rows a mask picks, and may do something else by that")
    _require_as_trained(module, trained)
    found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
    is_random = has_drawn(drawn, task.device)
    if trying.draws_itself or (trying.draws and not is_random):
        raise NotStackable("it draws random numbers by a seed or generator of its own, which a stack would not draw")
    if _outside(task, module) != outside:
        raise NotStackable(OUTSIDE)
    require_layout(module, before)
    buffers = {name: buffer.detach().clone() for name, buffer in module.named_buffers()}
    _restore(module, before)
    return Alone(
        gradients={name: g for name, g in zip(weights, found, strict=True) if g is not None},
        untrained=frozenset(name for name, g in zip(weights, found, strict=True) if g is None),
        buffers=buffers,
        is_random=is_random,
        draws=is_random or trying.drops or has_dropout(module),
    )


@contextmanager
def evaluating(task: Task, module: nn.Module) -> Iterator[None]:
    """Within this `module` is evaluated, which is to leave it as it is: in a stack, what it assigns there is dropped.

    Raises NotStackable.
    """
    before = {name: tensor.detach().clone() for name, tensor in tensors(module).items()}
    trained, drawn = _trained(module), random_states(task.device)
    yield
    _require_as_trained(module, trained)
    if has_drawn(drawn, task.device):
        raise NotStackable("its forward draws random numbers in evaluation")
    after = tensors(module)
    names = [name for name in {**before, **after} if not _unchanged(before.get(name), after.get(name))]
    if names:
        weights = dict(module.named_parameters()).keys() & set(names)
        changed = "weights" if weights else "buffers"
        raise NotStackable(f"its forward changes {changed} in evaluation ({', '.join(names[:3])})")


def _trained(module: nn.Module) -> Mapping[str, bool]:
    return {name: w.requires_grad for name, w in module.named_parameters()}


def _require_as_trained(module: nn.Module, before: Mapping[str, bool]) -> None:
    names = [name for name, is_trained in _trained(module).items() if before.get(name, is_trained) != is_trained]
    if names:
        raise NotStackable(f"its forward changes which weights are trained ({', '.join(names[:3])})")


def _unchanged(before: Tensor | None, after: Tensor | None) -> bool:
    if before is None or after is None or before.dtype != after.dtype or before.shape != after.shape:
        return False
    return bool(((before == after) | ((before != before) & (after != after))).all())  # no number is not equal to itself


_of_rows: WeakKeyDictionary[Objective, dict[Hashable, str | None]] = WeakKeyDictionary()
"""What `why_rows_matter` has found, by an objective, a structure and a batch size: steps of large networks are slow."""


def why_rows_matter(task: Task, member: Member, structure: Hashable, example: Split) -> str | None:
    """Return why a stack cannot take `member`, if the number of rows decides on which weights its loss depends.

    It is tried with as many as the epoch's batches have: the `example` again and again. What fails on such rows may not
    on others, so that nothing is known then. Of one `structure` it is tried once. Raises NotStackable, and where memory
    runs out.
    """
    try:
        known = _of_rows.setdefault(task.objective, {})
    except TypeError:  # an objective that is a dataclass, say, has no hash
        known = {}
    key = structure, member.params["batch_size"], task.n_rows, task.device
    if key not in known:
        known[key] = _why_rows_matter(task, member, example)
    return known[key]


def _why_rows_matter(task: Task, member: Member, example: Split) -> str | None:
    sizes = {len(example), *batch_sizes(task.n_rows, int(member.params["batch_size"]))}
    generators = random_states(task.device)
    try:
        module = tensor_dropout(task.drawn(member)).to(task.device)
        several = [step_alone(task, module, member.params, _rows(example, n)).untrained for n in sorted(sizes)]
    except NotStackable:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return None
    finally:
        set_random_states(generators, task.device)
    some = sorted(frozenset.union(*several) - frozenset.intersection(*several))
    return f"the number of rows decides whether the loss depends on {', '.join(some[:3])}" if some else None


def _rows(example: Split, n: int) -> Split:
    numbers = torch.arange(n, device=example.targets.device) % len(example)
    return Split(inputs={name: x[numbers] for name, x in example.inputs.items()}, targets=example.targets[numbers])


def _outside(task: Task, module: nn.Module) -> Hashable:
    """Return what a step must leave as it is, since in a stack it is done once for all members, or never again.

    That is what the network holds outside of tensors, Python's and NumPy's random numbers, and what the objective
    itself counts.
    """
    numpys = np.random.get_state(legacy=False)["state"]
    counted = tuple((key, repr(each)) for key, each in vars(task.objective).items() if isinstance(each, PLAIN))
    return own_state(module), random.getstate(), numpys["key"].tobytes(), numpys["pos"], counted


def require_layout(module: nn.Module, before: Mapping[str, Tensor]) -> None:
    """Raise NotStackable where a network's tensors have not the names, shapes and dtypes of those `before`."""
    if _layout(tensors(module)) != _layout(before):
        raise NotStackable("its forward changes the shape of a buffer, or which buffers there are")


def _layout(several: Mapping[str, Tensor]) -> Mapping[str, Any]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in several.items()}


@torch.no_grad()
def _restore(module: nn.Module, before: Mapping[str, Tensor]) -> None:
    for name, weight in module.named_parameters():
        weight.copy_(before[name])
    for name, _ in list(module.named_buffers()):
        path, _, last = name.rpartition(".")
        setattr(module.get_submodule(path), last, before[name])


def rounding_of(module: nn.Module, precision: Precision) -> Rounding:
    """Return how the sums of a network are rounded."""
    return "float64" if all(w.dtype == torch.float64 for w in module.parameters()) else precision


def unlike(got: Any, alone: Any, rounding: Rounding) -> str | None:
    """Return why outputs in a stack are not those that the network gives alone; None: they are."""
    several, expected_ones = tree_leaves(got), tree_leaves(alone)
    if len(several) != len(expected_ones):
        return NOT_ALONE
    most = max(1.0, _largest(expected_ones))
    for one, expected in zip(several, expected_ones, strict=True):
        if expected.numel() and not torch.isfinite(expected).any():
            return "its outputs are no numbers where it is tried"
        is_single = rounding == "float64" and expected.dtype != torch.float64
        how: Rounding = "float32" if is_single else rounding
        bound = _TOLERANCES[how] * _largest([expected]) + _OF_ALL[how] * most
        if not _close(one, expected, min(bound, _TOLERANCES[how] * max(1.0, _largest([expected])))):
            return NOT_ALONE
    return None


def is_other(got: Tensor, alone: Tensor, rounding: Rounding) -> bool:
    """Whether a loss in a stack is not the one that the network has alone; both may be no numbers."""
    if bool(torch.isfinite(got)) != bool(torch.isfinite(alone)):
        return True
    return not _close(got, alone, _TOLERANCES[rounding] * max(1.0, _largest([alone])))


def _is_rounded(x: Tensor) -> bool:
    """Whether it has fractions; integers and masks have none, and cannot be subtracted: unsigned ones wrap around."""
    return x.is_floating_point() or x.is_complex()


def _close(got: Tensor, expected: Tensor, most: float) -> bool:
    """Whether two tensors differ by at most so much, wherever what is expected is a number; integers by nothing."""
    if not (_is_rounded(got) and _is_rounded(expected)):
        return got.dtype == expected.dtype and torch.equal(got, expected)
    if got.shape != expected.shape:
        return False
    numbers = torch.isfinite(expected)
    return bool(((got - expected)[numbers].abs() <= most).all())


def _largest(several: Iterable[Tensor]) -> float:
    """Return the largest number in some tensors, integers left out."""
    numbers = [each[torch.isfinite(each)] for each in several if _is_rounded(each)]
    return max((some.abs().max().item() for some in numbers if some.numel()), default=0.0)
