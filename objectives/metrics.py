"""Metrics of logits. TorchMetrics takes logits that all happen to lie in [0, 1] as probabilities; these do not."""

import torch
from torch import Tensor
from torchmetrics.classification import BinaryAccuracy


class LogitAccuracy(BinaryAccuracy):
    """The share of rows whose logit (N, ...) is above 0 where the target is 1, and not where it is 0."""

    def update(self, preds: Tensor, target: Tensor) -> None:
        super().update(torch.sigmoid(preds), target)
