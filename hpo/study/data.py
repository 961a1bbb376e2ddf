"""Data as an objective hands it over: named tensors in three splits, checked once, known by a fingerprint."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from hpo.errors import DataError, InputError


def data_home() -> Path:
    """Return the folder of all data sets: `HPO_DATA_HOME`, else `~/.cache/hpo`; in it `sklearn/` and `torchvision/`."""
    return Path(os.environ.get("HPO_DATA_HOME") or "~/.cache/hpo").expanduser()


@dataclass(frozen=True, kw_only=True)
class Split:
    """N examples. `inputs` are named tensors of shape (N, ...); `targets` (N,) of classes or (N, T) of numbers.

    >>> split = hpo.Split(inputs={"features": torch.zeros(100, 4)}, targets=torch.zeros(100, 1))
    >>> len(split)
    100
    """

    inputs: Mapping[str, Tensor]
    targets: Tensor

    def __len__(self) -> int:
        return len(self.targets)

    @classmethod
    def from_dataset(
        cls,
        source: Any,
        *,
        inputs: Sequence[str] | None = None,
        targets: str | None = None,
        keep_in: str | Path | None = None,
        num_workers: int = 0,
    ) -> "Split":
        """Return the rows of a `torch.utils.data.Dataset` or `DataLoader`, read once and in their own order.

        A row is `(input, ..., target)` or a mapping; `inputs` names the inputs (default: features, or input0, input1,
        ..., or a mapping's own names), `targets` the target (default: the last). Whatever the loader would shuffle or
        drop, all rows are read in order, so that the data is the same at every call. Random transforms are therefore
        drawn once: augmentation belongs into the network. Targets that are single numbers become (N, 1); float64
        becomes float32.

        The rows lie in memory, or with `keep_in`, a folder, in files there that are mapped into memory, for more data
        than memory has; `loading: {resident: false}` then streams them. `num_workers` processes read a dataset.

        Raises DataError that says which row cannot be used, and why.

        >>> rows = [(torch.tensor([1.0, 2.0]), 0), (torch.tensor([3.0, 4.0]), 1)]
        >>> split = hpo.Split.from_dataset(rows)
        >>> split.inputs["features"].shape, split.targets
        (torch.Size([2, 2]), tensor([0, 1]))
        """
        from hpo.study import dataset

        folder = None if keep_in is None else Path(keep_in)
        read, target = dataset.read(source, inputs, targets, folder, num_workers)
        return cls(inputs=read, targets=target)

    def to(self, device: torch.device) -> "Split":
        """Return this split on `device`."""
        return Split(inputs={n: x.to(device) for n, x in self.inputs.items()}, targets=self.targets.to(device))

    def through(self, module: nn.Module, rows: int = 8192) -> "Split":
        """Return this split with its inputs passed once through `module`, `rows` at a time."""
        if isinstance(module, nn.Identity):
            return self
        names, parts, before = list(self.inputs), [], versions(self.inputs)
        with torch.no_grad():
            for start in range(0, len(self), rows):
                out = module(*(x[start : start + rows] for x in self.inputs.values()))
                parts.append((out,) if isinstance(out, Tensor) else tuple(out))
        require_unchanged(self.inputs, before, "preprocess")
        columns = (torch.cat(column) for column in zip(*parts, strict=True))
        return replace(self, inputs=dict(zip(names, columns, strict=True)))


LOSS_OR_METRIC = "the loss or a metric"


def versions(columns: Mapping[str, Tensor]) -> dict[str, int]:
    """Return how often each of some tensors has been changed in place, as far as torch counts it."""
    return {name: 0 if x.is_inference() else x._version for name, x in columns.items()}


def require_unchanged(columns: Mapping[str, Tensor], before: Mapping[str, int], who: str) -> None:
    """Raise InputError where some of these tensors have been changed in place since their `versions` were `before`."""
    if changed := [name for name, version in versions(columns).items() if version != before[name]]:
        names = ", ".join(map(repr, changed))
        raise InputError(
            f"{who} changes {names} in place, which every later epoch and trial is given too; "
            "write x = x / 255, not x /= 255, or change a copy, x.clone()"
        )


def batch_sizes(n_rows: int, batch_size: int) -> list[int]:
    """Return how many rows each batch of an epoch has: the last may be smaller.

    BatchNorm cannot train on one row: one that would be left over joins the batch before it.
    """
    sizes = [batch_size] * (n_rows // batch_size)
    rest = n_rows - sum(sizes)
    if rest == 1 and sizes:
        sizes[-1] += 1
    elif rest:
        sizes.append(rest)
    return sizes


def prediction(outputs: Any) -> Tensor:
    """Return what metrics and head see of a network's outputs: of several (a tuple, a dict), the first."""
    return outputs if isinstance(outputs, Tensor) else tree_leaves(outputs)[0]


@dataclass(frozen=True, kw_only=True)
class DataInfo:
    """What a network must know of the data: shapes without the batch axis, and the names of the classes.

    `Objective.build` gets it; `Data.info` makes it.

    >>> shapes, dtypes = {"pixels": (1, 28, 28)}, {"pixels": "uint8"}
    >>> info = hpo.DataInfo(inputs=shapes, input_dtypes=dtypes, class_names=("cat", "dog"))
    >>> info.n_features, info.n_classes
    (784, 2)
    """

    inputs: Mapping[str, tuple[int, ...]]
    input_dtypes: Mapping[str, str]
    feature_names: tuple[str, ...] = ()
    class_names: tuple[str, ...] = ()
    class_counts: tuple[int, ...] = ()
    """How many of the training rows have each class."""
    missing: bool = False
    """Whether NaN in the inputs is a missing value."""

    @property
    def n_features(self) -> int:
        """How many numbers one example of the first input has."""
        return int(torch.Size(next(iter(self.inputs.values()))).numel())

    @property
    def n_classes(self) -> int:
        return len(self.class_names)


@dataclass(frozen=True, kw_only=True)
class Data:
    """Train, validation and test split apart. No row is in two of them.

    `feature_names` and `class_names` are optional; class names go into the exported bundle.

    >>> part = hpo.Split(inputs={"features": torch.zeros(10, 4)}, targets=torch.arange(10) % 2)
    >>> data = hpo.Data(train=part, valid=part, test=part, class_names=("no", "yes"))
    >>> data.info.class_counts
    (5, 5)
    """

    train: Split
    valid: Split
    test: Split
    feature_names: tuple[str, ...] = ()
    class_names: tuple[str, ...] = ()
    missing: bool = False
    """Whether NaN in the inputs is a missing value, which `preprocess` fills in; else it is refused."""
    notices: tuple[str, ...] = ()
    """What a user should know of how the rows were read, a line each; said as a study starts, and by `hpo check`."""

    @property
    def splits(self) -> dict[str, Split]:
        return {"train": self.train, "valid": self.valid, "test": self.test}

    @property
    def info(self) -> DataInfo:
        inputs, n = self.train.inputs, len(self.class_names)
        return DataInfo(
            inputs={name: tuple(x.shape[1:]) for name, x in inputs.items()},
            input_dtypes={name: str(x.dtype).removeprefix("torch.") for name, x in inputs.items()},
            feature_names=self.feature_names,
            class_names=self.class_names,
            class_counts=tuple(torch.bincount(self.train.targets.long().ravel(), minlength=n).tolist()) if n else (),
            missing=self.missing,
        )

    def checked(self, objective: str) -> "Data":
        """Return this data if every split has tensors, rows of one length and one kind, and finite numbers.

        Raises DataError that says in which split, and what came.
        """
        for name, split in self.splits.items():
            where = f"objective {objective}: in its {name} split"
            columns = _columns(where, name, split)
            if len(split) == 0:
                raise DataError(f"objective {objective}: its {name} split is empty")
            for column, tensor in columns.items():
                if len(tensor) != len(split):
                    raise DataError(f"{where}, {column} has {len(tensor)} rows, but targets has {len(split)}")
                if not self.missing or column == "targets":
                    _require_finite(where, column, tensor)
            _require_alike(where, columns, {**self.train.inputs, "targets": self.train.targets})
            self._require_classes(where, split.targets)
        return self

    def _require_classes(self, where: str, targets: Tensor) -> None:
        n = len(self.class_names)
        least, most = targets.min().item(), targets.max().item()
        if n > 1 and not (least >= 0 and most < n):
            raise DataError(
                f"{where}, targets go from {least:g} to {most:g}, but class_names has {n} names: they are 0 to {n - 1}"
            )

    def for_refit(self) -> "Data":
        """Return this data with the validation rows added to train; `valid` stays as it is and must not be measured."""
        both = {n: torch.cat([x, self.valid.inputs[n]]) for n, x in self.train.inputs.items()}
        targets = torch.cat([self.train.targets, self.valid.targets])
        return self.with_rows(Split(inputs=both, targets=targets), self.valid)

    def with_rows(self, train: Split, valid: Split) -> "Data":
        """Return this data with other rows to train and to validate on; test, which may be out of reach, stays."""
        other = copy(self)
        vars(other).update(train=train, valid=valid)
        return other

    def fingerprint(self) -> str:
        """Return the first 16 hex digits of a SHA-256 over every tensor of every split."""
        digest = hashlib.sha256()
        for name, split in self.splits.items():
            for column, tensor in {**split.inputs, "targets": split.targets}.items():
                digest.update(f"{name}/{column}/{tuple(tensor.shape)}/{tensor.dtype}".encode())
                plain = tensor.contiguous().cpu()
                digest.update((plain.view(torch.int16) if plain.dtype == torch.bfloat16 else plain).numpy().data)
        return digest.hexdigest()[:16]


def _columns(where: str, name: str, split: Any) -> dict[str, Tensor]:
    """Return a split's tensors by name. Raises DataError where it holds anything else."""
    if not isinstance(split, Split):
        raise DataError(
            f"{where.replace('in its', 'its')} must be hpo.study.data.Split(inputs=..., targets=...), {_got(split)}"
        )
    if not isinstance(split.inputs, Mapping) or not split.inputs:
        rule = 'must be a mapping of names to tensors, {"features": x}'
        raise DataError(f"{where}, inputs {rule}, {_got(split.inputs)}")
    columns = {**split.inputs, "targets": split.targets}
    for column, tensor in columns.items():
        if not isinstance(tensor, Tensor):
            hint = (
                "" if tensor is None else "; use torch.from_numpy" if hasattr(tensor, "dtype") else "; use torch.tensor"
            )
            raise DataError(f"{where}, {column} must be a torch.Tensor, {_got(tensor)}{hint}")
        if tensor.ndim == 0:
            raise DataError(f"{where}, {column} must have a row for each example, but it is one number")
    return columns


def _got(value: Any) -> str:
    kind = type(value)
    module = "" if kind.__module__ == "builtins" else f"{kind.__module__.partition('.')[0]}."
    return "but is None" if value is None else f"but is a {module}{kind.__qualname__}"


def _require_finite(where: str, column: str, tensor: Tensor) -> None:
    if tensor.is_floating_point() and not (finite := torch.isfinite(tensor)).all():
        bad = (~finite.reshape(len(tensor), -1)).any(1).nonzero()[:, 0]
        raise DataError(
            f"{where}, {column} holds NaN or infinity in "
            f"{len(bad)} of {len(tensor)} rows (the first: row {int(bad[0])}); drop or impute them"
        )


def _require_alike(where: str, columns: Mapping[str, Tensor], train: Mapping[str, Any]) -> None:
    """Raise DataError where a split's columns, or one row of them, are not as in the train split."""
    if list(columns) != list(train):
        raise DataError(f"{where}, the inputs are {list(columns)[:-1]}, but in train they are {list(train)[:-1]}")
    for column, tensor in columns.items():
        kinds = [f"{tuple(x.shape[1:])} {str(x.dtype).removeprefix('torch.')}" for x in (tensor, train[column])]
        if kinds[0] != kinds[1]:
            raise DataError(f"{where}, a row of {column} is {kinds[0]}, but in train it is {kinds[1]}")
