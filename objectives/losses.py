"""Losses whose numbers may be tensors, so that members of one stack may differ in them."""

import torch
from torch import Tensor
from torch.nn import functional as F


def cross_entropy(logits: Tensor, classes: Tensor, label_smoothing: float | Tensor = 0.0) -> Tensor:
    """F.cross_entropy of logits (B, C) and classes (B,), with a smoothing that may be a tensor."""
    if not isinstance(label_smoothing, Tensor):
        return F.cross_entropy(logits, classes, label_smoothing=label_smoothing)
    log_probabilities = torch.log_softmax(logits, -1)
    hit = -log_probabilities.gather(-1, classes.unsqueeze(-1)).mean()
    return (1 - label_smoothing) * hit - label_smoothing * log_probabilities.mean()
