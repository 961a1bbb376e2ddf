"""The arithmetic of a study's budget: which trials take a place in it, what they come to, how long they took."""

import itertools
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from optuna.trial import FrozenTrial, TrialState

LEASE_KEY = "hpo:lease"
"""The system attribute that holds a running trial's lease (`hpo.search.lease`)."""


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
    """Return those of `trials` that take a place in the budget: not withdrawn, not replaced, no double of another."""
    return sorted(_holders(trials).values(), key=lambda t: t.number)


def _holders(trials: Sequence[FrozenTrial]) -> dict[Hashable, FrozenTrial]:
    """Return by its place each trial that takes one.

    A place is held by one trial at a time. A new trial takes a free place; a successor (`retry_of`) takes the place of
    the trial that it names, if that holds one; a trial that is withdrawn frees its place. Whatever else is there was
    queued twice by workers that did not see each other, and does not count.
    """
    holders: dict[Hashable, FrozenTrial] = {}
    held_by: dict[int, Hashable] = {}
    for trial in sorted(trials, key=lambda t: t.number):
        before = trial.user_attrs.get("retry_of")
        if before is None:
            place = _place(trial)
            if place in holders:
                continue
        else:
            place = held_by.get(before)
            if place not in holders or holders[place].number != before:
                continue
        if trial.user_attrs.get("withdrawn"):
            holders.pop(place, None)
            continue
        holders[place] = trial
        held_by[trial.number] = place
    return holders


def _place(trial: FrozenTrial) -> Hashable:
    """Return the place that a new trial asks for; one that was queued without any has its own."""
    place = trial.user_attrs.get("place")
    return ("number", trial.number) if place is None else place


@dataclass(frozen=True, kw_only=True)
class Refill:
    """What a queue needs: new trials, each with its place and the index of its `start_with` entry, or withdrawals."""

    queue: Sequence[tuple[int, int | None]]
    withdraw: Sequence[FrozenTrial]


def refill(trials: Sequence[FrozenTrial], budget: int, n_starts: int, most: int) -> Refill:
    """Return what brings the queue of a study with these `trials` to its `budget`, at most `most` new trials at once.

    Withdrawn are the WAITING trials that the budget has no place for: doubles, then those that nobody has started,
    the last first, and only then successors, which have a checkpoint to resume from.
    """
    holders = _holders(trials)
    counted = list(holders.values())
    numbers = {trial.number for trial in counted}
    taken = {place[1] if isinstance(place, tuple) else place for place in holders}
    started = {trial.user_attrs.get("start_with") for trial in counted}
    starts = [i for i in range(n_starts) if i not in started]
    n_new = min(max(0, budget - len(counted)), most)
    free = (place for place in itertools.count() if place not in taken)
    queue = [(place, starts[i] if i < len(starts) else None) for i, place in enumerate(itertools.islice(free, n_new))]
    waiting = [trial for trial in trials if trial.state == TrialState.WAITING]
    doubles = [trial for trial in waiting if trial.number not in numbers]
    last_first = sorted(
        (trial for trial in waiting if trial.number in numbers),
        key=lambda trial: ("retry_of" in trial.user_attrs, -trial.number),
    )
    return Refill(queue=queue, withdraw=[*doubles, *last_first[: max(0, len(counted) - budget)]])


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


def wrong_row(trial: FrozenTrial) -> str | None:
    """Return what is wrong with what a storage holds of a trial, as far as it is read here; None: nothing.

    Whoever can write the storage can write anything there, and a place is part of a file's name.
    """
    attrs, lease = trial.user_attrs, trial.system_attrs.get(LEASE_KEY, {})
    for key in ("place", "seed", "retry_of", "attempt", "lineage", "start_with", "best_epoch", "joined"):
        if key in attrs and not (type(attrs[key]) is int and 0 <= attrs[key] < 1 << 64):
            return f"its {key} is {attrs[key]!r:.100}, no whole number of at least 0"
    if not isinstance(attrs.get("metrics", {}), Mapping):
        return f"its metrics are {attrs['metrics']!r:.100}"
    if not isinstance(trial.system_attrs.get("fixed_params", {}), Mapping):
        return f"its fixed_params are {trial.system_attrs['fixed_params']!r:.100}"
    kinds = {"worker": str, "until": (int, float), "attempt": int}
    sound = isinstance(lease, Mapping) and all(isinstance(lease[k], kinds[k]) for k in kinds if k in lease)
    return None if sound else f"its lease is {lease!r:.100}"
