"""What it means that a storage is away: which errors may pass, waiting to open it, asking whether it is back."""

import threading
import time

from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from hpo.errors import HpoError, Interrupted, StorageError
from hpo.log import log
from hpo.search.storage import StorageBusy, open_storage, see_whether_it_answers

RETRY_SECONDS = 2.0
_FOR_GOOD = ("no such table", "readonly", "malformed", "not a database", "unable to open", "does not exist", "password")
_FULL = ("is full", "No space left", "could not extend file", "Disk quota exceeded", "File too large")


class StorageAway(HpoError):
    """The storage was away for longer than the study allows."""


class StoppedWhileAway(StorageAway, Interrupted):
    """The user asked to stop while the storage was away: no trial could be given back."""


class StudyGone(HpoError):
    """The study was deleted while it was in use."""


def is_away(error: BaseException) -> bool:
    """Whether `error` may pass by itself: nobody answers, or the connection was cut."""
    if isinstance(error, StorageInternalError | StorageError):
        return error.__cause__ is not None and is_away(error.__cause__)
    if type(error).__module__.startswith("grpc"):
        code = getattr(error, "code", lambda: None)()
        return getattr(code, "name", "") in ("UNAVAILABLE", "DEADLINE_EXCEEDED", "UNKNOWN")
    if isinstance(error, ConnectionError | TimeoutError):  # a server that is not up yet, a lock that a peer holds
        return True
    text = str(error)
    return isinstance(error, OperationalError | InterfaceError | PoolTimeout) and not any(
        each in text for each in (*_FOR_GOOD, *_FULL)
    )


def was_cut(error: BaseException | None) -> bool:
    """Whether a connection turned out to be cut, at once: a server that hangs is not asked a second time."""
    from hpo.search.postgres import NoAnswer  # psycopg, which is not needed until something is away

    if error is None or isinstance(getattr(error, "orig", None), NoAnswer):
        return False
    return getattr(error, "connection_invalidated", False) or was_cut(error.__cause__)


def full(error: BaseException | None) -> bool:
    return error is not None and (any(each in str(error) for each in _FULL) or full(error.__cause__))


def may_pass(error: Exception) -> bool:
    return is_away(error) or full(error)


def open_patiently(url: str, seconds: float, wait: bool = True) -> BaseStorage:
    """Return the storage at `url`, waited for (at most so long) while another process holds its lock.

    With `wait`, where the server does not answer too. It is logged once that it waits. Raises StorageError.
    """
    end, is_logged = time.monotonic() + seconds, False
    while True:
        try:
            return open_storage(url)
        except StorageError as error:
            waits = isinstance(error, StorageBusy) or (wait and is_away(error))
            if not waits or time.monotonic() >= end:
                raise
            if not is_logged:
                log.warning(f"waiting for the storage ({error})")
            is_logged = True
        time.sleep(min(RETRY_SECONDS, seconds))


class Probe:
    """Asks a storage that is away whether it answers again, every `pause` seconds, from a thread."""

    def __init__(self, storage: BaseStorage, pause: float) -> None:
        self.answered, self._stopped = threading.Event(), threading.Event()
        self._storage, self._pause = storage, pause
        threading.Thread(target=self._run, name="hpo-probe", daemon=True).start()

    def stop(self) -> None:
        self._stopped.set()

    def _run(self) -> None:
        while not self._stopped.wait(self._pause):
            try:
                see_whether_it_answers(self._storage)
            except Exception as error:
                if is_away(error):
                    continue  # any other fault is raised again where the storage is used
            self.answered.set()
            return


def reason(error: Exception) -> str:
    return f"{type(error).__name__}: {line(error)}"


def line(error: BaseException) -> str:
    """Return the first line of what is at the bottom of `error`."""
    while error.__cause__ is not None and not isinstance(error, StorageBusy):
        error = error.__cause__
    details = getattr(error, "details", None)
    text = details() if callable(details) else str(getattr(error, "orig", None) or error)
    return (str(text).splitlines() or [type(error).__name__])[0][:200]
