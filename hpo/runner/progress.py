"""What is shown of a study that runs: the contract, and the form that needs no screen, lines in a log."""

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from hpo.log import log
from hpo.search.budget import Counts
from hpo.search.clock import duration
from hpo.search.search import Search
from hpo.search.view import Best, StudyView
from hpo.study.spec import UNBOUNDED

if TYPE_CHECKING:
    from hpo.runner.prepare import Plan

STATES = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed", "INTERRUPTED": "interrupted"}


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How a trial ends: the state is a key of `hpo.tracking.base.STATUS`; `fault` says why it failed."""

    state: str
    value: float | None = None
    fault: str | None = None


class Progress(ABC):
    """What a person is shown of a study that runs: lines (here), or a live view (`hpo.cli.live`)."""

    def looked(self, seen: StudyView) -> None:  # noqa: B027 (there need not be anything that shows it)
        """The study was read, as others train it too."""

    @abstractmethod
    def trial_started(self, number: int, params: Mapping[str, Any]) -> None:
        """A trial was claimed; `params` are those that were searched."""

    @abstractmethod
    def epoch_ended(self, number: int, epoch: int, epochs: int, metrics: Mapping[str, float]) -> None:
        """A trial has `epoch` of its `epochs` behind it."""

    @abstractmethod
    def trial_paused(self, number: int, epoch: int) -> None:
        """A trial has left its slot after `epoch` epochs; `trial_started` says that it is resumed."""

    @abstractmethod
    def trial_ended(
        self, number: int, state: str, value: float | None, reason: str | None, seconds: float | None = None
    ) -> None:
        """A trial is COMPLETE, PRUNED, FAIL, or INTERRUPTED, after so many `seconds`; None: as many as were seen."""


Refreshes = Callable[[str, float | None], None]


_ENDS = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed"}
"""The states of trials that have ended, each with its name in `Counts`."""


class ProgressState:
    """The numbers that both views show; `refresh(state, value)` has them read anew when a trial has ended."""

    def __init__(self, counts: Counts, best: Best | None, trials: int, metric: str) -> None:
        self.counts, self.best, self.trials, self.metric = counts, best, trials, metric
        self._ends_at = trials
        self._started, self._done_before = time.monotonic(), counts.finished
        self.best_params: Mapping[str, Any] = {} if best is None else best.params
        """Those of the best trial that were searched, as far as that is known."""
        self.curve: Sequence[float] = ()
        """The best trial's value, epoch by epoch."""
        self.said: int | None = None
        """How many trials have been said to have ended; None: as many as have, since others end some, too."""
        self.workers: Collection[str] = ()
        """Who has a trial in training."""

    def see(self, seen: StudyView) -> None:
        """Take the numbers of a view of the study."""
        self.counts, self.best = seen.counts, seen.best()
        self._ends_at = seen.counts.finished + seen.counts.unfinished  # fewer than `trials` once `stop` has ended it
        self.workers = {trial.worker for trial in seen.running}
        if self.best is not None:
            self.best_params, self.curve = seen.searched(self.best.params), seen.curve(self.best.number)

    def elapsed(self) -> float:
        """Return the seconds since it is shown."""
        return time.monotonic() - self._started

    def per_hour(self) -> float | None:
        """Return how many trials end in an hour at the pace so far, or None before the first one has ended."""
        done, elapsed = self.counts.finished - self._done_before, self.elapsed()
        return done / elapsed * 3600 if done > 0 and elapsed > 0 else None

    def add(self, state: str) -> None:
        """Count one more trial that has ended."""
        field = _ENDS.get(state)
        if field is not None and self.counts.finished < self._ends_at:  # of many that end together, one look sees all
            counts = replace(self.counts, **{field: getattr(self.counts, field) + 1})
            self.counts = replace(counts, paused=min(counts.paused, self._ends_at - counts.finished))

    def seconds_left(self) -> float | None:
        """Return how long the rest will take at the pace so far, or None before the first trial has ended."""
        done = self.counts.finished - self._done_before
        if done <= 0 or self.counts.paused:  # which of those are resumed is not known
            return None
        if self.trials == UNBOUNDED:
            return None
        return (time.monotonic() - self._started) / done * (self._ends_at - self.counts.finished)

    def done_text(self) -> str:
        """Return `3/50`, how many trials have ended of how many; `3` where a `time` bounds them."""
        n = self.counts.finished if self.said is None else self.said
        return f"{n}" + ("" if self.trials == UNBOUNDED else f"/{self.trials}")

    def best_text(self) -> str:
        """Return `best accuracy 0.9890 (trial 7)`."""
        return (
            ("no feasible trial yet" if self.counts.complete else "no trial yet")
            if self.best is None
            else f"best {self.metric} {number_text(self.best.value)} (trial {self.best.number})"
        )

    def left_text(self) -> str:
        """Return `about 3 min left`, or nothing while that is unknown."""
        left = self.seconds_left()
        return "" if left is None or self.counts.finished >= self._ends_at else f"about {duration(left)} left"


