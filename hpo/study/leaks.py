"""What of a study's data flatters its results: rows that two splits have, columns that hold the answer."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from hpo.study.data import Data, Split

_WORDS = 1 << 22
"""How many numbers of 8 bytes are looked at together."""
_FEW, _LEAST = 2_000, 10
"""On so many rows a column is looked at first; from so many rows of other classes on it is no chance."""
_MOST_COLUMNS = 1_000


def repeated(data: Data) -> tuple[int, int]:
    """Return how many rows are in more than one split, inputs and targets equal to the last bit.

    Those of test that equal one of train or validation, and those of validation that equal one of train. Rows are
    compared by 64 bits of a random sum, so that one in 10^10 may be counted that only looks the same.
    """
    train, valid, test = (_sums(split) for split in (data.train, data.valid, data.test))
    return int(np.isin(test, np.concatenate([train, valid])).sum()), int(np.isin(valid, train).sum())


def telling(data: Data) -> list[str]:
    """Return the columns of train, by name, each of which alone says the target of every row.

    Of classes: each of its values (a missing one, too) comes with one class only. Of numbers: in the column's order the
    target only rises, or only falls. Columns of which each row has another value say nothing of classes.
    """
    train = data.train
    if train.targets.numel() != len(train):  # several targets a row
        return []
    targets = _plain(train.targets)
    few = np.random.default_rng(0).permutation(len(train))[:_FEW]
    return [
        name
        for name, tensor in _columns(data)
        if _tells(_plain(tensor[few]), targets[few]) and _tells(_plain(tensor), targets)
    ]


def _columns(data: Data) -> Iterator[tuple[str, torch.Tensor]]:
    """Give each column of the inputs that are tables, if they are not too many, and its name."""
    tables = {name: x for name, x in data.train.inputs.items() if x.ndim == 2 and not x.is_complex()}
    places = [(f"{name}[{i}]", x[:, i]) for name, x in tables.items() for i in range(x.shape[1])]
    if len(places) > _MOST_COLUMNS:
        return
    names = data.feature_names if len(data.feature_names) == len(places) else [place for place, _ in places]
    yield from zip(names, (column for _, column in places), strict=True)


def _plain(x: torch.Tensor) -> Any:
    return x.detach().cpu().double().numpy().ravel()


def _tells(column: Any, targets: Any) -> bool:
    """Whether a `column` (N,) alone says the targets (N,), and not because each row has a value of its own."""
    classes, of_row, counts = np.unique(targets, return_inverse=True, return_counts=True)
    if len(classes) > len(targets) / 10:
        known = ~np.isnan(column)
        return 2 * known.sum() > len(column) > _LEAST and _rises(column[known], targets[known])
    values, place = np.unique(column, return_inverse=True)
    if len(targets) - counts.max() < _LEAST or len(values) > len(targets) / 10:
        return False
    return len(np.unique(place * len(classes) + of_row)) == len(values)


def _rises(column: Any, targets: Any) -> bool:
    """Whether the targets only rise, or only fall, in the column's order; a column of one value has none."""
    if column.min() == column.max():
        return False
    return any((np.diff(each[np.lexsort((each, column))]) >= 0).all() for each in (targets, -targets))


def _sums(split: Split) -> Any:
    """Return a number (N,) of 64 bits for each row, equal for equal rows: a sum of its bytes with random weights."""
    total = np.zeros(len(split), dtype=np.uint64)
    columns: Mapping[str, torch.Tensor] = {**split.inputs, "targets": split.targets}
    for i, tensor in enumerate(columns.values()):
        width = tensor[:1].numel() * tensor.element_size()
        n_words = -(-width // 8)
        weights = np.random.default_rng(i).integers(1, 2**63, n_words, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
        step = max(1, _WORDS // max(1, n_words))
        for start in range(0, len(split), step):
            part = tensor[start : start + step].detach().cpu().contiguous()
            raw = part.reshape(len(part), -1).view(torch.uint8).numpy()
            padded = np.zeros((len(part), n_words * 8), dtype=np.uint8)
            padded[:, :width] = raw
            words = padded.view(np.uint64)
            words ^= words >> np.uint64(29)  # a float's last bits are often 0, and a sum never carries downwards
            total[start : start + len(part)] += words @ weights
    return total
