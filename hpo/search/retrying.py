"""Optuna's contract over a storage that may be away for a while, and several trials' writes at once.

How it is waited for is in `hpo.search.patient`.
"""

import copy
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Concatenate, ParamSpec, TypeVar

from optuna.distributions import BaseDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage, RDBStorage
from optuna.trial import FrozenTrial, TrialState, create_trial

from hpo.search.away import may_pass, was_cut
from hpo.search.batch import Batch, Queued, claim, enqueue, write_one_by_one, write_to_database
from hpo.search.clock import SYSTEM, Clock
from hpo.search.patient import PatientStorage
from hpo.search.schema import LEASE
from hpo.search.storage import exclusive
from hpo.search.trials import TrialCache

EPOCH_SECONDS = 0.25
"""How old what others see of a trial may be, beside the epoch that it is in."""
T = TypeVar("T")
P = ParamSpec("P")


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


class RetryingStorage(PatientStorage):
    """A storage as Optuna's code uses it: each call is waited for, and reports are kept where it is away."""

    def __init__(self, inner: BaseStorage, seconds: float, clock: Clock = SYSTEM) -> None:
        super().__init__(inner, seconds, clock)
        self._cache = TrialCache(inner) if isinstance(inner, RDBStorage) else None
        self._batch: Batch | None = None
        self._is_read = False
        """Whether trials were read since what is written is gathered."""
        self._kept_back: dict[tuple[int, int], float] = {}
        """Reports of epochs that were too short for a transaction each; they are in the next one."""
        self._epoch_at = self._read_at = self._written_at = -math.inf
        """When the last epoch was reported, when trials were last read and something last written (`Clock`)."""

    # Several trials at once.

    @property
    def gathers(self) -> bool:
        """Whether what is written of trials is gathered just now."""
        return self._batch is not None

    @contextmanager
    def together(self, epoch: bool = False) -> Iterator[set[int]]:
        """Within this, what is written of trials is gathered; then it is written, by a database in one transaction.

        The set has then the ids of those trials that a peer had ended before: they are left as they are. What is read
        within is without what is gathered, and of a database it is read once. Reports are kept where the storage is
        away, the rest is waited for.

        Of an `epoch` the reports are written at the latest with those of the first that ends `EPOCH_SECONDS` later, and
        trials are not read more often either, while epochs follow one another faster than that.
        """
        over: set[int] = set()
        now, before = self._clock.monotonic(), self._epoch_at
        is_short = epoch and now - before < EPOCH_SECONDS
        self._epoch_at = now if epoch else before
        kept, self._kept_back = self._kept_back, {}
        self._batch = Batch(reports=dict(kept))
        self._is_read = is_short and now - self._read_at < EPOCH_SECONDS
        try:
            yield over
        except BaseException:
            self._kept_back = kept
            raise
        finally:
            batch, self._batch = self._batch, None
        if not batch.ids:
            return
        if batch.has_reports_only and is_short and now - self._written_at < EPOCH_SECONDS:
            self._kept_back = batch.reports
            return
        self._written_at = now
        self._read_at = -math.inf if batch.ends else self._read_at
        if batch.has_reports_only:
            reports = [(*key, value) for key, value in batch.reports.items()]
            over |= self._or_keep(reports, lambda: self._write(batch)) or set()
        else:
            over |= self._write_patiently(batch)
        self.let_go(over | batch.ends.keys())

    def _write_what_was_kept_back(self) -> None:
        """Write the last epochs' reports, before something else is written of their trials."""
        if self._kept_back:
            with self.together():
                pass

    def let_go(self, trial_ids: Iterable[int]) -> None:
        """Have trials that are no longer this process's own be read again."""
        if self._cache is not None:
            self._cache.let_go(trial_ids)

    def claim(self, leases: Mapping[int, Mapping[str, Any]]) -> list[int]:
        """Make those of the trials RUNNING that are WAITING, each with its lease; return their ids."""
        if isinstance(self.inner, RDBStorage) and self._cache is not None:
            database, cache = self.inner, self._cache
            claimed = self.patiently(lambda: claim(database, leases))
            self.read(lambda: cache.take(claimed))
            return claimed
        return [trial_id for trial_id, lease in leases.items() if self._claim_one(trial_id, lease)]

    def _claim_one(self, trial_id: int, lease: Mapping[str, Any]) -> bool:
        try:
            if not self.set_trial_state_values(trial_id, TrialState.RUNNING):
                return False
            self.set_trial_system_attr(trial_id, LEASE, dict(lease))
        except UpdateFinishedTrialError:  # by a peer, which took this worker for dead
            return False
        return True

    def enqueue(self, study_id: int, queued: Sequence[Queued]) -> None:
        """Add WAITING trials to a study."""
        if not isinstance(self.inner, RDBStorage):
            for user, system in queued:
                trial = create_trial(state=TrialState.WAITING, user_attrs=dict(user), system_attrs=dict(system))
                self.create_new_trial(study_id, trial)
            return
        database = self.inner

        def call(again: bool) -> None:
            there = [trial.user_attrs for trial in self._waiting(study_id)] if again else []
            enqueue(database, study_id, [each for each in queued if each[0] not in there])

        self._again(call)

    def _write_patiently(self, batch: Batch) -> set[int]:
        def call(again: bool) -> set[int]:
            over = self._write(batch)
            ours = {trial_id for trial_id in over if again and self._is_told(trial_id, batch.ends.get(trial_id))}
            return over - ours

        return self._again(call)

    def _again(self, call: Callable[[bool], T]) -> T:
        """Return what `call` gives, as `patiently`; it is told whether it may have been done before.

        So it is where the connection was cut, and nobody could say so.
        """
        tries = itertools.count()
        return self.patiently(lambda: call(next(tries) > 0))

    def _write(self, batch: Batch) -> set[int]:
        if isinstance(self.inner, RDBStorage):
            try:
                return write_to_database(self.inner, batch)
            except Exception as error:
                if may_pass(error) or was_cut(error) or isinstance(error, KeyError):
                    raise  # else there is something that it does not take: all but that is stored
        return write_one_by_one(self._storage, batch)

    def _is_told(self, trial_id: int, end: tuple[TrialState, Sequence[float] | None] | None) -> bool:
        """Whether a trial has ended in that way."""
        state, values = end or (None, None)
        now = self._storage.get_trial(trial_id)
        return now.state == state and (values is None or now.values == list(values))

    # Optuna's contract, where more is to be done than to wait.

    def set_trial_intermediate_value(self, trial_id: int, step: int, intermediate_value: float) -> None:
        """Set it, or keep it to be sent as soon as the storage is back."""
        if self._batch is not None:
            self._batch.reports[trial_id, step] = intermediate_value
        else:
            report = (trial_id, step, intermediate_value)
            self._or_keep([report], lambda: self._storage.set_trial_intermediate_value(*report))

    def set_trial_param(
        self, trial_id: int, param_name: str, param_value_internal: float, distribution: BaseDistribution
    ) -> None:
        param = (param_value_internal, distribution)
        if self._batch is not None:
            self._batch.params[trial_id, param_name] = param
        else:
            storage = self.inner if isinstance(self.inner, RDBStorage) else self._storage  # not Optuna's cache
            self.patiently(lambda: storage.set_trial_param(trial_id, param_name, *param))

    def set_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None:
        if self._batch is not None:
            self._batch.user_attrs[trial_id, key] = value
        else:
            self.patiently(lambda: self._storage.set_trial_user_attr(trial_id, key, value))

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        if self._cache is not None:
            self._cache.note(trial_id, key, value)
        if self._batch is not None:
            self._batch.system_attrs[trial_id, key] = value
        else:
            self.patiently(lambda: self._storage.set_trial_system_attr(trial_id, key, value))

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        def call(again: bool) -> int:
            before = self._queued_before(study_id, template_trial) if again else None
            return self._storage.create_new_trial(study_id, template_trial) if before is None else before

        return self._again(call)

    def _queued_before(self, study_id: int, trial: FrozenTrial | None) -> int | None:
        """Return the id of the same trial, which was queued when the connection was cut; None: it was not."""
        if trial is None or trial.state != TrialState.WAITING or not trial.user_attrs:
            return None
        waiting = self._waiting(study_id)
        return next((each._trial_id for each in waiting if each.user_attrs == trial.user_attrs), None)

    def _waiting(self, study_id: int) -> list[FrozenTrial]:
        return self._storage.get_all_trials(study_id, deepcopy=False, states=(TrialState.WAITING,))

    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Sequence[float] | None = None) -> bool:
        if self._batch is not None and state != TrialState.RUNNING:
            self._batch.ends[trial_id] = (state, values)
            return True

        def call(again: bool) -> bool:
            try:
                return self._storage.set_trial_state_values(trial_id, state, values)
            except UpdateFinishedTrialError:
                if again and self._is_told(trial_id, (state, values)):
                    return True
                raise

        self._write_what_was_kept_back()
        if state != TrialState.RUNNING:
            self.let_go([trial_id])
            self._read_at = -math.inf
        return self._again(call)

    def delete_study(self, study_id: int) -> None:
        self.patiently(lambda: self._storage.delete_study(study_id))
        self._names.pop(study_id, None)

    def get_study_id_from_name(self, study_name: str) -> int:
        study_id = self.read(lambda: self._storage.get_study_id_from_name(study_name))
        self._names[study_id] = study_name
        return study_id

    def get_all_trials(self, study_id: int, deepcopy: bool = True, states: Any = None) -> list[FrozenTrial]:
        if self._cache is not None:
            cache, fresh = self._cache, self._batch is None or not self._is_read
            trials = self.read(lambda: cache.all(study_id, states, fresh))
            if fresh:
                self._is_read, self._read_at = True, self._clock.monotonic()
            return copy.deepcopy(trials) if deepcopy else trials
        return self.read(lambda: self._storage.get_all_trials(study_id, deepcopy=deepcopy, states=states))

    def get_trial(self, trial_id: int) -> FrozenTrial:
        if self._cache is not None:
            cache = self._cache
            return self.read(lambda: cache.one(trial_id))
        return self.read(lambda: self._storage.get_trial(trial_id))

    def remove_session(self) -> None:
        self._storage.remove_session()

    # The rest of it, waited for.

    create_new_study = _waited_for(BaseStorage.create_new_study)
    set_study_user_attr = _waited_for(BaseStorage.set_study_user_attr)
    set_study_system_attr = _waited_for(BaseStorage.set_study_system_attr)
    get_study_name_from_id = _waited_for(BaseStorage.get_study_name_from_id, reads=True)
    get_study_directions = _waited_for(BaseStorage.get_study_directions, reads=True)
    get_study_user_attrs = _waited_for(BaseStorage.get_study_user_attrs, reads=True)
    get_study_system_attrs = _waited_for(BaseStorage.get_study_system_attrs, reads=True)
    get_all_studies = _waited_for(BaseStorage.get_all_studies, reads=True)
    get_trial_id_from_study_id_trial_number = _waited_for(
        BaseStorage.get_trial_id_from_study_id_trial_number, reads=True
    )


@contextmanager
def locked(storage: RetryingStorage, url: str) -> Iterator[None]:
    """Hold the lock of the storage at `url`, waited for where the storage is away. Raises StorageAway, StorageError."""
    with ExitStack() as stack:
        storage.patiently(lambda: stack.enter_context(exclusive(url, storage.inner, storage.in_a_hurry)))
        yield