class Refresh:
    """Reads a study's counts and best anew when a trial has ended.

    Where reading is dear and many trials end together, one that this process ended is only counted (`alone`).
    """

    def __init__(self, board: ProgressState, search: Search, alone: bool) -> None:
        self._board, self._search, self._alone = board, search, alone
        self._looked, self._cost = -math.inf, 0.0
        if alone:
            board.said = board.counts.finished

    def __call__(self, state: str, value: float | None) -> None:
        start = time.monotonic()
        if self._board.said is not None:  # of many that end together the storage may have all before one is said
            self._board.said += state in _ENDS
        lately = start - self._looked < 20 * self._cost
        if self._alone and lately and not (value is not None and self._search.may_be_best(value)):
            self._board.add(state)
            return
        seen = self._search.view()
        self._board.see(seen)
        self._looked = time.monotonic()
        self._cost = self._looked - start


def state_of(plan: "Plan", search: Search) -> ProgressState:
    """Return the numbers of a study as its storage has them now."""
    seen = search.view()
    board = ProgressState(seen.counts, seen.best(), plan.spec.trials, plan.metric)
    board.see(seen)
    return board


class PlainProgress(Progress):
    """Logs one line a trial, and one every `epoch_seconds` while a long one runs."""

    _about: Mapping[str, Any] = {}
    """What is logged with each line."""

    def __init__(self, board: ProgressState, refresh: Refreshes, epoch_seconds: float = 15.0) -> None:
        self._board, self._refresh, self._epoch_seconds = board, refresh, epoch_seconds
        self._said_at = time.monotonic()
        self._running: dict[int, tuple[float, str]] = {}
        """When each trial in training would have begun, had it not been paused, and its params."""
        self._paused: dict[int, tuple[float, str]] = {}
        """For how many seconds each paused trial was trained, and its params."""

    def trial_started(self, number: int, params: Mapping[str, Any]) -> None:
        if not self._running:
            self._said_at = time.monotonic()
        seconds, text = self._paused.pop(number, (0.0, shown(params)))
        self._running[number] = (time.monotonic() - seconds, text)

    def epoch_ended(self, number: int, epoch: int, epochs: int, metrics: Mapping[str, float]) -> None:
        if time.monotonic() - self._said_at >= self._epoch_seconds:
            self._said_at = time.monotonic()
            line = f"trial {number}: epoch {epoch}/{epochs}, {metric_text(self._board, metrics)}"
            log.info(line, extra=self._about)

    def trial_paused(self, number: int, epoch: int) -> None:
        started, params = self._running.pop(number)
        self._paused[number] = (time.monotonic() - started, params)

    def trial_ended(
        self, number: int, state: str, value: float | None, reason: str | None, seconds: float | None = None
    ) -> None:
        self._refresh(state, value)
        board = self._board
        said = [f"{board.metric} {number_text(value)}" if value is not None else "", reason or ""]
        what = "".join(f"{before} {each}" for before, each in zip(":,", filter(None, said), strict=False))
        seen, params = self._paused.pop(number, (0.0, ""))
        if number in self._running:
            started, params = self._running.pop(number)
            seen = time.monotonic() - started
        parts = [
            f"[{board.done_text()}] trial {number} {STATES[state]}{what}",
            params,
            duration(seen if seconds is None else seconds),
            board.best_text(),
            board.left_text(),
        ]
        log.info("; ".join(part for part in parts if part), extra=self._about)


class NoProgress(Progress):
    """Shows nothing."""

    def trial_started(self, number: int, params: Mapping[str, Any]) -> None:
        pass

    def epoch_ended(self, number: int, epoch: int, epochs: int, metrics: Mapping[str, float]) -> None:
        pass

    def trial_paused(self, number: int, epoch: int) -> None:
        pass

    def trial_ended(
        self, number: int, state: str, value: float | None, reason: str | None, seconds: float | None = None
    ) -> None:
        pass


def count_text(counts: Counts) -> str:
    """Return `18 complete, 2 pruned, 0 failed`."""
    return f"{counts.complete} complete, {counts.pruned} pruned, {counts.failed} failed"


def metric_text(board: ProgressState, metrics: Mapping[str, float]) -> str:
    """Return what is shown of an epoch's metrics: not every trial has all of them."""
    return ", ".join(f"{name} {number_text(value)}" for name, value in metrics_shown(board.metric, metrics).items())


def metrics_shown(metric: str, metrics: Mapping[str, float]) -> dict[str, float]:
    """Return those of an epoch's metrics that are shown, as they are called there: the study's, and the loss."""
    known = {metric: metrics.get(f"valid_{metric}", metrics.get(metric)), "train loss": metrics.get("train_loss")}
    return {name: value for name, value in known.items() if value is not None}


def number_text(value: float) -> str:
    """Return a metric with four decimals, or with four digits where decimals would hide it."""
    return f"{value:.4f}" if value == 0 or not abs(value) < 0.001 else f"{value:.4g}"


def shown(params: Mapping[str, Any]) -> str:
    """Return `learning_rate=0.0123 n_hidden=24`."""
    return " ".join(
        f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}" for name, value in params.items()
    )
