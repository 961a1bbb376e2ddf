"""Losses by name against torch's own functions; weights of classes; what is wrong with their params."""

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight
from torch.func import vmap
from torch.nn import functional as F

from hpo.study import losses

COUNTS = (10, 30, 60)
CLASSES = torch.tensor([0, 1, 1, 2, 2, 2])
LOGITS = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
BINARY = torch.tensor([[0.0], [1.0], [1.0], [0.0]])
SCORES = torch.randn(4, 1, generator=torch.Generator().manual_seed(1))


def loss(name, outputs, targets, counts=COUNTS, **params):
    return losses.BY_NAME[name](outputs, targets, params, counts)


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("l1", F.l1_loss),
        ("mse", F.mse_loss),
        ("smooth_l1", F.smooth_l1_loss),
        ("huber", F.huber_loss),
        ("bce", F.binary_cross_entropy_with_logits),
    ],
)
def test_those_of_numbers_are_torchs(name, function):
    torch.testing.assert_close(loss(name, SCORES, BINARY), function(SCORES, BINARY))


def test_quartic_is_the_mean_fourth_power_of_the_error():
    assert loss("quartic", torch.tensor([1.0, 3.0]), torch.tensor([0.0, 1.0])).item() == (1 + 16) / 2


def test_cross_entropy_and_nll_take_logits():
    torch.testing.assert_close(loss("cross_entropy", LOGITS, CLASSES), F.cross_entropy(LOGITS, CLASSES))
    expected = F.nll_loss(torch.log_softmax(LOGITS, -1), CLASSES)
    torch.testing.assert_close(loss("nll", LOGITS, CLASSES), expected)


@pytest.mark.parametrize("smoothing", [0.0, 0.2, torch.tensor(0.2)])
@pytest.mark.parametrize("weighting", ["none", "balanced", 0.5])
def test_cross_entropy_with_smoothing_and_weights_is_torchs(smoothing, weighting):
    weights = losses.class_weights(weighting, COUNTS, LOGITS)
    expected = F.cross_entropy(LOGITS, CLASSES, weights, label_smoothing=float(smoothing))
    torch.testing.assert_close(
        loss("cross_entropy", LOGITS, CLASSES, label_smoothing=smoothing, class_weights=weighting), expected
    )


SHAPES = {"rows": (6,), "places": (6, 3), "pixels": (4, 3, 5), "one row": ()}


