"""A storage that may be away for a while: a database that restarts or hangs, a network that is cut.

Reports are kept and sent later, so training continues; whatever else is asked waits until the storage is back. Past
`outage` seconds StorageAway is raised, and no trial is lost: its worker's lease expires, others retry it. Whether it
is back is asked from a thread: a server that hangs would stop who asks it for seconds.
"""

import math
from abc import ABC
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import BaseStorage, get_storage

from hpo.errors import HpoError
from hpo.log import log
from hpo.search.away import (
    RETRY_SECONDS,
    Probe,
    StoppedWhileAway,
    StorageAway,
    StudyGone,
    full,
    is_away,
    line,
    may_pass,
    reason,
    was_cut,
)
from hpo.search.clock import SYSTEM, Clock
from hpo.search.reports import Report, ReportBuffer
from hpo.search.sqlite import reading
from hpo.search.storage import StorageBusy, close_storage

T = TypeVar("T")
P = ParamSpec("P")
_LONGEST_PAUSE = 30.0


class PatientStorage(BaseStorage, ABC):
    """`inner`, waited for where it is away. It is logged once when it is, and once when it is back.

    Once `interrupt` says so, nothing is waited for any more: StoppedWhileAway is raised where the storage is away.
    """

    def __init__(
        self,
        inner: BaseStorage,
        seconds: float,
        clock: Clock = SYSTEM,
    ) -> None:
        self.inner, self._seconds, self._clock = inner, seconds, clock
        self.interrupt: Callable[[], bool] = lambda: False
        self._storage = get_storage(inner)  # for a database, Optuna's own cache of finished trials
        self._reports = ReportBuffer()
        self._names: dict[int, str] = {}
        self._away_since: float | None = None
        self._why = ""
        self.back_at = -math.inf
        """When it was last known to be back after an outage (`Clock.monotonic`)."""
        self._probe: Probe | None = None
        self._pause = RETRY_SECONDS
        self._at_once = False

    def __getstate__(self) -> Any:
        raise TypeError(
            f"a {type(self).__name__} cannot be copied to another process: open the storage there, by its address"
        )

    # The policy: what is waited for, and until when.

    @property
    def away(self) -> bool:
        """Whether it did not answer when it was last asked."""
        return self._away_since is not None

    @property
    def away_for_good(self) -> bool:
        """Whether it has been away for longer than the study allows."""
        return self._away_since is not None and self._clock.monotonic() - self._away_since > self._seconds

    def in_a_hurry(self) -> bool:
        """Whether nothing is to be waited for: not even another process's lock."""
        return self._at_once or self.interrupt()

    def patiently(self, call: Callable[[], T]) -> T:
        """Return what `call` gives, as soon as the storage answers. Raises StorageAway, StudyGone."""
        while True:
            self._wait_until_it_answers()
            try:
                return self._flush_and(call)
            except StorageBusy as error:
                if self._at_once:  # it is not away
                    raise StorageAway(str(error)) from error
                self._note(error)
            except Exception as error:  # SQLAlchemy's, gRPC's, Optuna's
                self._note(error)

    def read(self, call: Callable[[], T]) -> T:
        """Return what `call`, which only reads, gives, as soon as the storage answers. Raises as `patiently`."""

        def once() -> T:
            with reading():
                return call()

        return self.patiently(once)

    def _wait_until_it_answers(self) -> None:
        """Return at once where it is not away."""
        while self._probe is not None and not self._probe.answered.is_set():
            if self._at_once or self.away_for_good:
                raise StorageAway(
                    f"the storage has been away for {self._seconds:g} s ({self._why}); no trial is lost: run the same "
                    "command again to resume"
                )
            if self.interrupt():
                raise self.stopped()
            self._probe.answered.wait(0.1)

    def stopped(self) -> StoppedWhileAway:
        """Return what is raised where the user asks to stop while it is away."""
        return StoppedWhileAway(
            f"interrupted while the storage was away ({self._why}); no trial is lost: the running ones are "
            "free once their leases expire, run the same command again to resume"
        )

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Within this, nothing is waited for: StorageAway is raised as soon as the storage does not answer."""
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False

    def _flush_and(self, call: Callable[[], T]) -> T:
        self._reports.flush(self._send, self._refused)
        result = self._on_a_live_connection(call)
        if self._away_since is not None:
            log.warning(f"the storage is back after {self._clock.monotonic() - self._away_since:.0f} s")
            self._away_since, self._probe, self._pause = None, None, RETRY_SECONDS
            self.back_at = self._clock.monotonic()
        return result

    def _or_keep(self, reports: Sequence[Report], send: Callable[[], T]) -> T | None:
        """Return what `send` gives, or keep the reports to be sent as soon as the storage is back."""
        if self._probe is not None and not self._probe.answered.is_set():
            self._reports.extend(reports)
            return None
        try:
            return self._flush_and(send)
        except Exception as error:
            if may_pass(error):
                self._reports.extend(reports)
            self._note(error)
        return None

    def _send(self, report: Report) -> None:
        self._on_a_live_connection(lambda: self._storage.set_trial_intermediate_value(*report))

    def _refused(self, report: Report, error: Exception) -> None:
        self._raise_if_gone(error)
        if not isinstance(error, UpdateFinishedTrialError):  # a peer has taken the trial over
            log.warning(f"a report of the trial with the id {report[0]} is dropped: {reason(error)}")

    def _on_a_live_connection(self, call: Callable[[], T]) -> T:
        """Call once more where the pool's connection turned out to be cut while nobody used it."""
        try:
            return call()
        except Exception as error:
            if self.away or not was_cut(error):
                raise
            return call()

    def _note(self, error: Exception) -> None:
        """Note that the storage is away, and have it asked from now on; raise `error` where it is another fault."""
        if full(error):
            raise HpoError(f"the storage's disk is full ({line(error)}); make room, and run it again") from error
        if not is_away(error):
            self._raise_if_gone(error)
            raise error
        self._why = line(error)
        if self._away_since is None:
            self._away_since = self._clock.monotonic()
            log.warning(f"the storage does not answer ({self._why}): training continues, what is reported is kept")
        elif self._probe is not None:  # it has answered, but not to this call
            self._pause = min(2 * self._pause, _LONGEST_PAUSE)
        self._probe = Probe(self.inner, max(0.05, min(self._pause, self._seconds)))

    def _raise_if_gone(self, error: Exception) -> None:
        """Raise StudyGone where what was asked for is not there, since its study is not."""
        if not isinstance(error, KeyError | StorageInternalError):
            return
        for study_id, name in self._names.items():
            try:
                with reading():
                    self.inner.get_study_name_from_id(study_id)
            except KeyError:
                raise StudyGone(
                    f"study {name!r} is no longer in the storage: it was deleted while it was in use, its trials with "
                    "it; run the same command again to start from scratch"
                ) from error

    def close(self) -> None:
        """Close the storage."""
        if self._probe is not None:
            self._probe.stop()
        close_storage(self.inner)
