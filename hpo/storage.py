"""Optuna's storages by address, opened so that several processes can use them at once (see also `hpo.search`).

    sqlite:///path.db            one machine; refused on a network file system
    postgresql://host/database   many machines
    journal:///path.log          Optuna's journal file
    grpc://host:port             a server that `hpo serve` runs, for hundreds of workers

SQLite as it comes hands one queued trial to several workers; with WAL and `BEGIN IMMEDIATE` it does not. The schema is
made once, under a lock: processes that start together on a fresh database would crash all but one of them
(optuna/optuna#4621).
"""

import hashlib
import sqlite3
import tempfile
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import optuna
import psutil
from filelock import FileLock
from optuna.storages import (
    BaseStorage,
    GrpcStorageProxy,
    JournalStorage,
    RDBStorage,
    get_storage,
    run_grpc_proxy_server,
)
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from sqlalchemy import create_engine, event, func, inspect, make_url, select
from sqlalchemy.engine import URL, Connection, Engine
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, SQLAlchemyError
from sqlalchemy.pool import NullPool

from hpo.errors import StorageError, masked

BUSY_SECONDS = 60
"""How long to wait for another process's transaction, or its lock."""
CUT_OFF_SECONDS = 20
"""How long PostgreSQL waits for a session that has a transaction open, and we for PostgreSQL."""
_POLL_SECONDS = 0.005
CONNECT_SECONDS = 5
"""How long to wait for a server before it counts as away."""
_NETWORK = ("nfs", "cifs", "smb", "afs", "lustre", "gpfs", "beegfs", "ceph", "fuse.glusterfs", "fuse.sshfs")


def open_storage(url: str) -> BaseStorage:
    """Return the storage at `url`, its schema made if the database is new. Give it to `close_storage` at the end.

    Raises StorageError where it cannot be opened, or holds another program's tables.
    """
    kind = _kind(url)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            if kind == "grpc":
                return _open_grpc(url)
            if kind == "journal":
                path = _journal(url)
                _make_folder(path, url)
                return JournalStorage(JournalFileBackend(str(path)))
        return _open_database(url)
    except StorageError:
        raise
    except ImportError as error:
        raise StorageError(f"storage {url}: its driver is not installed ({error}); pip install it") from error
    except RuntimeError as error:  # Optuna's own: a schema of a newer or older version
        raise StorageError(f"storage {url}: {error}") from error
    except (SQLAlchemyError, OSError, ValueError) as error:
        raise StorageError(f"storage {url} cannot be opened: {_first_line(error)}") from error


def close_storage(storage: BaseStorage) -> None:
    """Let the database, the file or the connection go."""
    if isinstance(storage, RDBStorage):
        storage.remove_session()
        storage.engine.dispose()
    elif isinstance(storage, GrpcStorageProxy):
        storage.close()


def serve_storage(url: str, host: str, port: int) -> None:
    """Serve the database at `url` to `grpc://host:port`, until the process ends. Raises StorageError."""
    storage = open_storage(url)
    if not isinstance(storage, RDBStorage):
        raise StorageError(f"storage {url}: only a database can be served, sqlite:/// or postgresql://")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        try:
            run_grpc_proxy_server(get_storage(storage), host=host, port=port)
        except RuntimeError as error:  # gRPC's own, whatever keeps it from listening
            raise StorageError(f"{host}:{port} cannot be listened on ({_first_line(error)}); give another") from error
        finally:
            close_storage(storage)


def complete_ids(storage: RDBStorage, study_id: int, known: int) -> list[int] | None:
    """Return the ids of a study's complete trials; None where there are `known` of them still.

    It is one statement, or two, where Optuna reads all trials that are not finished.
    """
    trials = optuna.storages._rdb.models.TrialModel
    where = (trials.study_id == study_id, trials.state == TrialState.COMPLETE)
    alone = {} if storage.engine.dialect.name == "sqlite" else {"isolation_level": "AUTOCOMMIT"}
    with storage.engine.execution_options(**alone).connect() as connection:
        if connection.execute(select(func.count()).where(*where)).scalar_one() == known:
            return None
        return list(connection.execute(select(trials.trial_id).where(*where)).scalars())


def exists(url: str) -> bool:
    """Whether there is a database at `url` to look into, so that looking does not make one."""
    kind = _kind(url)
    if kind == "journal":
        return _journal(url).is_file()
    if kind == "grpc":
        return True
    parsed = _parse(url)
    return parsed.get_backend_name() != "sqlite" or (parsed.database is not None and Path(parsed.database).is_file())


