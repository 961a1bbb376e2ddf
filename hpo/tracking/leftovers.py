"""What processes that are gone have left in the folder of outboxes: found, and read.

<folder>/<study>/<making>.<process>.sqlite   a database of one process, of one study as it was made (`Search.making`)
<folder>/<study>/<process>.jsonl             how versions before 0.2 kept it: one item a line
<folder>/<study>.<process>.jsonl             how earlier ones named that; taken where it is certain which study's it is
"""

import json
import re
import socket
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from hpo.processes import is_gone, this_process
from hpo.tracking.items import Item, as_left, is_item

LONG_SECONDS = 3600.0
"""A tracker that lives touches its outbox every few seconds."""
SIDE_FILES = ("-wal", "-shm", "-journal")
"""What SQLite has beside a database that is open, or that was when its process was killed."""
_DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_FORMAT)


class Damaged(Exception):
    """A database that is none any more."""


def database_name(making: str, process: str) -> str:
    """Return the name of a process's outbox."""
    return f"{making or 'study'}.{process}.sqlite"


def left_behind(folder: Path, study: str, making: str = "") -> list[Path]:
    """Return the outbox files of `study` whose process is gone.

    Of another machine's, or of one that was started again, that is so where nothing has been written for long.
    """
    found = []
    for file, process in sorted(_of_study(folder, study, making)):
        with suppress(OSError):
            if process != this_process() and (is_gone(process) or time.time() - _changed_at(file) > LONG_SECONDS):
                found.append(file)
    return found


def _of_study(folder: Path, study: str, making: str) -> Iterator[tuple[Path, str]]:
    """Yield each outbox of a study, with its process."""
    start = database_name(making, "").removesuffix("sqlite")[:-1]
    for file in (folder / study).glob("*.sqlite"):
        if file.name.startswith(start):
            yield file, file.stem.removeprefix(start)
    for file in (folder / study).glob("*.jsonl"):
        if re.fullmatch(r".+-\d+", file.stem):
            yield file, file.stem
    for file in folder.glob("*.jsonl"):
        whose, process = _study_and_process(file.stem)
        if whose == study:
            yield file, process


def _study_and_process(name: str) -> tuple[str, str]:
    """Return whose an older outbox of that name is: of one study only, though both names may hold dots and dashes."""
    ours = rf"(.+)\.({re.escape(socket.gethostname())}-[^.]*\d)"  # this machine's own name may have dots
    match = re.fullmatch(ours, name) or re.fullmatch(r"(.+)\.([^.]+-\d+)", name)
    return (match[1], match[2]) if match else ("", "")


def _changed_at(file: Path) -> float:
    """Return when a process last wrote to its outbox, in seconds since the epoch."""
    with suppress(FileNotFoundError):
        return max(file.stat().st_mtime, file.with_name(f"{file.name}-wal").stat().st_mtime)
    return file.stat().st_mtime


def read(file: Path) -> tuple[list[Item], list[str]]:
    """Return the items of an outbox that a process left, and what in it is none, as text.

    Raises OSError for one that cannot be had (another user's, or its process lives after all), Damaged.
    """
    items: list[Item] = []
    bad: list[str] = []
    for text in _database_rows(file) if file.suffix == ".sqlite" else _lines(file):
        value = _parsed(text)
        if is_item(value):
            items += as_left(value)
        else:
            bad.append(text)
    return items, bad


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # of numbers and of depths beyond Python's limits, too
        return None


def _database_rows(file: Path) -> Sequence[str]:
    try:
        with closing(connect(file)) as database:
            return [text for (text,) in database.execute("select item from items order by place, id")]
    except sqlite3.Error as error:
        if error.sqlite_errorcode & 0xFF in _DAMAGED:
            raise Damaged(f"{file}: {error}") from error
        raise OSError(f"{file}: {error}") from error


def _lines(file: Path) -> Sequence[str]:
    """Return the lines of a file of an older version; a last one that a kill cut short is left out."""
    *lines, last = file.read_bytes().split(b"\n")
    texts = [line.decode(errors="backslashreplace") for line in lines if line.strip()]
    torn = last.decode(errors="backslashreplace")
    return texts if _parsed(torn) is None else [*texts, torn]


def remove(file: Path) -> None:
    """Remove an outbox, with what SQLite has left beside it. Raises OSError."""
    for side in SIDE_FILES:
        file.with_name(f"{file.name}{side}").unlink(missing_ok=True)
    file.with_suffix(".part").unlink(missing_ok=True)  # of an older version
    file.unlink(missing_ok=True)


def connect(file: Path | None) -> sqlite3.Connection:
    """Open an outbox for this process alone; None: one in memory. Raises sqlite3.Error.

    A commit is in the file's log then, so that a kill loses nothing; with no `fsync`, since a trainer waits for it.
    """
    database = sqlite3.connect(file or ":memory:", timeout=0.2, check_same_thread=False)
    try:
        database.execute("pragma locking_mode = exclusive")  # the log needs no shared memory then: any file system
        database.execute("pragma journal_mode = wal")
        database.execute("pragma synchronous = normal")
        database.executescript(
            "create table if not exists items "
            "(id integer primary key, place integer not null, kind text not null, trial integer, item text not null);"
            "create index if not exists by_place on items (place);"
            "create index if not exists by_trial on items (trial, place);"
        )
    except sqlite3.Error:
        database.close()
        raise
    return database
