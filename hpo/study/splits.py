"""Other divisions of the rows that may be trained on: train and validation drawn again, or K folds. Test stays."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hpo.errors import InputError
from hpo.study.data import Data, Split


def resplit(data: Data, seed: int) -> Data:
    """Return `data` with its train and validation rows pooled and divided again, into as many rows each as before.

    By classes where targets are classes and each has rows enough.
    """
    from sklearn.model_selection import ShuffleSplit, StratifiedShuffleSplit

    pool, sizes = data.for_refit().train, {"train_size": len(data.train), "test_size": len(data.valid)}
    classes = _classes(data, pool)
    if classes is not None and min(sizes.values()) < len(torch.bincount(classes).nonzero()):
        classes = None
    kind: Any = ShuffleSplit if classes is None else StratifiedShuffleSplit
    (rows,) = kind(1, **sizes, random_state=seed).split(range(len(pool)), classes)
    return _divided(data, pool, *rows)


def fold(data: Data, k: int, i: int, seed: int) -> Data:
    """Return `data` with the i-th (from 0) of K folds of its train and validation rows for validation, else for train.

    By classes where targets are classes. Raises InputError where there are fewer rows than folds.
    """
    from sklearn.model_selection import KFold, StratifiedKFold

    require_rows(data, k)
    pool = data.for_refit().train
    classes = _classes(data, pool, k)
    kind: Any = KFold if classes is None else StratifiedKFold
    rows = list(kind(k, shuffle=True, random_state=seed).split(range(len(pool)), classes))
    return _divided(data, pool, *rows[i])


def require_rows(data: Data, k: int) -> None:
    """Raise InputError where there are fewer rows to train and validate on than `k` folds."""
    if k > (n := len(data.train) + len(data.valid)):
        raise InputError(f"confirm.folds: must be at most {n}, the rows of train and validation, but got {k}")


def _classes(data: Data, pool: Split, least: int = 2) -> Tensor | None:
    """Return the class of each row, (N,); None: targets are no classes, or one has less than `least` rows."""
    targets = pool.targets
    if targets.numel() != len(targets) or (targets.is_floating_point() and len(data.class_names) < 2):
        return None
    classes = targets.reshape(-1).long().cpu()
    counts = torch.bincount(classes)
    return classes if int(counts[counts > 0].min()) >= least else None


def _divided(data: Data, pool: Split, train: Sequence[int], valid: Sequence[int]) -> Data:
    return data.with_rows(_rows(pool, train), _rows(pool, valid))


def _rows(split: Split, rows: Sequence[int]) -> Split:
    index = torch.as_tensor(rows, device=split.targets.device)
    return Split(inputs={name: x[index] for name, x in split.inputs.items()}, targets=split.targets[index])
