"""SQLite as a storage of several processes: one writer at a time, readers beside it, no id given twice."""

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from optuna.storages._rdb import models
from sqlalchemy import event
from sqlalchemy.engine import Engine

from hpo.errors import HpoError

_NETWORK = ("nfs", "cifs", "smb", "afs", "lustre", "gpfs", "beegfs", "ceph", "fuse.glusterfs", "fuse.sshfs")
_here = threading.local()


def network(path: Path) -> str:
    """Return the kind of network file system that `path` is on, whose locks SQLite cannot trust; empty for a disk."""
    where = path.parent.resolve()
    mounts = [m for m in psutil.disk_partitions(all=True) if where.is_relative_to(m.mountpoint)]
    kind = max(mounts, key=lambda m: len(m.mountpoint)).fstype if mounts else ""
    return kind if kind.lower().startswith(_NETWORK) else ""


def give_no_id_twice() -> None:
    """Have a new database never use the id of a deleted study or trial again.

    A worker of a study that was deleted would else write into the trials of the study that was made after it.
    """
    for model in (models.StudyModel, models.TrialModel):
        model.__table__.dialect_options["sqlite"]["autoincrement"] = True


def _which(path: Path | None) -> tuple[int, int] | None:
    """Return what tells a file from another one of its name; None: there is none."""
    try:
        found = None if path is None else path.stat()
    except OSError:
        return None
    return None if found is None else (found.st_dev, found.st_ino)


@contextmanager
def reading() -> Iterator[None]:
    """Within this, the thread only reads: it waits for no writer, and lets none wait."""
    before = getattr(_here, "reads", False)
    _here.reads = True
    try:
        yield
    finally:
        _here.reads = before


def serialise_writers(engine: Engine) -> None:
    """Have SQLite take its write lock when a transaction begins, not midway, where two readers could both win it.

    What is written into a file that was deleted or replaced would be lost with the process: HpoError is raised.
    """
    path = Path(str(engine.url.database)) if engine.url.database else None
    opened = _which(path)

    @event.listens_for(engine, "connect")
    def _connect(connection: sqlite3.Connection, _record: object) -> None:
        connection.isolation_level = None  # pysqlite must not begin transactions of its own
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")

    @event.listens_for(engine, "begin")
    def _begin(connection: object) -> None:
        if opened is not None and _which(path) != opened:
            raise HpoError(
                f"{path} was deleted or replaced while it was in use, its trials with it; put it back, or run the same "
                "command again to start from scratch"
            )
        how = "DEFERRED" if getattr(_here, "reads", False) else "IMMEDIATE"
        connection.exec_driver_sql(f"BEGIN {how}")  # type: ignore[attr-defined]

    engine.dispose()  # what was opened before had no listeners
