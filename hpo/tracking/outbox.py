"""The outbox: what a tracker is yet to send, in memory and in a file that outlives the process.

<folder>/<study>/<process>.jsonl   one item a line, of one process; the folder belongs to exactly one study
<folder>/<study>/refused.jsonl     what will never be sent, and why: items that were refused, lines that are none
<folder>/<study>.<process>.jsonl   how older versions named it; adopted where it is certain which study's it is
"""

import json
import re
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from filelock import FileLock, Timeout

from hpo.errors import masked
from hpo.processes import is_gone, this_process
from hpo.tracking.base import STATUS

Item = dict[str, Any]
_ADOPT_SECONDS = 10.0
_LONG_SECONDS = 3600.0
"""A tracker that works sends within seconds, one that does not writes its outbox again whenever it has tried."""


class Outbox:
    """What one process is yet to send of a study. Whoever uses it from several threads holds a lock of its own."""

    def __init__(self, folder: Path, study: str) -> None:
        self._folder, self._study = folder, study
        self.file = folder / study / f"{this_process()}.jsonl"
        self.refused = folder / study / "refused.jsonl"
        self.items: deque[Item] = deque()
        self._log: TextIO | None = None

    def append(self, item: Mapping[str, Any]) -> None:
        """Add `item` to the file (not to `items`); a full disk costs the line only."""
        with suppress(OSError):
            if self._log is None:
                self._log = _open(self.file, "a")
            self._log.write(json.dumps(item) + "\n")
            self._log.flush()

    def write(self) -> bool:
        """Write `items` as they are; return whether the file holds them now."""
        if not self.items:
            self.forget()
            return True
        part = self.file.with_suffix(".part")
        try:
            self._close_file()
            with _open(part, "w") as file:
                file.writelines(json.dumps(item) + "\n" for item in self.items)
            part.replace(self.file)
        except OSError:  # a full disk: what the file held before, it still holds
            with suppress(OSError):
                part.unlink(missing_ok=True)
            return False
        return True

    def forget(self) -> None:
        """Remove the file, since everything in it was sent."""
        self._close_file()
        with suppress(OSError):
            self.file.unlink(missing_ok=True)
            self.file.parent.rmdir()  # if nothing else is in it

    def _close_file(self) -> None:
        log, self._log = self._log, None
        if log is not None:
            with suppress(OSError):  # a full disk, and a rest in its buffer
                log.close()

    def set_aside(self, item: Any, why: str) -> None:
        """Keep what will never be sent beside the outbox, for a person to look at."""
        with suppress(OSError), _open(self.refused, "a") as file:
            file.write(json.dumps({"why": masked(why)[:1000], "item": item}) + "\n")

    def adopt(self, own: bool = False) -> int:
        """Take over what processes that are gone could not send; return how many of its lines were set aside.

        With `own`, also what one left that had this process's name, as happens in containers.
        """
        files = left_behind(self._folder, self._study) + ([self.file] if own and self.file.exists() else [])
        n_bad = 0
        if not files:
            return n_bad
        with suppress(OSError, Timeout), FileLock(self._folder.with_name(f".{self._folder.name}.lock"), _ADOPT_SECONDS):
            read: list[tuple[Path, list[str]]] = []
            for file in files:
                with suppress(OSError):  # a peer was faster; another user's
                    items, bad = _read(file)
                    self.items.extend(items)
                    read.append((file, bad))
            if self.write():  # before theirs go, so that a kill in between loses nothing
                for file, bad in read:
                    n_bad += len(bad)
                    for line in bad:
                        self.set_aside(line, "is no item of an outbox")
                    if file != self.file:
                        file.with_suffix(".part").unlink(missing_ok=True)
                        file.unlink(missing_ok=True)
        return n_bad


def _open(file: Path, mode: str) -> TextIO:
    """Open `file` in its folder, which a peer that has nothing left to send may remove at any moment."""
    for _ in range(10):
        with suppress(FileNotFoundError):
            file.parent.mkdir(parents=True, exist_ok=True)
            return file.open(mode, encoding="utf-8")
    raise FileNotFoundError(file)


def left_behind(folder: Path, study: str) -> list[Path]:
    """Return the outbox files of `study` whose process is gone.

    Of another machine's, or of one that was started again, that is so where nothing has been written for long.
    """
    of_study = {file: file.stem for file in (folder / study).glob("*.jsonl") if re.fullmatch(r".+-\d+", file.stem)}
    for file in folder.glob("*.jsonl"):
        whose, process = _study_and_process(file.stem)
        if whose == study:
            of_study[file] = process
    found = []
    for file, process in sorted(of_study.items()):
        with suppress(OSError):
            if process != this_process() and (is_gone(process) or time.time() - file.stat().st_mtime > _LONG_SECONDS):
                found.append(file)
    return found


