"""Leases: who trains a running trial, and until when that holds.

A lease is a system attribute of the trial, so that every storage of Optuna's keeps it. Its worker renews it from a
thread; a trial whose lease was not renewed, or whose process on this machine is gone, is dead: others retry it.
"""

import math
import threading

from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage, RDBStorage
from optuna.trial import FrozenTrial

from hpo.processes import is_gone, this_process
from hpo.search import schema
from hpo.search.budget import lease_of
from hpo.search.clock import SYSTEM, Clock


class LeaseMonitor:
    """Tells which running trials nobody trains any more.

    A lease says until when it holds by its worker's clock, which may be wrong. So what counts is that it was seen not
    to change for three quarters of `grace`, in which its worker would have renewed it three times.
    """

    def __init__(self, grace: float, clock: Clock = SYSTEM) -> None:
        self._grace, self._clock = grace, clock
        self._seen: dict[int, tuple[float | None, float]] = {}

    def is_dead(self, trial: FrozenTrial, trouble: float = -math.inf) -> bool | None:
        """Whether nobody trains this RUNNING trial any more; None: not known yet, ask again.

        `trouble` is when the storage was last known to be away (`Clock.monotonic`): nobody could renew a lease then.
        """
        lease = lease_of(trial)
        if is_gone(lease.get(schema.LEASE_WORKER, "")):
            return True
        until = lease.get(schema.LEASE_UNTIL)  # without a lease: claimed just now, or killed right after
        if trial.number not in self._seen or self._seen[trial.number][0] != until:
            self._seen[trial.number] = (until, self._clock.monotonic())
        since = max(self._seen[trial.number][1], trouble)
        if self._clock.monotonic() - since >= 0.75 * self._grace:
            return True
        return False if until is not None and until >= self._clock.now() else None


class LeaseKeeper:
    """Renews the leases of the trials that this process trains, from a thread of its own that survives errors."""

    def __init__(self, storage: BaseStorage, grace: float, clock: Clock = SYSTEM) -> None:
        self._storage, self._grace, self._clock = storage, grace, clock
        self._attempts: dict[int, int] = {}
        self.failed_at = -math.inf
        """When a lease could not be renewed last (`Clock.monotonic`)."""
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def add(self, trial_id: int, attempt: int) -> None:
        """Take a lease and keep renewing it until `drop`. Raises what the storage raises, and keeps nothing then."""
        self._renew(trial_id, attempt)
        self._attempts[trial_id] = attempt
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="hpo-lease", daemon=True)
            self._thread.start()

    def drop(self, trial_id: int) -> None:
        """Stop renewing a trial's lease."""
        self._attempts.pop(trial_id, None)

    @property
    def held(self) -> frozenset[int]:
        """The ids of the trials whose leases are renewed."""
        return frozenset(self._attempts)

    def stop(self) -> None:
        """Stop renewing all leases."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join(timeout=1)  # it may hang with its storage, and it ends with the process

    def renew(self) -> None:
        """Renew all leases, as the thread does every quarter of `grace`. Raises nothing."""
        for trial_id, attempt in list(self._attempts.items()):
            try:
                self._renew(trial_id, attempt)
            except (UpdateFinishedTrialError, KeyError):  # a peer has ended the trial, or the study was deleted
                self.drop(trial_id)
            except Exception:  # a database that is away for a moment must not cost the trial its lease
                self.failed_at = self._clock.monotonic()

    def _run(self) -> None:
        while not self._stopped.wait(self._grace / 4):
            self.renew()
        if isinstance(self._storage, RDBStorage):
            self._storage.remove_session()

    def _renew(self, trial_id: int, attempt: int) -> None:
        until = self._clock.now() + self._grace
        lease: dict[str, str | float] = {
            schema.LEASE_WORKER: this_process(),
            schema.LEASE_UNTIL: until,
            schema.LEASE_ATTEMPT: attempt,
        }
        self._storage.set_trial_system_attr(trial_id, schema.LEASE, lease)
