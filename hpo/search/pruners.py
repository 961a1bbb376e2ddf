"""Optuna's percentile pruner for the members of a stack: what they are all compared with is computed once an epoch.

`tests/test_pruners.py` compares the decisions with Optuna's.
"""

import math

from optuna.pruners import MedianPruner, PercentilePruner
from optuna.pruners._percentile import (
    _get_best_intermediate_result_over_steps,
    _get_percentile_intermediate_result_over_trials,
    _is_first_in_interval_step,
)
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState


class SharedPercentilePruner(PercentilePruner):
    """Optuna's `PercentilePruner`, with its keys and decisions, for one study."""

    _limits: dict[int, float]
    """By step: what the complete trials say of it."""
    _n_complete = -1
    """Of how many complete trials these are: more may come, none goes or changes."""

    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        step = trial.last_step
        if not complete or len(complete) < self._n_startup_trials or step is None or step < self._n_warmup_steps:
            return False
        reported = trial.intermediate_values.keys()
        if not _is_first_in_interval_step(step, reported, self._n_warmup_steps, self._interval_steps):
            return False
        best = _get_best_intermediate_result_over_steps(trial, study.direction)
        if math.isnan(best):
            return True
        if self._n_complete != len(complete):
            self._limits, self._n_complete = {}, len(complete)
        if step not in self._limits:
            self._limits[step] = _get_percentile_intermediate_result_over_trials(
                complete, study.direction, step, self._percentile, self._n_min_trials
            )
        limit = self._limits[step]  # NaN where too few trials have got so far: nothing is worse
        return bool(best < limit if study.direction == StudyDirection.MAXIMIZE else best > limit)


class SharedMedianPruner(SharedPercentilePruner, MedianPruner):
    """Optuna's `MedianPruner`, likewise."""
