"""A storage that may be away for a while: a database that restarts, a network that is cut.

Reports are kept and sent later, so training goes on; whatever else is asked waits until the storage is back. Past
`outage` seconds StorageAway is raised, and no trial is lost: its worker's lease runs out, others take it up.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import BaseStorage, RDBStorage, get_storage
from optuna.study._study_direction import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from hpo.errors import HpoError, StorageError
from hpo.storage import complete_ids, open_storage, reading

T = TypeVar("T")
RETRY_SECONDS = 2.0
_LONGEST_PAUSE = 30.0
_AT_ONCE = 8
"""From how many new trials on all are read at once, not one by one."""
_FOR_GOOD = ("no such table", "readonly", "malformed", "not a database", "unable to open", "does not exist", "password")
_FULL = ("is full", "No space left", "could not extend file")


class StorageAway(HpoError):
    """The storage was away for longer than the study allows."""


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


def _was_cut(error: BaseException | None) -> bool:
    return error is not None and (getattr(error, "connection_invalidated", False) or _was_cut(error.__cause__))


def _full(error: BaseException | None) -> bool:
    return error is not None and (any(each in str(error) for each in _FULL) or _full(error.__cause__))


def open_patiently(url: str, seconds: float) -> BaseStorage:
    """Return the storage at `url`, waited for (at most so long) where nobody answers yet. Raises StorageError."""
    end = time.monotonic() + seconds
    while True:
        try:
            return open_storage(url)
        except StorageError as error:
            if not is_away(error) or time.monotonic() >= end:
                raise
        time.sleep(RETRY_SECONDS)


class Patient(BaseStorage):
    """`inner`, waited for where it is away. `say` is told once that it is, and once that it is back."""

    def __init__(self, inner: BaseStorage, seconds: float, say: Callable[[str], None] = lambda text: None) -> None:
        self.inner, self._seconds, self.say = inner, seconds, say
        self._storage = get_storage(inner)  # for a database, Optuna's own cache of finished trials
        self._known_complete: dict[int, dict[int, FrozenTrial]] = {}
        self._kept: deque[tuple[int, int, float]] = deque()
        self._away_since: float | None = None
        self._tried = self.back_at = -math.inf
        self._pause = RETRY_SECONDS
        self._at_once = False

    @property
    def away(self) -> bool:
        """Whether it did not answer when it was last asked."""
        return self._away_since is not None

    @property
    def away_for_good(self) -> bool:
        """Whether it has been away for longer than the study allows."""
        return self._away_since is not None and time.monotonic() - self._away_since > self._seconds

    def patiently(self, call: Callable[[], T]) -> T:
        """Return what `call` gives, as soon as the storage answers. Raises StorageAway."""
        while True:
            try:
                result = self._send_kept_and(call)
            except Exception as error:  # SQLAlchemy's, gRPC's, Optuna's
                self._note(error)
                if self._at_once or self.away_for_good:
                    raise StorageAway(
                        f"the storage has been away for {self._seconds:g} s ({_line(error)}); no trial is lost: run "
                        "the same command again to go on"
                    ) from error
                time.sleep(min(RETRY_SECONDS, self._seconds))
            else:
                return result

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Within this, nothing is waited for: StorageAway is raised as soon as the storage does not answer."""
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False

    def _read(self, call: Callable[[], T]) -> T:
        def read() -> T:
            with reading():
                return call()

        return self.patiently(read)

    def _send_kept_and(self, call: Callable[[], T]) -> T:
        while self._kept:
            trial_id, step, value = self._kept[0]
            with suppress(UpdateFinishedTrialError):  # a peer has taken the trial over
                self._storage.set_trial_intermediate_value(trial_id, step, value)
            self._kept.popleft()
        result = self._on_a_live_connection(call)
        if self._away_since is not None:
            self.say(f"the storage is back after {time.monotonic() - self._away_since:.0f} s")
            self._away_since, self.back_at = None, time.monotonic()
        return result

    def _on_a_live_connection(self, call: Callable[[], T]) -> T:
        """Call once more where the pool's connection turned out to be cut while nobody used it."""
        try:
            return call()
        except Exception as error:
            if self.away or not _was_cut(error):
                raise
            return call()

    def _note(self, error: Exception) -> None:
        """Note that the storage is away; raise `error` again where it is another fault."""
        self._tried = time.monotonic()
        if _full(error):
            raise HpoError(f"the storage's disk is full ({_line(error)}); make room, and run it again") from error
        if not is_away(error):
            raise error
        if self._away_since is None:
            self._away_since = time.monotonic()
            self.say(f"the storage does not answer ({_line(error)}): training goes on, what is reported is kept")

    def set_trial_intermediate_value(self, trial_id: int, step: int, intermediate_value: float) -> None:
        """Set it, or keep it to be sent as soon as the storage is back."""
        self._kept.append((trial_id, step, intermediate_value))
        begun = time.monotonic()
        if self._away_since is not None and begun - self._tried < self._pause:
            return
        only = len(self._kept) == 1
        try:
            if only:
                self._on_a_live_connection(
                    lambda: self._storage.set_trial_intermediate_value(trial_id, step, intermediate_value)
                )
                self._kept.clear()
            self._send_kept_and(lambda: None)
        except UpdateFinishedTrialError:
            self._kept.clear()
            raise
        except Exception as error:
            self._note(error)
            # a network that is cut answers nothing: each try takes seconds in which nothing is trained
            self._pause = min(max(RETRY_SECONDS, 4 * (time.monotonic() - begun)), _LONGEST_PAUSE)

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
                    return True  # it was told when the connection was cut
                raise

        return self.patiently(call)

    # The rest of Optuna's contract, waited for.

    def create_new_study(self, directions: Sequence[StudyDirection], study_name: str | None = None) -> int:
        return self.patiently(lambda: self._storage.create_new_study(directions, study_name))

    def delete_study(self, study_id: int) -> None:
        self.patiently(lambda: self._storage.delete_study(study_id))

    def set_study_user_attr(self, study_id: int, key: str, value: Any) -> None:
        self.patiently(lambda: self._storage.set_study_user_attr(study_id, key, value))

    def set_study_system_attr(self, study_id: int, key: str, value: Any) -> None:
        self.patiently(lambda: self._storage.set_study_system_attr(study_id, key, value))

    def get_study_id_from_name(self, study_name: str) -> int:
        return self._read(lambda: self._storage.get_study_id_from_name(study_name))

    def get_study_name_from_id(self, study_id: int) -> str:
        return self._read(lambda: self._storage.get_study_name_from_id(study_id))

    def get_study_directions(self, study_id: int) -> list[StudyDirection]:
        return self._read(lambda: self._storage.get_study_directions(study_id))

    def get_study_user_attrs(self, study_id: int) -> dict[str, Any]:
        return self._read(lambda: self._storage.get_study_user_attrs(study_id))

    def get_study_system_attrs(self, study_id: int) -> dict[str, Any]:
        return self._read(lambda: self._storage.get_study_system_attrs(study_id))

    def get_all_studies(self) -> list[Any]:
        return self._read(self._storage.get_all_studies)

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        return self.patiently(lambda: self._storage.create_new_trial(study_id, template_trial))

    def set_trial_param(self, trial_id: int, param_name: str, param_value_internal: float, distribution: Any) -> None:
        self.patiently(lambda: self._storage.set_trial_param(trial_id, param_name, param_value_internal, distribution))

    def get_trial_id_from_study_id_trial_number(self, study_id: int, trial_number: int) -> int:
        return self._read(lambda: self._storage.get_trial_id_from_study_id_trial_number(study_id, trial_number))

    def set_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None:
        self.patiently(lambda: self._storage.set_trial_user_attr(trial_id, key, value))

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        self.patiently(lambda: self._storage.set_trial_system_attr(trial_id, key, value))

    def get_trial(self, trial_id: int) -> FrozenTrial:
        return self._read(lambda: self._storage.get_trial(trial_id))

    def get_all_trials(self, study_id: int, deepcopy: bool = True, states: Any = None) -> list[FrozenTrial]:
        if isinstance(self.inner, RDBStorage) and states == (TrialState.COMPLETE,) and not deepcopy:
            return self._complete(self.inner, study_id)
        return self._read(lambda: self._storage.get_all_trials(study_id, deepcopy=deepcopy, states=states))

    def _complete(self, storage: RDBStorage, study_id: int) -> list[FrozenTrial]:
        """Return the complete trials, which pruners ask for each epoch; only those that are new are read."""
        known = self._known_complete.get(study_id, {})
        ids = self._read(lambda: complete_ids(storage, study_id, len(known)))
        new = set(ids or ()) - known.keys()
        if len(new) > _AT_ONCE:
            states = (TrialState.COMPLETE,)
            read = self._read(lambda: self._storage.get_all_trials(study_id, deepcopy=False, states=states))
        else:
            read = [self.get_trial(trial_id) for trial_id in new]
        if new:
            everything = [*known.values(), *(trial for trial in read if trial._trial_id not in known)]
            known = {trial._trial_id: trial for trial in sorted(everything, key=lambda trial: trial.number)}
            self._known_complete[study_id] = known
        return list(known.values())

    def remove_session(self) -> None:
        self._storage.remove_session()


def _line(error: BaseException) -> str:
    """Return the first line of what is at the bottom of `error`."""
    while error.__cause__ is not None:
        error = error.__cause__
    details = getattr(error, "details", None)
    text = details() if callable(details) else str(getattr(error, "orig", None) or error)
    return (str(text).splitlines() or [type(error).__name__])[0][:200]
