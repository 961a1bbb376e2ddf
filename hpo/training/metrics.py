"""Loss and metrics of all members of a stack at once, without a loop over them where a metric allows it.

A regression metric takes the members as its outputs, one column each. Other TorchMetrics objects are plain functions of
outputs and targets once they are reset, updated and computed in one go, and torch.func may batch those. Which of the
two a metric allows, if any, is tried the first time, against what it gives member by member; after that it is known.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap
from torch.utils._pytree import tree_map

from hpo.light import Metric
from hpo.study.data import LOSS_OR_METRIC, prediction, require_unchanged, versions
from hpo.study.objective import Objective, Params
from hpo.study.probabilities import Making, Taken
from hpo.training.loss_params import SharedParams, as_pythons

MetricFunction = Callable[[Metric, Tensor, Tensor], Tensor]
"""Takes a metric, the members' predictions (K, N, ...) and the targets (N, ...); returns K values."""


class Measuring:
    """Measures the outputs of K members against the same targets."""

    def __init__(self, objective: Objective, device: torch.device) -> None:
        self._objective = objective
        self._metrics = {name: metric.to(device) for name, metric in objective.metrics().items()}
        self._functions: dict[str, MetricFunction] = {}

    @torch.no_grad()
    def __call__(
        self,
        outputs: Any,
        targets: Tensor,
        params: Sequence[Params],
        numbers: Mapping[str, Tensor],
        reads: Collection[str],
    ) -> list[dict[str, float]]:
        """Return each member's `loss` and metrics. Raises InputError where they change the targets.

        `outputs` are (K, N, ...), `targets` (N, ...), `params` one per member; `numbers` are those of the params that
        the loss takes as tensors, each (K,): in the others it `reads`, all members are the same (`SharedParams`).
        """

        def loss_of(outputs: Any, numbers: Mapping[str, Tensor]) -> Tensor:
            with as_pythons(numbers):
                return self._objective.loss(outputs, targets, SharedParams(params[0], numbers, reads))

        before = versions({"targets": targets})
        columns = {"loss": vmap(loss_of, randomness="different")(outputs, dict(numbers))}
        predictions = prediction(outputs)
        taken = Taken(self._objective, tree_map(lambda x: x[0], outputs), targets, params[0])
        for name, metric in self._metrics.items():
            making = taken.making(metric)
            columns[name] = self._measured(name, metric, _made(making, predictions), targets)
        require_unchanged({"targets": targets}, before, LOSS_OR_METRIC)
        values = {name: column.tolist() for name, column in columns.items()}
        return [{name: value[k] for name, value in values.items()} for k in range(len(params))]

    def _measured(self, name: str, metric: Metric, predictions: Tensor, targets: Tensor) -> Tensor:
        if len(predictions) == 1:  # that would tell nothing about several, nor do those forms hold for one
            return _one_by_one(metric, predictions, targets)
        function = self._functions.get(name)
        if function is not None:
            return function(metric, predictions, targets)
        expected = _one_by_one(metric, predictions, targets)
        self._functions[name] = _one_by_one
        for function in (_as_columns, _batched):
            try:
                values = function(metric, predictions, targets)
            except Exception:  # a metric that does not allow it says so in many ways
                continue
            if values.shape == expected.shape and torch.allclose(
                values.to(expected.dtype), expected, rtol=1e-4, atol=1e-6, equal_nan=True
            ):
                self._functions[name] = function
                break
        return expected


def _made(making: Making | None, predictions: Tensor) -> Tensor:
    """Return the members' predictions (K, N, ...) as a metric takes them; a head may go by their dimensions."""
    if making is None or making is torch.sigmoid:
        return predictions if making is None else making(predictions)
    return torch.stack([making(each) for each in predictions])


def _one_by_one(metric: Metric, predictions: Tensor, targets: Tensor) -> Tensor:
    return torch.stack([torch.as_tensor(_value(metric, each, targets)).reshape(()) for each in predictions])


def _value(metric: Metric, predictions: Tensor, targets: Tensor) -> Tensor:
    metric.reset()
    return _updated(metric, predictions, targets)


def _updated(metric: Metric, predictions: Tensor, targets: Tensor) -> Tensor:
    metric.update(predictions, targets)
    value: Tensor = metric.compute()
    return value


def _as_columns(metric: Metric, predictions: Tensor, targets: Tensor) -> Tensor:
    """Measure one column of predictions a member, as the metric's several outputs."""
    k, n = predictions.shape[:2]
    if not (hasattr(metric, "num_outputs") or hasattr(metric, "multioutput")) or predictions[0].numel() != n:
        raise TypeError("it is no metric of several outputs")
    metric = deepcopy(metric)
    if hasattr(metric, "multioutput"):
        metric.multioutput = "raw_values"
    if hasattr(metric, "num_outputs"):
        metric.num_outputs = k
    metric._defaults = tree_map(  # sums become one a column; counts of rows stay one number
        lambda state: state.reshape(-1)[:1].expand(k).clone() if state.is_floating_point() else state, metric._defaults
    )
    return _value(metric, predictions.reshape(k, n).T, targets.reshape(n, 1).expand(n, k)).reshape(k)


def _batched(metric: Metric, predictions: Tensor, targets: Tensor) -> Tensor:
    metric = deepcopy(metric)
    if hasattr(metric, "validate_args"):
        metric.validate_args = False  # its checks look at values; the first time, one by one, they were made

    def value(predictions: Tensor) -> Tensor:
        metric.reset()
        zero = torch.zeros_like(predictions.flatten()[0])
        for name in metric._defaults:  # states that are added to in place must be batched from the beginning
            setattr(metric, name, getattr(metric, name) + zero.to(getattr(metric, name).dtype))
        return _updated(metric, predictions, targets)

    values: Tensor = vmap(value)(predictions)
    return values
