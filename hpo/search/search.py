"""The Optuna side of a study: ask for a trial, report its epochs, tell its end.

Everything goes through Optuna's storage interface, so the dashboard shows it all. `hpo.search.queue` says how the
budget is kept and trials are claimed, `hpo.search.lease` who trains a trial, `hpo.search.view` what is known of a
study, and `hpo.search.schema` what is stored. Params are sampled when a trial is claimed.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.pruners import _filter_study
from optuna.trial import FrozenTrial, TrialState

from hpo.errors import HpoError, masked
from hpo.search import schema
from hpo.search.away import StorageAway
from hpo.search.budget import Counts, seconds_used
from hpo.search.claim import Claim, ClaimedTrial
from hpo.search.clock import SYSTEM, Clock
from hpo.search.front import maximizes, others_in
from hpo.search.halving import Halving
from hpo.search.lease import LeaseKeeper
from hpo.search.queue import Lost, Queue
from hpo.search.retrying import RetryingStorage
from hpo.search.samplers import PerTrialSampler, looks_at_its_trial_only
from hpo.search.seen import LEARNING, AtOneRung
from hpo.search.view import Best, StudyView, TrialReader
from hpo.seeds import derive
from hpo.study.space import Space
from hpo.study.spec import StudySpec


class Search:
    """One study in its storage. Make it with `hpo.search.opening.open_search`, and close it at the end.

    Whatever reads or writes the storage raises StorageAway, StudyGone, or StorageError.
    """

    def __init__(
        self,
        study: optuna.Study,
        storage: RetryingStorage,
        spec: StudySpec,
        space: Space,
        metric: str,
        clock: Clock = SYSTEM,
    ) -> None:
        self.study, self.storage, self.spec, self.space = study, storage, spec, space
        self.metric, self.maximize, self.others = metric, maximizes(study), others_in(self.attrs.get(schema.IDENTITY))
        study_id = storage.get_study_id_from_name(study.study_name)
        self.making: str = self.attrs.get(schema.MAKING, "")
        """What tells this study from another one of its name, made before or in another storage."""
        self._clock = clock
        self._claimed: dict[int, ClaimedTrial] = {}
        self._elsewhere: set[int] = set()
        """The trials that turned out to be ended by a peer."""
        self._seen: StudyView | None = None
        self.lease = LeaseKeeper(storage.inner, study_id, spec.grace, clock)
        self._reader = TrialReader(storage, study_id, spec)
        self._queue = Queue(study, storage, spec, space, self._reader, self.lease, self._claimed, clock)

    @property
    def halving(self) -> Halving | None:
        """The rule by which trials are paused and resumed; None: they are trained in one go."""
        return self._queue.halving

    def pause_by(self, halving: Halving) -> None:
        """Have that rule say from now on which trials are paused and resumed (`hpo.search.pruning`)."""
        self._queue.halving = halving
        if self.spec.sampler.name in LEARNING and not self.others:
            assert isinstance(self.study.sampler, PerTrialSampler)
            self.study.sampler.see = AtOneRung(halving, self.spec.epochs, self.spec.constraints, maximize=self.maximize)

    # Ask.

    def ask(self, wait: bool = True) -> Claim | None:
        """Claim the next trial of the budget and sample its params; None where there is none left to claim.

        Without `wait`, StorageAway is raised as soon as the storage does not answer or a peer holds its lock.
        """
        return next(iter(self.ask_up_to(1, wait)), None)

    def ask_up_to(self, n: int, wait: bool = True) -> list[Claim]:
        """Claim up to `n` trials; fewer where there are no more. `wait` is that of `ask`."""
        claims: list[Claim] = []
        while len(claims) < n:
            try:
                with nullcontext() if wait else self.storage.at_once():
                    self._queue.look_for_the_dead()
                    taken = self._queue.take(n - len(claims))
            except StorageAway:
                if wait or not claims:
                    raise
                break
            if not taken:
                break
            claims += self._claim(taken)
        return claims

    def _claim(self, taken: Sequence[FrozenTrial]) -> list[Claim]:
        """Sample the params of claimed trials; return those that are still ours, and can use their params."""
        claims: dict[int, Claim] = {}
        self.study._thread_local.cached_all_trials = None  # as Study.ask does, but it makes a trial beyond the budget
        assert isinstance(self.study.sampler, PerTrialSampler)
        try:
            with self.study.sampler.together(), self.storage.together() as over:
                for frozen in taken:
                    try:
                        claims[frozen._trial_id] = self._sample(frozen)
                    except (KeyError, TypeError, ValueError) as error:
                        if not frozen.system_attrs.get(schema.FIXED_PARAMS):
                            raise
                        self.fail(frozen.number, f"the params that it was queued with cannot be used: {error}")
        except Exception as error:
            for frozen in taken:
                self.forget(frozen.number)
                with suppress(HpoError), self.storage.at_once():
                    self._queue.give_back(frozen._trial_id, f"{type(error).__name__}: {error}")
            raise
        for trial_id in over & claims.keys():  # a peer took this worker for dead meanwhile
            self.forget(claims.pop(trial_id).number)
        return list(claims.values())

    def _sample(self, frozen: FrozenTrial) -> Claim:
        trial = ClaimedTrial(self.study, frozen._trial_id, self._clock)
        self._claimed[trial.number] = trial
        attrs, n_reported = frozen.user_attrs, len(frozen.intermediate_values)
        seed, slot = attrs.get(schema.SEED), attrs.get(schema.SLOT, trial.number)
        if seed is None:  # queued by an older version
            seed = derive(self.spec.seed, "init", slot)
            trial.set_user_attr(schema.SEED, seed)
        return Claim(
            number=trial.number,
            seed=seed,
            params=self.space.suggest(trial),
            attempt=attrs.get(schema.ATTEMPT, 1),
            slot=slot,
            lineage=attrs.get(schema.LINEAGE, frozen.number),
            retry_of=attrs.get(schema.RETRY_OF),
            is_resumed=n_reported > 0,
            n_reported=n_reported,
            n_restarts=attrs.get(schema.RESTARTED, 0),
            paused_at=n_reported or attrs.get(schema.PAUSED_AT, 0),
            seconds=sum(end - start for start, end in attrs.get(schema.TRAINED, ())),
        )

    def forget(self, number: int) -> None:
        """Forget a trial that a peer has ended: it is no longer ours."""
        if (trial := self._claimed.pop(number, None)) is not None:
            self.storage.let_go([trial._trial_id])

    def repair(self) -> bool:
        """Retry the trials whose worker died (`Queue.repair`); return whether to call it again in a moment."""
        return self._queue.repair()

    def tidy(self, seen: StudyView | None = None) -> None:
        """Withdraw what is still queued of a study that is done (`seen`: a fresh view).

        Where no lock is, workers may queue a trial twice.
        """
        everything = (seen or self.view()).everything
        if any(trial.state == TrialState.WAITING for trial in everything):
            self._queue.fill()

    def settle_stop(self) -> None:
        """Ask the rules of `stop`, and say what has ended the search (`Queue.settle_stop`)."""
        self._queue.settle_stop()

    def drain_lost(self) -> list[Lost]:
        """Return other workers' trials that were ended here since the last call."""
        return self._queue.drain_lost()

    # Report.

    @contextmanager
    def together(self) -> Iterator[set[int]]:
        """Within this, what is reported, annotated and told is gathered; at its end it is written, together.

        The set has then the numbers of the trials that a peer had ended before; until then `complete` and the like
        return True. Pruners see what was told before. Where one looks at other trials' reports, nothing is gathered.
        """
        with suppress(StorageAway), self.storage.at_once():
            if not self.storage.away:
                self._queue.look_for_the_dead()
        elsewhere: set[int] = set()
        self._elsewhere = elsewhere
        if not looks_at_its_trial_only(self.study.pruner):
            yield elsewhere
            return
        ids = {trial._trial_id: number for number, trial in self._claimed.items()}
        with self.storage.together(epoch=True) as over:
            yield elsewhere
        elsewhere |= {ids[trial_id] for trial_id in over}

    def repeat(self, number: int, values: Sequence[float]) -> None:
        """Report what a trial's predecessor had reported in its epochs."""
        for epoch, value in enumerate(values):
            with suppress(UpdateFinishedTrialError):
                self._claimed[number].report(value, step=epoch)

    def report(self, number: int, epoch: int, value: float) -> bool:
        """Report a trial's value at an epoch (counted from 0); return whether to continue training it.

        A retried trial may report an epoch again: Optuna keeps the first value, which is the same.
        """
        trial = self._claimed[number]
        if epoch in trial._cached_frozen_trial.intermediate_values:  # it was resumed from scratch
            return True
        try:
            trial.report(value, step=epoch)
        except UpdateFinishedTrialError:
            self._elsewhere.add(number)
            return False
        try:
            with self.storage.at_once():
                if self.storage.away:
                    return True
                if not self.storage.gathers:
                    self._queue.look_for_the_dead()
                return not trial.should_prune()
        except StorageAway:
            return True  # just now: continue training

    def call(
        self, number: int, function: Callable[..., Any], names: Sequence[str], on_report: Callable[[int, float], None]
    ) -> tuple[Mapping[str, Any], Mapping[str, float] | None]:
        """Run `function`, a plain Optuna objective, on a trial; see `ClaimedTrial.run`."""
        return self._claimed[number].run(function, names, on_report, self.spec.objective)

    def annotate(self, number: int, attrs: Mapping[str, Any]) -> None:
        """Set the trial's attributes (keys of `hpo.search.schema`), unless a peer has ended it."""
        for key, value in attrs.items():
            with suppress(UpdateFinishedTrialError):
                self._claimed[number].annotate(key, value)

    # Tell.

    def complete(self, number: int, value: float, others: Mapping[str, float] | None = None) -> bool:
        """Tell that a trial is complete; `others` has its values of the other metrics. Returns as `prune`."""
        return self._finish(number, TrialState.COMPLETE, [value, *((others or {})[name] for name in self.others)])

    def prune(self, number: int) -> bool:
        """Tell that a trial was pruned; return False where a peer has ended it before."""
        return self._finish(number, TrialState.PRUNED)

    def fail(self, number: int, reason: str) -> bool:
        """Tell that a trial failed for good, and why; return False where a peer has ended it before."""
        self.annotate(number, {schema.ERROR: masked(reason)})
        return self._finish(number, TrialState.FAIL)

    def pause(self, number: int) -> None:
        """Have a trial wait until it is resumed, here or by a peer (`halving`); it is no longer ours then."""
        trial = self._claimed.pop(number)
        frozen = trial._cached_frozen_trial
        attrs = {
            schema.PAUSED_AT: len(frozen.intermediate_values),
            schema.TRAINED: [*frozen.user_attrs.get(schema.TRAINED, []), trial.span()],
        }
        self.study._thread_local.cached_all_trials = None
        try:
            for key, value in attrs.items():
                trial.set_user_attr(key, value)
            self.storage.set_trial_state_values(trial._trial_id, TrialState.WAITING)
        except UpdateFinishedTrialError:
            self._elsewhere.add(number)

    def give_back(self, number: int, reason: str) -> bool:
        """End a trial that was interrupted; a successor with its slot, params and seed is queued.

        Return False, and do nothing, for one that was ended already.
        """
        trial = self._claimed.get(number)
        if trial is None:
            return False
        trial.note_seconds()
        self._queue.give_back(trial._trial_id, reason)
        self.forget(number)
        return True

    def _finish(self, number: int, state: TrialState, values: list[float] | None = None) -> bool:
        """Do what Study.tell does, but that it reads the trial, all of which is known here."""
        trial = self._claimed.pop(number)
        frozen = trial._cached_frozen_trial
        if state == TrialState.PRUNED and frozen.last_step is not None and not self.others:
            last = frozen.intermediate_values[frozen.last_step]
            values = None if math.isnan(last) else [last]
        self.study._thread_local.cached_all_trials = None
        trial.note_seconds()
        study = _filter_study(self.study, frozen)
        try:
            study.sampler.after_trial(study, frozen, state, values)
            self.storage.set_trial_state_values(trial._trial_id, state, values)
        except UpdateFinishedTrialError:
            self._elsewhere.add(number)
            return False
        return True

    # What is known of the study.

    def view(self) -> StudyView:
        """Return the study as it is now: all trials are read, once. Ask it, where several things are asked in a row."""
        everything, stopped = self._reader.read(), self._reader.stopped()
        metrics = {self.metric: self.maximize, **self.others}
        self._seen = StudyView(everything, self.spec, self.space, metrics, stopped=stopped)
        return self._seen

    def trials(self) -> list[FrozenTrial]:
        """Return the trials that hold the slots of the budget, in the order of their numbers."""
        return list(self.view().trials)

    def counts(self) -> Counts:
        """Return how many trials there are of each state."""
        return self.view().counts

    def best(self, number: int | None = None) -> Best | None:
        """Return the best complete trial, or the complete trial `number`; see `StudyView.best`."""
        return self.view().best(number)

    def may_be_best(self, value: float) -> bool:
        """Whether no trial of the last view is better: it reads nothing, where `best` reads the storage."""
        return self._seen is None or self._seen.none_is_better(value)

    def seconds_used(self, seen: StudyView | None = None) -> float:
        """Return for how long at least one trial was running until now (`seen`: a fresh view), over all restarts."""
        return seconds_used((seen or self.view()).everything, self._reader.leases())

    def seconds_left(self, timeout: float, seen: StudyView | None = None) -> float:
        """Return what is left of `timeout` (`seen`: a fresh view): nothing once it has ended the study."""
        if self.attrs.get(schema.TIMED_OUT, 0.0) >= timeout:
            return 0.0
        return max(0.0, timeout - self.seconds_used(seen))

    @property
    def attrs(self) -> dict[str, Any]:
        """The study's `user_attrs`: keys of `hpo.search.schema`."""
        return self.study.user_attrs

    def remember(self, key: str, value: Any) -> None:
        """Set one of the study's `user_attrs`: a key of `hpo.search.schema`."""
        self.study.set_user_attr(key, value)

    def close(self) -> None:
        """Stop renewing the lease and close the storage."""
        self.lease.stop()
        self.storage.close()
