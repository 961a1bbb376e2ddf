"""Leases: who trains a running trial, and until when that holds.

A worker has one lease, a system attribute of the study, so that every storage of Optuna's keeps it, and renews it from
a thread. Each trial that it trains names that lease. A trial whose worker's lease was not renewed, or whose process on
this machine is gone, is dead: others retry it.
"""

import math
import secrets
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from optuna.storages import BaseStorage, RDBStorage
from optuna.trial import FrozenTrial, TrialState

from hpo.processes import is_gone, this_process
from hpo.search import schema
from hpo.search.budget import held_until, lease_of, leases_in, worker_of
from hpo.search.clock import SYSTEM, Clock

JUST_NOW = 10.0
"""For how long, in seconds, a trial that is running without a lease may be one that was claimed just now."""
_RENEWED = 0.7
"""The share of its `grace` that a lease has left which is renewed every quarter of it."""


class LeaseMonitor:
    """Tells which running trials nobody trains any more.

    A lease says until when it holds by its worker's clock, which may be wrong. So what counts is that it was seen not
    to change for three quarters of `grace`, in which its worker would have renewed it three times.
    """

    def __init__(self, grace: float, clock: Clock = SYSTEM) -> None:
        self._grace, self._clock = grace, clock
        self._seen: dict[int, tuple[float | None, float]] = {}

    def is_dead(self, trial: FrozenTrial, leases: Mapping[str, float], trouble: float = -math.inf) -> bool | None:
        """Whether nobody trains this RUNNING trial any more; None: not known yet, ask again.

        `leases` are those of the study (`budget.leases_in`). `trouble` is when the storage was last known to be away
        (`Clock.monotonic`): nobody could renew a lease then.
        """
        if is_gone(lease_of(trial).get(schema.LEASE_WORKER, "")):
            return True
        until = held_until(trial, leases)  # without a lease: claimed just now, or killed right after
        if trial.number not in self._seen or self._seen[trial.number][0] != until:
            self._seen[trial.number] = (until, self._clock.monotonic())
        since = max(self._seen[trial.number][1], trouble)
        if self._clock.monotonic() - since >= 0.75 * self._grace:
            return True
        return False if until is not None and until >= self._clock.now() else None


class LeaseKeeper:
    """Keeps the lease of this worker, and renews it from a thread of its own that survives errors.

    Its trials are its own until it is stopped, or until they are ended. A second study of this process, or the same
    one opened again, is another worker, with another lease.
    """

    def __init__(self, storage: BaseStorage, study_id: int, grace: float, clock: Clock = SYSTEM) -> None:
        self._storage, self._study_id, self._grace, self._clock = storage, study_id, grace, clock
        self._id = secrets.token_hex(8)
        self._until = -math.inf
        self.failed_at = -math.inf
        """When the lease could not be renewed last (`Clock.monotonic`)."""
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def announce(self) -> None:
        """Say that this process has the study open to train it, before its first trial: data may take long to load.

        What cannot be written now is left out: it only keeps others from renaming or deleting the study.
        """
        with suppress(Exception):
            self._storage.set_study_system_attr(self._study_id, schema.OPENED + self._id, this_process())
        self.renew()
        self._start()

    def lease(self, attempt: int) -> Mapping[str, Any]:
        """Return what is to be written of a trial that this worker claims (schema.LEASE). Raises as it does."""
        if self._until - self._clock.now() < self._grace / 2:  # not held yet, or not renewed for long
            self._renew()
        self._start()
        return {schema.LEASE_WORKER: this_process(), schema.LEASE_ID: self._id, schema.LEASE_ATTEMPT: attempt}

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="hpo-lease", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Stop renewing the lease."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join(timeout=1)  # it may hang with its storage, and it ends with the process

    def renew(self) -> None:
        """Renew the lease, as the thread does every quarter of `grace`. Raises nothing."""
        try:
            self._renew()
        except Exception:  # a database that is away for a moment must not cost the trials their lease
            self.failed_at = self._clock.monotonic()

    def _run(self) -> None:
        while not self._stopped.wait(self._grace / 4):
            self.renew()
        if isinstance(self._storage, RDBStorage):
            self._storage.remove_session()

    def _renew(self) -> None:
        until = self._clock.now() + self._grace
        self._storage.set_study_system_attr(self._study_id, schema.WORKER_LEASE + self._id, until)
        self._until = until


def working(trials: Sequence[FrozenTrial], leases: Mapping[str, float], grace: float, now: float) -> dict[str, float]:
    """Return the processes that work on a study, each with until when its lease holds (seconds since 1970).

    `trials` are all of the study's, `leases` those of its workers (`budget.leases_in`), each given for `grace` seconds;
    `now` is the time, too. One that was killed on another machine counts until its lease has run out. One without a
    running trial may export, so it counts as long as it renews its lease; but not this process, which is here.
    """
    held: dict[str, float] = {}
    for trial in trials:
        worker, until = worker_of(trial), held_until(trial, leases)
        running = trial.state == TrialState.RUNNING
        if until is None and running and trial.datetime_start is not None:  # claimed just now, or killed right after
            until = trial.datetime_start.timestamp() + JUST_NOW
        if until is None or is_gone(worker):
            continue
        renews = worker != this_process() and until - now > _RENEWED * grace
        if renews or (running and until >= now):
            held[worker] = max(until, held.get(worker, until))
    return held


def at_work(trials: Sequence[FrozenTrial], attrs: Mapping[str, Any], grace: float, now: float) -> dict[str, float]:
    """Return what `working` does, and those processes that have opened the study to train it and have no trial yet.

    `attrs` are the study's `system_attrs`.
    """
    leases = leases_in(attrs)
    held = working(trials, leases, grace, now)
    for key, worker in attrs.items():
        if key.startswith(schema.OPENED) and isinstance(worker, str) and worker != this_process():
            until = leases.get(key.removeprefix(schema.OPENED), -math.inf)
            if until - now > _RENEWED * grace and not is_gone(worker):
                held[worker] = max(until, held.get(worker, until))
    return held
