"""Predictions as TorchMetrics' classification takes them: probabilities, where a network gives logits.

TorchMetrics takes logits for probabilities wherever all of them happen to lie between 0 and 1, as they do early in
training: a metric would then be of something else in one epoch than in the next. What is a probability, an objective's
`head` says, which the exported model ends in; else its loss does, where that takes the predictions as logits.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from hpo.light import Metric
from hpo.study.data import prediction
from hpo.study.losses import LINKS, Link
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
_LINKS: Mapping[Any, Link] = {
    F.cross_entropy: "softmax",
    F.binary_cross_entropy_with_logits: "sigmoid",
    **dict.fromkeys((torch.sigmoid, Tensor.sigmoid, F.sigmoid, F.logsigmoid), "sigmoid"),
    **dict.fromkeys((torch.softmax, Tensor.softmax, F.softmax), "softmax"),
    **dict.fromkeys((torch.log_softmax, Tensor.log_softmax, F.log_softmax), "softmax"),
}
"""What takes logits to what is no logit, and what makes probabilities of the same."""


class LogitsSeen(TorchFunctionMode):
    """Notes which functions that take logits are called, and with what."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any]] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _LINKS:
            self.calls.append((func, args[0] if args else kwargs.get("input")))
        return func(*args, **kwargs)


def takes_probabilities(metric: Any) -> bool:
    """Whether TorchMetrics' own `metric` takes probabilities or logits, and tells which by their range.

    One that has an `update` of its own is given what the network gives.
    """
    cls = type(metric)
    if cls.__name__ == "CompositionalMetric":
        return any(map(takes_probabilities, (metric.metric_a, metric.metric_b)))
    if not isinstance(metric, Metric) or not cls.update.__module__.startswith("torchmetrics."):
        return False
    names = [each.__name__ for each in cls.__mro__ if each.__module__.startswith("torchmetrics.")]
    return any(name.startswith(_OF_LABELS) for name in names) or not _OF_VALUES.isdisjoint(names)


def link_of(objective: Objective, outputs: Any, targets: Tensor, params: Params) -> Link:
    """Return what makes probabilities of `outputs` (N, ...), if the loss takes the predictions among them as logits."""
    if objective.train is not None:
        return ""
    name = params.get("loss", "")
    if getattr(objective.loss, "__func__", None) is Objective.loss and name not in objective.own_losses:
        return LINKS.get(name, "")
    predictions = prediction(outputs)
    seen = LogitsSeen()
    try:
        with torch.no_grad(), seen:
            objective.loss(outputs, targets, params)
    except Exception:  # said where it is called in earnest; what it did until then is known
        pass
    return next((_LINKS[func] for func, given in seen.calls if _is_view(given, predictions)), "")


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
        if type(head) is nn.Sigmoid:
            return torch.sigmoid
        by_loss = _MAKING[link_of(self._objective, self._outputs, self._targets, self._params)]
        if isinstance(head, nn.Identity):
            return by_loss
        return _by(head.to(prediction(self._outputs).device).eval(), by_loss)


def _by(head: nn.Module, by_loss: Making | None) -> Making:
    """Return what makes probabilities by `head`, and where it makes none, `by_loss`."""

    def made(predictions: Tensor) -> Tensor:
        found = head(predictions)
        otherwise = predictions if by_loss is None else by_loss(predictions)
        if not isinstance(found, Tensor) or found.numel() != predictions.numel() or not found.is_floating_point():
            return otherwise
        is_label = (found == 0) | (found == 1)  # of which a curve could not be made
        is_probability = ((found >= 0) & (found <= 1)).all() & ~is_label.all()
        return torch.where(is_probability, found.reshape(predictions.shape), otherwise)

    return made


def _is_view(given: Any, predictions: Tensor) -> bool:
    """Whether `given` is the predictions, of whatever shape."""
    if not isinstance(given, Tensor) or given.numel() != predictions.numel():
        return False
    return given.data_ptr() == predictions.data_ptr()


def _softmax(predictions: Tensor) -> Tensor:
    return predictions.softmax(1) if predictions.ndim > 1 else predictions


_MAKING: Mapping[Link, Making | None] = {"sigmoid": torch.sigmoid, "softmax": _softmax, "": None}
