"""The live view of a study on a terminal: drawn again a few times a second, as wide as the terminal is then."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from hpo.errors import masked
from hpo.log import SHOWN
from hpo.runner.progress import (
    STATES,
    PlainProgress,
    ProgressState,
    Refreshes,
    count_text,
    metrics_shown,
    number_text,
    shown,
)
from hpo.search.clock import duration
from hpo.search.view import StudyView

_SHOWN = 8
"""How many of a stack's trials have a line of their own."""
_BARS, _ASCII_BARS = "▁▂▃▄▅▆▇█", "_.-~=+*#"
_WIDE = 100
"""From how many columns on the params of a running trial are shown."""


@dataclass
class _Row:
    """A trial in training."""

    params: str
    epoch: int = 0
    epochs: int | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)


class LiveProgress(PlainProgress):
    """A bar of all trials, how many there are of each state, the best one, and the first few that run.

    The lines of the plain form go to a log file only, where there is one.
    """

    _about = {SHOWN: True}

    def __init__(self, board: ProgressState, refresh: Refreshes, console: Console) -> None:
        super().__init__(board, refresh)
        self._console = console
        self._rows: dict[int, _Row] = {}
        self._live = Live(self, console=console, refresh_per_second=4)

    def __enter__(self) -> "LiveProgress":
        self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._rows.clear()
        self._live.stop()

    def looked(self, seen: StudyView) -> None:
        self._board.see(seen)

    def trial_started(self, number: int, params: Mapping[str, Any]) -> None:
        super().trial_started(number, params)
        self._rows[number] = _Row(shown(params))

    def epoch_ended(self, number: int, epoch: int, epochs: int, metrics: Mapping[str, float]) -> None:
        super().epoch_ended(number, epoch, epochs, metrics)
        row = self._rows[number]
        row.epoch, row.epochs, row.metrics = epoch, epochs, metrics_shown(self._board.metric, metrics)

    def trial_paused(self, number: int, epoch: int) -> None:
        super().trial_paused(number, epoch)
        self._rows.pop(number, None)

    def trial_ended(
        self, number: int, state: str, value: float | None, reason: str | None, seconds: float | None = None
    ) -> None:
        super().trial_ended(number, state, value, reason, seconds)
        self._rows.pop(number, None)  # one that was pruned while it was paused has none
        if reason is not None:
            self._console.print(Text(masked(f"trial {number} {STATES[state]}: {reason}"), style="yellow"))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        rows = list(self._rows.items())  # another thread changes them
        yield self._bar(options.max_width)
        for line in (self._counts(len(rows)), *self._best(ascii_only=options.ascii_only)):
            yield Text(masked(line), no_wrap=True, overflow="ellipsis")
        if rows:
            yield self._training(rows[:_SHOWN], options.max_width)
        if len(rows) > _SHOWN:
            yield Text(f"  and {len(rows) - _SHOWN} more in training")

    def _bar(self, width: int) -> Table:
        board = self._board
        line = Table.grid(padding=(0, 1))
        bar = ProgressBar(total=max(board.trials, 1), completed=board.counts.finished, width=min(30, width // 4))
        times = ", ".join(part for part in (duration(board.elapsed()), board.left_text()) if part)
        line.add_row(Text("trials", style="bold"), bar, Text(board.done_text()), Text(times))
        return line

    def _counts(self, n_training: int) -> str:
        counts, workers = self._board.counts, self._board.workers
        parts = [count_text(counts)]
        parts += [f"{counts.paused} paused"] if counts.paused else []
        parts += [f"{n_training} in training" + (f" by {len(workers)} workers" if len(workers) > 1 else "")]
        pace = self._board.per_hour()
        return ", ".join(parts) + (f"; {pace:,.0f} trials an hour" if pace is not None else "")

    def _best(self, *, ascii_only: bool) -> list[str]:
        board = self._board
        if board.best is None:
            return [board.best_text()]
        line = sparkline(board.curve, _ASCII_BARS if ascii_only else _BARS)
        best = " ".join(part for part in (board.best_text(), line) if part)
        return [best, f"  {shown(board.best_params)}"] if board.best_params else [best]

    def _training(self, rows: Sequence[tuple[int, _Row]], width: int) -> Table:
        names = list(dict.fromkeys(name for _, row in rows for name in row.metrics))
        made = Table.grid(padding=(0, 2), pad_edge=True)
        made.add_column(no_wrap=True)
        made.add_column(no_wrap=True, justify="right")
        for _ in names:
            made.add_column(no_wrap=True, justify="right", overflow="ellipsis")
        if width >= _WIDE:
            made.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
        header = ["trial", "epoch", *names, *(["params"] if width >= _WIDE else [])]
        made.add_row(*(Text(name, style="dim") for name in header))
        for number, row in rows:
            values = [number_text(row.metrics[name]) if name in row.metrics else "" for name in names]
            epoch = f"{row.epoch}/{row.epochs}" if row.epochs else "-"
            cells = [str(number), epoch, *values, *([masked(row.params)] if width >= _WIDE else [])]
            made.add_row(*(Text(cell) for cell in cells))
        return made


def sparkline(values: Sequence[float], bars: str = _BARS, width: int = 24) -> str:
    """Return a curve as a line of at most `width` bars, from its lowest to its highest finite value.

    >>> sparkline([0.0, 0.5, 1.0])
    '▁▄█'
    """
    finite = [value for value in values if abs(value) < float("inf")]  # NaN is not
    if len(finite) < 2:
        return ""
    some = finite if len(finite) <= width else [finite[i * (len(finite) - 1) // (width - 1)] for i in range(width)]
    low, high = min(some), max(some)
    if low == high:
        return bars[0] * len(some)
    return "".join(bars[int((value - low) / (high - low) * (len(bars) - 1))] for value in some)
