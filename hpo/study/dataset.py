"""A split read out of a `torch.utils.data.Dataset` or `DataLoader`: once, in order, into memory or onto the disk."""

import hashlib
import itertools
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    default_collate,
)

from hpo.errors import DataError

_ROWS = 256
"""How many rows are read at a time where the source does not say."""


def read(
    source: Any, inputs: Sequence[str] | None, targets: str | None, keep_in: Path | None, num_workers: int
) -> tuple[dict[str, Tensor], Tensor]:
    """Return the inputs by name, each (N, ...), and the targets; see `Split.from_dataset`."""
    columns: dict[str, _Column] = {}
    target = ""
    with ExitStack() as end:
        for number, batch in enumerate(_batches(source, num_workers)):
            named, target = _named(batch, inputs, targets, number)
            if columns and list(named) != list(columns):
                raise DataError(
                    f"batch {number} of {_kind(source)} gives {list(named)}, but those before {list(columns)}"
                )
            for name, tensor in named.items():
                if name not in columns:
                    columns[name] = _Column(name, keep_in)
                    end.callback(columns[name].discard)
                columns[name].add(tensor, number)
        if not columns:
            raise DataError(f"{_kind(source)} gives no rows")
        read = {name: column.joined() for name, column in columns.items()}
    values = read.pop(target)
    return read, values.unsqueeze(1) if values.is_floating_point() and values.ndim == 1 else values


def _batches(source: Any, num_workers: int) -> Iterator[Any]:
    """Yield all rows of `source` in their own order, whatever order it would draw them in, none left out."""
    if isinstance(source, DataLoader):
        if isinstance(source.dataset, IterableDataset):
            yield from source
            return
        batches = source.batch_sampler
        collate = source.collate_fn if batches is not None else _collated
        rows = getattr(batches, "batch_size", None) or _ROWS
        chosen = _chosen(source)
        dataset = source.dataset if chosen is None else Subset(source.dataset, chosen)
        yield from DataLoader(dataset, rows, collate_fn=collate, num_workers=source.num_workers)
    elif isinstance(source, IterableDataset):
        yield from DataLoader(source, _ROWS, collate_fn=_collated)
    elif isinstance(source, Dataset) or (hasattr(source, "__getitem__") and hasattr(source, "__len__")):
        yield from DataLoader(source, _ROWS, collate_fn=_collated, num_workers=num_workers)
    else:
        raise DataError(f"must be a torch.utils.data.Dataset or DataLoader, but is a {type(source).__name__}")


def _chosen(loader: "DataLoader[Any]") -> list[int] | None:
    """Return which rows of its dataset a loader draws; None: all. Raises DataError where it draws some more often."""
    batches, sampler = loader.batch_sampler, loader.sampler
    if batches is not None and type(batches) is not BatchSampler:
        sampler = batches
    elif batches is not None:
        sampler = batches.sampler
    if type(sampler) in (SequentialSampler, RandomSampler):
        return None
    if type(sampler) is SubsetRandomSampler:
        return [int(index) for index in sampler.indices]
    raise DataError(
        f"the DataLoader of {_kind(loader)} draws its rows by a {type(sampler).__name__}, but here each is read once: "
        "give the dataset itself, or torch.utils.data.Subset(dataset, indices) of those that are meant (classes that "
        "are rare: weigh them in the loss)"
    )


def _collated(rows: list[Any]) -> Any:
    try:
        return default_collate(rows)
    except (TypeError, RuntimeError) as error:
        what = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"rows of the dataset cannot be put together: {what}; each must be tensors, arrays or numbers of one shape "
            "(images: give the dataset a transform that makes tensors of one size)"
        ) from error


