"""When more trials are not worth it: the rules of `stop` in the study file, and what is stored of one that held.

A search that was stopped is one whose budget is the trials that were started: what is queued beyond them is withdrawn,
as under a lowered `trials`. Only who looks for work asks the rules. The answer is stored, and it stands, whatever the
trials that were in training then come to, until the study file says something else or asks for more trials.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import optuna
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from hpo.errors import masked
from hpo.log import log
from hpo.search.budget import in_order_of_end, is_new, is_paused, rank
from hpo.search.constraints import holds
from hpo.search.front import leading
from hpo.seeds import derive
from hpo.study.goals import front
from hpo.study.spec import StudySpec
from hpo.study.spec_parts import TERMINATORS, Stop

_EVERY = 5
"""A terminator that fits a Gaussian process is asked once so many more trials are complete, or a tenth more of many."""
_STAGNATION = "best_value_stagnation"


@dataclass(frozen=True, kw_only=True)
class Stopped:
    """What has ended a search before its budget was spent."""

    rule: str
    """The key of `stop` that held."""
    setting: float | str
    """What the study file said there."""
    trials: int
    """The budget."""
    finished: int
    """How many of these had finished."""
    why: str

    def as_dict(self) -> dict[str, Any]:
        """Return it as it is stored, and as `--json` has it."""
        return asdict(self)

    def text(self) -> str:
        """Return in words that the search was stopped, and why."""
        return f"stopped after {self.finished} of {self.trials} trials: {self.why}"


def stopped_in(stored: Any) -> Stopped | None:
    """Return what ended a search, as a storage has it (schema.STOPPED); None: nothing, or hpo did not write that."""
    if not isinstance(stored, Mapping) or set(stored) != set(Stopped.__dataclass_fields__):
        return None
    numbers = all(type(stored[key]) is int for key in ("trials", "finished"))
    texts = all(type(stored[key]) is str for key in ("rule", "why"))
    if not (numbers and texts and type(stored["setting"]) in (int, float, str)):
        return None
    return Stopped(**{**stored, "why": masked(stored["why"])})


def still_stopped(stored: Any, spec: StudySpec) -> Stopped | None:
    """Return what ended a search, unless the study file has another rule by now, or asks for more trials than then."""
    found, stop = stopped_in(stored), spec.stop
    if found is None or stop is None or spec.trials > found.trials:
        return None
    return found if stop.rules().get(found.rule) == found.setting else None


def budget(trials: int, holders: Sequence[FrozenTrial], stopped: Stopped | None) -> int:
    """Return how many trials a study is to have: `trials`, or where it was stopped those of them that were started."""
    return trials if stopped is None else min(trials, sum(not is_new(trial) for trial in holders))


class StopRules:
    """The rules of one study, as one process asks them."""

    def __init__(self, spec: StudySpec, *, maximize: bool, others: Sequence[bool] = ()) -> None:
        """`others`: of each metric beside the one that leads, whether more of it is better."""
        self._spec, self._maximize, self._others = spec, maximize, others
        self._terminator: Any = None
        self._ask_at = 0

    def ask(self, holders: Sequence[FrozenTrial]) -> Stopped | None:
        """Return which rule holds of the trials that hold the slots of the budget; None: none, or nothing is left.

        None holds before a trial is complete. A terminator is asked now and then only, and it may take seconds.
        """
        stop, ended = self._spec.stop, in_order_of_end(holders)
        started = sum(not is_new(trial) for trial in holders)
        if stop is None or (started >= self._spec.trials and not any(map(is_paused, holders))):
            return None
        found = self._target(stop, ended) or self._no_gain(stop, ended) or self._terminated(stop, ended)
        if found is None:
            return None
        rule, why = found
        setting = stop.rules()[rule]
        return Stopped(rule=rule, setting=setting, trials=self._spec.trials, finished=len(ended), why=why)

    def _target(self, stop: Stop, ended: Sequence[FrozenTrial]) -> tuple[str, str] | None:
        best = self._best(ended)
        value = None if best is None else leading(best)
        if stop.target is None or best is None or value is None:
            return None
        if value < stop.target if self._maximize else value > stop.target:
            return None
        return "target", f"trial {best.number} has reached the target {stop.target:g}, with {value:.6g}"

    def _no_gain(self, stop: Stop, ended: Sequence[FrozenTrial]) -> tuple[str, str] | None:
        if stop.no_gain is None:
            return None
        if self._others:
            return self._front_stands(stop.no_gain, ended)
        best, since = None, 0
        for trial in ended:
            since += 1
            if _counts(trial) and (best is None or self._better(trial, best)):
                best, since = trial, 0
        if best is None or since < stop.no_gain:
            return None
        return "no_gain", f"none of the last {since} finished trials was better than trial {best.number}"

    def _front_stands(self, no_gain: int, ended: Sequence[FrozenTrial]) -> tuple[str, str] | None:
        before = [trial.values for trial in ended[:-no_gain] if _counts(trial)]
        after = [trial.values for trial in ended[-no_gain:] if _counts(trial)]
        if not before:
            return None
        on = front([*map(tuple, before), *map(tuple, after)], (self._maximize, *self._others))
        if any(i >= len(before) and after[i - len(before)] not in before for i in on):
            return None
        return "no_gain", f"none of the last {no_gain} finished trials added to the Pareto front"

    def _terminated(self, stop: Stop, ended: Sequence[FrozenTrial]) -> tuple[str, str] | None:
        complete = list(filter(_counts, ended))
        if stop.terminator is None or len(complete) < max(self._ask_at, TERMINATORS[stop.terminator]):
            return None
        if self._terminator is None:
            self._terminator = _terminator(stop.terminator, derive(self._spec.seed, "terminator", 0))
        try:
            with _quiet():
                if self._holds(stop.terminator, complete):
                    after = f"after {len(complete)} complete trials"
                    return "terminator", f"Optuna's terminator {stop.terminator} expects nothing more of it, {after}"
        except Exception as error:  # Optuna's own, on trials that it was not made for: no reason to stop a study
            log.warning(f"stop.terminator: {stop.terminator} could not be asked ({type(error).__name__}: {error})")
        self._ask_at = len(complete) + (1 if stop.terminator == _STAGNATION else max(_EVERY, len(complete) // 10))
        return None

    def _holds(self, name: str, complete: Sequence[FrozenTrial]) -> bool:
        """Whether Optuna's terminator expects nothing more."""
        if name != _STAGNATION:
            return bool(self._terminator.should_terminate(_study_of(complete, maximize=self._maximize)))
        direction = StudyDirection.MAXIMIZE if self._maximize else StudyDirection.MINIMIZE
        left = self._terminator.evaluate(sorted(complete, key=lambda trial: trial.number), direction)
        return bool(left < 0)  # as Optuna's `Terminator` has it, without a study made of the trials at each of them

    def _best(self, ended: Sequence[FrozenTrial]) -> FrozenTrial | None:
        complete = list(filter(_counts, ended))
        return min(complete, key=lambda t: rank(t, maximize=self._maximize, others=self._others), default=None)

    def _better(self, trial: FrozenTrial, than: FrozenTrial) -> bool:
        return rank(trial, maximize=self._maximize)[0] < rank(than, maximize=self._maximize)[0]


