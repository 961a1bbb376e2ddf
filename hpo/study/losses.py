"""Losses by name, whose numbers may be tensors, so that members of one stack may differ in them.

Each takes (outputs, targets, params, class_counts) and returns the mean over the batch. Networks give logits: sigmoid
and softmax belong to an objective's `head`. `label_smoothing` and `class_weights` are read by bce, cross_entropy, nll.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from hpo.errors import Fault, broken_rules, is_number

Loss = Callable[[Tensor, Tensor, Mapping[str, Any], Sequence[int]], Tensor]


def cross_entropy(
    logits: Tensor, classes: Tensor, label_smoothing: float | Tensor = 0.0, class_weights: Tensor | None = None
) -> Tensor:
    """F.cross_entropy of logits (B, C) and classes (B,); smoothing and weights (C,) may be a member's own."""
    if not isinstance(label_smoothing, Tensor) and class_weights is None:
        return F.cross_entropy(logits, classes, label_smoothing=label_smoothing)
    log_probabilities = torch.log_softmax(logits, -1)
    weights = torch.ones_like(logits[0]) if class_weights is None else class_weights
    of_rows = weights.expand_as(logits).gather(-1, classes.unsqueeze(-1))
    hit = -(of_rows * log_probabilities.gather(-1, classes.unsqueeze(-1))).sum()
    spread = -(weights * log_probabilities).sum() / logits.shape[-1]
    return ((1 - label_smoothing) * hit + label_smoothing * spread) / of_rows.sum()


def binary_cross_entropy(
    logits: Tensor, targets: Tensor, label_smoothing: float | Tensor = 0.0, class_weights: Tensor | None = None
) -> Tensor:
    """F.binary_cross_entropy_with_logits of logits and targets (0 or 1) of one shape, with `cross_entropy`'s numbers.

    `class_weights` (2,) are those of the targets 0 and 1.
    """
    smooth = targets * (1 - label_smoothing) + label_smoothing / 2
    if class_weights is None:
        return F.binary_cross_entropy_with_logits(logits, smooth)
    weights = torch.where(targets > 0.5, class_weights[..., 1], class_weights[..., 0])
    each = F.binary_cross_entropy_with_logits(logits, smooth, reduction="none")
    return (weights * each).sum() / weights.sum()


def quartic(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the mean fourth power of the error."""
    return (outputs - targets).square().square().mean()


def class_weights(value: Any, counts: Sequence[int], like: Tensor) -> Tensor | None:
    """Return the weight of each class, (C,), for the param `class_weights`: none, balanced, or a number between.

    balanced is scikit-learn's: rows / (classes * rows of the class). A number from 0 (none) to 1 (balanced) is the
    power to which a class's share goes; the mean weight of a row is 1.
    """
    if value == "none":
        return None
    if not counts:
        raise ValueError("class_weights counts the rows of each class, but the data names none; give Data class_names")
    power = 1.0 if value == "balanced" else value
    rows = torch.tensor(counts, dtype=like.dtype, device=like.device)
    weights = rows.clamp(min=1) ** -power
    return weights * rows.sum() / (weights * rows).sum()


def _of_numbers(function: Callable[[Tensor, Tensor], Tensor]) -> Loss:
    def loss(outputs: Tensor, targets: Tensor, params: Mapping[str, Any], counts: Sequence[int]) -> Tensor:
        if outputs.shape != targets.shape:  # they would be broadcast, and the loss would be that of all pairs
            raise ValueError(
                f"outputs {tuple(outputs.shape)} and targets {tuple(targets.shape)} must have the same shape"
            )
        return function(outputs, targets)

    return loss


def _of_classes(function: Callable[[Tensor, Tensor, Any, Tensor | None], Tensor]) -> Loss:
    def loss(outputs: Tensor, targets: Tensor, params: Mapping[str, Any], counts: Sequence[int]) -> Tensor:
        weights = class_weights(params.get("class_weights", "none"), counts, outputs)
        return function(outputs, targets, params.get("label_smoothing", 0.0), weights)

    return loss


BY_NAME: Mapping[str, Loss] = {
    "l1": _of_numbers(F.l1_loss),
    "mse": _of_numbers(F.mse_loss),
    "smooth_l1": _of_numbers(F.smooth_l1_loss),
    "huber": _of_numbers(F.huber_loss),
    "quartic": _of_numbers(quartic),
    "bce": _of_classes(binary_cross_entropy),
    "cross_entropy": _of_classes(cross_entropy),
    "nll": _of_classes(lambda x, y, smoothing, weights: cross_entropy(torch.log_softmax(x, -1), y, smoothing, weights)),
}
"""nll is F.nll_loss after a log_softmax, so that networks give logits here too: it equals cross_entropy."""


Link = Literal["sigmoid", "softmax", ""]
LINKS: Mapping[str, Link] = {"bce": "sigmoid", "cross_entropy": "softmax", "nll": "softmax"}
"""The losses by name that take logits, each with what makes probabilities of them."""


def faults(values: Mapping[str, Sequence[Any]]) -> list[Fault]:
    """Return what is wrong with the losses' params, given every value (or both ends) that each can have."""
    rules = {
        "label_smoothing": (lambda v: is_number(v) and 0 <= v < 1, "a number in [0, 1)"),
        "class_weights": (
            lambda v: v in ("none", "balanced") or (is_number(v) and 0 <= v <= 1),
            "none, balanced, or a number from 0 (none) to 1 (balanced)",
        ),
    }
    return broken_rules(rules, values)
