"""The errors that a user may see, and the exit status of each.

    HpoError                    1  something went wrong that is no bug of ours
    +-- InputError              2  what the user gave is at fault: nothing was run, nothing was lost
    |   +-- SpecError           2  study.yaml: all of its faults at once, each with file and line
    |   +-- DataError           2  data that is missing, corrupted, or holds NaN
    |   +-- StorageError        2  a storage that cannot be opened or is not ours to use
    +-- ExportError             1  an export that is not equal to the model that was measured
    +-- Interrupted           130  Ctrl-C, SIGTERM or SIGHUP: the running trial was given back

A password in an address, or what an option takes from an environment variable, never reaches a message: each message
passes through `masked`.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any
from urllib.parse import quote

_CONCEALED: dict[str, tuple[re.Pattern[str], str]] = {}
"""What must not be shown, each with how it is found and what is shown in its place."""


def conceal(value: str, shown: str) -> None:
    """Have `masked` replace `value`, which came from an environment variable, by `shown` (`${NAME}`).

    A short value is replaced only where it stands as a word, and one of less than four characters is no secret.
    """
    forms = {value, quote(value, safe=""), repr(value)[1:-1], json.dumps(value)[1:-1], *value.splitlines()}
    for form in sorted(forms, key=len, reverse=True):  # the whole before its parts
        if len(form) >= 4:
            text = re.escape(form)
            pattern = text if len(form) >= 8 else rf"(?<!\w){text}(?!\w)"
            _CONCEALED[form] = (re.compile(pattern), shown)


def masked(text: str) -> str:
    """Return `text` with every password of an address replaced by `***`, and every value that is concealed."""
    for pattern, shown in _CONCEALED.values():
        text = pattern.sub(shown.replace("\\", r"\\"), text)
    return without_passwords(text)


def without_passwords(text: str) -> str:
    """Return `text` with every password of an address replaced by `***`."""
    text = re.sub(r"(\w[\w+.-]{0,40}://[^\s/:@]{0,300}):\S{0,1000}@", r"\1:***@", text)
    return re.sub(r"(?i)([?&](?:password|passwd|pwd|token|secret)=)[^&\s'\"]+", r"\1***", text)


def said(error: BaseException) -> str:
    """Return the first line of what `error` says; secrets in it are masked before anything is cut off."""
    try:
        text = str(error)
    except Exception:  # the user's own class
        text = "(its text cannot be had)"
    return (masked(text).splitlines() or [""])[0][:300]


class HpoError(Exception):
    """Base of all errors that are shown to a user without a traceback; `exit_status` is the command line's.

    HpoError
      InputError      what the user gave is at fault (2): SpecError a study file, with all its faults; DataError data;
                      StorageError a storage
      ExportError     what was exported is not the model that was measured (1)
      Interrupted     Ctrl-C, SIGTERM or SIGHUP (130)

    >>> try:
    ...     hpo.check({"objective": "iris", "trials": 0})
    ... except hpo.HpoError as error:
    ...     print(error.exit_status, error)
    2 study: trials: must be ...
    """

    exit_status = 1

    def __init__(self, message: str) -> None:
        super().__init__(masked(message))


class InputError(HpoError):
    """What the user gave is at fault."""

    exit_status = 2


class DataError(InputError):
    """Data is missing, corrupted, or not usable."""


class StorageError(InputError):
    """A storage cannot be opened, or holds something else."""


class ExportError(HpoError):
    """What was exported is not the model that was measured."""


class Interrupted(HpoError):
    """The user asked to stop; what was running has been given back to the queue."""

    exit_status = 130

    def __init__(self, message: str = "interrupted; run the same command again") -> None:
        super().__init__(message)


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One thing that is wrong with a study file.

    `path` is where in the file (("params", "lr", "low")); `message` says the rule, what came and what to do.
    """

    path: tuple[str | int, ...]
    message: str


class Faulty(Exception):
    """What keeps a value from being made; `collecting` puts it with the other faults of the file."""

    def __init__(self, at: tuple[str | int, ...], *messages: str) -> None:
        super().__init__(*messages)
        self.faults = [Fault(path=at, message=message) for message in messages]


@contextmanager
def collecting(faults: list[Fault]) -> Iterator[None]:
    """Add to `faults` what is raised as `Faulty`; what was to be made then keeps the value that it had before."""
    try:
        yield
    except Faulty as error:
        faults += error.faults


class SpecError(InputError):
    """All the faults of a study file; `lines` are `file:line: path: rule, got, hint`."""

    def __init__(self, lines: Iterable[str]) -> None:
        self.lines = tuple(masked(line) for line in lines)
        super().__init__("\n".join(self.lines))


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """Return ` (did you mean "x"?)` for the nearest of `known`, or the list of them where none is near."""
    known = list(known)
    near = get_close_matches(str(name), known, n=1, cutoff=0.6)
    return f'; did you mean "{near[0]}"?' if near else f"; known: {', '.join(known) or 'none'}"


def listed(texts: Iterable[str], longest: int = 50) -> str:
    """Return the texts, cut where they are longer than `longest`, with commas between, and how many more than ten."""
    every = [text if len(text) <= longest else f"{text[: longest - 3]}..." for text in texts]
    more = f" and {len(every) - 10} more" if len(every) > 10 else ""
    return ", ".join(every[:10]) + more


def broken_rules(
    rules: Mapping[str, tuple[Callable[[Any], bool], str]], values: Mapping[str, Sequence[Any]]
) -> list[Fault]:
    """Return a fault for each of the params' `values` that does not hold to its rule: a test of it, and its words."""
    return [
        Fault(path=("params", name), message=f"must be {rule}, but got {value!r}")
        for name, (holds, rule) in rules.items()
        for value in values.get(name, [])
        if not holds(value)
    ]


def is_number(value: Any) -> bool:
    """Whether `value` is a plain number; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)
