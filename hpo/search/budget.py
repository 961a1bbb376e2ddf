"""The arithmetic of a study's budget: which trials hold its slots, what they come to, how long they took."""

import itertools
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, cast

from optuna.trial import FrozenTrial, TrialState

from hpo.search import schema
from hpo.search.constraints import is_real, wrong_constraints
from hpo.search.front import leading
from hpo.search.starts import Starts

_NUMBERS = (
    schema.SLOT,
    schema.SEED,
    schema.RETRY_OF,
    schema.ATTEMPT,
    schema.LINEAGE,
    schema.START_WITH,
    schema.BEST_EPOCH,
    schema.JOINED,
    schema.PAUSED_AT,
    schema.RESTARTED,
    schema.N_PARAMETERS,
)
"""The attributes of a trial that are whole numbers."""
_LEASE_TYPES: Mapping[str, type | tuple[type, ...]] = {
    schema.LEASE_WORKER: str,
    schema.LEASE_ID: str,
    schema.LEASE_UNTIL: (int, float),
    schema.LEASE_ATTEMPT: int,
}


def lease_of(trial: FrozenTrial) -> Mapping[str, Any]:
    """Return a trial's lease, with the keys `hpo.search.schema.LEASE_...`; empty where nobody has claimed it."""
    return cast(Mapping[str, Any], trial.system_attrs.get(schema.LEASE, {}))


def leases_in(attrs: Mapping[str, Any]) -> dict[str, float]:
    """Return until when each worker's lease holds, by its id, from a study's `system_attrs`."""
    return {
        key.removeprefix(schema.WORKER_LEASE): float(value)
        for key, value in attrs.items()
        if key.startswith(schema.WORKER_LEASE) and isinstance(value, int | float)
    }


def held_until(trial: FrozenTrial, leases: Mapping[str, float]) -> float | None:
    """Return until when a trial is, or was, its worker's; None where that is not known. See `leases_in`."""
    lease = lease_of(trial)
    until: float | None = lease.get(schema.LEASE_UNTIL, leases.get(lease.get(schema.LEASE_ID, "")))
    return until


def worker_of(trial: FrozenTrial) -> str:
    """Return the process that trains a running trial; `unknown` where its lease is not written yet."""
    return str(lease_of(trial).get(schema.LEASE_WORKER, "unknown"))


def is_paused(trial: FrozenTrial) -> bool:
    """Whether a trial waits to be resumed, by `hpo.search.halving`: of those that wait only it has reported."""
    return trial.state == TrialState.WAITING and bool(trial.intermediate_values)


def is_new(trial: FrozenTrial) -> bool:
    """Whether a trial waits that has never been trained, nor has one that it succeeds."""
    return trial.state == TrialState.WAITING and not is_paused(trial) and schema.RETRY_OF not in trial.user_attrs


def is_retry(trial: FrozenTrial) -> bool:
    """Whether a WAITING trial succeeds one that was in training."""
    return trial.state == TrialState.WAITING and not is_new(trial) and not is_paused(trial)


