"""What is known of a study, from one read of all its trials: counts, the best, ends, curves."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from hpo.errors import StorageError
from hpo.search import schema
from hpo.search.budget import (
    Counts,
    count,
    holders,
    in_order_of_end,
    is_paused,
    lease_of,
    leases_in,
    rank,
    worker_of,
    wrong_row,
    wrong_values,
)
from hpo.search.constraints import feasible_text, holds, said_of, values_of
from hpo.search.curves import curves_in, reported
from hpo.search.effort import Effort, effort
from hpo.search.front import front_of, leading, others_of
from hpo.search.retrying import RetryingStorage
from hpo.search.stop import Stopped, budget, still_stopped
from hpo.seeds import derive
from hpo.study.constraints import constraints_in
from hpo.study.space import FreeSpace, Space
from hpo.study.spec import StudySpec


@dataclass(frozen=True, kw_only=True)
class Running:
    """A trial in progress, as another process sees it. `epoch` counts finished epochs."""

    number: int
    epoch: int
    value: float | None
    worker: str


NO_TRIAL = -1
"""In place of a number: params that are no trial's."""


@dataclass(frozen=True, kw_only=True)
class Best:
    """A finished trial: its value, all of its params, and at which epoch (counted from 0) it had that value."""

    number: int
    value: float
    params: Mapping[str, Any]
    epoch: int
    seed: int
    metrics: Mapping[str, float]
    others: Mapping[str, float] = field(default_factory=dict)
    """Its values of the metrics beside the one that leads, by name; empty: the study has one metric."""


class TrialReader:
    """Reads all trials of a study, and looks at each that hpo may not have written."""

    def __init__(self, storage: RetryingStorage, study_id: int, spec: StudySpec) -> None:
        self._storage, self._study_id, self._spec = storage, study_id, spec
        self._sound: set[int] = set()
        self._n_metrics: int | None = None

    def read(self) -> list[FrozenTrial]:
        """Return all trials of the study, but for adopted ones, which only its sampler sees.

        Raises StorageError for one that hpo cannot have written, StorageAway.
        """
        trials = own(self._storage.get_all_trials(self._study_id, deepcopy=False))
        if self._n_metrics is None:
            self._n_metrics = len(self._storage.get_study_directions(self._study_id))
        for trial in trials:
            if trial.number in self._sound:
                continue
            if (wrong := wrong_row(trial) or wrong_values(trial, self._n_metrics)) is not None:
                raise foreign(trial.number, self._spec, wrong)
            if trial.state.is_finished():
                self._sound.add(trial.number)
        return trials

    def stopped(self) -> Stopped | None:
        """Return what has ended the search, as far as the study file still says so. Raises StorageAway."""
        if self._spec.stop is None:
            return None
        return still_stopped(self._storage.get_study_user_attrs(self._study_id).get(schema.STOPPED), self._spec)

    def leases(self) -> dict[str, float]:
        """Return until when each worker's lease holds, by its id. Raises StorageAway."""
        return leases_in(self._storage.get_study_system_attrs(self._study_id))


