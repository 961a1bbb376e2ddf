"""Halving in a study with a `time` or `timeout`: its rule, until what is left is needed to train the best to their end.

How long that takes follows from the rungs and from how long an epoch has taken of late. From then on no new trial is
started; what is good enough is resumed, as far as it can be complete in time, and the best paused trial before all.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from statistics import median

from optuna.trial import FrozenTrial, TrialState

from hpo.search import schema
from hpo.search.budget import is_paused, is_retry, spans_of
from hpo.search.constraints import holds
from hpo.search.halving import Choice, Halving, HalvingPruner
from hpo.study.spec import UNBOUNDED
from hpo.study.value import BEST

COHORT = 32
"""How many trials a cohort has at the least where `time` alone bounds the study."""
_COHORT_AT_ONCE = 2
"""It has so many times as many as are trained at once: while a cohort comes to its end, slots are empty."""
_RECENT = 32
"""Of so many trials, those that were trained last, the seconds of an epoch are the median."""
_MARGIN = 1.25
"""So much longer than it is reckoned the way to the end may take: who may catch up is resumed too."""


class TimedHalving(Halving):
    """The rule, for one study that its time ends."""

    def __init__(
        self, pruner: HalvingPruner, cohorts: int, *, maximize: bool, value: str = BEST, at_once: int = 1
    ) -> None:
        """So many trials are trained `at_once`, over all workers; the others are those of `Halving`."""
        super().__init__(pruner, cohorts, maximize=maximize, value=value)
        self._at_once = at_once
        self._cohort = max(COHORT, _COHORT_AT_ONCE * at_once)
        self.left: Callable[[float], float] = lambda epoch: math.inf
        """Gives the seconds that trials may still take where an epoch takes so many (`hpo.runner.deadline`)."""

    def choose(self, holders: Sequence[FrozenTrial], n: int, trials: int) -> Choice:
        """Return which of the `holders` of a budget of so many `trials` are to be claimed next, at most `n`."""
        epoch = epoch_seconds(holders)
        left = math.inf if epoch is None else self.left(epoch)
        if epoch is None or left == math.inf or not self.rungs:
            return super().choose(holders, n, trials)
        is_short = left < _MARGIN * self.seconds_to_end(holders, epoch, min(n, self._at_once))
        choice = self._ending(holders, n, left, epoch) if is_short else None
        choice = super().choose(holders, n, trials) if choice is None else choice
        best = self._best_paused(holders, left, epoch)
        if best is None or any(map(is_retry, choice.claim)):
            return choice
        takes = max((self._seconds_to_pause(trial, epoch) for trial in choice.claim), default=self.rungs[0] * epoch)
        if left - takes < _MARGIN * self._seconds_to_complete(best, epoch):
            return Choice(claim=[best])
        return choice

    def seconds_to_end(self, holders: Sequence[FrozenTrial], epoch: float, n_new: int = 0) -> float:
        """Return how long the rule takes to its end with these trials and `n_new` more, an epoch taking `epoch` s."""
        going = [trial for trial in holders if trial.state == TrialState.RUNNING or is_retry(trial)]
        moving, seconds = n_new + sum(self._rung_of(trial) == 0 for trial in going), 0.0
        for rung, to in pairwise((0, *self.rungs, self._pruner.epochs)):
            if rung:
                at = self.at(holders, rung)
                stay = len(self._paused_among(at, rung))
                reached = len(at) + moving
                least = max(1, self._pruner.finish) if to == self._pruner.epochs else 1
                n = max(reached // self._pruner.factor, min(reached, least))
                moving = max(0, min(n - (len(at) - stay), stay + moving))
                moving += sum(self._rung_of(trial) == rung for trial in going)
            seconds += math.ceil(moving / self._at_once) * (to - rung) * epoch
        return seconds

    def _ending(self, holders: Sequence[FrozenTrial], n: int, left: float, epoch: float) -> Choice | None:
        """Return what is resumed when no new trial is started any more; None: nothing of it can be complete in time."""
        claim = [trial for trial in holders if is_retry(trial)]
        below = [trial for trial in holders if is_paused(trial) and self._rung_of(trial) == 0]
        several = {t.number: t for t in (*self._to_promote(holders), *self._to_finish(holders), *below)}
        claim += [trial for trial in several.values() if self._seconds_to_complete(trial, epoch) <= left]
        if claim or any(trial.state == TrialState.RUNNING for trial in holders):
            return Choice(claim=claim[:n])
        return None

    def _best_paused(self, holders: Sequence[FrozenTrial], left: float, epoch: float) -> FrozenTrial | None:
        """Return the best paused trial by its value so far; None: a complete one is as good, or time is short.

        Where none is complete, it is that whatever the time: it is the study's result with fewer epochs.
        """
        complete = [t for t in holders if t.state == TrialState.COMPLETE and holds(t)]
        least = min(map(self._so_far, complete), default=math.inf)
        paused = [t for t in holders if is_paused(t) and holds(t) and self._so_far(t) < least]
        if complete:
            paused = [trial for trial in paused if self._seconds_to_complete(trial, epoch) <= left]
        return min(paused, key=lambda trial: (self._so_far(trial), trial.number), default=None)

    def _so_far(self, trial: FrozenTrial) -> float:
        return self.score(trial, len(trial.intermediate_values))

    def _seconds_to_complete(self, trial: FrozenTrial, epoch: float) -> float:
        trained = len(trial.intermediate_values)
        return (self._pruner.epochs - trained) * max(epoch, _length(spans_of(trial)) / max(1, trained))

    def _seconds_to_pause(self, trial: FrozenTrial, epoch: float) -> float:
        trained = len(trial.intermediate_values)
        return ((self.next_pause(trained) or self._pruner.epochs) - trained) * epoch

    def _room(self, n_started: int, trials: int) -> int:
        if trials < UNBOUNDED:
            return super()._room(n_started, trials)
        return 0 if n_started and n_started % self._cohort == 0 else self._room_of_next(n_started, trials)

    def _room_of_next(self, n_started: int, trials: int) -> int:
        """Return how many trials of a cohort are not started; where there are as many as fit, all are of one size."""
        if trials < UNBOUNDED:
            return super()._room_of_next(n_started, trials)
        return self._cohort - n_started % self._cohort


def epoch_seconds(holders: Sequence[FrozenTrial]) -> float | None:
    """Return how long an epoch takes where trials are trained now, side by side or not; None: nothing is known yet."""
    trained = [t for t in holders if t.intermediate_values and t.state != TrialState.RUNNING]
    own = [trial for trial in trained if schema.RETRY_OF not in trial.user_attrs]  # a retry has its predecessor's too
    known = [
        (spans[-1][1], _length(spans) / len(t.intermediate_values)) for t in own or trained if (spans := spans_of(t))
    ]
    return median(epoch for _, epoch in sorted(known)[-_RECENT:]) if known else None


def _length(spans: Sequence[tuple[float, float]]) -> float:
    return sum(end - start for start, end in spans)
