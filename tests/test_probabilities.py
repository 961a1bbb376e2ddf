"""Metrics are given probabilities, also where all logits of an epoch happen to lie between 0 and 1."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.classification import (
    BinaryAccuracy,
    BinaryAUROC,
    MulticlassAccuracy,
    MulticlassAUROC,
    MulticlassCalibrationError,
    MultilabelF1Score,
)
from torchmetrics.regression import MeanSquaredError

from hpo.study.objective import Objective
from hpo.study.probabilities import Taken
from hpo.training.evaluation import measure
from hpo.training.metrics import Measuring
from tests.stacking import CPU, INFO, Toy

LOGITS = torch.tensor([[0.1], [0.4], [0.6], [0.2], [0.9], [0.3]])
LABELS = torch.tensor([[1.0], [0.0], [1.0], [1.0], [0.0], [1.0]])
OF_CLASSES = torch.tensor([[0.1, 0.9, 0.5], [0.8, 0.9, 0.9], [0.2, 0.1, 0.3], [0.3, 0.3, 0.4]])


class Squeezed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(x).reshape(len(x), -1)


class Halves(nn.Module):
    """What this gives is no probability of each prediction, so it is not what a metric is given."""

    def __init__(self, gives: str) -> None:
        super().__init__()
        self.gives = gives

    def forward(self, x: Tensor) -> Tensor:
        given = {"labels": (x > 0).float(), "ints": (x > 0).long(), "amounts": x * 100, "shape": x.reshape(-1)}
        return given[self.gives]


class Judged(Toy):
    def __init__(self, head: nn.Module, loss: str = "logits") -> None:
        super().__init__()
        self._head, self._loss = head, loss

    def head(self) -> nn.Module:
        return self._head

    def loss(self, outputs, targets, params):
        first = outputs[0] if isinstance(outputs, tuple) else outputs
        if self._loss == "logits":
            return F.binary_cross_entropy_with_logits(first.squeeze(-1), targets.squeeze(-1))
        if self._loss == "by hand":
            return F.binary_cross_entropy(first.sigmoid(), targets)
        if self._loss == "classes by hand":
            return F.nll_loss(first.log_softmax(1), targets)
        if self._loss == "classes":
            return F.cross_entropy(input=first, target=targets)
        if self._loss == "of another":
            return F.binary_cross_entropy(first, targets) + F.binary_cross_entropy_with_logits(outputs[1], targets)
        return F.binary_cross_entropy(first, targets)

    def metrics(self):
        return {"m": BinaryAccuracy()}


@pytest.mark.parametrize(
    ("objective", "params", "is_logits"),
    [
        (Judged(nn.Sigmoid()), {}, True),
        (Judged(nn.Sequential(nn.Sigmoid())), {}, True),
        (Judged(Squeezed()), {}, True),
        (Judged(nn.Identity()), {}, True),
        (Judged(nn.Identity(), "by hand"), {}, True),
        *((Judged(Halves(gives)), {}, True) for gives in ("labels", "ints", "amounts")),
        (Judged(nn.Identity(), "probabilities"), {"loss": "bce"}, False),
        (Judged(nn.Identity(), "of another"), {}, False),
        *((Judged(Halves(gives), "probabilities"), {}, False) for gives in ("labels", "ints", "amounts", "shape")),
    ],
)
def test_logits_between_0_and_1_are_no_probabilities(objective: Objective, params, is_logits: bool) -> None:
    outputs = (LOGITS, LOGITS - 3) if isinstance(objective, Judged) and objective._loss == "of another" else LOGITS
    expected = BinaryAccuracy()(LOGITS.sigmoid() if is_logits else LOGITS, LABELS)
    assert BinaryAccuracy()(LOGITS, LABELS) != BinaryAccuracy()(LOGITS.sigmoid(), LABELS)
    assert measure(objective, outputs, LABELS, params, objective.metrics())["m"] == expected
    several = tuple(torch.stack([x, x - 5]) for x in outputs) if isinstance(outputs, tuple) else None
    stacked = torch.stack([LOGITS, LOGITS - 5]) if several is None else several
    if objective._loss != "probabilities" and objective._loss != "of another":
        both = Measuring(objective, CPU)(stacked, LABELS, [params, params], {}, params)
        assert both[0]["m"] == expected
        assert both[1]["m"] == BinaryAccuracy()(LOGITS - 5, LABELS)


def test_only_metrics_that_guess_are_given_probabilities() -> None:
    two = Taken(Judged(nn.Sigmoid()), LOGITS, LABELS, {})
    for metric in (BinaryAUROC(), MultilabelF1Score(3)):
        assert torch.equal(two.by(metric), LOGITS.sigmoid())
    several = Taken(Judged(nn.Identity(), "classes"), OF_CLASSES, torch.tensor([0, 1, 2, 0]), {})
    for metric in (MulticlassAUROC(3), MulticlassCalibrationError(3)):
        assert torch.equal(several.by(metric), OF_CLASSES.softmax(1))
        by_hand = Taken(Judged(nn.Identity(), "classes by hand"), OF_CLASSES, torch.tensor([0, 1, 2, 0]), {})
        assert torch.equal(by_hand.by(metric), OF_CLASSES.softmax(1))
    for metric in (MulticlassAccuracy(3), MeanSquaredError()):  # the most probable class is the same
        assert several.by(metric) is OF_CLASSES


class Cooler(nn.Sigmoid):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(x / 4)


class Flat(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(x).reshape(-1)


def test_what_the_head_makes_is_given_in_the_predictions_shape() -> None:
    for head, expected in ((Cooler(), (LOGITS / 4).sigmoid()), (Flat(), LOGITS.sigmoid())):
        assert torch.equal(Taken(Judged(head, "probabilities"), LOGITS, LABELS, {}).by(BinaryAUROC()), expected)


@pytest.mark.parametrize("loss", ["bce", "cross_entropy", "nll"])
@pytest.mark.parametrize("weights", ["none", "balanced"])
def test_a_loss_by_name_takes_logits(loss: str, weights: str) -> None:
    class Named(Toy):
        loss = Objective.loss

        def metrics(self):
            return {}

    of_two = loss == "bce"
    outputs, targets = (LOGITS, LABELS) if of_two else (OF_CLASSES, torch.tensor([0, 1, 2, 0]))
    named = Named()
    n = 2 if of_two else 3
    named.info = replace(INFO, class_names=("a", "b", "c")[:n], class_counts=(2, 4, 2)[:n])
    taken = Taken(named, outputs, targets, {"loss": loss, "class_weights": weights})
    expected = outputs.sigmoid() if of_two else outputs.softmax(1)
    assert torch.equal(taken.by(BinaryAUROC() if of_two else MulticlassAUROC(3)), expected)


def test_an_own_metric_is_given_what_the_network_gives_if_it_has_an_update_of_its_own() -> None:
    class Mine(BinaryAccuracy):
        pass

    class Own(BinaryAccuracy):
        def update(self, preds: Tensor, target: Tensor) -> None:
            super().update(preds.sigmoid(), target)

    taken = Taken(Judged(nn.Sigmoid()), LOGITS, LABELS, {})
    for metric in (Mine(), 1 - BinaryAccuracy()):
        assert torch.equal(taken.by(metric), LOGITS.sigmoid())
    for metric in (Own(), 1 - MeanSquaredError()):
        assert taken.by(metric) is LOGITS