@pytest.mark.parametrize("name", ["cross_entropy", "nll"])
@pytest.mark.parametrize("targets", ["classes", "some left out", "probabilities"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2, torch.tensor(0.2)])
@pytest.mark.parametrize("weighting", ["none", "balanced"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_whatever_the_shape_of_the_targets_it_is_torchs(name, targets, smoothing, weighting, shape):
    """With as many places as classes too, where the last dimension would do as well."""
    torch.manual_seed(2)
    classes = torch.randint(0, 3, shape)
    if targets == "some left out" and shape:
        classes.view(-1)[::4] = -100
    logits = torch.randn(*shape[:1], 3, *shape[1:])
    if targets == "probabilities":
        classes = torch.randn_like(logits).softmax(min(1, logits.ndim - 1))
    weights = losses.class_weights(weighting, COUNTS, logits)
    expected = F.cross_entropy(logits, classes, weights, label_smoothing=float(smoothing))
    torch.testing.assert_close(
        loss(name, logits, classes, label_smoothing=smoothing, class_weights=weighting), expected
    )


def test_members_of_a_stack_have_weights_and_smoothing_of_their_own_at_every_place():
    torch.manual_seed(3)
    logits_KBCL, classes_BL = torch.randn(4, 6, 3, 3), torch.randint(0, 3, (6, 3))
    powers_K, smoothings_K = torch.rand(4), torch.rand(4) / 2

    def of_a_member(logits_BCL, power, smoothing):
        params = {"label_smoothing": smoothing, "class_weights": power}
        return losses.BY_NAME["cross_entropy"](logits_BCL, classes_BL, params, COUNTS)

    found_K = torch.func.vmap(of_a_member)(logits_KBCL, powers_K, smoothings_K)
    for logits_BCL, power, smoothing, found in zip(logits_KBCL, powers_K, smoothings_K, found_K, strict=True):
        weights = losses.class_weights(power.item(), COUNTS, logits_BCL)
        expected = F.cross_entropy(logits_BCL, classes_BL, weights, label_smoothing=smoothing.item())
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("logits", "targets", "message"),
    [
        (
            (6, 3, 5),
            (6, 3),
            r"3 classes along dimension 1, so .+ classes must have the shape \(6, 5\), but got \(6, 3\)$",
        ),
        ((6, 3), (6, 1), r"must have the shape \(6,\), but got \(6, 1\)$"),
        (
            (6, 5, 3),
            (6, 3),
            r"^class_weights: the data names 3 classes, but outputs \(6, 5, 3\) have 5 along dimension 1$",
        ),
    ],
)
def test_shapes_that_fit_no_classes_are_said(logits, targets, message):
    with pytest.raises(ValueError, match=message):
        loss("cross_entropy", torch.randn(logits), torch.zeros(targets).long(), class_weights="balanced")
    with pytest.raises(ValueError, match=r"probabilities \(they are no whole numbers\) must have the shape \(6, 3\)"):
        loss("cross_entropy", LOGITS, torch.zeros(6), class_weights="balanced")


def test_binary_weights_are_those_of_each_rows_class():
    balanced = loss("bce", SCORES, BINARY, (30, 10), class_weights="balanced")
    each = F.binary_cross_entropy_with_logits(SCORES, BINARY, reduction="none")
    weights = torch.where(BINARY > 0, 2.0, 2 / 3)  # rows / (classes * rows of the class)
    torch.testing.assert_close(balanced, (weights * each).sum() / weights.sum())


def test_binary_smoothing_moves_both_targets_towards_the_middle():
    expected = F.binary_cross_entropy_with_logits(SCORES, BINARY * 0.8 + 0.1)
    torch.testing.assert_close(loss("bce", SCORES, BINARY, label_smoothing=0.2), expected)


def test_balanced_weights_are_scikit_learns_and_a_number_lies_between():
    labels = torch.repeat_interleave(torch.arange(3), torch.tensor(COUNTS)).numpy()
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels)
    balanced, one, zero = (losses.class_weights(v, COUNTS, LOGITS) for v in ("balanced", 1.0, 0.0))
    torch.testing.assert_close(balanced, torch.tensor(expected, dtype=torch.float32))
    torch.testing.assert_close(one, balanced)
    torch.testing.assert_close(zero, torch.ones(3))
    half = losses.class_weights(0.5, COUNTS, LOGITS)
    assert 1 < half[0] < balanced[0]
    assert float((half * torch.tensor(COUNTS)).sum()) == pytest.approx(sum(COUNTS))


def test_shapes_that_would_be_broadcast_are_refused():
    with pytest.raises(ValueError, match=r"outputs \(4, 1\) and targets \(4,\) must have the same shape"):
        loss("mse", SCORES, BINARY.ravel())


def test_faults_name_the_rule():
    found = losses.faults({"label_smoothing": [0.1, 1.0], "class_weights": ["balanced", "even", 2]})
    assert [fault.message for fault in found] == [
        "must be a number in [0, 1), but got 1.0",
        "must be none, balanced, or a number from 0 (none) to 1 (balanced), but got 'even'",
        "must be none, balanced, or a number from 0 (none) to 1 (balanced), but got 2",
    ]


def test_on_a_device_of_its_own_the_weights_of_classes_are_made_once(monkeypatch):
    """A tensor of numbers is copied there from memory that is not pinned: each loss would wait for the GPU."""
    monkeypatch.setattr(losses, "_counted", {})
    far = torch.zeros(3, device="meta")

    def weights(like):
        return losses.class_weights("balanced", COUNTS, like)

    with torch.inference_mode():
        weights(far)
    weights(torch.zeros(3))
    assert not losses._counted, "what was made in inference mode is of no use after it"
    weights(far)
    monkeypatch.setattr(torch, "tensor", None)
    weights(far)
    vmap(weights)(torch.zeros(2, 3, device="meta"))
