"""The Optuna side of a study: the budget, claims and leases, ask, report and tell.

Everything goes through Optuna's storage interface, so the dashboard shows it all. The budget is a queue of WAITING
trials; a claim is the storage's own compare-and-set WAITING -> RUNNING; a lease is an attribute of the running trial
(whose, until when), renewed by a thread. A trial whose lease ran out, or that was interrupted, becomes FAIL, and a
successor that names it (`retry_of`) takes over its place in the budget. Params are sampled when a trial is claimed.
"""

import json
import math
import random
import time
import uuid
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

from hpo.errors import InputError, StorageError, did_you_mean, masked
from hpo.processes import this_process
from hpo.search.away import open_patiently
from hpo.search.budget import Counts, count, lease_of, places, refill, seconds_used, wrong_row
from hpo.search.lease import LeaseKeeper, LeaseMonitor
from hpo.search.retrying import RetryingStorage, StorageAway
from hpo.search.samplers import make_pruner, make_sampler
from hpo.search.storage import close_storage, exclusive, exists, open_storage
from hpo.seeds import derive
from hpo.study.space import Space
from hpo.study.spec import StudySpec

_QUEUE_CHUNK = 16
"""How many trials are queued at a time: whoever asks for all trials reads those that wait anew each time."""
_IDENTITY = "hpo:identity"
_MAKING = "hpo:making"
DATA, CODE = "hpo:data", "hpo:code"
"""The study's attributes that hold the fingerprints of its data and of its objective's source."""
_MAKING_SECONDS = 5.0
STUDY_FILE = "hpo:study_file"
"""The study's attribute that holds its study file, for workers that have none."""
TIMED_OUT = "hpo:timed_out"
"""The study's attribute that holds the `timeout` that has ended it."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A trial that is ours to train. `number` is Optuna's; `seed` is the one its weights are drawn from."""

    number: int
    seed: int
    params: Mapping[str, Any]
    attempt: int
    place: int
    """Its place in the budget, which its successors take over."""
    lineage: int
    """The number of the first trial that had its params and seed: a retry's checkpoint is of its own lineage only."""
    is_retry: bool
    """Whether it succeeds a trial that was interrupted or whose worker died."""


@dataclass(frozen=True, kw_only=True)
class Running:
    """A trial in progress, as another process sees it. `epoch` counts finished epochs."""

    number: int
    epoch: int
    value: float | None
    worker: str


@dataclass(frozen=True, kw_only=True)
class Best:
    """A finished trial: its value, all of its params, and at which epoch (counted from 0) it had that value."""

    number: int
    value: float
    params: Mapping[str, Any]
    epoch: int
    seed: int
    metrics: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Lost:
    """A trial whose worker died: INTERRUPTED where a successor has its place, FAIL where its retries are spent."""

    number: int
    state: str
    reason: str


class TakenOver(Exception):
    """A peer has ended this trial: its worker was not heard of for too long. It is to be let go."""


class _Trial(Trial):
    """Optuna's trial, which tells what a plain Optuna objective reports."""

    told: Callable[[int, float], None] = staticmethod(lambda step, value: None)

    def report(self, value: float, step: int) -> None:
        super().report(value, step)
        self.told(step, float(value))