@contextmanager
def exclusive(url: str, storage: BaseStorage | None = None) -> Iterator[None]:
    """Hold the lock of the storage at `url` against every other process that uses it.

    `storage` is that storage, where it is open: PostgreSQL is not connected to once more then. Behind gRPC there is no
    lock: what is done under it is harmless when done twice, only not as quick.
    """
    kind = _kind(url)
    if kind == "grpc":
        yield
        return
    if kind == "postgresql":
        opened = storage.engine if isinstance(storage, RDBStorage) else _engine(_parse(url), poolclass=NullPool)
        with _advisory_lock(opened, url):
            yield
        return
    if kind in ("sqlite", "journal"):
        # Optuna's journal has a `.lock` of its own
        path = Path(f"{_journal(url)}.queue.lock" if kind == "journal" else f"{make_url(url).database}.lock")
    else:  # another database that SQLAlchemy knows: of this machine's processes at least
        path = Path(tempfile.gettempdir()) / f"hpo-{hashlib.sha256(url.encode()).hexdigest()[:16]}.lock"
    try:
        lock = FileLock(path, timeout=BUSY_SECONDS, poll_interval=_POLL_SECONDS)
        lock.acquire()
    except TimeoutError as error:
        raise StorageError(f"storage {url}: another process held {path} for {BUSY_SECONDS} s") from error
    except OSError as error:
        raise StorageError(f"storage {url} cannot be opened: {path} cannot be made ({error.strerror})") from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _advisory_lock(engine: Engine, url: str) -> Iterator[None]:
    """Hold PostgreSQL's lock of that database; it ends with its transaction, so a killed process frees it."""
    key = int.from_bytes(hashlib.sha256(b"hpo").digest()[:7])
    with ExitStack() as stack:
        try:
            connection = engine.connect()
            stack.callback(_close, connection)
            for limit in ("lock_timeout", "idle_in_transaction_session_timeout"):
                connection.exec_driver_sql(f"SET LOCAL {limit} = '{BUSY_SECONDS}s'")
            connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({key})")
        except SQLAlchemyError as error:
            raise StorageError(f"storage {url} cannot be opened: {_first_line(error)}") from error
        yield


def _close(connection: Connection) -> None:
    with suppress(SQLAlchemyError):  # the server is away, and what the connection held is gone with it
        connection.close()


def _kind(url: str) -> str:
    """Return `grpc`, `journal`, or the name of a database. Raises StorageError."""
    scheme = url.partition(":")[0]
    return scheme if scheme in ("grpc", "journal") else _parse(url).get_backend_name()


def _journal(url: str) -> Path:
    """Return the path of `journal:///relative` or `journal:////absolute`."""
    scheme, _, path = url.partition(":///")
    if scheme != "journal" or not path:
        raise StorageError(f"storage {url}: names no file; write journal:///mlruns/journal.log")
    return Path(path)


def _open_grpc(url: str) -> BaseStorage:
    parts = urlsplit(url)
    try:
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if host is None or port is None or parts.path not in ("", "/"):
        raise StorageError(f"storage {url}: is no address of a server; write grpc://host:port")
    storage = GrpcStorageProxy(host=host, port=port)
    try:
        storage.wait_server_ready(timeout=CONNECT_SECONDS)
    except ConnectionError as error:
        raise StorageError(
            f"storage {url} cannot be opened: no server answers there; start one: hpo serve STUDY --port {port}"
        ) from error
    return storage


def _open_database(url: str) -> BaseStorage:
    parsed = _parse(url)
    if parsed.get_backend_name() == "sqlite":
        path = Path(str(parsed.database))
        _make_folder(path, url)
        _refuse_network(path, url)
    with exclusive(url):
        _refuse_other_programs(parsed, url)
        storage = RDBStorage(_text(parsed), engine_kwargs=_engine_arguments(parsed))
    if parsed.get_backend_name() == "sqlite":
        _serialise_writers(storage.engine)
    elif parsed.get_backend_name() == "postgresql":
        _end_sessions_that_are_cut_off(storage.engine)
    return storage


def _engine(parsed: URL, **arguments: Any) -> Engine:
    own = {key: value for key, value in _engine_arguments(parsed).items() if not key.startswith("pool_")}
    return create_engine(parsed, **own, **arguments)


def _text(parsed: URL) -> str:
    return parsed.render_as_string(hide_password=False)


