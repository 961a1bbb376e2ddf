"""The outbox: what a tracker is yet to send, in a SQLite database of its process, which outlives it.

An item is in the file before `append` returns, and until `replace` has it removed: a kill at any moment loses nothing.
Where the file cannot be written (a full disk), all is kept in memory, until `save` can write it. What will never be
sent goes to `refused.jsonl` beside it, with the reason. Where files lie: `hpo.tracking.leftovers`.
"""

import json
import math
import os
import sqlite3
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from filelock import FileLock, Timeout

from hpo.errors import masked
from hpo.processes import this_process
from hpo.tracking import leftovers
from hpo.tracking.items import MERGED, Item, merged

_ADOPT_SECONDS = 10.0
_T = TypeVar("_T")


class Batch(NamedTuple):
    """What is to be sent next: one item, or several of a trial as one."""

    ids: tuple[int, ...]
    item: Item


class Outbox:
    """What one process is yet to send of a study. Whoever uses it from several threads holds a lock of its own."""

    def __init__(self, folder: Path, study: str, making: str = "") -> None:
        self._folder, self._study, self._making = folder, study, making
        self._beside = folder.parent.resolve()
        self.file = folder / study / leftovers.database_name(making, this_process())
        self.refused = folder / study / "refused.jsonl"
        self._database: sqlite3.Connection | None = None
        self._in_memory = False
        self._is_copied = False
        """Whether what the file holds is in memory too, so that it may be removed when all of that was sent."""

    @property
    def where(self) -> str:
        """Where the items are kept, in words."""
        if not self._in_memory:
            return str(self.file)
        return f"memory only, as long as this process runs, since {self.file} cannot be written,"

    def __len__(self) -> int:
        if self._database is None and not self.file.exists():
            return 0
        return self._number("count(*)")

    def append(self, *items: Item) -> None:
        """Add `items` at the end, all of them or none."""
        self._do(lambda db: _add(db, [self._from_here(item) for item in items], None))

    def first(self, without: Collection[str] = (), until: float = math.inf) -> Batch | None:
        """Return what is to be sent next, but for kinds that are to wait; None where there is nothing.

        `until`: the `last` place of the order that is to be sent by now; more may be sent with what goes to its run.
        """
        if self._database is None and not self.file.exists():
            return None
        batch = self._do(lambda db: _first(db, tuple(without), until))
        if batch is None or "folder" not in batch.item:
            return batch
        return batch._replace(item=batch.item | {"folder": str(self._beside / batch.item["folder"])})

    def last(self) -> int:
        """Return the last place in the order that something has."""
        if self._database is None and not self.file.exists():
            return 0
        return self._number("coalesce(max(place), 0)")

    def replace(self, batch: Batch, items: Sequence[Item] = ()) -> None:
        """Put `items` where `batch` was; without them: it was sent."""

        def change(db: sqlite3.Connection) -> None:
            (place,) = db.execute("select min(place) from items where id = ?", batch.ids[:1]).fetchone()
            db.executemany("delete from items where id = ?", [(each,) for each in batch.ids])
            _add(db, [self._from_here(item) for item in items], place)

        self._do(change)

    def _from_here(self, item: Item) -> Item:
        """Return `item` with the folder that it names as seen from here, since both may be moved before it is sent."""
        folder = Path(item.get("folder", "/"))
        return item | {"folder": str(folder.relative_to(self._beside))} if self._beside in folder.parents else item

    def set_aside(self, item: Any, why: str) -> None:
        """Keep what will never be sent beside the outbox, for a person to look at."""
        line = json.dumps({"why": masked(why)[:1000], "item": item}) + "\n"
        for _ in range(10):  # a peer that has nothing left to send may remove the folder at any moment
            with suppress(OSError):
                self.refused.parent.mkdir(parents=True, exist_ok=True)
                with self.refused.open("a", encoding="utf-8") as file:
                    file.write(line)
                return

    def adopt(self, own: bool = False) -> int:
        """Take over what processes that are gone could not send; return how much of it was no item, and set aside.

        With `own`, also what one left that had this process's name, as happens in containers.
        """
        files = leftovers.left_behind(self._folder, self._study, self._making)
        files += [file for file in self._of_this_name() if own and file.exists()]
        if not files:
            return 0
        with suppress(OSError, Timeout), FileLock(self._folder.with_name(f".{self._folder.name}.lock"), _ADOPT_SECONDS):
            return sum(self._adopt(file) for file in files)
        return 0

    def _of_this_name(self) -> list[Path]:
        return [self.file, self.file.with_name(f"{this_process()}.jsonl")]

    def _adopt(self, file: Path) -> int:
        """Take over one file; ours before theirs goes, so that a kill in between loses nothing."""
        try:
            items, bad = leftovers.read(file)
        except OSError:  # a peer was faster; another user's; or its process lives after all
            return 0
        except leftovers.Damaged as error:
            self.set_aside(file.name, f"{error}; it is kept as {file.name}.damaged")
            with suppress(OSError):
                file.replace(file.with_name(f"{file.name}.damaged"))
                leftovers.remove(file)
            return 1

        def take(db: sqlite3.Connection) -> None:
            if file == self.file:  # what it held, it holds again, as left
                db.execute("delete from items")
            _add(db, items, None)

        self._do(take)
        if not self.save():
            return 0
        for text in bad:
            self.set_aside(text, "is not an outbox item")
        if file != self.file:
            with suppress(OSError):
                leftovers.remove(file)
        return len(bad)

    def _number(self, what: str) -> int:
        return int(self._do(lambda db: db.execute(f"select {what} from items").fetchone()[0]))

    # The file, and memory in its place.

    def touch(self) -> None:
        """Show other processes that this one lives."""
        with suppress(OSError):
            os.utime(self.file)

    def save(self) -> bool:
        """Write what is in memory only to the file, if that can be now; return whether the file holds everything."""
        if self._database is None or not self._in_memory:
            return True
        rows = self._database.execute("select * from items").fetchall()
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            file = leftovers.connect(self.file)
        except (OSError, sqlite3.Error):
            return False
        try:
            with file:
                file.execute("delete from items")
                file.executemany("insert into items values (?, ?, ?, ?, ?)", rows)
        except sqlite3.Error:
            file.close()
            return False
        self._database.close()
        self._database, self._in_memory = file, False
        return True

    def close(self) -> None:
        """Let the file go, until it is needed again; remove it where all of it was sent."""
        self.save()
        n_left = len(self)
        if self._database is not None and not (self._in_memory and n_left):
            is_ours = not self._in_memory or self._is_copied
            self._database.close()
            self._database, self._in_memory = None, False
            if n_left == 0 and is_ours:
                with suppress(OSError):
                    leftovers.remove(self.file)
        with suppress(OSError):
            self.file.parent.rmdir()  # if nothing else is in it

    def _do(self, work: Callable[[sqlite3.Connection], _T]) -> _T:
        """Have `work` done as a whole: in the file, or, from the first time that fails, in memory."""
        if self._database is None:
            self._database = self._open()
        try:
            with self._database as database:
                return work(database)
        except sqlite3.Error:
            if self._in_memory:
                raise
        with self._to_memory(self._database) as database:
            return work(database)

    def _open(self) -> sqlite3.Connection:
        for _ in range(3):  # a peer that has nothing left to send may remove the folder at any moment
            with suppress(OSError, sqlite3.Error):
                self.file.parent.mkdir(parents=True, exist_ok=True)
                return leftovers.connect(self.file)
        self._in_memory, self._is_copied = True, False
        return leftovers.connect(None)

    def _to_memory(self, file: sqlite3.Connection) -> sqlite3.Connection:
        """Use a database in memory from now on, with what the file holds."""
        self._database, self._in_memory, self._is_copied = leftovers.connect(None), True, False
        with suppress(sqlite3.Error), self._database as memory:
            rows = file.execute("select * from items").fetchall()
            memory.executemany("insert into items values (?, ?, ?, ?, ?)", rows)
            self._is_copied = True
        with suppress(sqlite3.Error):
            file.close()
        return self._database


def _add(db: sqlite3.Connection, items: Iterable[Item], place: int | None) -> None:
    """Add `items` at a `place` of the order; None: at the end."""
    for item in items:
        at = "(select coalesce(max(place), 0) + 1 from items)" if place is None else "?"
        row = [*([] if place is None else [place]), item["do"], item["trial"], json.dumps(item)]
        db.execute(f"insert into items (place, kind, trial, item) values ({at}, ?, ?, ?)", row)


def _first(db: sqlite3.Connection, without: Sequence[str], until: float) -> Batch | None:
    marks = ", ".join("?" * len(without))
    query = f"select id, place, item from items where kind not in ({marks}) and place <= ? order by place, id limit 1"
    row = db.execute(query, (*without, until)).fetchone()
    if row is None:
        return None
    id_, place, item = row[0], row[1], json.loads(row[2])
    ids = [id_]
    if item["do"] in MERGED:
        later = db.execute(
            "select id, item from items where trial is ? and (place > ? or (place = ? and id > ?)) order by place, id",
            (item["trial"], place, place, id_),
        )
        for next_id, text in later:
            both = merged(item, json.loads(text))
            if both is None:
                break
            ids.append(next_id)
            item = both
        later.close()
    return Batch(tuple(ids), item)
