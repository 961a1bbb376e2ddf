"""The checkpoints of paused trials that a worker keeps in memory, so that it need not read them back."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from hpo.runner.checkpoints import Checkpoint
from hpo.search.claim import Claim
from hpo.training.memory import Bounded

_MIB = 1 << 20


class PausedTrials:
    """Checkpoints by trial, up to so many MiB; the oldest is let go first, which is on disk as all of them are."""

    def __init__(self, mib: float) -> None:
        self._kept = Bounded[int, Checkpoint](mib * _MIB)

    def keep(self, number: int, checkpoint: Checkpoint) -> None:
        """Keep what a trial resumes from, which nobody must change."""
        if checkpoint.training.get("lost"):  # which is refused when it is read
            self._kept.take(number)
        else:
            self._kept.keep(number, checkpoint, _n_bytes([checkpoint.kept, checkpoint.training]))

    def take(self, claim: Claim) -> Checkpoint | None:
        """Return what a claimed trial resumes from; None: it is not here, or a peer has trained it since."""
        checkpoint = self._kept.take(claim.number)
        return checkpoint if checkpoint is not None and checkpoint.epoch == claim.n_reported else None


def _n_bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()  # of a sparse one, an optimizer's state: at most
    if isinstance(value, Mapping):
        return sum(map(_n_bytes, value.values()))
    return sum(map(_n_bytes, value)) if isinstance(value, Sequence) and not isinstance(value, str) else 0
