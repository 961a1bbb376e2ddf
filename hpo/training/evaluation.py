"""Loss and metrics of one network over a whole split.

Never a mean of batches' own metrics: the RMSE of a set is not the mean of its batches' RMSEs.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from hpo.study.data import LOSS_OR_METRIC, require_unchanged, versions
from hpo.study.objective import Objective, Params
from hpo.study.probabilities import Taken
from hpo.training.batches import Batches
from hpo.training.memory import free_if_cuda, is_out_of_memory
from hpo.training.stack import Task

EVALUATION_ROWS = 8192
"""How many rows go through a network at once where no gradient is kept; metrics are of all rows all the same."""
_FEWEST_ROWS = 32
"""Where memory has no room for so many, it has none for training either."""


def in_full(outputs: Any) -> Any:
    """Return outputs that autocast left in bfloat16 in float32: losses and metrics are not to be rounded."""
    return tree_map(lambda x: x.float() if x.dtype == torch.bfloat16 else x, outputs)


def joined(parts: Sequence[Any], dim: int = 0) -> Any:
    """Return the outputs of several batches as one."""
    return tree_map(lambda *tensors: torch.cat(tensors, dim), *parts) if len(parts) > 1 else parts[0]


def in_pieces(
    forward: Callable[[Sequence[Tensor]], Any], batches: Batches, rows: int, fewest: int
) -> tuple[list[Any], int]:
    """Return what `forward` gives for all rows of `batches`, piece by piece, and how many rows a piece has.

    That is `rows`, or half as many as often as memory runs out, down to `fewest`: nothing was trained meanwhile. An
    evaluation may need more memory at once than a step, whose batch is smaller.
    """
    while True:
        try:
            return [forward(inputs) for inputs, _ in batches.chunks(rows)], rows
        except (RuntimeError, MemoryError) as error:
            if rows <= fewest or not is_out_of_memory(error):
                raise
        # the error is gone by now, and with it the tensors that its traceback held
        rows = max(fewest, min(rows, len(batches)) // 2)
        free_if_cuda(batches.targets.device)


@torch.no_grad()
def evaluate(
    task: Task, module: nn.Module, batches: Batches, params: Params, metrics: Mapping[str, Any]
) -> dict[str, float]:
    """Return `module`'s `loss` and `metrics` over all rows of `batches`; the module is left in evaluation mode."""
    with task.guarding():
        return measure(task.objective, outputs_of(task, module, batches), batches.targets, params, metrics)


@torch.no_grad()
def outputs_of(task: Task, module: nn.Module, batches: Batches) -> Any:
    """Return what `module` gives for all rows of `batches`, (N, ...), in float32; it is left in evaluation mode."""
    module.eval()
    with task.autocast():
        parts, _ = in_pieces(lambda inputs: module(*inputs), batches, EVALUATION_ROWS, _FEWEST_ROWS)
    return in_full(joined(parts))


def measure(
    objective: Objective, outputs: Any, targets: Tensor, params: Params, metrics: Mapping[str, Any]
) -> dict[str, float]:
    """Return the `loss` and the metrics of `outputs` (N, ...) against `targets`."""
    before = versions({"targets": targets})
    result = {} if objective.train is not None else {"loss": float(objective.loss(outputs, targets, params))}
    taken = Taken(objective, outputs, targets, params)
    for name, metric in metrics.items():
        metric.reset()
        metric.update(taken.by(metric), targets)
        result[name] = float(metric.compute())
    require_unchanged({"targets": targets}, before, LOSS_OR_METRIC)
    return result
