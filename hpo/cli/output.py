"""What a command prints on stdout, which may be a file on a full disk, or a pipe that nobody reads any more."""

import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, TextIO


class Output:
    """Stdout. An error of it is raised once, or, where the command has more to do than to print, said once.

    After that nothing is written any more: what is buffered would be tried again, also as the interpreter ends.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.continues = False
        """Whether the command does its work without it."""
        self.lost: OSError | None = None

    def write(self, text: str) -> int:
        """Write `text`, if that can be."""
        try:
            return len(text) if self.lost else self._stream.write(text)
        except OSError as error:
            self._lose(error)
            return len(text)

    def flush(self) -> None:
        """Write what is buffered, if that can be."""
        try:
            self._stream.flush()
        except OSError as error:
            self._lose(error)

    def require_written(self, status: Any) -> None:
        """Raise its error once more where a command ends well: typer looks at stdout by writing, and lets it go."""
        if self.lost and not self.continues and not status:
            raise self.lost

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _lose(self, error: OSError) -> None:
        is_first, self.lost = self.lost is None, error
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
        if not self.continues:
            raise error
        if is_first:
            say(f"hpo: {lost_text(error)}; the command continues without it, and `hpo status` shows the study")


def continue_without_output() -> None:
    """Have the command do its work where stdout cannot be written: that is no reason to lose it."""
    if isinstance(sys.stdout, Output):
        sys.stdout.continues = True


def lost_text(error: OSError) -> str:
    """Return what is said of an error of stdout."""
    return f"the output cannot be written ({error.strerror or error})"


def say(text: str) -> None:
    """Print a line on stderr, if that can be."""
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def end(text: str, status: int) -> NoReturn:
    """Exit, saying why."""
    with suppress(OSError):
        sys.stdout.flush()
    if text:
        say(text)
    sys.exit(status)


def say_how_dashes_are_written(arguments: list[str]) -> None:
    """Say how a file is given whose name looks like options to the command line."""
    for each in arguments:
        if each.startswith("-") and Path(each).is_file():
            say(f"hpo: {each} is a file whose name starts as an option does; write ./{each}")
