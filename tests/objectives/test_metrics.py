"""Metrics of logits."""

import pytest
import torch
from torchmetrics.classification import BinaryAccuracy

from hpo.study.blocks import LogitAccuracy


@pytest.mark.parametrize("logits", [[0.1, 0.2, 0.9, 0.8], [-3.0, 2.0, 5.0, -0.1], [-0.4, 0.4, -0.2, 0.3]])
def test_a_logit_above_zero_is_class_one_wherever_the_others_lie(logits):
    targets = torch.tensor([0, 1, 1, 0])
    metric = LogitAccuracy()
    expected = ((torch.tensor(logits) > 0).long() == targets).float().mean()
    assert metric(torch.tensor(logits), targets) == expected
    assert metric.higher_is_better


def test_torchmetrics_own_takes_them_as_probabilities_where_all_lie_between_0_and_1():
    assert BinaryAccuracy()(torch.tensor([0.1, 0.2]), torch.tensor([1, 1])) == 0  # why there is one of ours