def _parse(url: str) -> URL:
    """Return `url` taken apart. Raises StorageError where it is no address of a database that we can use."""
    try:
        parsed = make_url(url)
        if parsed.drivername in ("postgresql", "postgres"):
            parsed = parsed.set(drivername="postgresql+psycopg")
        parsed.get_dialect().import_dbapi()
    except (ArgumentError, NoSuchModuleError, ValueError) as error:
        hint = "write sqlite:///path/to/file.db, postgresql://..., journal:///path, grpc://host:port"
        raise StorageError(f"storage {url}: is no database address; {hint}") from error
    except ImportError as error:
        raise StorageError(f"storage {url}: its driver is not installed ({error}); pip install it") from error
    if parsed.get_backend_name() == "sqlite" and (not parsed.database or parsed.database == ":memory:"):
        raise StorageError(f"storage {url}: names no file, so nothing would be kept; write sqlite:///mlruns/optuna.db")
    return parsed


def _make_folder(path: Path, url: str) -> None:
    """Make the folder of a relative path, which is output of ours; an absolute one must be there."""
    folder = path.parent
    if not folder.is_absolute():
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"storage {url} cannot be opened: {folder} is no folder ({error.strerror})") from error
    if not folder.is_dir():
        raise StorageError(f"storage {url} cannot be opened: there is no folder {folder}; make it, or give another")


def _refuse_network(path: Path, url: str) -> None:
    """Raise StorageError for a file on a network file system, whose locks SQLite cannot trust."""
    where = path.parent.resolve()
    mounts = [m for m in psutil.disk_partitions(all=True) if where.is_relative_to(m.mountpoint)]
    kind = max(mounts, key=lambda m: len(m.mountpoint)).fstype if mounts else ""
    if kind.lower().startswith(_NETWORK):
        raise StorageError(
            f"storage {url}: lies on a network file system ({kind}), where SQLite loses data; "
            "write postgresql://..., or a path on a disk of this machine"
        )


def _engine_arguments(parsed: URL) -> dict[str, Any]:
    if parsed.get_backend_name() == "sqlite":
        return {"connect_args": {"timeout": BUSY_SECONDS}}
    if parsed.drivername != "postgresql+psycopg":
        return {}
    alive = {"keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 3}
    alive |= {"tcp_user_timeout": CUT_OFF_SECONDS * 1000}
    return {
        "pool_size": 3,  # one for training, one for the leases, one that holds the lock
        "connect_args": {"connect_timeout": CONNECT_SECONDS, **alive},
    }


def _refuse_other_programs(parsed: URL, url: str) -> None:
    """Raise StorageError where the database has tables, but not Optuna's: ours would be mixed with them."""
    if not exists(url):
        return
    engine = _engine(parsed)
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


_here = threading.local()


@contextmanager
def reading() -> Iterator[None]:
    """Within this, the thread only reads: it waits for no writer, and lets none wait."""
    before = getattr(_here, "reads", False)
    _here.reads = True
    try:
        yield
    finally:
        _here.reads = before


def _serialise_writers(engine: Engine) -> None:
    """Have SQLite take its write lock when a transaction begins, not midway, where two readers could both win it."""

    @event.listens_for(engine, "connect")
    def _connect(connection: sqlite3.Connection, _record: object) -> None:
        connection.isolation_level = None  # pysqlite must not begin transactions of its own
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")

    @event.listens_for(engine, "begin")
    def _begin(connection: object) -> None:
        how = "DEFERRED" if getattr(_here, "reads", False) else "IMMEDIATE"
        connection.exec_driver_sql(f"BEGIN {how}")  # type: ignore[attr-defined]

    engine.dispose()  # what was opened before had no listeners


def _end_sessions_that_are_cut_off(engine: Engine) -> None:
    """Have PostgreSQL end a session whose machine is cut off, or it would hold its locks for hours."""

    @event.listens_for(engine, "connect")
    def _connect(connection: Any, _record: object) -> None:
        limits = {"tcp_keepalives_idle": 10, "tcp_keepalives_interval": 5, "tcp_keepalives_count": 3}
        limits |= dict.fromkeys(("idle_in_transaction_session_timeout", "tcp_user_timeout"), CUT_OFF_SECONDS * 1000)
        with connection.cursor() as cursor:
            for name, value in limits.items():
                cursor.execute(f"SET {name} = {value}")
        connection.commit()

    engine.dispose()  # what was opened before had no listener


def _first_line(error: BaseException) -> str:
    return masked(str(getattr(error, "orig", None) or error).splitlines()[0])


optuna.logging.set_verbosity(optuna.logging.WARNING)
