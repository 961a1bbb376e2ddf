"""The arithmetic of a study's budget: which trials take a place in it, what they come to, how long they took."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from optuna.trial import FrozenTrial, TrialState

LEASE_KEY = "hpo:lease"
"""The system attribute that holds a running trial's lease (`hpo.lease`)."""


def lease_of(trial: FrozenTrial) -> Mapping[str, Any]:
    """Return who trains `trial` (`worker`), `until` when that holds, and at which `attempt`; empty where nobody did."""
    return trial.system_attrs.get(LEASE_KEY, {})


@dataclass(frozen=True, kw_only=True)
class Counts:
    """A study's trials by state. A trial that a successor replaced is none of them."""

    complete: int
    pruned: int
    failed: int
    running: int
    waiting: int

    @property
    def finished(self) -> int:
        return self.complete + self.pruned + self.failed

    @property
    def unfinished(self) -> int:
        return self.running + self.waiting


def count(places: Sequence[FrozenTrial], trials: int) -> Counts:
    """Return what the `places` of a budget of `trials` come to; what is not begun is waiting, queued or not."""
    states = [trial.state for trial in places]
    complete, pruned, failed, running = (
        states.count(s) for s in (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL, TrialState.RUNNING)
    )
    waiting = max(0, trials - complete - pruned - failed - running)
    return Counts(complete=complete, pruned=pruned, failed=failed, running=running, waiting=waiting)


def places(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Return those of `trials` that take a place in the budget: not withdrawn, not replaced, nobody's double.

    Of several that were queued for one place, or to succeed one trial, the first counts: two workers may have queued
    at the same time.
    """
    replaced: set[int] = set()
    taken: set[int] = set()
    counted = []
    for trial in sorted(trials, key=lambda t: t.number):
        before, place = trial.user_attrs.get("retry_of"), trial.user_attrs.get("place")
        if before in replaced or (before is None and place is not None and place in taken):
            continue
        if before is not None:
            replaced.add(before)
        if not trial.user_attrs.get("withdrawn"):  # a withdrawn successor takes its predecessor's place with it
            counted.append(trial)
            taken |= {place} - {None}
    return [trial for trial in counted if trial.number not in replaced]


def covered(spans: Sequence[tuple[float, float]]) -> float:
    """Return the length of the union of `spans` of (start, end)."""
    total, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def seconds_used(trials: Sequence[FrozenTrial]) -> float:
    """Return for how long at least one of `trials` was running, over all workers and restarts.

    A trial whose worker was killed ran until its lease did, not until somebody came to take it up.
    """
    now = datetime.now(UTC)
    return covered(
        [
            (
                utc(trial.datetime_start).timestamp(),
                min(
                    utc(trial.datetime_complete or now).timestamp(),
                    lease_of(trial).get("until", float("inf")),
                ),
            )
            for trial in trials
            if trial.datetime_start is not None
        ]
    )


def utc(moment: datetime) -> datetime:
    """Return one of Optuna's times, which are this machine's local ones without saying so, in UTC."""
    return moment.astimezone(UTC)
