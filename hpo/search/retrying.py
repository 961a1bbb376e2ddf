"""A storage that may be away for a while: a database that restarts or hangs, a network that is cut.

Reports are kept and sent later, so training continues; whatever else is asked waits until the storage is back. Past
`outage` seconds StorageAway is raised, and no trial is lost: its worker's lease expires, others retry it. Whether it
is back is asked from a thread: a server that hangs would stop who asks it for seconds.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Concatenate, ParamSpec, TypeVar

from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import BaseStorage, RDBStorage, get_storage
from optuna.trial import FrozenTrial, TrialState

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
from hpo.search.complete import CompleteTrialsCache
from hpo.search.reports import Report, ReportBuffer
from hpo.search.sqlite import reading
from hpo.search.storage import StorageBusy, close_storage, exclusive

T = TypeVar("T")
P = ParamSpec("P")
_LONGEST_PAUSE = 30.0


def _waited_for(
    method: Callable[Concatenate[BaseStorage, P], T], reads: bool = False
) -> Callable[Concatenate["RetryingStorage", P], T]:
    """Return that method of Optuna's contract, waited for until the storage answers; `reads`: it only reads."""
    name = method.__name__

    def call(self: "RetryingStorage", /, *args: P.args, **keys: P.kwargs) -> T:
        def once() -> T:
            result: T = getattr(self._storage, name)(*args, **keys)
            return result

        return self.read(once) if reads else self.patiently(once)

    call.__name__, call.__doc__ = name, method.__doc__
    return call


class RetryingStorage(BaseStorage):
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
        self._complete = CompleteTrialsCache(inner, self._storage) if isinstance(inner, RDBStorage) else None
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
        raise TypeError("a RetryingStorage cannot be copied to another process: open the storage there, by its address")

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
                raise StoppedWhileAway(
                    f"interrupted while the storage was away ({self._why}); no trial is lost: the running ones are "
                    "free once their leases expire, run the same command again to resume"
                )
            self._probe.answered.wait(0.1)

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

    # Optuna's contract, where more is to be done than to wait.

    def set_trial_intermediate_value(self, trial_id: int, step: int, intermediate_value: float) -> None:
        """Set it, or keep it to be sent as soon as the storage is back."""
        report = (trial_id, step, intermediate_value)
        if self._probe is not None and not self._probe.answered.is_set():
            self._reports.append(report)
            return
        try:
            self._flush_and(lambda: self._storage.set_trial_intermediate_value(*report))
        except Exception as error:
            if may_pass(error):
                self._reports.append(report)
            self._note(error)

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        tries = 0

        def call() -> int:
            nonlocal tries
            tries += 1
            before = self._queued_before(study_id, template_trial) if tries > 1 else None
            return self._storage.create_new_trial(study_id, template_trial) if before is None else before

        return self.patiently(call)

    def _queued_before(self, study_id: int, trial: FrozenTrial | None) -> int | None:
        """Return the id of the same trial, which was queued when the connection was cut; None: it was not."""
        if trial is None or trial.state != TrialState.WAITING or not trial.user_attrs:
            return None
        waiting = self._storage.get_all_trials(study_id, deepcopy=False, states=(TrialState.WAITING,))
        return next((each._trial_id for each in waiting if each.user_attrs == trial.user_attrs), None)

    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Sequence[float] | None = None) -> bool:
        tries = 0

        def call() -> bool:
            nonlocal tries
            tries += 1
            try:
                return self._storage.set_trial_state_values(trial_id, state, values)
            except UpdateFinishedTrialError:
                now = self._storage.get_trial(trial_id)
                if tries > 1 and now.state == state and (values is None or now.values == list(values)):
                    return True  # it was written when the connection was cut
                raise

        return self.patiently(call)

    def delete_study(self, study_id: int) -> None:
        self.patiently(lambda: self._storage.delete_study(study_id))
        self._names.pop(study_id, None)

    def get_study_id_from_name(self, study_name: str) -> int:
        study_id = self.read(lambda: self._storage.get_study_id_from_name(study_name))
        self._names[study_id] = study_name
        return study_id

    def get_all_trials(self, study_id: int, deepcopy: bool = True, states: Any = None) -> list[FrozenTrial]:
        if self._complete is not None and states == (TrialState.COMPLETE,) and not deepcopy:
            complete = self._complete
            return self.read(lambda: complete.trials(study_id))
        return self.read(lambda: self._storage.get_all_trials(study_id, deepcopy=deepcopy, states=states))

    def remove_session(self) -> None:
        self._storage.remove_session()

    # The rest of it, waited for.

    create_new_study = _waited_for(BaseStorage.create_new_study)
    set_study_user_attr = _waited_for(BaseStorage.set_study_user_attr)
    set_study_system_attr = _waited_for(BaseStorage.set_study_system_attr)
    set_trial_param = _waited_for(BaseStorage.set_trial_param)
    set_trial_user_attr = _waited_for(BaseStorage.set_trial_user_attr)
    set_trial_system_attr = _waited_for(BaseStorage.set_trial_system_attr)
    get_study_name_from_id = _waited_for(BaseStorage.get_study_name_from_id, reads=True)
    get_study_directions = _waited_for(BaseStorage.get_study_directions, reads=True)
    get_study_user_attrs = _waited_for(BaseStorage.get_study_user_attrs, reads=True)
    get_study_system_attrs = _waited_for(BaseStorage.get_study_system_attrs, reads=True)
    get_all_studies = _waited_for(BaseStorage.get_all_studies, reads=True)
    get_trial_id_from_study_id_trial_number = _waited_for(
        BaseStorage.get_trial_id_from_study_id_trial_number, reads=True
    )
    get_trial = _waited_for(BaseStorage.get_trial, reads=True)


@contextmanager
def locked(storage: RetryingStorage, url: str) -> Iterator[None]:
    """Hold the lock of the storage at `url`, waited for where the storage is away. Raises StorageAway, StorageError."""
    with ExitStack() as stack:
        storage.patiently(lambda: stack.enter_context(exclusive(url, storage.inner, storage.in_a_hurry)))
        yield
