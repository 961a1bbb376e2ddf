"""A storage that may be away for a while: a database that restarts or hangs, a network that is cut.

Reports are kept and sent later, so training goes on; whatever else is asked waits until the storage is back. Past
`outage` seconds StorageAway is raised, and no trial is lost: its worker's lease runs out, others take it up. Whether it
is back is asked from a thread: a server that hangs would stop who asks it for seconds.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import BaseStorage, RDBStorage, get_storage
from optuna.study._study_direction import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from hpo.errors import HpoError
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
from hpo.search.sqlite import reading
from hpo.search.storage import StorageBusy, close_storage, complete_ids

T = TypeVar("T")
_LONGEST_PAUSE = 30.0
_AT_ONCE = 8
"""From how many new trials on all are read at once, not one by one."""


class RetryingStorage(BaseStorage):
    """`inner`, waited for where it is away. `say` is told once that it is, and once that it is back.

    Once `interrupt` says so, nothing is waited for any more: StoppedWhileAway is raised where the storage is away.
    """

    def __init__(self, inner: BaseStorage, seconds: float, say: Callable[[str], None] = lambda text: None) -> None:
        self.inner, self._seconds, self.say = inner, seconds, say
        self.interrupt: Callable[[], bool] = lambda: False
        self._storage = get_storage(inner)  # for a database, Optuna's own cache of finished trials
        self._names: dict[int, str] = {}
        self._known_complete: dict[int, dict[int, FrozenTrial]] = {}
        self._kept: deque[tuple[int, int, float]] = deque()
        self._away_since: float | None = None
        self._why = ""
        self.back_at = -math.inf
        self._probe: Probe | None = None
        self._pause = RETRY_SECONDS
        self._at_once = False

    def __getstate__(self) -> Any:
        raise TypeError("a RetryingStorage cannot be copied to another process: open the storage there, by its address")

    @property
    def away(self) -> bool:
        """Whether it did not answer when it was last asked."""
        return self._away_since is not None

    @property
    def away_for_good(self) -> bool:
        """Whether it has been away for longer than the study allows."""
        return self._away_since is not None and time.monotonic() - self._away_since > self._seconds

    def in_a_hurry(self) -> bool:
        """Whether nothing is to be waited for: not even another process's lock."""
        return self._at_once or self.interrupt()

    def patiently(self, call: Callable[[], T]) -> T:
        """Return what `call` gives, as soon as the storage answers. Raises StorageAway, StudyGone."""
        while True:
            self._wait_until_it_answers()
            try:
                result = self._send_kept_and(call)
            except StorageBusy as error:
                if self._at_once:  # it is not away
                    raise StorageAway(str(error)) from error
                self._note(error)
            except Exception as error:  # SQLAlchemy's, gRPC's, Optuna's
                self._note(error)
            else:
                return result

    def _wait_until_it_answers(self) -> None:
        """Return at once where it is not away."""
        while self._probe is not None and not self._probe.answered.is_set():
            if self._at_once or self.away_for_good:
                raise StorageAway(
                    f"the storage has been away for {self._seconds:g} s ({self._why}); no trial is lost: run the same "
                    "command again to go on"
                )
            if self.interrupt():
                raise StoppedWhileAway(
                    f"interrupted while the storage was away ({self._why}); no trial is lost: the running ones are "
                    "free once their leases run out, run the same command again to go on"
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

    def _read(self, call: Callable[[], T]) -> T:
        def read() -> T:
            with reading():
                return call()

        return self.patiently(read)

    def _send_kept_and(self, call: Callable[[], T]) -> T:
        self._send_kept()
        result = self._on_a_live_connection(call)
        if self._away_since is not None:
            self.say(f"the storage is back after {time.monotonic() - self._away_since:.0f} s")
            self._away_since, self._probe, self._pause = None, None, RETRY_SECONDS
            self.back_at = time.monotonic()
        return result

    def _send_kept(self) -> None:
        """Send what is kept. What the storage refuses for good is dropped: it would keep all others from it."""
        while self._kept:
            each = self._kept[0]
            try:
                self._report(*each)
            except Exception as error:
                if may_pass(error):
                    raise
                self._kept.popleft()
                self._raise_if_gone(error)
                if not isinstance(error, UpdateFinishedTrialError):  # a peer has taken the trial over
                    self.say(f"a report of the trial with the id {each[0]} is dropped: {reason(error)}")
            else:
                self._kept.popleft()

    def _report(self, trial_id: int, step: int, value: float) -> None:
        self._on_a_live_connection(lambda: self._storage.set_trial_intermediate_value(trial_id, step, value))

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
            self._away_since = time.monotonic()
            self.say(f"the storage does not answer ({self._why}): training goes on, what is reported is kept")
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

    def set_trial_intermediate_value(self, trial_id: int, step: int, intermediate_value: float) -> None:
        """Set it, or keep it to be sent as soon as the storage is back."""
        if self._probe is None or self._probe.answered.is_set():
            try:
                self._send_kept_and(
                    lambda: self._storage.set_trial_intermediate_value(trial_id, step, intermediate_value)
                )
                return
            except Exception as error:
                if may_pass(error):
                    self._kept.append((trial_id, step, intermediate_value))
                self._note(error)
        else:
            self._kept.append((trial_id, step, intermediate_value))

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
                    return True  # it was told when the connection was cut
                raise

        return self.patiently(call)

    def close(self) -> None:
        """Let the storage go."""
        if self._probe is not None:
            self._probe.stop()
        close_storage(self.inner)

    # The rest of Optuna's contract, waited for.

    def create_new_study(self, directions: Sequence[StudyDirection], study_name: str | None = None) -> int:
        return self.patiently(lambda: self._storage.create_new_study(directions, study_name))

    def delete_study(self, study_id: int) -> None:
        self.patiently(lambda: self._storage.delete_study(study_id))
        self._names.pop(study_id, None)

    def set_study_user_attr(self, study_id: int, key: str, value: Any) -> None:
        self.patiently(lambda: self._storage.set_study_user_attr(study_id, key, value))

    def set_study_system_attr(self, study_id: int, key: str, value: Any) -> None:
        self.patiently(lambda: self._storage.set_study_system_attr(study_id, key, value))

    def get_study_id_from_name(self, study_name: str) -> int:
        study_id = self._read(lambda: self._storage.get_study_id_from_name(study_name))
        self._names[study_id] = study_name
        return study_id

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
