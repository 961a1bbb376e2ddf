"""What a person sees: a live view on a terminal, plain lines in a file or a pipe."""

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

from hpo.errors import masked
from hpo.runner.progress import Progress
from hpo.search.budget import Counts
from hpo.search.view import Best

Refresh = Callable[[str, float | None], None]


class ProgressState:
    """The numbers that both views show; `refresh(state, value)` has them read anew when a trial has ended."""

    def __init__(self, counts: Counts, best: Best | None, trials: int, metric: str) -> None:
        self.counts, self.best, self.trials, self.metric = counts, best, trials, metric
        self._started, self._done_before = time.monotonic(), counts.finished

    def add(self, state: str) -> None:
        """Count one more trial that has ended."""
        field = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed"}.get(state)
        if field is not None:
            self.counts = replace(self.counts, **{field: getattr(self.counts, field) + 1})

    def seconds_left(self) -> float | None:
        """Return how long the rest will take at the pace so far, or None before the first trial has ended."""
        done = self.counts.finished - self._done_before
        if done <= 0:
            return None
        return (time.monotonic() - self._started) / done * (self.trials - self.counts.finished)

    def best_text(self) -> str:
        """Return `best accuracy 0.9890 (trial 7)`."""
        return (
            "no trial yet"
            if self.best is None
            else f"best {self.metric} {self.best.value:.4f} (trial {self.best.number})"
        )

    def left_text(self) -> str:
        """Return `about 3 min left`, or nothing while that is unknown."""
        left = self.seconds_left()
        return "" if left is None or self.counts.finished >= self.trials else f"about {duration(left)} left"


class PlainProgress(Progress):
    """One line a trial, and one every `epoch_seconds` while a long one runs."""

    def __init__(
        self, board: ProgressState, refresh: Refresh, write: Callable[[str], None], epoch_seconds: float = 15.0
    ):
        self._board, self._refresh, self._write, self._epoch_seconds = board, refresh, write, epoch_seconds
        self._said_at = time.monotonic()
        self._running: dict[int, tuple[float, str]] = {}

    def trial_started(self, number: int, params: Mapping[str, Any]) -> None:
        if not self._running:
            self._said_at = time.monotonic()
        self._running[number] = time.monotonic(), shown(params)

    def epoch_ended(self, number: int, epoch: int, epochs: int, metrics: Mapping[str, float]) -> None:
        if time.monotonic() - self._said_at >= self._epoch_seconds:
            self._said_at = time.monotonic()
            self._write(f"trial {number}: epoch {epoch}/{epochs}, {_metric(self._board, metrics)}")

    def trial_ended(self, number: int, state: str, value: float | None, reason: str | None) -> None:
        self._refresh(state, value)
        board = self._board
        what = f": {board.metric} {value:.4f}" if value is not None else f": {reason}" if reason else ""
        started, params = self._running.pop(number)
        parts = [
            f"[{board.counts.finished}/{board.trials}] trial {number} {_STATES[state]}{what}",
            params,
            duration(time.monotonic() - started),
            board.best_text(),
            board.left_text(),
        ]
        self._write("; ".join(part for part in parts if part))

    def note(self, text: str) -> None:
        self._write(text)


class Notes(Progress):
    """Says only what is to be said once: what a worker does is shown by the process that has started it."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write

    def trial_started(self, number: int, params: Mapping[str, Any]) -> None:
        pass

    def epoch_ended(self, number: int, epoch: int, epochs: int, metrics: Mapping[str, float]) -> None:
        pass

    def trial_ended(self, number: int, state: str, value: float | None, reason: str | None) -> None:
        pass

    def note(self, text: str) -> None:
        self._write(text)


class LiveProgress(Progress):
    """A bar of all trials, and under it the epoch and metric of the first few that run."""

    def __init__(self, board: ProgressState, refresh: Refresh, console: Console) -> None:
        self._board, self._refresh, self._console = board, refresh, console
        self._all = Bar(
            TextColumn("[bold]trials[/]"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            TimeElapsedColumn(),
            console=console,
        )
        self._task = self._all.add_task("", total=board.trials, completed=board.counts.finished, text=board.best_text())
        self._running = Bar(
            TextColumn("  {task.description}"),
            BarColumn(bar_width=20),
            TextColumn("epoch"),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            console=console,
        )
        self._tasks: dict[int, TaskID] = {}
        self._more = Text()
        self._live = Live(Group(self._all, self._running, self._more), console=console, refresh_per_second=8)

    def __enter__(self) -> "LiveProgress":
        self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        for task in self._tasks.values():
            self._running.remove_task(task)
        self._live.stop()

    def trial_started(self, number: int, params: Mapping[str, Any]) -> None:
        visible = len(self._tasks) < _SHOWN
        self._tasks[number] = self._running.add_task(f"trial {number}", total=None, text=shown(params), visible=visible)
        self._show_more()

    def epoch_ended(self, number: int, epoch: int, epochs: int, metrics: Mapping[str, float]) -> None:
        self._running.update(self._tasks[number], total=epochs, completed=epoch, text=_metric(self._board, metrics))

    def trial_ended(self, number: int, state: str, value: float | None, reason: str | None) -> None:
        self._refresh(state, value)
        self._running.remove_task(self._tasks.pop(number))
        for task in list(self._tasks.values())[:_SHOWN]:
            self._running.update(task, visible=True)
        self._show_more()
        text = ", ".join(part for part in (self._board.best_text(), self._board.left_text()) if part)
        self._all.update(self._task, completed=self._board.counts.finished, text=text)
        if reason is not None:
            self._console.print(Text(masked(f"trial {number} {_STATES[state]}: {reason}"), style="yellow"))

    def _show_more(self) -> None:
        more = len(self._tasks) - _SHOWN
        self._more.plain = f"  and {more} more in training" if more > 0 else ""

    def note(self, text: str) -> None:
        self._console.print(Text(masked(text)))


_SHOWN = 8
"""How many of a stack's trials have a line of their own."""
_STATES = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed", "INTERRUPTED": "interrupted"}


def _metric(board: ProgressState, metrics: Mapping[str, float]) -> str:
    """Return what is shown of an epoch's metrics: not every trial has all of them."""
    known = {board.metric: metrics.get(f"valid_{board.metric}", metrics.get(board.metric))}
    known["train loss"] = metrics.get("train_loss")
    return ", ".join(f"{name} {value:.4f}" for name, value in known.items() if value is not None)


def shown(params: Mapping[str, Any]) -> str:
    """Return `learning_rate=0.0123 n_hidden=24`."""
    return " ".join(
        f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}" for name, value in params.items()
    )


def duration(seconds: float) -> str:
    """Return seconds as `0.4 s`, `12 s`, `3 min` or `1 h 20 min`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def table(title: str, columns: list[str], rows: list[list[str]]) -> Table:
    """Return a rich table."""
    made = Table(title=title, title_justify="left", title_style="bold", show_edge=False, pad_edge=False)
    for column in columns:
        made.add_column(column, overflow="fold")
    for row in rows:
        made.add_row(*(Text(cell) for cell in row))
    return made


def pairs(title: str, rows: list[list[str]]) -> Table:
    """Return a table of names and values, without a header."""
    made = table(title, ["", ""], rows)
    made.show_header = False
    return made
