"""A claimed trial: what its worker is told of it, and Optuna's object of it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from optuna.trial import Trial


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A trial that is ours to train. `number` is Optuna's; `seed` is the one its weights are drawn from."""

    number: int
    seed: int
    params: Mapping[str, Any]
    attempt: int
    slot: int
    """Its slot of the budget, which its successors inherit."""
    lineage: int
    """The number of the first trial that had its params and seed: a retry's checkpoint is of its own lineage only."""
    is_retry: bool
    """Whether it succeeds a trial that was interrupted or whose worker died."""
    is_resumed: bool = False
    """Whether it was paused."""
    n_reported: int = 0
    """How many epochs it has reported before."""
    n_restarts: int = 0
    """How often it was resumed from scratch."""
    paused_at: int = 0
    """After how many epochs it, or the one that it succeeds, was paused last; 0: never."""


class TakenOver(Exception):
    """A peer has ended this trial: its lease had expired. Stop training it."""


class ClaimedTrial(Trial):
    """Optuna's trial, which passes on what a plain Optuna objective reports."""

    on_report: Callable[[int, float], None] = staticmethod(lambda step, value: None)

    def report(self, value: float, step: int) -> None:
        super().report(value, step)
        self.on_report(step, float(value))
