"""Leases: who trains a running trial, and until when that holds.

A lease is a system attribute of the trial, so that every storage of Optuna's keeps it. Its worker renews it from a
thread; a trial whose lease ran out, or whose process on this machine is gone, is dead and may be taken up by others.
"""

import os
import socket
import threading
import time
from contextlib import suppress

from optuna.storages import BaseStorage, RDBStorage
from optuna.trial import FrozenTrial

from hpo.budget import LEASE_KEY, lease_of, utc
from hpo.processes import alive


def is_dead(trial: FrozenTrial, now: float, grace: float) -> bool:
    """Whether nobody trains this RUNNING trial any more: its lease ran out, or its process on this machine is gone."""
    lease = lease_of(trial)
    if not lease:  # killed between the claim and the lease
        started = trial.datetime_start
        return started is None or now - utc(started).timestamp() > grace
    if lease["until"] < now:
        return True
    place, _, pid = lease["worker"].rpartition(":")
    return place == _place() and not alive(int(pid))


def this_worker() -> str:
    """Return what names this process among all that may work on a study."""
    return f"{_place()}:{os.getpid()}"


def _place() -> str:
    """Return what tells this machine (and container) from others that may have processes of the same number."""
    with suppress(OSError):
        return f"{socket.gethostname()}:{os.readlink('/proc/self/ns/pid').strip('pid:[]')}"
    return socket.gethostname()


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
        lease = {"worker": this_worker(), "until": time.time() + self._grace, "attempt": attempt}
        self._storage.set_trial_system_attr(trial_id, LEASE_KEY, lease)
