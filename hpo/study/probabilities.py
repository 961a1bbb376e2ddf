"""Predictions as TorchMetrics' classification takes them: probabilities, where a network gives logits.

TorchMetrics takes logits for probabilities wherever all of them happen to lie between 0 and 1, as they do early in
training: a metric would then be of something else in one epoch than in the next. What is a probability, an objective's
`head` says, which the exported model ends in; without a head its loss does, where that takes logits.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from hpo.light import Metric
from hpo.study.data import prediction
from hpo.study.objective import Objective, Params

Making = Callable[[Tensor], Tensor]
"""Makes probabilities of one network's predictions (N, ...), of the same shape."""
_OF_LABELS = ("Binary", "Multilabel")
_OF_VALUES = frozenset({"MulticlassPrecisionRecallCurve", "MulticlassCalibrationError", "MulticlassHingeLoss"})
"""Metrics of classes, with those derived from them, that read more than which class is the most probable."""
TAKES_LOGITS: Mapping[Any, str] = {
    F.cross_entropy: "cross_entropy",
    F.binary_cross_entropy_with_logits: "binary_cross_entropy_with_logits",
}


class LogitsSeen(TorchFunctionMode):
    """Notes which functions that take logits are called, and with what."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, Any]] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if name := TAKES_LOGITS.get(func):
            self.calls.append((name, args[0] if args else kwargs.get("input")))
        return func(*args, **kwargs)


def takes_probabilities(metric: Any) -> bool:
    """Whether `metric` is TorchMetrics' own, takes probabilities or logits, and tells which by their range."""
    cls = type(metric)
    if not cls.__module__.startswith("torchmetrics."):
        return False
    return cls.__name__.startswith(_OF_LABELS) or not _OF_VALUES.isdisjoint(each.__name__ for each in cls.__mro__)


class Taken:
    """One network's outputs (N, ...) as each metric takes them; `params` are the network's."""

    def __init__(self, objective: Objective, outputs: Any, targets: Tensor, params: Params) -> None:
        self._objective, self._params = objective, params
        self._outputs, self._targets = outputs, targets
        self._making: list[Making | None] = []

    def by(self, metric: Metric) -> Tensor:
        """Return what `metric` is to be given."""
        predictions = prediction(self._outputs)
        making = self.making(metric)
        return predictions if making is None else making(predictions)

    def making(self, metric: Metric) -> Making | None:
        """Return what makes that of predictions; None: `metric` takes them as they are."""
        if not takes_probabilities(metric):
            return None
        if not self._making:
            self._making.append(self._found())
        return self._making[0]

    def _found(self) -> Making | None:
        head = self._objective.head()
        if isinstance(head, nn.Sigmoid):
            return torch.sigmoid
        if not isinstance(head, nn.Identity):
            return _by(head.to(prediction(self._outputs).device).eval())
        if self._objective.train is not None:
            return None
        return _LINKS.get(self._logits_loss())

    def _logits_loss(self) -> str:
        """Return the name of the function that the loss gives the predictions to as logits, if it does."""
        predictions = prediction(self._outputs)
        with LogitsSeen() as seen:
            self._objective.loss(self._outputs, self._targets, self._params)
        of_them = [name for name, given in seen.calls if _is_view(given, predictions)]
        return of_them[0] if of_them else ""


def _by(head: nn.Module) -> Making:
    """Return what makes probabilities by `head`; where it makes none, predictions stay as they are."""

    def made(predictions: Tensor) -> Tensor:
        found = head(predictions)
        if not isinstance(found, Tensor) or found.shape != predictions.shape or not found.is_floating_point():
            return predictions
        is_label = (found == 0) | (found == 1)  # of which a curve could not be made
        is_probability = ((found >= 0) & (found <= 1)).all() & ~is_label.all()
        return torch.where(is_probability, found, predictions)

    return made


def _is_view(given: Any, predictions: Tensor) -> bool:
    """Whether `given` is the predictions, of whatever shape."""
    return (
        isinstance(given, Tensor)
        and given.numel() == predictions.numel()
        and given.data_ptr() == predictions.data_ptr()
    )


def _softmax(predictions: Tensor) -> Tensor:
    return predictions.softmax(1) if predictions.ndim > 1 else predictions


_LINKS: Mapping[str, Making] = {"cross_entropy": _softmax, "binary_cross_entropy_with_logits": torch.sigmoid}
