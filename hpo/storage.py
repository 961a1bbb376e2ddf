"""Optuna's storage, opened so that several processes can use it at once (see also `hpo.search`).

SQLite as it comes hands one queued trial to several workers; with WAL and `BEGIN IMMEDIATE` it does not. The schema is
made once, under a lock: processes that start together on a fresh database would crash all but one of them
(optuna/optuna#4621).
"""

import hashlib
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import optuna
from filelock import FileLock
from optuna.storages import RDBStorage
from sqlalchemy import create_engine, event, inspect, make_url
from sqlalchemy.engine import URL, Engine
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, SQLAlchemyError

from hpo.errors import StorageError, masked

BUSY_SECONDS = 60
"""How long SQLite waits for another process's transaction."""


def open_storage(url: str) -> RDBStorage:
    """Return the storage at `url`, its schema made if the database is new.

    Raises StorageError where it cannot be opened, or holds another program's tables.
    """
    parsed = _parse(url)
    _make_folder(parsed, url)
    try:
        with exclusive(url):
            _refuse_other_programs(parsed, url)
            storage = RDBStorage(url, engine_kwargs=_engine_arguments(parsed))
    except StorageError:
        raise
    except ImportError as error:
        raise StorageError(f"storage {url}: its driver is not installed ({error}); pip install it") from error
    except RuntimeError as error:  # Optuna's own: a schema of a newer or older version
        raise StorageError(f"storage {url}: {error}") from error
    except (SQLAlchemyError, OSError) as error:
        raise StorageError(f"storage {url} cannot be opened: {_first_line(error)}") from error
    if parsed.get_backend_name() == "sqlite":
        _serialise_writers(storage.engine)
    return storage


def exists(url: str) -> bool:
    """Whether there is a database at `url` to look into, so that looking does not make one."""
    parsed = _parse(url)
    return parsed.get_backend_name() != "sqlite" or (parsed.database is not None and Path(parsed.database).is_file())


@contextmanager
def exclusive(url: str) -> Iterator[None]:
    """Hold the lock of the storage at `url` against every other process of this machine."""
    parsed = make_url(url)
    if parsed.get_backend_name() == "sqlite" and parsed.database:
        path = Path(f"{parsed.database}.lock")
    else:
        path = Path(tempfile.gettempdir()) / f"hpo-{hashlib.sha256(url.encode()).hexdigest()[:16]}.lock"
    try:
        lock = FileLock(path, timeout=BUSY_SECONDS)
        lock.acquire()
    except TimeoutError as error:
        raise StorageError(f"storage {url}: another process held {path} for {BUSY_SECONDS} s") from error
    except OSError as error:
        raise StorageError(f"storage {url} cannot be opened: {path} cannot be made ({error.strerror})") from error
    try:
        yield
    finally:
        lock.release()


def _parse(url: str) -> URL:
    """Return `url` taken apart. Raises StorageError where it is no address of a database that we can use."""
    try:
        parsed = make_url(url)
        parsed.get_dialect()
    except (ArgumentError, NoSuchModuleError, ValueError) as error:
        hint = "write sqlite:///path/to/file.db, or another address that SQLAlchemy knows"
        raise StorageError(f"storage {url}: is no database address; {hint}") from error
    except ImportError as error:
        raise StorageError(f"storage {url}: its driver is not installed ({error}); pip install it") from error
    if parsed.get_backend_name() == "sqlite" and (not parsed.database or parsed.database == ":memory:"):
        raise StorageError(f"storage {url}: names no file, so nothing would be kept; write sqlite:///mlruns/optuna.db")
    return parsed


def _make_folder(parsed: URL, url: str) -> None:
    """Make the folder of a relative SQLite path, which is output of ours; an absolute one must be there."""
    if parsed.get_backend_name() != "sqlite":
        return
    folder = Path(str(parsed.database)).parent
    if not folder.is_absolute():
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"storage {url} cannot be opened: {folder} is no folder ({error.strerror})") from error
    if not folder.is_dir():
        raise StorageError(f"storage {url} cannot be opened: there is no folder {folder}; make it, or give another")


def _engine_arguments(url: URL) -> dict[str, object]:
    return (
        {"connect_args": {"timeout": BUSY_SECONDS}} if url.get_backend_name() == "sqlite" else {"pool_pre_ping": True}
    )


def _refuse_other_programs(parsed: URL, url: str) -> None:
    """Raise StorageError where the database has tables, but not Optuna's: ours would be mixed with them."""
    if not exists(url):
        return
    engine = create_engine(url, **_engine_arguments(parsed))  # type: ignore[arg-type]
    try:
        tables = inspect(engine).get_table_names()
    except (DBAPIError, sqlite3.DatabaseError) as error:
        what = _first_line(error)
        raise StorageError(f"storage {url} cannot be opened: {what}; is it a database at all?") from error
    finally:
        engine.dispose()
    if tables and "version_info" not in tables:
        some = ", ".join(sorted(tables)[:3])
        raise StorageError(
            f"storage {url}: is another program's database (it has tables {some}, but none of Optuna's); "
            "give a database of its own"
        )


def _serialise_writers(engine: Engine) -> None:
    """Have SQLite take its write lock when a transaction begins, not midway, where two readers could both win it."""

    @event.listens_for(engine, "connect")
    def _connect(connection: sqlite3.Connection, _record: object) -> None:
        connection.isolation_level = None  # pysqlite must not begin transactions of its own
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")

    @event.listens_for(engine, "begin")
    def _begin(connection: object) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")  # type: ignore[attr-defined]

    engine.dispose()  # what was opened before had no listeners


def _first_line(error: BaseException) -> str:
    return masked(str(getattr(error, "orig", None) or error).splitlines()[0])


optuna.logging.set_verbosity(optuna.logging.WARNING)