def own(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Return those of a study's trials that it had itself; the others are another study's, adopted as history."""
    return [trial for trial in trials if schema.ADOPTED not in trial.user_attrs]


def foreign(number: int, spec: StudySpec, wrong: str) -> StorageError:
    """Return the error for a trial that hpo cannot have written."""
    return StorageError(
        f"trial {number} of study {spec.name!r} in {spec.storage}: {wrong}; hpo did not "
        "write that: repair or delete the trial in the storage, or give the study another `name`"
    )


class StudyView:
    """A study as it was at one moment: however much is asked of a view, the trials are read once.

    Make it with `Search.view`. All trials are those of the budget, unless it is said otherwise.
    """

    def __init__(
        self,
        everything: Sequence[FrozenTrial],
        spec: StudySpec,
        space: Space,
        metrics: Mapping[str, bool],
        *,
        stopped: Stopped | None = None,
    ) -> None:
        """`everything` is all trials of the study, as `TrialReader` gives them; `stopped` is what it says, too.

        `metrics` says of each whether more of it is better; the first is the one that leads.
        """
        (metric, maximize), *others = metrics.items()
        self.stopped, self.others, self.metrics = stopped, dict(others), metrics
        self.everything, self._spec, self._space = everything, spec, space
        self._metric_key = metric if isinstance(space, FreeSpace) else f"valid_{metric}"
        self._sign = -1 if maximize else 1
        self._constraints = constraints_in(spec.constraints)

    @cached_property
    def trials(self) -> Sequence[FrozenTrial]:
        """The trials that hold the slots of the budget, in the order of their numbers."""
        return holders(self.everything)

    @cached_property
    def counts(self) -> Counts:
        return count(self.trials, budget(self._spec.trials, self.trials, self.stopped))

    @cached_property
    def ends(self) -> Mapping[int, tuple[str, str | None]]:
        """By the number of every trial that has ended, retried ones too: how, and why if it failed; not the withdrawn.

        How is a key of `hpo.tracking.base.STATUS`.
        """
        counted = {trial.number for trial in self.trials}
        return {
            trial.number: (
                trial.state.name if trial.number in counted else "INTERRUPTED",
                trial.user_attrs.get(schema.ERROR),
            )
            for trial in self.everything
            if trial.state.is_finished() and not (trial.datetime_start is None and schema.WITHDRAWN in trial.user_attrs)
        }

    @property
    def is_shared(self) -> bool:
        """Whether several processes have trained its trials, as far as the storage says."""
        return len({worker_of(trial) for trial in self.everything if lease_of(trial)}) > 1

    @cached_property
    def failures(self) -> Sequence[str | None]:
        """Of each trial that has ended, why it failed; None: it did not."""
        ended = [trial for trial in self.trials if trial.state.is_finished()]
        return [t.user_attrs.get(schema.ERROR) if t.state == TrialState.FAIL else None for t in ended]

    @property
    def n_claimed(self) -> int:
        """How many trials have been claimed so far, each retry counted, and each time that one was resumed."""
        claimed = sum(trial.state != TrialState.WAITING for trial in self.everything)
        return claimed + sum(len(trial.user_attrs.get(schema.TRAINED, ())) for trial in self.everything)

    @cached_property
    def running(self) -> Sequence[Running]:
        """The trials in progress."""
        return [
            Running(
                number=trial.number,
                epoch=len(trial.intermediate_values),
                value=trial.intermediate_values[trial.last_step] if trial.last_step is not None else None,
                worker=worker_of(trial),
            )
            for trial in self.trials
            if trial.state == TrialState.RUNNING
        ]

    @cached_property
    def paused(self) -> Mapping[int, int]:
        """After how many epochs each paused trial was paused, by its number."""
        return {trial.number: len(trial.intermediate_values) for trial in self.trials if is_paused(trial)}

    @cached_property
    def effort(self) -> Effort:
        """How many epochs were trained, and how many would have been without pruning.

        A plain function has no epochs of the study's: of how many steps pruning has saved it is not known.
        """
        return effort(self.trials, 0 if isinstance(self._space, FreeSpace) else self._spec.epochs)

    @cached_property
    def complete(self) -> Sequence[FrozenTrial]:
        """The complete trials, in the order of their numbers."""
        return [trial for trial in self.trials if trial.state == TrialState.COMPLETE]

    @cached_property
    def feasible(self) -> Sequence[FrozenTrial]:
        """The complete trials that break no constraint, in the order of their numbers: one of them can be the best."""
        return [trial for trial in self.complete if holds(trial)]

    @cached_property
    def feasible_text(self) -> str:
        """How many complete trials hold to the study's constraints, for a person; empty: there are none."""
        return feasible_text(self.trials, self._constraints)

    @cached_property
    def constrained(self) -> dict[str, Any]:
        """What `--json` prints of constraints: their `bounds` by name, and which trials hold to them.

        `feasible` and `infeasible` are numbers of trials; `values` the constrained values by number.
        """
        return {
            "bounds": {name: each.text for name, each in self._constraints.items()},
            "feasible": [trial.number for trial in self.feasible],
            "infeasible": [trial.number for trial in self.trials if not holds(trial)],
            "values": {str(trial.number): found for trial in self.trials if (found := values_of(trial))},
        }

    def broken(self, number: int) -> str:
        """Return which constraints any trial breaks, and by how much, for a person; empty: none.

        Raises KeyError: there is no such trial.
        """
        return said_of(self._by_number[number], self._constraints)

    def best(self, number: int | None = None) -> Best | None:
        """Return the best feasible trial (of equals: `rank`), or the complete trial `number`; None: there is none.

        Raises StorageError where its params are not of the study's space.
        """
        trial = self._best if number is None else next((t for t in self.complete if t.number == number), None)
        if trial is None:
            return None
        value, attrs = leading(trial), trial.user_attrs
        assert value is not None
        return Best(
            number=trial.number,
            value=value,
            others=others_of(trial, self.others),
            params=self._resolved(trial),
            epoch=min(attrs.get(schema.BEST_EPOCH, self._spec.epochs), self._spec.epochs - 1),
            seed=self.seed_of(trial.number),
            metrics=attrs.get(schema.METRICS, {}),
        )

    def complete_with(self, params: Mapping[str, Any]) -> Best | None:
        """Return the first complete trial of these params; None: there is none."""
        return next((b for t in self.complete if (b := self.best(t.number)) is not None and b.params == params), None)

    @cached_property
    def _best(self) -> FrozenTrial | None:
        others = tuple(self.others.values())
        return min(self.feasible, key=lambda t: rank(t, maximize=self._sign < 0, others=others), default=None)

    @cached_property
    def front(self) -> Sequence[Best]:
        """The Pareto front of several metrics, the trials first that lead; empty: the study has one metric."""
        trials = front_of(self.trials, [self._sign < 0, *self.others.values()])
        return [best for trial in trials if (best := self.best(trial.number)) is not None]

    @property
    def best_so_far(self) -> list[tuple[int, float, int]]:
        """The best value after each trial that has ended: how many had ended, the value, when (in ms since 1970).

        It begins with the first feasible trial. Trials are in the order of their ends, so that it only ever grows.
        """
        curve: list[tuple[int, float, int]] = []
        best: float | None = None
        for n, trial in enumerate(in_order_of_end(self.trials), start=1):
            value = leading(trial) if trial.state == TrialState.COMPLETE and holds(trial) else None
            if value is not None and (best is None or self._sign * value < self._sign * best):
                best = value
            if best is not None:
                assert trial.datetime_complete is not None
                curve.append((n, best, int(trial.datetime_complete.timestamp() * 1000)))
        return curve

    def none_is_better(self, value: float) -> bool:
        """Whether no feasible trial is better than one of that value."""
        return self._best is None or self._sign * value <= self._sign * (leading(self._best) or 0.0)

    def _resolved(self, trial: FrozenTrial) -> dict[str, Any]:
        try:
            return self._space.resolve(trial.params)
        except (KeyError, ValueError, TypeError) as error:
            raise StorageError(
                f"trial {trial.number} of study {self._spec.name!r}: its params {trial.params!r:.200} are not of the "
                "study's space; hpo did not write them: delete that trial, or give the study another `name`"
            ) from error

    def params_of(self, number: int) -> dict[str, Any]:
        """Return all params of any trial, as far as they were sampled. Raises KeyError: there is no such trial."""
        return self._space.resolve(self._by_number[number].params)

    def seed_of(self, number: int) -> int:
        """Return any trial's seed. Raises KeyError: there is no such trial."""
        seed: int = self._by_number[number].user_attrs.get(schema.SEED, derive(self._spec.seed, "init", number))
        return seed

    def value_of(self, number: int) -> float | None:
        """Return any trial's value; None where it is not complete. Raises KeyError: there is no such trial."""
        trial = self._by_number[number]
        return leading(trial) if trial.state == TrialState.COMPLETE else None

    def searched(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Return those of a trial's params that were searched."""
        return self._space.searched(params)

    def curve(self, number: int) -> list[float]:
        """Return any trial's value, epoch by epoch. Raises KeyError: there is no such trial."""
        return reported(self._by_number[number])

    def curves(self, number: int) -> dict[str, list[float]]:
        """Return the metrics of any trial by name (`train_loss`, `valid_...`), each a list with one number an epoch.

        An epoch that did not report a metric has NaN there. They are stored when the trial ends; of a running trial,
        one that was interrupted, and one of an earlier version only the study's metric is known, which is reported
        epoch by epoch. A plain Optuna objective's are listed by step.

        Raises KeyError: there is no such trial; StorageError: hpo did not write what is stored.
        """
        try:
            curves = curves_in(self._by_number[number], self._metric_key)
            return curves if any(curves.values()) else {}
        except ValueError as error:
            raise foreign(number, self._spec, f"its {schema.CURVES}: {error}") from error

    @cached_property
    def _by_number(self) -> Mapping[int, FrozenTrial]:
        return {trial.number: trial for trial in self.everything}
