"""Studies of several metrics: the value of a trial that leads, its other ones, and the Pareto front.

Optuna has a trial's values in a list; the first is the one of the metric that leads (`hpo.study.goals`). Its own
`FrozenTrial.value` raises where there are several, and so do its pruners: they see a study of the first alone.
"""

import copy
from collections.abc import Collection, Mapping, Sequence
from typing import Any, cast

import optuna
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from hpo.search.constraints import holds
from hpo.study.goals import DIRECTIONS, direction_of, front


def leading(trial: FrozenTrial) -> float | None:
    """Return a trial's value, of several metrics that of the one that leads; None: it has none."""
    return float(trial.values[0]) if trial.values else None


def others_of(trial: FrozenTrial, others: Collection[str]) -> dict[str, float]:
    """Return a complete trial's values of the metrics beside the one that leads, by the names in `others`."""
    return dict(zip(others, (trial.values or [])[1:], strict=False)) if trial.state == TrialState.COMPLETE else {}


def others_in(identity: Any) -> dict[str, bool]:
    """Return the metrics of a stored study beside the one that leads, each with whether more of it is better.

    `identity` is what the storage has under `hpo.search.schema.IDENTITY`; what was not written by hpo is left out.
    """
    stored = identity.get("others") if isinstance(identity, Mapping) else None
    if not isinstance(stored, Mapping):
        return {}
    return {str(name): each == "maximize" for name, each in stored.items() if each in DIRECTIONS}


def directions_by_name(metrics: Mapping[str, bool]) -> dict[str, str]:
    """Return Optuna's word for the direction of each metric."""
    return {name: direction_of(more) for name, more in metrics.items()}


def maximizes(study: optuna.Study) -> bool:
    """Whether more of the metric that leads is better."""
    return bool(study.directions[0] == StudyDirection.MAXIMIZE)


def front_of(trials: Sequence[FrozenTrial], maximize: Sequence[bool]) -> list[FrozenTrial]:
    """Return the Pareto front of a study's trials, those first that lead: complete ones that break no constraint.

    `maximize`: of each metric whether more of it is better; of a single one there is no front.
    """
    if len(maximize) == 1:
        return []
    candidates = [t for t in trials if t.state == TrialState.COMPLETE and len(t.values) == len(maximize) and holds(t)]
    on = front([trial.values for trial in candidates], maximize)
    sign = -1 if maximize[0] else 1
    return sorted((candidates[i] for i in on), key=lambda trial: (sign * trial.values[0], trial.number))


def alone(study: optuna.Study) -> optuna.Study:
    """Return the study with its leading metric only, as Optuna's pruners want it."""
    if len(study.directions) == 1:
        return study
    of_first = copy.copy(study)
    of_first._directions = study.directions[:1]
    of_first._storage = cast(BaseStorage, _OfLeading(study._storage))  # of which Hyperband makes a study of its own
    return of_first


class _OfLeading:
    """A storage whose studies have the directions and the best trial of their leading metric."""

    def __init__(self, storage: BaseStorage) -> None:
        self._storage = storage

    def __getattr__(self, name: str) -> Any:
        return getattr(self._storage, name)

    def get_study_directions(self, study_id: int) -> list[StudyDirection]:
        return self._storage.get_study_directions(study_id)[:1]

    def get_best_trial(self, study_id: int) -> FrozenTrial:
        """Return the best trial of those that break no constraint. Raises ValueError: there is none."""
        complete = self._storage.get_all_trials(study_id, deepcopy=False, states=(TrialState.COMPLETE,))
        more = self.get_study_directions(study_id)[0] == StudyDirection.MAXIMIZE
        best = copy.copy((max if more else min)(filter(holds, complete), key=lambda trial: trial.values[0]))
        best.values = best.values[:1]
        return best


class WorstIfPruned:
    """Gives a study's trials to samplers that learn from values: a pruned one has the worst value in each metric.

    Optuna's samplers cannot tell pruned trials of several metrics from each other, and TPE fails at them. One whose
    network was not trained, since it breaks a constraint, stays as it is.
    """

    def __init__(self, maximize: Sequence[bool]) -> None:
        self._maximize = maximize

    def __call__(self, trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
        """Return all trials, the pruned ones as complete."""
        complete = [trial.values for trial in trials if trial.state == TrialState.COMPLETE]
        if not complete:
            return [trial for trial in trials if trial.state != TrialState.PRUNED]
        columns = zip(*complete, strict=True)
        worst = [min(column) if more else max(column) for column, more in zip(columns, self._maximize, strict=True)]
        return [_complete(trial, worst) if _was_trained(trial) else trial for trial in trials]


def _was_trained(trial: FrozenTrial) -> bool:
    return trial.state == TrialState.PRUNED and holds(trial)


def _complete(trial: FrozenTrial, values: Sequence[float]) -> FrozenTrial:
    made = copy.copy(trial)
    made.state, made.values = TrialState.COMPLETE, list(values)
    return made
