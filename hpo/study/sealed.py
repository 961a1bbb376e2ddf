"""The test split kept out of reach until the search is over, and its rows looked for among those that it trains on."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from hpo.errors import InputError
from hpo.study.data import Data, Split
from hpo.study.objective import Objective

_WORDS = 1 << 22
"""How many numbers of 8 bytes are looked at together."""


class SealedData(Data):
    """Data in the search: `test` raises InputError, all else is as it was. Made by `sealed`."""

    @property
    def test(self) -> Split:
        raise InputError(
            "the test split is read once, after the search: the objective must not use data().test in build, loss, "
            "metrics, preprocess, head or train; train and valid are there"
        )

    @property
    def splits(self) -> dict[str, Split]:
        return {"train": self.train, "valid": self.valid}


def sealed(data: Data) -> Data:
    """Return `data` without its test split."""
    kept = object.__new__(SealedData)
    kept.__dict__.update({name: value for name, value in vars(data).items() if name != "test"})
    return kept


class _Sealed:
    """An objective's `data`, without the test split; it can be pickled where that can."""

    def __init__(self, plain: Callable[[], Any]) -> None:
        self._plain = plain

    def __call__(self) -> Any:
        data = self._plain()
        return sealed(data) if isinstance(data, Data) else data


@contextmanager
def sealing(objective: object) -> Iterator[None]:
    """Within this, what the objective's own methods get of `self.data()` has no test split; a function has no data."""
    if not isinstance(objective, Objective):
        yield
        return
    before = vars(objective).get("data")
    objective.data = _Sealed(objective.data)  # type: ignore[method-assign]
    try:
        yield
    finally:
        del objective.data
        if before is not None:
            objective.data = before  # type: ignore[method-assign]


def repeated(data: Data) -> tuple[int, int]:
    """Return how many rows are in more than one split, inputs and targets equal to the last bit.

    Those of test that equal one of train or validation, and those of validation that equal one of train. Rows are
    compared by 64 bits of a random sum, so that one in 10^10 may be counted that only looks the same.
    """
    train, valid, test = (_sums(split) for split in (data.train, data.valid, data.test))
    return int(np.isin(test, np.concatenate([train, valid])).sum()), int(np.isin(valid, train).sum())


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
