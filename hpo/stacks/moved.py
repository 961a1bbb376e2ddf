"""Weights that show what padding does to a network: those that it begins with may hide it, and training finds others.

The largest of some outputs, the sum of their exponentials, a group of channels: with zeros beside them these are others
as soon as all outputs are negative, say. So each padded form of a network is also compared with its biases far up and
far down, its weights negated, and all rows of a weight alike.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from hpo.stacks.candidate import Candidate
from hpo.study.data import Split
from hpo.training.evaluation import in_full
from hpo.training.memory import is_out_of_memory
from hpo.training.stack import Task

_FAR = 3.0


def _shifted(by: float) -> Callable[[Tensor], Tensor]:
    return lambda w: w + by if w.ndim < 2 else w


def _alike(w: Tensor) -> Tensor:
    return w if w.ndim < 2 else w.mean(0, keepdim=True) * w.shape[0] ** 0.5 + 0.01 * w


_MOVES: Sequence[Callable[[Tensor], Tensor]] = (
    _shifted(-_FAR),
    _shifted(_FAR),
    lambda w: -w if w.ndim > 1 else w,
    _alike,
    lambda w: -_alike(w),
)


def outputs_when_moved(task: Task, candidates: Mapping[int, Candidate], example: Split) -> Iterator[dict[int, Any]]:
    """Move the weights of the probes of `candidates`, in one way after another, and yield what each gives alone then.

    A network that fails there, or gives no numbers, is left out. In the end the probes have the weights that they had,
    of which their `outputs` are: they are compared again in another stack.
    """
    began = {slot: [w.detach().clone() for w in each.probe.module.parameters()] for slot, each in candidates.items()}

    def set_weights(slot: int, move: Callable[[Tensor], Tensor]) -> nn.Module:
        module = candidates[slot].probe.module
        with torch.no_grad():
            for weight, first in zip(module.parameters(), began[slot], strict=True):
                weight.copy_(move(first))
        return module

    try:
        for move in _MOVES:
            made = {slot: _outputs(task, set_weights(slot, move), example) for slot in candidates}
            yield {slot: outputs for slot, outputs in made.items() if outputs is not None}
    finally:
        for slot in candidates:
            set_weights(slot, lambda w: w)


def _outputs(task: Task, module: nn.Module, example: Split) -> Any:
    """Return what `module` gives, evaluated; None where that is no numbers, or fails."""
    was_training = module.training
    try:
        with torch.no_grad(), task.autocast():
            made = in_full(module.eval()(*(x.clone() for x in example.inputs.values())))
    except Exception as error:  # user's code, with weights that are none of its own
        if is_out_of_memory(error):
            raise
        return None
    finally:
        module.train(was_training)
    return made if all(torch.isfinite(x).all() for x in tree_leaves(made)) else None
