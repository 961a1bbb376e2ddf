"""Leases: who trains a running trial, and until when that holds.

A lease is a system attribute of the trial, so that every storage of Optuna's keeps it. Its worker renews it from a
thread; a trial whose lease ran out, or whose process on this machine is gone, is dead and may be taken up by others.
"""

import threading
import time
from contextlib import suppress

from optuna.storages import BaseStorage, RDBStorage
from optuna.trial import FrozenTrial

from hpo.budget import LEASE_KEY, lease_of, utc
from hpo.processes import is_gone, this_process

_SURELY_OUT = 3600.0
"""For how long a lease has run out (seconds) that no clock of another machine that is wrong explains."""


class Deaths:
    """Tells which running trials nobody trains any more.

    A lease says until when it holds by its worker's clock, which may be wrong. So one that has run out counts only
    after it was seen not to change for half of `grace`, in which its worker would have renewed it twice.
    """

    def __init__(self, grace: float) -> None:
        self._grace = grace
        self._seen: dict[int, tuple[float, float]] = {}

    def is_dead(self, trial: FrozenTrial) -> bool | None:
        """Whether nobody trains this RUNNING trial any more; None: that is to be seen, ask again."""
        lease, now = lease_of(trial), time.time()
        if is_gone(lease.get("worker", "")):
            return True
        begun = utc(trial.datetime_start).timestamp() if trial.datetime_start is not None else 0.0
        until = lease.get("until", begun + self._grace)  # without a lease: claimed just now, or killed right after
        before, since = self._seen.get(trial.number, (None, 0.0))
        if until != before:
            since = time.monotonic()
            self._seen[trial.number] = (until, since)
        if until >= now:
            return False
        return True if now - until > _SURELY_OUT or time.monotonic() - since >= self._grace / 2 else None


class LeaseKeeper:
    """Renews the leases of the trials that this process trains, from a thread of its own that survives errors."""

    def __init__(self, storage: BaseStorage, grace: float) -> None:
        self._storage, self._grace = storage, grace
        self._attempts: dict[int, int] = {}
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def add(self, trial_id: int, attempt: int) -> None:
        self._attempts[trial_id] = attempt
        self._renew(trial_id, attempt)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="hpo-lease", daemon=True)
            self._thread.start()

    def drop(self, trial_id: int) -> None:
        self._attempts.pop(trial_id, None)

    def stop(self) -> None:
        self._stopped.set()
        if self._thread is not None:
            self._thread.join(timeout=5)

    def _run(self) -> None:
        while not self._stopped.wait(self._grace / 4):
            for trial_id, attempt in list(self._attempts.items()):
                with suppress(Exception):  # a database that is away for a moment must not cost the trial its lease
                    self._renew(trial_id, attempt)
        if isinstance(self._storage, RDBStorage):
            self._storage.remove_session()

    def _renew(self, trial_id: int, attempt: int) -> None:
        lease = {"worker": this_process(), "until": time.time() + self._grace, "attempt": attempt}
        self._storage.set_trial_system_attr(trial_id, LEASE_KEY, lease)
