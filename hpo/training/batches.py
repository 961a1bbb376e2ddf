"""A split on its way into the networks: prepared, in batches, on the device, as fast as its size allows.

What fits on the device lies there and is sliced, never loaded. Data that the preprocessing would blow up (images of
bytes that become floats) lies there as it is, and is prepared batch by batch. What does not fit streams from the
machine's memory through a `DataLoader`, so that one batch, once it has arrived, serves all members of a stack.
"""

import os
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from hpo.study.data import Split, batch_sizes, require_unchanged, versions
from hpo.study.spec import Loading
from hpo.training.memory import free_bytes

AS_IT_FITS = Loading()
Batch = tuple[Sequence[Tensor], Tensor]
_SHARE = 0.5
"""How much of the device's free memory data may take; the rest is for networks and what lies between their layers."""
_PIECE = 1 << 28
"""Bytes of the rows that are put in order at once: all of them would take the data's memory once more."""


class Batches:
    """Gives a split's rows to the networks. Its `targets` are on the device, whatever its inputs are."""

    def __init__(
        self,
        split: Split,
        device: torch.device,
        preprocess: nn.Module | None = None,
        resident: bool = True,
        loading: Loading = AS_IT_FITS,
    ) -> None:
        """`preprocess` is applied to each batch; None: the split is prepared already.

        `resident`: the whole split lies on the device; otherwise it streams, as `loading` says.
        """
        self._loading = loading
        self._device, self._resident = device, resident
        self._split = split.to(device) if resident else split
        self._preprocess = None if preprocess is None else deepcopy(preprocess).to(device)
        self.targets = split.targets.to(device)
        self._loader: DataLoader[Any] | None = None
        self._order = _Order()

    def __len__(self) -> int:
        return len(self.targets)

    def head(self, n: int) -> Split:
        """Return the first `n` rows, prepared, on the device."""
        inputs, targets = next(self.chunks(n))
        return Split(inputs=dict(zip(self._split.inputs, inputs, strict=True)), targets=targets)

    @property
    def resident(self) -> bool:
        """Whether all rows are on the device."""
        return self._resident

    def pick(self, rows: Tensor) -> Batch:
        """Return the batch of these rows (B,), whose numbers are on the device, as the data must be (`resident`)."""
        inputs = [x.index_select(0, rows) for x in self._split.inputs.values()]
        return self._prepared(inputs), self.targets.index_select(0, rows)

    def chunks(self, size: int) -> Iterator[Batch]:
        """Yield all rows in their own order, `size` at a time. They must not be changed: that is raised, InputError."""
        columns = {**self._split.inputs, "targets": self.targets}
        before = versions(columns)
        for start in range(0, len(self), size):
            rows = slice(start, start + size)
            yield self._prepared([x[rows] for x in self._split.inputs.values()]), self.targets[rows]
            require_unchanged(columns, before, "the network's forward")

    def epoch(self, batch_size: int, rows: Tensor) -> Iterator[Batch]:
        """Yield an epoch's batches of `batch_size` rows (see `hpo.study.data.batch_sizes`), in `rows`' order (N,)."""
        sizes = batch_sizes(len(rows), batch_size)
        if not self._resident:
            yield from self._stream(torch.split(rows, sizes))
            return
        rows = rows.to(self._device)
        columns = (*self._split.inputs.values(), self.targets)
        n = max(1, int(_PIECE / max(1, batch_size * _bytes_per_row(self._split))))  # batches in a piece
        for start in range(0, len(sizes), n):
            some, first = sizes[start : start + n], sum(sizes[:start])
            piece = rows[first : first + sum(some)]
            # its rows are put in order at once: slicing them afterwards copies nothing
            for *inputs, targets in zip(*(torch.split(x[piece], some) for x in columns), strict=True):
                yield self._prepared(inputs), targets

    def _stream(self, batches: Sequence[Tensor]) -> Iterator[Batch]:
        if self._loader is None:
            loading, gpu = self._loading, self._device.type == "cuda"
            pinned = gpu if loading.pin_memory is None else loading.pin_memory
            n_workers = loading.num_workers
            if n_workers is None:
                n_workers = min(4, max(0, (os.cpu_count() or 1) - 1)) if gpu else 0
            self._loader = DataLoader(
                _Rows(self._split),
                batch_sampler=self._order,
                collate_fn=_unchanged,
                pin_memory=pinned,
                num_workers=n_workers,
                persistent_workers=loading.persistent_workers and n_workers > 0,
                prefetch_factor=loading.prefetch_factor or 4 if n_workers else None,
            )
        self._order.batches = batches
        for batch in self._loader:
            *inputs, targets = self._moved_beside(batch) if _computes_beside(self._device) else map(self._moved, batch)
            yield self._prepared(inputs), targets

    def _moved_beside(self, batch: Sequence[Tensor]) -> list[Tensor]:
        """Return a batch on the GPU, copied while the step before is still computed there."""
        here, beside = torch.cuda.current_stream(self._device), _copying_stream(self._device)
        with torch.cuda.stream(beside):
            moved = [self._moved(x) for x in batch]
        here.wait_stream(beside)
        for x in moved:
            x.record_stream(here)  # else its memory would be free for the next copy as soon as Python lets go of it
        return moved

    def _moved(self, x: Tensor) -> Tensor:
        return x.to(self._device, non_blocking=self._loading.non_blocking)

    def _prepared(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        if not self._resident:
            inputs = [self._moved(x) for x in inputs]
        if self._preprocess is None:
            return inputs
        with torch.no_grad():
            out = self._preprocess(*inputs)
        return (out,) if isinstance(out, Tensor) else tuple(out)


def make_batches(split: Split, preprocess: nn.Module, device: torch.device, loading: Loading = AS_IT_FITS) -> Batches:
    """Return the batches of `split` through `preprocess` on `device`, resident or streamed as its size allows.

    `loading` may say instead which of the two.
    """
    preprocess = preprocess.eval()
    if loading.resident is False:
        return Batches(split, device, preprocess, resident=False, loading=loading)
    if device.type == "cpu":
        return Batches(split.through(preprocess), device)
    some = replace(split, inputs={n: x[:8] for n, x in split.inputs.items()}, targets=split.targets[:8])
    raw, prepared = _bytes_per_row(some), _bytes_per_row(some.through(preprocess))
    if (
        loading.resident == "auto"
        and device.type == "cuda"
        and min(raw, prepared) * len(split) > _SHARE * free_bytes(device)
    ):
        return Batches(split, device, preprocess, resident=False, loading=loading)
    if raw < prepared:
        return Batches(split, device, preprocess)
    return Batches(split.through(preprocess), device)


def _computes_beside(device: torch.device) -> bool:
    """Whether `device` computes and copies at the same time, in streams of their own."""
    return device.type == "cuda"


@cache
def _copying_stream(device: torch.device) -> Any:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch does not annotate it


def _bytes_per_row(split: Split) -> float:
    return sum(x.element_size() * x.numel() for x in split.inputs.values()) / len(split)


class _Order:
    """A batch sampler whose order is set for each epoch, so that the loader's workers are kept."""

    batches: Sequence[Tensor] = ()

    def __iter__(self) -> Iterator[list[int]]:
        return (batch.tolist() for batch in self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class _Rows(Dataset[Any]):
    """A split's rows, a batch at a time."""

    def __init__(self, split: Split) -> None:
        self._columns = [*split.inputs.values(), split.targets]

    def __len__(self) -> int:
        return len(self._columns[0])

    def __getitems__(self, rows: list[int]) -> list[Tensor]:
        return [column[rows] for column in self._columns]


def _unchanged(batch: Any) -> Any:
    return batch
