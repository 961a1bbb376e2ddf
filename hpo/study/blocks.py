"""What most objectives of tables are made of: splits of arrays, a network, a scaling, an accuracy of logits."""

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from hpo.light import BinaryAccuracy
from hpo.study.data import Data, Split


def tabular_splits(
    features: np.ndarray,
    targets: torch.Tensor,
    *,
    test: float,
    valid: float,
    random_state: int,
    feature_names: tuple[str, ...],
    class_names: tuple[str, ...] = (),
    stratify: bool = False,
) -> Data:
    """Return `features` (N, F) as float32 in three splits: `test` of all rows, then `valid` of those that are left.

    The test rows are those of scikit-learn's `train_test_split` with the same `random_state`; `stratify` keeps the
    classes' shares equal in train and validation.

    >>> x, y = np.zeros((100, 2)), torch.arange(100) % 2
    >>> data = hpo.tabular_splits(x, y, test=0.2, valid=0.25, random_state=0, feature_names=("a", "b"))
    >>> [len(split) for split in data.splits.values()]
    [60, 20, 20]
    """
    labels = targets.numpy().ravel() if stratify else None
    rest, test_rows = train_test_split(np.arange(len(features)), test_size=test, random_state=random_state)
    train_rows, valid_rows = train_test_split(
        rest, test_size=valid, random_state=random_state, stratify=None if labels is None else labels[rest]
    )
    return split_by_rows(
        {"features": torch.from_numpy(np.ascontiguousarray(features, dtype=np.float32))},
        targets,
        (train_rows, valid_rows, test_rows),
        feature_names=feature_names,
        class_names=class_names,
    )


def split_by_rows(
    inputs: Mapping[str, torch.Tensor],
    targets: torch.Tensor,
    rows: tuple[np.ndarray, np.ndarray, np.ndarray],
    *,
    feature_names: tuple[str, ...] = (),
    class_names: tuple[str, ...] = (),
) -> Data:
    """Return `inputs` (N, ...) and `targets` (N, ...) in three splits: `rows` of train, validation and test."""
    train, valid, test = (
        Split(inputs={name: x[chosen] for name, x in inputs.items()}, targets=targets[chosen]) for chosen in rows
    )
    return Data(train=train, valid=valid, test=test, feature_names=feature_names, class_names=class_names)


class MLP(nn.Module):
    """Flatten, then `hidden` layers of linear and ReLU, then one linear layer: (B, ...) -> (B, n_out).

    The layers are named hidden1, hidden2, ... and output; with a `dropout` rate, one follows each ReLU.

    >>> hpo.MLP(8, [16, 16], 1)(torch.zeros(5, 8)).shape
    torch.Size([5, 1])
    """

    def __init__(self, n_in: int, hidden: Sequence[int], n_out: int, dropout: float | None = None) -> None:
        super().__init__()
        widths = [n_in, *hidden]
        self.layers = nn.Sequential(nn.Flatten())
        for index, (before, after) in enumerate(itertools.pairwise(widths), start=1):
            self.layers.add_module(f"hidden{index}", nn.Linear(before, after))
            self.layers.add_module(f"relu{index}", nn.ReLU())
            if dropout is not None:
                self.layers.add_module(f"dropout{index}", nn.Dropout(dropout))
        self.layers.add_module("output", nn.Linear(widths[-1], n_out))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return y


class Standardize(nn.Module):
    """(x - mean) / std by feature: (B, F) -> (B, F). Mean and deviation of `train` (N, F) are kept as buffers.

    >>> hpo.Standardize(torch.tensor([[1.0], [3.0]]))(torch.tensor([[2.0], [3.0]])).tolist()
    [[0.0], [1.0]]
    """

    mean: Tensor
    std: Tensor

    def __init__(self, train: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", train.double().mean(0).to(train.dtype))
        std = train.double().std(0, correction=0)
        self.register_buffer("std", torch.where(std > 0, std, 1.0).to(train.dtype))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


class LogitAccuracy(BinaryAccuracy):
    """The share of rows whose logit (N, ...) is above 0 where the target is 1, and not where it is 0.

    TorchMetrics takes logits that all happen to lie in [0, 1] as probabilities; this one does not.

    >>> accuracy = hpo.LogitAccuracy()
    >>> accuracy(torch.tensor([0.2, -0.3]), torch.tensor([1, 0])).item()
    1.0
    """

    def update(self, preds: Tensor, target: Tensor) -> None:
        super().update(torch.sigmoid(preds), target)
