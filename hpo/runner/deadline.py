"""When the trials of a study that has a `time` must end, so that the whole of `hpo run` ends in that time.

What comes behind them is estimated from what trials have taken: the refit is about one trial alone, a confirmation is
as many as it trains; the export, and its comparison with the model that was measured, take some seconds.
"""

import math
import time
from statistics import fmean

from hpo.log import log
from hpo.runner.outcome import networks_of
from hpo.runner.prepare import Plan
from hpo.search import schema
from hpo.search.budget import covered, spans_of
from hpo.search.search import Search
from hpo.search.view import StudyView
from hpo.training.stack import Member

EXPORT_SECONDS = 6.0
"""What the test, the export in all formats and its comparison take, measured on a network of a table, or as long as it
took to begin (imports, data, networks tried) where that was longer: a busy machine is slow at both."""
_MOST_EXPORT_SECONDS = 60.0
_MORE_ROWS = 1.3
"""A refit has the validation rows too, a fourth more by the default shares."""
_MOST_BEHIND = 0.6
"""No more than so large a share of the time is kept for what comes behind the trials."""
_OF_FIRST = 0.25
"""A stack's second epoch is assumed to take so much of the first one, in which its steps are traced."""
_LOOK_SECONDS = 1.0
SHORT_SECONDS = 300.0
"""A shorter `time` is not spent on measuring how many trials to train at once."""


def set_end(plan: Plan, search: Search) -> None:
    """Store when the study is to end, from what of its `time` earlier runs have left; all its workers keep to that."""
    if plan.spec.time is not None:
        since = time.monotonic() - plan.made
        search.remember(schema.ENDS, time.time() - since + search.seconds_left(plan.spec.time))


class Deadline:
    """Until when trials may run, by time.monotonic(); of a `time`, what comes behind them is taken off.

    Where no trial has ended yet, none is given back, since there would be no model: `must_end` says when it has enough.
    """

    def __init__(self, plan: Plan, search: Search, stacked: bool = False) -> None:
        """`stacked`: whether trials are trained in stacks, whose first epoch takes as long as to trace or compile."""
        self._plan, self._search, self._stacked = plan, search, stacked
        self._look_at, self._until, now = -math.inf, math.inf, time.monotonic()
        self._reported: dict[tuple[int, float], tuple[float, int]] = {}
        """When each trial has first reported since it was claimed, by time.monotonic(), and after how many epochs."""
        self._any_complete = False
        spec = plan.spec
        self._export = min(max(EXPORT_SECONDS, now - plan.made), _MOST_EXPORT_SECONDS)
        self._trials_end = now + search.seconds_left(spec.timeout) if spec.timeout is not None else math.inf
        self._end = math.inf
        if spec.time is not None:
            left, ends = search.seconds_left(spec.time), search.attrs.get(schema.ENDS)
            if isinstance(ends, int | float) and ends > time.time():
                left = min(left, ends - time.time())
            self._end = now + left

    def __call__(self) -> float:
        """Return the deadline as it is seen now."""
        if self._end == math.inf:
            return self._trials_end
        now = time.monotonic()
        if now >= self._look_at:
            self._look_at = now + _LOOK_SECONDS
            seen = self._search.view()
            until = self._end - seconds_behind(self._plan, seen, self._export) if seen.counts.finished else math.inf
            self._until = min(until, self._trials_end)
            self._any_complete = bool(seen.complete)
        return self._until

    def left(self, epoch: float) -> float:
        """Return the seconds that trials still have, by which halving chooses (`TimedHalving`); `epoch` is one's.

        Where none is complete, what comes behind them is reckoned by it, for a trial of all epochs.
        """
        until = self()
        if self._end < math.inf and not self._any_complete:
            until = min(self._end - self._behind(epoch * self._plan.spec.epochs), self._trials_end)
        return until - time.monotonic()

    def must_end(self, member: Member, value: float, started: float) -> bool:
        """Whether a trial is to be complete with the epochs it has, since the time is too short for another one.

        That is so only where none is complete yet. `value` is what the trial comes to so far, `started` when it was
        claimed, by time.monotonic(). One than which another trial is better is left to make room for that: where that
        is paused, under halving, this one is paused now. Past the time by more than an epoch it ends nevertheless.
        """
        if self._end == math.inf or self._any_complete:
            return False
        now = time.monotonic()
        first, n_first = self._reported.setdefault((member.number, started), (now, member.epoch))
        epoch = (now - first) / (member.epoch - n_first) if member.epoch > n_first else now - started
        if self._stacked and member.epoch == n_first and now + _OF_FIRST * epoch + self._export <= self._end:
            return False  # the next one says how long they take
        if now + epoch + self._behind(epoch * (member.epoch + 1)) <= self._end:
            return False
        seen = self._search.view()
        self._any_complete = bool(seen.complete)
        if self._any_complete:
            return False
        if now <= self._end + epoch and (better := self._better(seen, member.number, value)):
            if self._search.halving is not None and any(number in seen.paused for number in better):
                member.pause = member.epoch
            return False
        spec = self._plan.spec
        log.info(
            f"trial {member.number} ends after {member.epoch} of {spec.epochs} epochs, since the study's time "
            f"({spec.time:g} s) is needed for refit and export; raise `time` or lower `epochs` to train it whole"
        )
        return True

    def _behind(self, trial: float) -> float:
        """Return the seconds that what comes behind the trials takes, where none is complete and one takes `trial`."""
        spec = self._plan.spec
        assert spec.time is not None
        behind = trial * _MORE_ROWS * max(networks_of(spec)) + self._export
        if spec.confirm is not None:
            behind += trial * spec.confirm.runs
        return min(behind, _MOST_BEHIND * spec.time)

    def _better(self, seen: StudyView, number: int, value: float) -> list[int]:
        """Return the paused and running trials that have been better than trial `number` with its `value`."""
        sign = -1.0 if self._plan.maximize else 1.0
        others = {*seen.paused, *(trial.number for trial in seen.running)} - {number}
        return [other for other in others if any(sign * x < sign * value for x in seen.curve(other))]


def seconds_behind(plan: Plan, seen: StudyView, export: float = EXPORT_SECONDS) -> float:
    """Return the seconds that confirmation, refit and `export` will take, from what the trials have taken."""
    assert plan.spec.time is not None
    took = {trial.number: covered(spans_of(trial)) for trial in seen.complete}
    best = seen.best()
    if best is None or plan.function is not None:
        return 0.0
    n_networks = max(networks_of(plan.spec))
    [trained] = [trial for trial in seen.complete if trial.number == best.number]
    share = (best.epoch + 1) / max(len(trained.intermediate_values), best.epoch + 1)  # it is refitted to its best epoch
    behind = took[best.number] * share * _MORE_ROWS * n_networks + export
    if plan.spec.confirm is not None:
        behind += fmean(took.values()) * plan.spec.confirm.runs * min(plan.spec.confirm.top, len(took))
    return min(behind, _MOST_BEHIND * plan.spec.time)