def identity(spec: StudySpec, space: Space, metric: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return what must not change while a study goes on, as plain values: its trials would not compare.

    `options` are the spec's, without what must not be seen (`Document.options`).
    """
    plain = {
        "objective": spec.objective,
        "options": options,
        "metric": metric,
        "value": spec.value,
        "epochs": spec.epochs,
        "patience": spec.patience,
        "precision": spec.precision,
        "deterministic": spec.deterministic,
        "seed": spec.seed,
        "params": space.identity(),
    }
    return json.loads(json.dumps(plain))  # as the storage gives it back


class Search:
    """One study in its storage. Make it with `open_search`."""

    def __init__(self, study: optuna.Study, storage: RetryingStorage, spec: StudySpec, space: Space) -> None:
        self.study, self.storage, self.spec, self.space = study, storage, spec, space
        self.maximize = study.direction == optuna.study.StudyDirection.MAXIMIZE
        self._study_id = storage.get_study_id_from_name(study.study_name)
        self.making: str = self.attrs[_MAKING]
        """What tells this study from another one of its name, made before or in another storage."""
        self._claimed: dict[int, _Trial] = {}
        self._waiting: deque[FrozenTrial] = deque()
        self._best: float | None = None
        self._lost: list[Lost] = []
        self._sound: set[int] = set()
        self._lease = LeaseKeeper(storage.inner, spec.grace)
        self._deaths = LeaseMonitor(spec.grace)
        self._look_at = 0.0

    # The budget: which trials count, and which are still to come.

    def trials(self) -> list[FrozenTrial]:
        """Return the trials that take a place in the budget, in the order of their numbers."""
        return places(self._everything())

    def _everything(self) -> list[FrozenTrial]:
        """Return all rows of the study. Raises StorageError for one that hpo cannot have written."""
        trials = self.storage.get_all_trials(self._study_id, deepcopy=False)
        for trial in trials:
            if trial.number in self._sound:
                continue
            if (wrong := wrong_row(trial)) is not None:
                raise StorageError(
                    f"trial {trial.number} of study {self.spec.name!r} in {self.spec.storage}: {wrong}; hpo did not "
                    "write that: mend or delete the trial in the storage, or give the study another `name`"
                )
            if trial.state.is_finished():
                self._sound.add(trial.number)
        return trials

    def counts(self) -> Counts:
        return count(self.trials(), self.spec.trials)

    def _fill_queue(self) -> None:
        """Queue trials up to the budget (a chunk at a time), or withdraw those that are queued beyond it."""
        with _alone(self.storage, self.spec.storage):
            self._reclaim()
            everything = self._everything()
            change = refill(everything, self.spec.trials, len(self.spec.start_with), _QUEUE_CHUNK)
            for place, start in change.queue:
                config = {} if start is None else self.space.queued(self.spec.start_with[start])
                attrs = {"place": place, "seed": derive(self.spec.seed, "init", place)}
                self._enqueue(config, attrs | ({} if start is None else {"start_with": start}))
            self._withdraw(change.withdraw)

    def _withdraw(self, trials: Sequence[FrozenTrial]) -> None:
        """End WAITING trials that the budget has no place for."""
        for trial in trials:
            with suppress(UpdateFinishedTrialError):  # claimed and finished by a peer just now
                self.storage.set_trial_user_attr(trial._trial_id, "withdrawn", True)
                self.storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)

    def tidy(self) -> None:
        """Withdraw what is still queued of a study that is done: where no lock is, workers may queue a trial twice."""
        everything = self._everything()
        if any(trial.state == TrialState.WAITING for trial in everything):
            self._fill_queue()

    def _enqueue(
        self, config: Mapping[str, Any], attrs: Mapping[str, Any], inherited: Mapping[str, Any] | None = None
    ) -> None:
        """Queue a trial that has the params of `config`; the others are sampled when it is claimed."""
        system = {**(inherited or {}), **({"fixed_params": dict(config)} if config else {})}  # not {}: see grid
        self.study.add_trial(create_trial(state=TrialState.WAITING, user_attrs=dict(attrs), system_attrs=system))

    def _reclaim(self) -> bool:
        """Give the places of trials whose worker died to successors; return whether it is unclear of any yet.

        The storage's lock must be held.
        """
        everything = self._everything()
        with_place = {trial.number for trial in places(everything)}
        judged = self._judge(everything)
        for trial, dead in judged:
            if dead:
                lease = lease_of(trial)
                attempt = lease.get("attempt", 1) if trial.number in with_place else math.inf  # it has a successor
                self._replace(trial, f"worker {lease.get('worker', 'unknown')} died", attempt)
        return any(dead is None for _, dead in judged)

    def _judge(self, trials: Sequence[FrozenTrial]) -> list[tuple[FrozenTrial, bool | None]]:
        """Return those of `trials` that other workers train, each with whether it is dead (`LeaseMonitor`)."""
        trouble = max(self.storage.back_at, self._lease.failed_at)
        others = (t for t in trials if t.state == TrialState.RUNNING and t.number not in self._claimed)
        return [(trial, self._deaths.is_dead(trial, trouble)) for trial in others]

    def _replace(self, trial: FrozenTrial, reason: str, attempt: float) -> None:
        """End `trial` as FAIL and queue its successor; the successor first, so that a crash between loses nothing."""
        succeeded = attempt <= self.spec.retries
        if succeeded:
            lineage = trial.user_attrs.get("lineage", trial.number)
            attrs = {"retry_of": trial.number, "attempt": attempt + 1, "lineage": lineage}
            attrs |= {key: trial.user_attrs[key] for key in ("place", "seed", "start_with") if key in trial.user_attrs}
            grid = {key: trial.system_attrs[key] for key in ("grid_id", "search_space") if key in trial.system_attrs}
            self._enqueue(trial.params, attrs, grid)
        with suppress(UpdateFinishedTrialError):  # a peer was faster
            self.storage.set_trial_user_attr(trial._trial_id, "error", masked(reason))
            self.storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
            if trial.number not in self._claimed:
                state = "INTERRUPTED" if succeeded or attempt == math.inf else "FAIL"
                self._lost.append(Lost(number=trial.number, state=state, reason=reason))

    def repair(self) -> bool:
        """Give the places of trials whose worker died to successors, as every worker does when it looks for work.

        Return whether that is unclear of any trial yet: call it again in a moment then.
        """
        with _alone(self.storage, self.spec.storage):
            return self._reclaim()

    def ends(self) -> dict[int, tuple[str, str | None]]:
        """Return how every trial that is over has ended (a key of `hpo.tracking.base.STATUS`), and why if it failed."""
        everything = self._everything()
        counted = {trial.number for trial in places(everything)}
        return {
            trial.number: (
                trial.state.name if trial.number in counted else "INTERRUPTED",
                trial.user_attrs.get("error"),
            )
            for trial in everything
            if trial.state.is_finished()
        }

    def n_claimed(self) -> int:
        """Return how many trials have been claimed so far, each retry counted."""
        everything = self._everything()
        return sum(trial.state != TrialState.WAITING for trial in everything)

    def failures(self) -> list[str | None]:
        """Return of each trial that has ended why it failed; None: it did not."""
        ended = [trial for trial in self.trials() if trial.state.is_finished()]
        return [t.user_attrs.get("error") if t.state == TrialState.FAIL else None for t in ended]

    def drain_lost(self) -> list[Lost]:
        """Return other workers' trials that were ended here since the last call."""
        lost, self._lost = self._lost, []
        return lost

    # Ask, report, tell.

    def ask(self, wait: bool = True) -> Claim | None:
        """Claim the next trial of the budget and sample its params; None where there is none left to claim.

        Without `wait`, StorageAway is raised as soon as the storage, or its lock, is not to be had.
        """
        while True:
            with nullcontext() if wait else self.storage.at_once():
                self._look_for_the_dead()
                frozen = self._take()
            if frozen is None:
                return None
            try:
                return self._claim(frozen)
            except UpdateFinishedTrialError:  # a peer took this worker for dead meanwhile
                self._let_go(frozen.number, frozen._trial_id)
            except (KeyError, TypeError, ValueError) as error:
                if not frozen.system_attrs.get("fixed_params"):
                    raise
                self.fail(frozen.number, f"the params that it was queued with cannot be used: {error}")

    def _take(self) -> FrozenTrial | None:
        if not self._waiting:
            self._look_for_waiting()
        while self._waiting:
            frozen = self._waiting.popleft()
            with suppress(UpdateFinishedTrialError):
                if self.storage.set_trial_state_values(frozen._trial_id, TrialState.RUNNING):
                    return frozen
            if not self._waiting:  # peers were faster; there may be more
                self._look_for_waiting()
        return None

    def forget(self, number: int) -> None:
        """Let a trial go that a peer has ended."""
        self._let_go(number, self._claimed[number]._trial_id)

    def _let_go(self, number: int, trial_id: int) -> None:
        """Forget a trial that is no longer ours: its lease must not be renewed."""
        self._claimed.pop(number, None)
        self._lease.drop(trial_id)

    def _look_for_the_dead(self) -> None:
        """Now and then, give the places of trials whose worker died to successors, though there is other work."""
        if time.monotonic() < self._look_at:
            return
        self._look_at = time.monotonic() + self.spec.grace / 4
        if any(dead for _, dead in self._judge(self.trials())):
            self.repair()

    def _look_for_waiting(self) -> None:
        """Read which trials wait, and queue more where there are none; reading is what claims of a large study cost."""
        taken = self.trials()
        if len(taken) > self.spec.trials or all(trial.state != TrialState.WAITING for trial in taken):
            self._fill_queue()
            taken = self.trials()
        self._waiting = deque(self._share([trial for trial in taken if trial.state == TrialState.WAITING], taken))

    def _share(self, waiting: list[FrozenTrial], taken: Sequence[FrozenTrial]) -> list[FrozenTrial]:
        """Return all that wait, or, beside peers, a share drawn at random: to try what a peer takes is time lost."""
        peers = {lease_of(trial).get("worker") for trial in taken if trial.state == TrialState.RUNNING}
        peers -= {this_process(), None}
        return random.sample(waiting, math.ceil(len(waiting) / (1 + len(peers)))) if peers else waiting

    def _claim(self, frozen: FrozenTrial) -> Claim:
        attempt = frozen.user_attrs.get("attempt", 1)
        self.storage.patiently(lambda: self._lease.add(frozen._trial_id, attempt))
        # What Study.ask does, without making a trial beyond the budget.
        self.study._thread_local.cached_all_trials = None
        trial = _Trial(self.study, frozen._trial_id)
        self._claimed[trial.number] = trial
        place = frozen.user_attrs.get("place", trial.number)
        seed = frozen.user_attrs.get("seed")
        if seed is None:  # queued by an older version
            seed = derive(self.spec.seed, "init", place)
            trial.set_user_attr("seed", seed)
        return Claim(
            number=trial.number,
            seed=seed,
            params=self.space.suggest(trial),
            attempt=attempt,
            place=place,
            lineage=frozen.user_attrs.get("lineage", frozen.number),
            is_retry="retry_of" in frozen.user_attrs,
        )

    def repeat(self, number: int, values: Sequence[float]) -> None:
        """Report what a trial's predecessor had reported in its epochs."""
        for epoch, value in enumerate(values):
            with suppress(UpdateFinishedTrialError):
                self._claimed[number].report(value, step=epoch)

    def report(self, number: int, epoch: int, value: float) -> bool:
        """Report a trial's value at an epoch (counted from 0); return whether it is to go on.

        A retried trial may report an epoch again: Optuna keeps the first value, which is the same.
        """
        trial = self._claimed[number]
        with suppress(UpdateFinishedTrialError):
            trial.report(value, step=epoch)
            try:
                with self.storage.at_once():
                    if not self.storage.away:
                        self._look_for_the_dead()
                        return not trial.should_prune()
            except StorageAway:
                pass  # just now: training goes on
            return True
        return False

    def call(
        self, number: int, function: Callable[[Trial], Any], told: Callable[[int, float], None]
    ) -> tuple[Mapping[str, Any], float | None]:
        """Return the params that `function`, a plain Optuna objective, asked for, and its value; None: it pruned.

        `told` is given each step and value that it reports. Raises InputError where it returns no number, TakenOver
        where a peer has ended the trial meanwhile.
        """
        trial = self._claimed[number]
        trial.told = told
        try:
            value = function(trial)
        except optuna.TrialPruned:
            return trial.params, None
        except Exception as error:
            if _says_finished(error):
                raise TakenOver from error
            raise
        try:
            return trial.params, float(value)
        except (TypeError, ValueError):
            raise InputError(
                f"objective {self.spec.objective}: must return one number, a trial's value, but returned {value!r:.100}"
            ) from None

    def annotate(self, number: int, **attrs: Any) -> None:
        """Set the trial's `user_attrs`."""
        for key, value in attrs.items():
            with suppress(UpdateFinishedTrialError):
                self._claimed[number].set_user_attr(key, value)

    def complete(self, number: int, value: float) -> bool:
        """Tell that a trial is done; return False where a peer has taken it over."""
        return self._finish(number, TrialState.COMPLETE, value)

    def may_be_best(self, value: float) -> bool:
        """Whether no trial that this process knows of is better; cheap, where `best` reads the storage."""
        sign = -1 if self.maximize else 1
        return self._best is None or sign * value <= sign * self._best

    def prune(self, number: int) -> bool:
        """Tell that a trial was pruned; return False where a peer has taken it over."""
        return self._finish(number, TrialState.PRUNED)

    def fail(self, number: int, reason: str) -> bool:
        """Tell that a trial failed for good, and why; return False where a peer has taken it over."""
        self.annotate(number, error=masked(reason))
        return self._finish(number, TrialState.FAIL)

    def give_back(self, number: int, reason: str) -> bool:
        """End a trial that was interrupted; a successor with its params and seed is queued in its place.

        Return False, and do nothing, for one whose end was told already.
        """
        trial = self._claimed.get(number)
        if trial is None:
            return False
        with _alone(self.storage, self.spec.storage):
            frozen = self.storage.get_trial(trial._trial_id)
            if frozen.state == TrialState.RUNNING:
                self._replace(frozen, reason, attempt=0)  # an interruption is nobody's fault: it costs no attempt
        self._let_go(number, trial._trial_id)
        return True

    def _finish(self, number: int, state: TrialState, value: float | None = None) -> bool:
        trial = self._claimed[number]
        self._let_go(number, trial._trial_id)
        try:
            self.study.tell(trial, values=value, state=state)
        except (ValueError, UpdateFinishedTrialError) as error:
            if not self.storage.get_trial(trial._trial_id).state.is_finished():
                raise
            if "Cannot tell" not in str(error) and not isinstance(error, UpdateFinishedTrialError):
                raise
            return False
        return True

    # What is known of the study.

    def best(self, number: int | None = None) -> Best | None:
        """Return the best complete trial (the first of equals), or the complete trial `number`; None: there is none."""
        done = [trial for trial in self.trials() if trial.state == TrialState.COMPLETE]
        if number is not None:
            done = [trial for trial in done if trial.number == number]
        if not done:
            return None
        sign = -1 if self.maximize else 1
        trial = min(done, key=lambda t: (sign * (t.value or 0.0), t.number))
        assert trial.value is not None
        if number is None:
            self._best = trial.value
        return Best(
            number=trial.number,
            value=trial.value,
            params=self._resolved(trial),
            epoch=min(trial.user_attrs.get("best_epoch", self.spec.epochs), self.spec.epochs - 1),
            seed=trial.user_attrs.get("seed", derive(self.spec.seed, "init", trial.number)),
            metrics=trial.user_attrs.get("metrics", {}),
        )

    def _resolved(self, trial: FrozenTrial) -> dict[str, Any]:
        try:
            return self.space.resolve(trial.params)
        except (KeyError, ValueError, TypeError) as error:
            raise StorageError(
                f"trial {trial.number} of study {self.spec.name!r}: its params {trial.params!r:.200} are none of the "
                "study's space; hpo did not write them: delete that trial, or give the study another `name`"
            ) from error

    def running(self) -> list[Running]:
        running = [trial for trial in self.trials() if trial.state == TrialState.RUNNING]
        return [
            Running(
                number=trial.number,
                epoch=len(trial.intermediate_values),
                value=trial.intermediate_values[trial.last_step] if trial.last_step is not None else None,
                worker=lease_of(trial).get("worker", "unknown"),
            )
            for trial in running
        ]

    def params_of(self, number: int) -> dict[str, Any]:
        """Return all params of any trial, as far as they were asked for."""
        return self.space.resolve(self._trial(number).params)

    def value_of(self, number: int) -> float | None:
        """Return any trial's value; None where it has none."""
        trial = self._trial(number)
        return trial.value if trial.state == TrialState.COMPLETE else None

    def _trial(self, number: int) -> FrozenTrial:
        trial_id = self.storage.get_trial_id_from_study_id_trial_number(self._study_id, number)
        return self.storage.get_trial(trial_id)

    def seconds_used(self) -> float:
        """Return for how long at least one trial was running, over all workers and restarts."""
        return seconds_used(self._everything())

    def seconds_left(self, timeout: float) -> float:
        """Return what is left of `timeout`: nothing once it has ended the study, however the pauses are counted."""
        if self.attrs.get(TIMED_OUT, 0.0) >= timeout:
            return 0.0
        return max(0.0, timeout - self.seconds_used())

    @property
    def attrs(self) -> dict[str, Any]:
        """The study's `user_attrs`."""
        return self.study.user_attrs

    def remember(self, key: str, value: Any) -> None:
        """Set one of the study's `user_attrs`."""
        self.study.set_user_attr(key, value)

    def close(self) -> None:
        """Stop renewing leases and let the database go."""
        self._lease.stop()
        self.storage.close()


def open_search(
    spec: StudySpec,
    space: Space,
    metric: str,
    *,
    maximize: bool,
    options: Mapping[str, Any] | None = None,
    make: bool = True,
    wait: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> Search | None:
    """Return the study in its storage, made if it is not there (None with `make=False`).

    `options` are the spec's as they may be stored. With `wait`, a storage that does not answer is waited for, as it is
    later on; `say` is told of later waits.
    Raises StorageError where the storage cannot be opened, InputError where its study of that name is another one.
    """
    if not make and not exists(spec.storage):
        return None
    with ExitStack() as unless_opened:
        storage = RetryingStorage(open_patiently(spec.storage, spec.outage, wait, say), spec.outage, say)
        unless_opened.callback(storage.close)
        search = _opened(spec, space, metric, storage, maximize, options, make)
        if search is not None:
            unless_opened.pop_all()
        return search


def _opened(
    spec: StudySpec,
    space: Space,
    metric: str,
    storage: RetryingStorage,
    maximize: bool,
    options: Mapping[str, Any] | None,
    make: bool,
) -> Search | None:
    direction = "maximize" if maximize else "minimize"
    sampler, _ = make_sampler(spec.sampler, spec.seed, space)
    pruner, _ = make_pruner(spec.pruner, spec.epochs)
    wanted = identity(spec, space, metric, spec.options if options is None else options)
    with _alone(storage, spec.storage):
        names = [study.study_name for study in storage.get_all_studies()]
        if spec.name not in names and not make:
            return None
        if spec.name in names:
            study_id = storage.get_study_id_from_name(spec.name)
            attrs = _attrs_of(storage, study_id)
            _compare(spec, attrs, wanted)
            if attrs[_IDENTITY].get("options") != wanted["options"]:  # an older version stored them in clear
                storage.set_study_user_attr(study_id, _IDENTITY, attrs[_IDENTITY] | {"options": wanted["options"]})
            if storage.get_study_directions(study_id)[0].name.lower() != direction:
                raise _is_another(spec, [f"it goes to {direction} here, the other way there"])
        study = optuna.create_study(
            study_name=spec.name,
            storage=storage,
            direction=direction,
            load_if_exists=True,
            sampler=sampler,
            pruner=pruner,
        )
        if _MAKING not in study.user_attrs:
            study.set_user_attr(_MAKING, uuid.uuid4().hex)
        if _IDENTITY not in study.user_attrs:
            study.set_user_attr(_IDENTITY, wanted)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                study.set_metric_names([metric])  # the dashboard's axis
    return Search(study, storage, spec, space)


def _says_finished(error: BaseException | None) -> bool:
    """Whether an error, or what it was raised from, is that the trial was ended already."""
    return error is not None and (
        isinstance(error, UpdateFinishedTrialError) or _says_finished(error.__cause__ or error.__context__)
    )


@contextmanager
def _alone(storage: RetryingStorage, url: str) -> Iterator[None]:
    """Hold the storage's lock, waited for where the storage is away."""
    with ExitStack() as stack:
        storage.patiently(lambda: stack.enter_context(exclusive(url, storage.inner, storage.in_a_hurry)))
        yield


def _attrs_of(storage: RetryingStorage, study_id: int) -> dict[str, Any]:
    """Return the study's attributes; a peer that makes it just now, where no lock keeps us out, is waited for."""
    end = time.monotonic() + _MAKING_SECONDS
    attrs = storage.get_study_user_attrs(study_id)
    while _IDENTITY not in attrs and time.monotonic() < end and not storage.get_all_trials(study_id):
        time.sleep(0.05)
        attrs = storage.get_study_user_attrs(study_id)
    return attrs


def stored_file(url: str, name: str) -> dict[str, Any]:
    """Return the values of the study file that the storage keeps of study `name`. Raises InputError, StorageError."""
    storage = open_storage(url)
    try:
        studies = {study.study_name: study for study in storage.get_all_studies()}
        text = studies[name].user_attrs.get(STUDY_FILE) if name in studies else None
    finally:
        close_storage(storage)
    if name not in studies:
        raise InputError(f"the storage {url} has no study {name!r}{did_you_mean(name, studies)}")
    if text is None:
        raise InputError(f"study {name!r} in {url} was not started by `hpo run`; give its study file")
    try:
        values = json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"study {name!r} in {url}: its study file cannot be read ({error}); give the file") from error
    if not isinstance(values, dict) or not isinstance(values.get("objective"), str):
        raise InputError(f"study {name!r} in {url}: its study file names no objective; give the file")
    return values


def _compare(spec: StudySpec, attrs: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise InputError where the stored study is not the one that study.yaml describes; it says what differs."""
    stored = attrs.get(_IDENTITY)
    if not isinstance(stored, Mapping) or not isinstance(stored.get("options", {}), Mapping):
        raise _is_another(spec, ["it was not made by hpo"])
    differences = []
    for key in ("objective", "metric", "value", "epochs", "patience", "precision", "deterministic", "seed"):
        there = stored.get(key, _LATER_KEYS.get(key))
        if there != wanted[key]:
            differences.append(f"{key} is {wanted[key]!r} here, {there!r} there")
    there = stored.get("options", {})
    plain = json.loads(json.dumps(spec.options))
    for key in sorted({*wanted["options"], *there}) if there != plain else []:
        here = wanted["options"].get(key, _ABSENT)
        was = there.get(key, _ABSENT)
        if was not in (here, plain.get(key, _ABSENT)) and str(was) != str(plain.get(key)):
            hidden = plain.get(key, _ABSENT) != here  # of an older version's study the other value may be in clear
            came = "another value than" if hidden else f"{here!r} here, {was!r}"
            differences.append(f"options.{key} is {came} there")
    here, there = wanted["params"], stored.get("params", {})
    for name in sorted({*here, *there}):
        if here.get(name, _ABSENT) != there.get(name, _ABSENT):
            differences.append(f"params.{name} is {here.get(name, _ABSENT)} here, {there.get(name, _ABSENT)} there")
    if differences:
        raise _is_another(spec, differences)


_ABSENT = "absent"
_LATER_KEYS: Mapping[str, Any] = {"precision": "float32", "deterministic": False}
"""What a key meant in studies that were stored before there was one."""


def _is_another(spec: StudySpec, differences: list[str]) -> InputError:
    lines = "".join(f"\n  {difference}" for difference in differences)
    return InputError(
        f"the storage {spec.storage} has another study named {spec.name!r}:{lines}\n"
        "give this one another `name`, or another `storage`"
    )
