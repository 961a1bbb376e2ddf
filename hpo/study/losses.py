"""Losses by name, whose numbers may be tensors, so that members of one stack may differ in them.

Each takes (outputs, targets, params, class_counts) and returns the mean over the batch. Networks give logits: sigmoid
and softmax belong to an objective's `head`. `label_smoothing` and `class_weights` are read by bce, cross_entropy, nll.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.nn import functional as F

from hpo.errors import Fault, broken_rules, is_number

Loss = Callable[[Tensor, Tensor, Mapping[str, Any], Sequence[int]], Tensor]


def cross_entropy(
    logits: Tensor, classes: Tensor, label_smoothing: float | Tensor = 0.0, class_weights: Tensor | None = None
) -> Tensor:
    """F.cross_entropy, whatever its shapes: logits (B, C) and classes (B,), or (B, C, L, ...) and (B, L, ...).

    The classes lie along dimension 1; targets of logits' shape are probabilities; a class of -100 is left out.
    Smoothing and weights (C,) may be a member's own.
    """
    if not isinstance(label_smoothing, Tensor) and class_weights is None:
        return F.cross_entropy(logits, classes, label_smoothing=label_smoothing)
    dim = _of_the_classes(logits)
    n_classes = logits.shape[dim]
    _require_fitting(logits, classes, dim, class_weights)
    log_probabilities = torch.log_softmax(logits, dim)
    each = logits.new_ones(n_classes) if class_weights is None else class_weights
    weights = each.reshape(-1, *(1,) * (logits.ndim - 1 - dim))
    if classes.is_floating_point():
        smooth = classes * (1 - label_smoothing) + label_smoothing / n_classes
        return -(smooth * weights * log_probabilities).sum() / (logits.numel() / n_classes)
    left_out = (classes == _LEFT_OUT).unsqueeze(dim)
    index = classes.unsqueeze(dim).masked_fill(left_out, 0)
    of_rows = weights.expand_as(logits).gather(dim, index).masked_fill(left_out, 0)
    hit = -(of_rows * log_probabilities.gather(dim, index)).sum()
    spread = -(weights * log_probabilities).masked_fill(left_out, 0).sum() / n_classes
    return ((1 - label_smoothing) * hit + label_smoothing * spread) / of_rows.sum()


_LEFT_OUT = -100
"""F.cross_entropy's `ignore_index`."""


def _of_the_classes(logits: Tensor) -> int:
    """Return along which dimension F.cross_entropy takes the classes: of a row without a batch, the only one."""
    return min(1, logits.ndim - 1)


def _require_fitting(logits: Tensor, classes: Tensor, dim: int, weights: Tensor | None) -> None:
    """Raise ValueError for shapes that F.cross_entropy would refuse, and some that would be broadcast here."""
    shape, n_classes = tuple(logits.shape), logits.shape[dim]
    wanted = shape if classes.is_floating_point() else (*shape[:dim], *shape[dim + 1 :])
    if tuple(classes.shape) != wanted:
        what = "probabilities (they are no whole numbers)" if classes.is_floating_point() else "classes"
        raise ValueError(
            f"outputs {shape} have {n_classes} classes along dimension {dim}, so that targets that are {what} must "
            f"have the shape {wanted}, but got {tuple(classes.shape)}"
        )
    if weights is not None and weights.shape[-1] != n_classes:
        raise ValueError(
            f"class_weights: the data names {weights.shape[-1]} classes, but outputs {shape} have {n_classes} along "
            f"dimension {dim}"
        )


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
    rows = _row_counts(tuple(counts), like.dtype, like.device)
    weights = rows.clamp(min=1) ** -power
    return weights * rows.sum() / (weights * rows).sum()


_counted: dict[Any, Tensor] = {}


def _row_counts(counts: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return `counts` as a tensor, on a GPU kept for the next loss: to make one there waits for it, at each step."""
    key = counts, dtype, device
    if key in _counted:
        return _counted[key]
    made = torch.tensor(counts, dtype=dtype, device=device)
    # what is made in a trace, in torch.func's transforms or in inference mode is of no use after them
    is_plain = type(made) is Tensor and not is_functorch_wrapped_tensor(made) and not made.is_inference()
    if is_plain and device.type != "cpu":
        _counted[key] = made
    return made


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
    "nll": _of_classes(
        lambda x, y, smoothing, weights: cross_entropy(torch.log_softmax(x, _of_the_classes(x)), y, smoothing, weights)
    ),
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
