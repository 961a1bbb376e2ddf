"""Where commands print: a console that shows no secret, on which the package's log is shown too."""

import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.text import Text

from hpo.cli.output import say
from hpo.errors import HpoError, InputError, masked
from hpo.log import SHOWN, log, shown_by
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
        console().print(f"{draft.spec.name}: {path}, {draft.spec.budget_text}; importing PyTorch")


class ConsoleHandler(logging.Handler):
    """Prints what is logged, above a live view; rich's own handler would wrap lines in a file or a pipe."""

    def __init__(self, out: Console) -> None:
        super().__init__()
        self._out = out

    def emit(self, record: logging.LogRecord) -> None:
        if not getattr(record, SHOWN, False):
            self._out.print(Text(record.getMessage()))


class Shown(NamedTuple):
    """What is shown of what is logged, and where else it goes."""

    quiet: bool = False
    """Only warnings."""
    log_file: Path | None = None
    """A file that all of it is added to, each text with its time."""
    started: float | None = None
    """When the command began, by time.monotonic(), before it imported anything; a study's `time` counts from there."""


@contextmanager
def screen(how: Shown = Shown()) -> Iterator[Console]:
    """Give a console, on which the package's log is shown too. Raises InputError where the log's file cannot be had."""
    out = console()
    handler = ConsoleHandler(out)
    handler.setLevel(logging.WARNING if how.quiet else logging.INFO)
    with shown_by(handler), nullcontext() if how.log_file is None else _logged_to(how.log_file):
        yield out


class _LogFile(logging.FileHandler):
    """A file of what is logged; a disk that is full costs what is logged only, and logging's own way is a traceback."""

    _is_said = False

    def handleError(self, record: logging.LogRecord) -> None:
        if not self._is_said:
            say(f"hpo: --log-file {self.baseFilename}: cannot be written ({sys.exc_info()[1]}); the command continues")
        self._is_said = True

    def close(self) -> None:
        with suppress(OSError):
            super().close()


@contextmanager
def _logged_to(path: Path) -> Iterator[None]:
    """Have a file take all that is logged, and how it ended where that was an error."""
    try:
        file = _LogFile(path, encoding="utf-8")
    except OSError as error:
        raise InputError(f"--log-file {path}: cannot be written ({error.strerror}); give another file") from error
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    with closing(file), shown_by(file):
        try:
            yield
        except HpoError as error:
            file.emit(log.makeRecord(log.name, logging.ERROR, __file__, 0, masked(str(error)), (), None))
            raise