def _study_and_process(name: str) -> tuple[str, str]:
    """Return whose an older outbox of that name is: of one study only, though both names may hold dots and dashes."""
    ours = rf"(.+)\.({re.escape(socket.gethostname())}-[^.]*\d)"  # this machine's own name may have dots
    match = re.fullmatch(ours, name) or re.fullmatch(r"(.+)\.([^.]+-\d+)", name)
    return (match[1], match[2]) if match else ("", "")


def _read(file: Path) -> tuple[list[Item], list[str]]:
    """Return the items of an outbox that another process left, and its lines that are none.

    A last line that a kill cut short is in neither.
    """
    items: list[Item] = []
    bad: list[str] = []
    *lines, last = file.read_bytes().split(b"\n")
    for line in (*lines, last):
        if not line.strip():
            continue
        try:
            value = json.loads(line.decode())
        except (ValueError, RecursionError):  # of numbers and of depths beyond Python's limits, too
            bad += [line.decode(errors="backslashreplace")] if line is not last else []
            continue
        if is_item(value):
            items += _as_left(value)
        else:
            bad.append(line.decode())
    return items, bad


def _as_left(item: Item) -> Iterator[Item]:
    """Give `item` as what a process left that is gone: the study's run is not begun by it, nor ended again."""
    texts = item.pop("texts", None) if item["do"] == "start" else None  # as older versions had them
    item.pop("status", None) if item["do"] == "start" else None
    yield item | {"left": True}
    if texts:
        yield {"do": "texts", "trial": item["trial"], "time": item["time"], "texts": texts, "left": True}


# What an item is. `trial` is a number, None for the study; `time` is in ms.


def is_item(value: Any) -> bool:
    """Whether `value`, read from a file that anything may have happened to, is an item that can be sent."""
    if not isinstance(value, dict) or not isinstance(value.get("do"), str) or value["do"] not in _KINDS:
        return False
    if "trial" not in value or not (value["trial"] is None or _is_count(value["trial"])):
        return False
    return _is_count(value.get("time")) and _KINDS[value["do"]](value)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _are_texts(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(x, str) for pair in value.items() for x in pair)


def _is_row(row: Any) -> bool:
    if not isinstance(row, list | tuple) or len(row) != 4:
        return False
    key, value, when, step = row
    is_number = isinstance(value, float) or (type(value) is int and abs(value) < 2**63)
    return isinstance(key, str) and is_number and _is_count(when) and type(step) is int and abs(step) < 2**63


def _is_end(end: Any) -> bool:
    return (
        isinstance(end, list | tuple)
        and len(end) == 2
        and isinstance(end[0], str)
        and end[0] in STATUS
        and isinstance(end[1], str | None)
    )


def _is_file_name(name: Any) -> bool:
    return isinstance(name, str) and re.fullmatch(r"\w[\w.-]{0,200}", name) is not None


_KINDS: Mapping[str, Callable[[Item], bool]] = {
    "start": lambda item: (
        all(_are_texts(item.get(key, {})) for key in ("params", "tags", "texts"))
        and all(map(_is_file_name, item.get("texts", {})))
        and item.get("status") in (None, "RUNNING")
    ),
    "texts": lambda item: _are_texts(item.get("texts")) and all(map(_is_file_name, item["texts"])),
    "metrics": lambda item: isinstance(item.get("rows"), list) and all(map(_is_row, item["rows"])),
    "end": lambda item: item.get("status") in STATUS.values() and _are_texts(item.get("tags")),
    "folder": lambda item: isinstance(item.get("folder"), str) and _is_file_name(item.get("name")),
    "reconcile": lambda item: (
        isinstance(item.get("ends"), dict)
        and all(isinstance(trial, str) and _is_end(end) for trial, end in item["ends"].items())
    ),
}
FILES = ("texts", "folder")
"""Kinds of items that go to a store of their own, which may be away while the rest works; their order is free."""


def halves(item: Item) -> list[Item]:
    """Return two items that say what `item` says, or nothing where it says one thing only."""
    several = [key for key in ("rows", "params", "tags", "texts", "ends") if item.get(key)]
    if len(several) > 1:
        return [item | {key: {} for key in several[1:]}, item | {several[0]: {}}]
    if not several or len(item[several[0]]) < 2:
        return []
    key, things = several[0], item[several[0]]
    parts = list(things.items()) if isinstance(things, dict) else list(things)
    cut = (parts[: len(parts) // 2], parts[len(parts) // 2 :])
    return [item | {key: dict(part) if isinstance(things, dict) else part} for part in cut]