def _named(batch: Any, inputs: Sequence[str] | None, targets: str | None, number: int) -> tuple[dict[str, Tensor], str]:
    """Return a batch's tensors by name, and which of them is the target: the last, unless `targets` names it."""
    if isinstance(batch, Mapping):
        named = dict(batch)
    elif isinstance(batch, list | tuple) and len(batch) >= 2:
        *parts, last = _flat(batch)
        names = list(inputs) if inputs is not None else _default_names(len(parts))
        if len(names) != len(parts):
            raise DataError(f"a row has {len(parts)} inputs, but inputs names {len(names)}: {', '.join(names)}")
        named = dict(zip(names, parts, strict=True)) | {targets or "targets": last}
    else:
        came = f"a {type(batch).__name__}"
        raise DataError(f"a row must be (input, ..., target) or a mapping of names, but batch {number} is {came}")
    target = targets or list(named)[-1]
    if target not in named:
        raise DataError(f"a row has no {target!r}; it has {', '.join(map(str, named))}: name the target by targets=")
    if isinstance(batch, Mapping) and inputs is not None:
        if missing := [name for name in inputs if name not in named]:
            raise DataError(f"a row has no {missing[0]!r}; it has {', '.join(map(str, named))}")
        named = {name: named[name] for name in (*inputs, target)}
    for name, value in named.items():
        if not isinstance(value, Tensor):
            raise DataError(f"{name} of a row must be a tensor, an array or a number, but is a {type(value).__name__}")
    if len(named) < 2:
        raise DataError("a row must have an input beside its target, but has the target alone")
    return named, target


def _flat(batch: Sequence[Any]) -> list[Any]:
    """Return ((a, b), y), as some datasets have several inputs, as [a, b, y]."""
    return list(itertools.chain.from_iterable(part if _is_several(part) else [part] for part in batch))


def _is_several(part: Any) -> bool:
    return isinstance(part, list | tuple) and all(isinstance(each, Tensor) for each in part)


def _default_names(n: int) -> list[str]:
    return ["features"] if n == 1 else [f"input{index}" for index in range(n)]


def _kind(source: Any) -> str:
    return f"the {type(source.dataset if isinstance(source, DataLoader) else source).__name__}"


class _Column:
    """The rows of one tensor: in memory, or appended to a file that becomes a memory map.

    The file is named by what is in it and moved into its place: other splits, and other processes that read the same
    data, may be in that folder, with maps of theirs.
    """

    def __init__(self, name: str, keep_in: Path | None) -> None:
        self._name, self._parts, self._n = name, list[Tensor](), 0
        self._kind: tuple[Any, ...] = ()
        self._folder, self._digest = keep_in, hashlib.sha256()
        self._file: Path | None = None
        if keep_in is not None:
            keep_in.mkdir(parents=True, exist_ok=True)
            handle, path = tempfile.mkstemp(".part", f".{name}-", keep_in)
            os.close(handle)
            self._file = Path(path)

    def add(self, rows: Tensor, number: int) -> None:
        rows = rows.detach().cpu()
        rows = rows.float() if rows.dtype == torch.float64 else rows.long() if rows.dtype == torch.int32 else rows
        kind = (tuple(rows.shape[1:]), rows.dtype)
        if self._kind and kind != self._kind:
            raise DataError(f"{self._name} is {_shown(kind)} in batch {number}, but {_shown(self._kind)} before")
        self._kind = kind
        self._n += len(rows)
        if self._file is None:
            self._parts.append(rows.clone())  # a loader's worker may hold what it gave in shared memory
            return
        written = rows.contiguous().numpy().tobytes()
        self._digest.update(written)
        with self._file.open("ab") as file:
            file.write(written)

    def joined(self) -> Tensor:
        """Return all rows, (N, ...)."""
        if self._file is None:
            return torch.cat(self._parts)
        shape, dtype = self._kind
        assert self._folder is not None
        place = self._folder / f"{self._name}-{self._digest.hexdigest()[:16]}.bin"
        self._file.replace(place)
        array = np.memmap(place, torch.empty(0, dtype=dtype).numpy().dtype, "r+", shape=(self._n, *shape))
        return torch.from_numpy(array)

    def discard(self) -> None:
        """Remove the file, if it was not joined."""
        if self._file is not None:
            self._file.unlink(missing_ok=True)


def _shown(kind: tuple[Any, ...]) -> str:
    return f"{kind[0]} {str(kind[1]).removeprefix('torch.')}"
