"""The checkpoints of paused trials that a worker keeps in memory, so that it need not read them back."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from hpo.runner.checkpoints import Checkpoint
from hpo.search.claim import Claim

_MIB = 1 << 20


class PausedTrials:
    """Checkpoints by trial, up to so many MiB; the oldest is let go first, which is on disk as all of them are."""

    def __init__(self, mib: float) -> None:
        self._most = mib * _MIB
        self._kept: dict[int, tuple[Checkpoint, int]] = {}
        self._size = 0

    def keep(self, number: int, checkpoint: Checkpoint) -> None:
        """Keep what a trial resumes from, which nobody must change."""
        self._let_go(number)
        size = _n_bytes([checkpoint.kept, checkpoint.training])
        if size > self._most or checkpoint.training.get("lost"):  # which is refused when it is read
            return
        self._kept[number] = checkpoint, size
        self._size += size
        while self._size > self._most:
            self._let_go(next(iter(self._kept)))

    def take(self, claim: Claim) -> Checkpoint | None:
        """Return what a claimed trial resumes from; None: it is not here, or a peer has trained it since."""
        checkpoint = self._let_go(claim.number)
        return checkpoint if checkpoint is not None and checkpoint.epoch == claim.n_reported else None

    def _let_go(self, number: int) -> Checkpoint | None:
        checkpoint, size = self._kept.pop(number, (None, 0))
        self._size -= size
        return checkpoint


def _n_bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()  # of a sparse one, an optimizer's state: at most
    if isinstance(value, Mapping):
        return sum(map(_n_bytes, value.values()))
    return sum(map(_n_bytes, value)) if isinstance(value, Sequence) and not isinstance(value, str) else 0