def _counts(trial: FrozenTrial) -> bool:
    """Whether a trial is one that the search may end with: complete, and it breaks no constraint."""
    return trial.state == TrialState.COMPLETE and holds(trial)


def _terminator(name: str, seed: int) -> Any:
    """Return Optuna's terminator of that name.

    What is left to be gained is held against Optuna's threshold: a hundredth of what it was for the 20 trials after
    the first 10. Optuna's default is the error of cross-validation, which a search has not.
    """
    from optuna import terminator as of

    with _quiet():
        if name == _STAGNATION:
            return of.BestValueStagnationEvaluator()
        make = {"regret_bound": of.RegretBoundEvaluator, "emmr": of.EMMREvaluator}[name]
        evaluator = make(seed=seed % 2**32)
        return of.Terminator(evaluator, of.MedianErrorEvaluator(evaluator))


def _study_of(complete: Sequence[FrozenTrial], *, maximize: bool) -> optuna.Study:
    """Return a study in memory that has these trials, without those that failed or that another study had."""
    study = optuna.create_study(direction="maximize" if maximize else "minimize")
    study.add_trials(sorted(complete, key=lambda trial: trial.number))
    return study


@contextmanager
def _quiet() -> Iterator[None]:
    """Within this, Optuna does not say that these classes are experimental and deprecated, or have few trials."""
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        optuna.logging.set_verbosity(level)
