"""Halving with resume: which trial of a study is trained next, so that the epochs go to the promising ones.

Every trial is trained to the first rung, a number of epochs, and is paused there. Once a cohort of trials has got so
far, the best half at each rung is resumed and trained to the next one, and beside it whoever may still catch up with
the best. What is still paused when nothing is to be resumed any more is pruned. So trials are compared with trials of
the same number of epochs, also where all members of a stack train in step, and nothing that was trained is lost.

A trial is paused as WAITING in Optuna's storage, with its reports. Where in the ladder it stands follows from these, so
nothing else is stored. Figures, and the rules that this one was chosen from: `benchmarks/pruning.py`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from optuna.pruners import BasePruner
from optuna.trial import FrozenTrial, TrialState

from hpo.search.budget import is_new, is_paused
from hpo.study.value import BEST, averaged, value_of

if TYPE_CHECKING:
    from optuna.study import Study

AUTO = "auto"
MEMORY = 256.0
"""How many MiB of paused trials a worker keeps in memory, unless the study file says it."""
ENOUGH = 10
"""How many trials must have reached a rung before a sampler learns from it, or it is judged how much it says."""
_COHORTS = 3
_UNRELATED = 0.1
"""Below this rank correlation a rung says nothing of the next one."""
_FIT_TO_CATCH_UP = 0.75
"""The gain that a trial is credited with is that of the best quarter of the good ones."""


class HalvingPruner(BasePruner):
    """The keys of `pruner: halving`. Optuna is never told to prune: which trials are trained on is up to the queue."""

    def __init__(
        self,
        epochs: int,
        first: int | str = AUTO,
        factor: int = 2,
        finish: int = 3,
        reach: float = 1.0,
        cohorts: int | str = AUTO,
        memory: float = MEMORY,
    ) -> None:
        """`epochs` of a trial that is never paused; the other keys are those of the study file.

        first: epochs to the first rung; auto: a tenth of `epochs`, at least 2.
        factor: one in so many of those that have reached a rung is resumed from it, and rungs are so far apart.
        finish: so many of the best at each rung are trained on when nothing else is left to be.
        reach: how much of the gain that good trials had since the rung before another one is credited with, which is
            resumed if it would be the best then; 0: nobody is resumed for that.
        cohorts: into how many parts the trials are divided, each of which learns from those before; auto: 3, or 1 where
            the sampler does not learn, a fourth of the trials is trained at once, or there are fewer than 30.
        memory: how many MiB of paused trials a worker keeps in memory beside their files.

        Raises ValueError.
        """
        for name, value, least in (("factor", factor, 2), ("finish", finish, 0), ("reach", reach, 0)):
            if not value >= least or math.isinf(value):
                raise ValueError(f"{name} must be at least {least}, but is {value}")
        for name, auto in (("first", first), ("cohorts", cohorts)):
            if auto != AUTO and (isinstance(auto, str | bool) or auto < 1):
                raise ValueError(f"{name} must be auto, or a whole number of at least 1, but is {auto!r}")
        if not memory >= 0 or math.isinf(memory):
            raise ValueError(f"memory must be a number of MiB of at least 0, but is {memory}")
        self.epochs, self.factor, self.finish, self.reach = epochs, factor, finish, reach
        self.first = max(2, epochs // 10) if isinstance(first, str) else first
        self.cohorts = cohorts
        self.memory = memory

    @property
    def rungs(self) -> tuple[int, ...]:
        """The numbers of epochs after which trials are paused; empty where all are trained to their end."""
        rungs, rung = [], self.first
        while rung < self.epochs:
            rungs.append(rung)
            rung *= self.factor
        return tuple(rungs)

    def prune(self, study: "Study", trial: FrozenTrial) -> bool:
        return False


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What is to be claimed, at most as many as were asked for, the most urgent first."""

    claim: Sequence[FrozenTrial] = ()
    n_to_queue: int = 0
    """How many new trials are to be trained first that are not queued yet."""
    over: bool = False
    """Whether the study is: what is paused is to be pruned."""