def in_order_of_end(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Return those of `trials` that have ended, the first first."""
    ended = [trial for trial in trials if trial.state.is_finished() and trial.datetime_complete is not None]
    return sorted(ended, key=lambda trial: (trial.datetime_complete, trial.number))


@dataclass(frozen=True, kw_only=True)
class Counts:
    """A study's trials by state. A trial that a successor replaced is not counted."""

    complete: int
    pruned: int
    failed: int
    running: int
    waiting: int
    paused: int = 0

    def by_state(self) -> dict[str, int]:
        """Return the counts by name, as `--json` has them."""
        states = ("complete", "pruned", "failed", "running", "paused", "waiting")
        return {state: getattr(self, state) for state in states}

    @property
    def finished(self) -> int:
        return self.complete + self.pruned + self.failed

    @property
    def unfinished(self) -> int:
        return self.running + self.waiting + self.paused


def count(holders: Sequence[FrozenTrial], trials: int) -> Counts:
    """Return what the slots of a budget of `trials` come to; one that nobody holds is waiting, queued or not."""
    states = [trial.state for trial in holders]
    complete, pruned, failed, running = (
        states.count(s) for s in (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL, TrialState.RUNNING)
    )
    paused = sum(is_paused(trial) for trial in holders)
    waiting = max(0, trials - complete - pruned - failed - running - paused)
    return Counts(complete=complete, pruned=pruned, failed=failed, running=running, waiting=waiting, paused=paused)


def holders(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Return those of `trials` that hold a slot of the budget: not withdrawn, not replaced, no double of another."""
    return sorted(_by_slot(trials).values(), key=lambda t: t.number)


def _by_slot(trials: Sequence[FrozenTrial]) -> dict[Hashable, FrozenTrial]:
    """Return each slot's holder.

    A slot is held by one trial at a time. A new trial takes a free slot; a successor (`retry_of`) takes the slot of
    the trial that it names, if that holds one; a trial that is withdrawn frees its slot. Any other trial was queued
    twice by workers that did not see each other, and does not count.
    """
    by_slot: dict[Hashable, FrozenTrial] = {}
    held_by: dict[int, Hashable] = {}
    for trial in sorted(trials, key=lambda t: t.number):
        before = trial.user_attrs.get(schema.RETRY_OF)
        if before is None:
            slot = _wanted_slot(trial)
            if slot in by_slot:
                continue
        else:
            slot = held_by.get(before)
            if slot not in by_slot or by_slot[slot].number != before:
                continue
        if trial.user_attrs.get(schema.WITHDRAWN):
            by_slot.pop(slot, None)
            continue
        by_slot[slot] = trial
        held_by[trial.number] = slot
    return by_slot


def _wanted_slot(trial: FrozenTrial) -> Hashable:
    """Return the slot that a new trial was queued for; one that was queued without any has its own."""
    slot: int | None = trial.user_attrs.get(schema.SLOT)
    return ("number", trial.number) if slot is None else slot


@dataclass(frozen=True, kw_only=True)
class Refill:
    """What a queue needs: new trials, each with its slot and the index of its `start_with` entry, or withdrawals."""

    queue: Sequence[tuple[int, int | None]]
    withdraw: Sequence[FrozenTrial]


def refill(trials: Sequence[FrozenTrial], budget: int, starts: Starts, most: int) -> Refill:
    """Return what brings the queue of a study with these `trials` to its `budget`, at most `most` new trials at once.

    Withdrawn are the WAITING trials that the budget has no slot for: doubles, then those that nobody has started,
    the last first and those of `start_with` last, and only then successors, which have a checkpoint to resume from.
    Paused ones stay. Where entries of `start_with` are untried and no slot is free, those that nobody has started give
    way to them.
    """
    by_slot = _by_slot(trials)
    counted = list(by_slot.values())
    numbers = {trial.number for trial in counted}
    taken = {slot[1] if isinstance(slot, tuple) else slot for slot in by_slot}
    n_new = min(max(0, budget - len(counted)), most)
    free = (slot for slot in itertools.count() if slot not in taken)
    waiting = [trial for trial in trials if trial.state == TrialState.WAITING and not is_paused(trial)]
    doubles = [trial for trial in waiting if trial.number not in numbers]
    last_first = sorted(
        (trial for trial in waiting if trial.number in numbers),
        key=lambda trial: (schema.RETRY_OF in trial.user_attrs, not starts.gives_way(trial), -trial.number),
    )
    n_beyond = max(0, len(counted) - budget)
    for_starts = [t for t in last_first[n_beyond:] if schema.SLOT in t.user_attrs and starts.gives_way(t)]
    for_starts = for_starts[: max(0, len(starts.untried) - n_new)]
    slots = [*itertools.islice(free, n_new), *(trial.user_attrs[schema.SLOT] for trial in for_starts)]
    queue = list(zip(slots, itertools.chain(starts.untried, itertools.repeat(None)), strict=False))
    return Refill(queue=queue, withdraw=[*doubles, *last_first[:n_beyond], *for_starts])


Rank = tuple[float, ...]


def rank(trial: FrozenTrial, *, maximize: bool, others: Sequence[bool] = ()) -> Rank:
    """Return what complete trials that break no constraint are sorted by, the best first (`rank_of`).

    `others`: of each metric beside the one that leads, whether more of it is better.
    """
    attrs = trial.user_attrs
    metrics, size = attrs.get(schema.METRICS, {}), attrs.get(schema.N_PARAMETERS)
    values = zip((trial.values or ())[1:], others, strict=False)
    return rank_of(leading(trial) or 0.0, metrics, size, trial.number, maximize=maximize, others=list(values))


def rank_of(
    value: float,
    metrics: Mapping[str, Any],
    size: int | None,
    number: int,
    *,
    maximize: bool,
    others: Sequence[tuple[float, bool]] = (),
) -> Rank:
    """Return a rank by value; of equals the lower validation loss is better, then the smaller network, the earlier.

    `metrics` are those of the trial's best epoch, `size` is how many parameters its network has. Of several metrics the
    `others`, each with whether more of it is better, come before the loss: the best trial is on the Pareto front.
    """
    signed = [-x if more else x for x, more in ((value, maximize), *others)]
    return (*signed, _number(metrics.get("valid_loss")), _number(size), number)


def _number(x: Any) -> float:
    """Return a number that can be compared; what is none, or not known, comes last."""
    return float(x) if type(x) in (int, float) and not math.isnan(x) else math.inf


def covered(spans: Sequence[tuple[float, float]]) -> float:
    """Return the length of the union of `spans` of (start, end)."""
    total, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def seconds_used(trials: Sequence[FrozenTrial], leases: Mapping[str, float]) -> float:
    """Return for how long at least one of `trials` was running, over all workers and restarts.

    A trial whose worker was killed ran until its lease expired, not until somebody retried it. See `leases_in`.
    """
    spans = []
    for trial in trials:
        until = held_until(trial, {} if trial.state.is_finished() else leases)
        spans += [(start, end if until is None else min(end, until)) for start, end in spans_of(trial)]
    return covered(spans)


def spans_of(trial: FrozenTrial) -> list[tuple[float, float]]:
    """Return from when until when a trial was trained, in seconds since 1970: once, unless it was paused meanwhile.

    Optuna's times are this machine's local ones without saying so, which is what `timestamp` takes them for.
    """
    spans = [(float(start), float(end)) for start, end in trial.user_attrs.get(schema.TRAINED, ())]
    if trial.datetime_start is None or trial.state == TrialState.WAITING:
        return spans
    start = trial.datetime_start.timestamp()
    if any(abs(known - start) < 1e-3 for known, _ in spans):  # it was pruned while it was paused
        return spans
    if (seconds := trial.user_attrs.get(schema.SECONDS)) is not None:  # the date was set meanwhile
        return [*spans, (start, start + float(seconds))]
    return [*spans, (start, (trial.datetime_complete or datetime.now(UTC)).timestamp())]


def trained(trial: FrozenTrial) -> float:
    """Return for how many seconds a trial was trained."""
    return covered(spans_of(trial))


def wrong_row(trial: FrozenTrial) -> str | None:
    """Return what is wrong with what a storage holds of a trial, as far as it is read here; None: nothing.

    Who can write the storage can write anything there, and a slot is part of a file's name.
    """
    attrs, lease = trial.user_attrs, trial.system_attrs.get(schema.LEASE, {})
    for key in _NUMBERS:
        if key in attrs and not (type(attrs[key]) is int and 0 <= attrs[key] < 1 << 64):
            return f"its {key} is {attrs[key]!r:.100}, not a whole number of at least 0"
    rounds = attrs.get(schema.ROUNDS, [])
    if not (isinstance(rounds, list) and all(type(each) is int and each >= 0 for each in rounds)):
        return f"its {schema.ROUNDS} are {rounds!r:.100}"
    trained = attrs.get(schema.TRAINED, [])
    if not (isinstance(trained, list) and all(map(_is_span, trained))):
        return f"its {schema.TRAINED} is {trained!r:.100}"
    seconds = attrs.get(schema.SECONDS, 0.0)
    if not (is_real(seconds) and 0 <= seconds < 1 << 53):
        return f"its {schema.SECONDS} are {seconds!r:.100}"
    for key, stored in ((schema.METRICS, attrs), (schema.FIXED_PARAMS, trial.system_attrs)):
        if not isinstance(stored.get(key, {}), Mapping):
            return f"its {key} are {stored[key]!r:.100}"
    sound = isinstance(lease, Mapping) and all(isinstance(lease[k], t) for k, t in _LEASE_TYPES.items() if k in lease)
    return wrong_constraints(trial) if sound else f"its lease is {lease!r:.100}"


def wrong_values(trial: FrozenTrial, n: int) -> str | None:
    """Return what is wrong with the values of a trial of a study of `n` metrics; None: nothing."""
    values = trial.values or []
    if trial.state != TrialState.COMPLETE or (len(values) == n and all(map(is_real, values))):
        return None
    metrics = "one metric" if n == 1 else f"{n} metrics"
    return f"it is complete with the values {values!r:.100}, and the study has {metrics}"


def _is_span(span: Any) -> bool:
    return isinstance(span, list) and len(span) == 2 and all(type(x) in (int, float) for x in span)
