"""Losses whose numbers may be tensors, so that members of one stack may differ in them."""

import torch
from torch import Tensor
from torch.nn import functional as F


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