class Halving:
    """The rule, for one study."""

    def __init__(self, pruner: HalvingPruner, cohorts: int, *, maximize: bool, value: str = BEST) -> None:
        """`cohorts` is how many there are, where the pruner's are `auto`; `value` is the study's.

        With `value: last` the best so far counts: the last epoch before a rung is not the trial's last, and its metric
        is one noisy number. On the recorded curves of `benchmarks/curves`, of 20 trials, the mean regret of the last
        value was 0.002 so, and 0.025 with rungs that compare the last epoch.
        """
        self._pruner = pruner
        self.rungs = pruner.rungs
        self._cohorts = pruner.cohorts if isinstance(pruner.cohorts, int) else cohorts
        self._sign = -1 if maximize else 1
        self._value = BEST if averaged(value) is None else value
        self._scores: dict[tuple[int, int], float] = {}
        self._doubt_from: float = ENOUGH

    @staticmethod
    def cohorts_for(trials: int, at_once: int, learns: bool) -> int:
        """Return how many cohorts a study of so many trials has, of which so many are trained at once.

        Several are of use only to a sampler that `learns` from the trials before, and only if it can from one cohort.
        """
        return _COHORTS if learns and trials >= max(4 * at_once, _COHORTS * ENOUGH) else 1

    # The rule.

    def choose(self, holders: Sequence[FrozenTrial], n: int, trials: int) -> Choice:
        """Return which of the `holders` of a budget of so many `trials` are to be claimed next, at most `n`."""
        waiting = [trial for trial in holders if trial.state == TrialState.WAITING]
        new = [trial for trial in waiting if is_new(trial)]
        claim = [trial for trial in waiting if not is_new(trial) and self._rung_of(trial) == 0][:n]  # retries
        n_started = len(holders) - len(new)
        room = self._room(n_started, trials)
        claim += new[: min(room, n - len(claim))]
        if len(claim) == n or room > len(new):
            return Choice(claim=claim, n_to_queue=max(0, min(n - len(claim), room - len(new))))
        claim += self._to_promote(holders)[: n - len(claim)]
        if claim or any(trial.state == TrialState.RUNNING for trial in holders):
            return Choice(claim=claim)
        if (room := self._room_of_next(n_started, trials)) > 0:
            return Choice(claim=new[: min(room, n)], n_to_queue=max(0, min(n, room) - len(new)))
        if finishing := self._to_finish(holders):
            return Choice(claim=finishing[:n])
        return Choice(over=True)

    def _ends(self, trials: int) -> list[int]:
        """Return how many trials have been started when each cohort is whole."""
        return [round(trials * part / self._cohorts) for part in range(1, self._cohorts + 1)]

    def _room(self, n_started: int, trials: int) -> int:
        """Return how many trials of the cohort that was opened have not been started."""
        if n_started and n_started in self._ends(trials):
            return 0  # the next one is opened by its first trial
        return self._room_of_next(n_started, trials)

    def _room_of_next(self, n_started: int, trials: int) -> int:
        return next((end - n_started for end in self._ends(trials) if end > n_started), 0)

    def _to_promote(self, holders: Sequence[FrozenTrial]) -> list[FrozenTrial]:
        """Return the paused trials that are good enough to be resumed, those of the highest rung first."""
        return [trial for rung in reversed(self.rungs) for trial in self._paused_among(self._best(holders, rung), rung)]

    def _to_finish(self, holders: Sequence[FrozenTrial]) -> list[FrozenTrial]:
        """Return the paused ones of the best few of the highest rung that has any, when nothing else is to be done.

        With `finish: 0` that is the best one as long as no trial is complete: a study has a result.
        """
        n = self._pruner.finish
        if not any(trial.state == TrialState.COMPLETE for trial in holders):
            n = max(n, 1)
        for rung in reversed(self.rungs):
            if found := self._paused_among(self.at(holders, rung)[:n], rung):
                return found
        return []

    def _best(self, holders: Sequence[FrozenTrial], rung: int) -> list[FrozenTrial]:
        """Return the trials that are trained on from `rung`: one in `factor`, and who may catch up with the best.

        None as long as more are on their way there than have reached it: the best of a few are not the best of all.
        """
        at = self.at(holders, rung)
        if len(at) < sum(t.state == TrialState.RUNNING and not self._has_reached(t, rung) for t in holders):
            return []
        n = len(at) // self._pruner.factor
        if len(at) > 4 and rung >= 2 and self._pruner.reach > 0:
            good = at[: max(5, len(at) // 2)]
            gains = [self.score(trial, rung // 2) - self.score(trial, rung) for trial in good]
            gain = float(np.quantile(gains, _FIT_TO_CATCH_UP)) if np.isfinite(gains).all() else 0.0
            best, credit = self.score(at[0], rung), self._pruner.reach * max(gain, 0.0)
            n = max(n, sum(self.score(trial, rung) - credit <= best for trial in at))
        return at[:n]

    def _paused_among(self, trials: Sequence[FrozenTrial], rung: int) -> list[FrozenTrial]:
        return [trial for trial in trials if is_paused(trial) and self._rung_of(trial) == rung]

    def _rung_of(self, trial: FrozenTrial) -> int:
        """Return the highest rung that a trial has reached; 0: none."""
        return max((rung for rung in self.rungs if rung <= _n_reports(trial)), default=0)

    def at(self, trials: Sequence[FrozenTrial], rung: int) -> list[FrozenTrial]:
        """Return those of `trials` that have ever reached `rung`, the best there first, of equals the first."""
        reached = [trial for trial in trials if self._has_reached(trial, rung)]
        return sorted(reached, key=lambda trial: (self.score(trial, rung), trial.number))

    def _has_reached(self, trial: FrozenTrial, rung: int) -> bool:
        ended_early = trial.state == TrialState.COMPLETE  # by `patience`: it has no more to show
        return _n_reports(trial) >= rung or ended_early

    def score(self, trial: FrozenTrial, rung: int) -> float:
        """Return a trial's value so far at `rung`, less being better; infinite for one that failed."""
        if trial.state == TrialState.FAIL:
            return math.inf
        key = trial.number, rung
        if key not in self._scores:
            reports = sorted(trial.intermediate_values.items())
            curve = [self._sign * value for step, value in reports if step < rung and math.isfinite(value)]
            self._scores[key] = value_of(curve, self._value, maximize=False)[0] if curve else math.inf
        return self._scores[key]

    def next_pause(self, since: int) -> int | None:
        """Return after how many epochs a trial is paused next that was last paused after `since`, 0: never; or None."""
        return next((rung for rung in self.rungs if rung > since), None)

    # How much a rung says.

    def doubt(self, holders: Sequence[FrozenTrial]) -> str | None:
        """Say once that the ranking at the first rung says nothing of the next one; None: it does, as far as is known.

        It is looked at whenever ENOUGH more trials have reached both.
        """
        if len(self.rungs) < 2:
            return None
        first, second = self.rungs[:2]
        there = [t for t in holders if t.state != TrialState.FAIL and self._has_reached(t, second)]
        if len(there) < self._doubt_from:
            return None
        self._doubt_from = len(there) + ENOUGH
        both = np.array([[self.score(trial, first), self.score(trial, second)] for trial in there])
        if not np.isfinite(both).all():
            return None
        correlation = _rank_correlation(both[:, 0], both[:, 1])
        if correlation >= _UNRELATED:
            return None
        self._doubt_from = math.inf
        return (
            f"pruner: how trials do after {first} epochs says nothing of how they do after {second} (rank correlation "
            f"{correlation:.2f} of {len(there)} trials), so good ones may be pruned; raise `first`, which is {first}"
        )


def _n_reports(trial: FrozenTrial) -> int:
    return len(trial.intermediate_values)


def _rank_correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Return Spearman's, without SciPy's statistics, which take half a second to import; 0 where all are equal."""
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return 0.0
    return float(np.corrcoef(_ranks(x), _ranks(y))[0, 1])


def _ranks(x: np.ndarray) -> np.ndarray:
    """Return each number's rank; equal ones have their mean rank."""
    _, where, counts = np.unique(x, return_inverse=True, return_counts=True)
    means: np.ndarray = (np.cumsum(counts) - (counts - 1) / 2)[where]
    return means
