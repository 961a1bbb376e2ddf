"""Where commands print: a console that shows no secret, on which the package's log is shown too."""

import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from hpo.errors import masked
from hpo.log import shown_by
from hpo.study.draft import read


class _MaskingConsole(Console):
    """Shows no secret, whoever prints."""

    def print(self, *objects: Any, **keys: Any) -> None:
        super().print(*(masked(each) if isinstance(each, str) else each for each in objects), **keys)


def console() -> Console:
    """Return a console on stdout; a file or a pipe is not wrapped at 80 columns."""
    terminal = sys.stdout.isatty()
    return _MaskingConsole(markup=False, highlight=False, soft_wrap=not terminal, width=None if terminal else 200)


def announce(path: Path, overrides: Mapping[str, str]) -> None:
    """Say that a study is begun, before torch is imported, which takes seconds. Raises what reading its file does."""
    if sys.modules.get("torch") is not None:
        return
    draft = read(path, overrides)
    if draft.spec is not None and not draft.faults:
        console().print(f"{draft.spec.name}: {path}, {draft.spec.trials} trials; importing PyTorch")


class ConsoleHandler(logging.Handler):
    """Prints what is logged, above a live view; rich's own handler would wrap lines in a file or a pipe."""

    def __init__(self, out: Console) -> None:
        super().__init__()
        self._out = out

    def emit(self, record: logging.LogRecord) -> None:
        self._out.print(Text(record.getMessage()))


@contextmanager
def screen() -> Iterator[Console]:
    """Give a console, on which the package's log is shown too."""
    out = console()
    with shown_by(ConsoleHandler(out)):
        yield out
