"""What a person sees: a live view on a terminal, plain lines in a file or a pipe."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

from hpo.errors import masked
from hpo.runner.progress import STATES, Progress, ProgressState, Refreshes, metric_text, shown


class LiveProgress(Progress):
    """A bar of all trials, and under it the epoch and metric of the first few that run."""

    def __init__(self, board: ProgressState, refresh: Refreshes, console: Console) -> None:
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
        self._running.update(self._tasks[number], total=epochs, completed=epoch, text=metric_text(self._board, metrics))

    def trial_paused(self, number: int, epoch: int) -> None:
        self._remove(number)

    def trial_ended(self, number: int, state: str, value: float | None, reason: str | None) -> None:
        self._refresh(state, value)
        self._remove(number)
        text = ", ".join(part for part in (self._board.best_text(), self._board.left_text()) if part)
        self._all.update(self._task, completed=self._board.counts.finished, text=text)
        if reason is not None:
            self._console.print(Text(masked(f"trial {number} {STATES[state]}: {reason}"), style="yellow"))

    def _remove(self, number: int) -> None:
        """Remove the line of a trial that is no longer trained; one that was pruned while it was paused has none."""
        if number in self._tasks:
            self._running.remove_task(self._tasks.pop(number))
        for task in list(self._tasks.values())[:_SHOWN]:
            self._running.update(task, visible=True)
        self._show_more()

    def _show_more(self) -> None:
        more = len(self._tasks) - _SHOWN
        self._more.plain = f"  and {more} more in training" if more > 0 else ""


_SHOWN = 8
"""How many of a stack's trials have a line of their own."""


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
