"""Optuna's storages by address, opened so that several processes can use them at once (see also `hpo.search.search`).

    sqlite:///path.db            one machine; refused on a network file system
    postgresql://host/database   many machines
    journal:///path.log          Optuna's journal file (`hpo.search.journal`)
    grpc://host:port             a server that `hpo serve` runs, for hundreds of workers

SQLite as it comes hands one queued trial to several workers; with WAL and `BEGIN IMMEDIATE` it does not. The schema is
made once, under a lock: processes that start together on a fresh database would crash all but one of them
(optuna/optuna#4621). No wait is without an end, so that a storage that hangs stops neither training nor SIGTERM.
"""

import hashlib
import sqlite3
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import optuna
from filelock import FileLock
from optuna.storages import (
    BaseStorage,
    GrpcStorageProxy,
    JournalStorage,
    RDBStorage,
    get_storage,
)
from sqlalchemy import create_engine, inspect, make_url
from sqlalchemy.engine import URL, Engine
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.pool import NullPool

from hpo.errors import StorageError, masked
from hpo.search.address import as_text, exists, journal_path, kind_of, parsed_url
from hpo.search.journal import JournalFile
from hpo.search.remote import (
    CONNECT_SECONDS,
    GrpcStorage,
    advisory_lock,
    end_sessions_that_are_cut_off,
    engine_arguments,
)
from hpo.search.sqlite import give_no_id_twice, network, serialise_writers
from hpo.search.versions import without_alembic
from hpo.stopping import ANSWER_SECONDS

BUSY_SECONDS = 60
"""How long to wait for another process's lock before the storage counts as away."""
_POLL_SECONDS = 0.005
_STOP_POLL_SECONDS = 0.5


class StorageBusy(StorageError):
    """Another process holds the storage's lock: nothing that the user gave is at fault."""

    exit_status = 1


def open_storage(url: str) -> BaseStorage:
    """Return the storage at `url`, its schema made if the database is new. Give it to `close_storage` at the end.

    Raises StorageError where it cannot be opened, or holds another program's tables, StorageBusy where another process
    holds its lock.
    """
    kind = kind_of(url)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            if kind == "grpc":
                return _open_grpc(url)
            if kind == "journal":
                path = journal_path(url)
                _make_folder(path, url)
                return JournalStorage(JournalFile(path))
        return _open_database(url)
    except StorageError:
        raise
    except ImportError as error:
        how = "pip install 'hpo[grpc]'" if kind == "grpc" else "pip install it"
        raise StorageError(f"storage {url}: its driver is not installed ({error}); {how}") from error
    except RuntimeError as error:  # Optuna's own: a schema of a newer or older version
        raise StorageError(f"storage {url}: {error}") from error
    except (SQLAlchemyError, OSError, ValueError) as error:
        busy = isinstance(error, TimeoutError) or "database is locked" in str(error)
        raise (StorageBusy if busy else StorageError)(
            f"storage {url} cannot be opened: {_first_line(error)}"
        ) from error


def see_whether_it_answers(storage: BaseStorage) -> None:
    """Return where a write would get through now. Raises what the storage raises where it does not answer."""
    try:
        if isinstance(storage, JournalStorage) and isinstance(storage._backend, JournalFile):
            storage._backend.lock()
        else:  # a transaction like any other; there is no such study
            storage.get_study_id_from_name("hpo: does it answer?")
    except KeyError:
        pass
    finally:
        storage.remove_session()


def close_storage(storage: BaseStorage) -> None:
    """Close the database or the connection."""
    if isinstance(storage, RDBStorage):
        storage.remove_session()
        storage.engine.dispose()
    elif isinstance(storage, GrpcStorageProxy):
        storage.close()


def serve_storage(url: str, host: str, port: int, ready: Callable[[], object] = lambda: None) -> None:
    """Serve the database at `url` to `grpc://host:port`, until the process ends; `ready` is called once it listens.

    Raises StorageError.
    """
    if find_spec("grpc") is None:  # before a database is made
        raise StorageError("serving needs gRPC, which is not installed: pip install 'hpo[grpc]'")
    storage = open_storage(url)
    try:
        if not isinstance(storage, RDBStorage):
            raise StorageError(f"storage {url}: only a database can be served, sqlite:/// or postgresql://")
        server = _listening(storage, host, port)
        server.start()
        ready()
        server.wait_for_termination()
    finally:
        close_storage(storage)


def _listening(storage: RDBStorage, host: str, port: int) -> Any:
    """Return Optuna's gRPC server, bound to that port, which no other server has. Raises StorageError."""
    from optuna.storages._grpc.auto_generated import api_pb2_grpc
    from optuna.storages._grpc.servicer import OptunaStorageProxyService

    grpc, generated = import_module("grpc"), cast(Any, api_pb2_grpc)  # neither is typed
    # by itself gRPC shares a port with another server of gRPC's, and each would get some of the workers
    server = grpc.server(ThreadPoolExecutor(max_workers=10), options=[("grpc.so_reuseport", 0)])
    generated.add_StorageServiceServicer_to_server(OptunaStorageProxyService(get_storage(storage)), server)
    try:
        server.add_insecure_port(f"{host}:{port}")
    except RuntimeError as error:  # whatever keeps it from listening; gRPC has written to stderr what does
        raise StorageError(
            f"{host}:{port} cannot be listened on: another program has the port, or the host is no address of this "
            "machine; give another --port or --host"
        ) from error
    return server


@contextmanager
def exclusive(
    url: str,
    storage: BaseStorage | None = None,
    stopping: Callable[[], bool] = lambda: False,
    seconds: float | None = None,
) -> Iterator[None]:
    """Hold the lock of the storage at `url` against every other process that uses it.

    It is waited for for `seconds` (default: `BUSY_SECONDS`), less where `stopping` says so; StorageBusy is raised then.
    `storage` is that storage, where it is open: PostgreSQL is not connected to once more then. Behind gRPC there is no
    lock: what is done under it is harmless when done twice, only not as quick.
    """
    kind, seconds = kind_of(url), BUSY_SECONDS if seconds is None else seconds
    if kind == "grpc":
        yield
        return
    if kind == "postgresql":
        engine = storage.engine if isinstance(storage, RDBStorage) else _engine(parsed_url(url), poolclass=NullPool)
        lock, what = advisory_lock(engine, seconds, stopping), "its lock"
    else:
        what = str(_lock_path(kind, url))
        lock = _file_lock(what, seconds, stopping)
    with ExitStack() as stack:
        try:
            stack.enter_context(lock)
        except TimeoutError as error:
            raise StorageBusy(f"storage {url}: another process held {what} for {seconds:g} s") from error
        except SQLAlchemyError as error:
            raise StorageError(f"storage {url} cannot be opened: {_first_line(error)}") from error
        except OSError as error:
            message = f"storage {url} cannot be opened: {what} cannot be made ({error.strerror})"
            raise StorageError(
                f"{message}; a lock is needed to read a study too: copy it to where one can be"
            ) from error
        yield


def _lock_path(kind: str, url: str) -> Path:
    if kind == "journal":  # its `.lock` is that of plain Optuna
        return Path(f"{journal_path(url)}.queue.lock")
    if kind == "sqlite":
        return Path(f"{make_url(url).database}.lock")
    # another database that SQLAlchemy knows: of this machine's processes at least
    return Path(tempfile.gettempdir()) / f"hpo-{hashlib.sha256(url.encode()).hexdigest()[:16]}.lock"


@contextmanager
def _file_lock(path: str, seconds: float, stopping: Callable[[], bool]) -> Iterator[None]:
    """Hold the lock of a file, which ends with its process. Raises TimeoutError, OSError."""
    end = time.monotonic() + seconds
    lock = FileLock(path, poll_interval=_POLL_SECONDS)
    while not lock.is_locked:
        try:
            lock.acquire(timeout=min(_STOP_POLL_SECONDS, seconds))
        except TimeoutError:
            if stopping() or time.monotonic() >= end:
                raise
    try:
        yield
    finally:
        lock.release()


def _open_grpc(url: str) -> BaseStorage:
    parts = urlsplit(url)
    try:
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if host is None or port is None or parts.path not in ("", "/"):
        raise StorageError(f"storage {url}: is not the address of a server; write grpc://host:port")
    storage = GrpcStorage(host=host, port=port)
    try:
        storage.wait_server_ready(timeout=CONNECT_SECONDS)
    except ConnectionError as error:
        storage.close()
        raise StorageError(
            f"storage {url} cannot be opened: no server answers there; start one: hpo serve STUDY --port {port}"
        ) from error
    return storage


def _open_database(url: str) -> BaseStorage:
    parsed = parsed_url(url)
    if parsed.get_backend_name() == "sqlite":
        path = Path(str(parsed.database))
        _make_folder(path, url)
        _refuse_network(path, url)
    with exclusive(url, seconds=ANSWER_SECONDS):
        _refuse_other_programs(parsed, url)
        give_no_id_twice()
        without_alembic()
        storage = _Database(as_text(parsed), engine_kwargs=_engine_arguments(parsed))
    if parsed.get_backend_name() == "sqlite":
        serialise_writers(storage.engine)
    elif parsed.get_backend_name() == "postgresql":
        end_sessions_that_are_cut_off(storage.engine)
    return storage


class _Database(RDBStorage):
    """Optuna's storage of a database, which keeps no connection open where its schema is refused."""

    def __init__(self, url: str, engine_kwargs: dict[str, Any]) -> None:
        try:
            super().__init__(url, engine_kwargs=engine_kwargs)
        except BaseException:
            if hasattr(self, "scoped_session"):  # else there is no connection yet
                close_storage(self)
            raise


def _engine(parsed: URL, **arguments: Any) -> Engine:
    own = {key: value for key, value in _engine_arguments(parsed).items() if not key.startswith("pool_")}
    return create_engine(parsed, **own, **arguments)


def _make_folder(path: Path, url: str) -> None:
    """Make the folder of a relative path, which is output of ours; an absolute one must be there."""
    folder = path.parent
    if not folder.is_absolute():
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            if isinstance(error, FileExistsError | NotADirectoryError):
                why = f"{folder} is not a folder ({error.strerror})"
            else:
                why = f"{folder} cannot be made ({error.strerror}); give another `storage` and `output`"
            raise StorageError(f"storage {url} cannot be opened: {why}") from error
    if not folder.is_dir():
        raise StorageError(f"storage {url} cannot be opened: there is no folder {folder}; make it, or give another")


def _refuse_network(path: Path, url: str) -> None:
    if kind := network(path):
        raise StorageError(
            f"storage {url}: lies on a network file system ({kind}), where SQLite loses data; "
            "write postgresql://..., or a path on a disk of this machine"
        )


def _engine_arguments(parsed: URL) -> dict[str, Any]:
    if parsed.get_backend_name() == "sqlite":
        return {"connect_args": {"timeout": ANSWER_SECONDS}}
    return engine_arguments(parsed) if parsed.drivername == "postgresql+psycopg" else {}


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


def _first_line(error: BaseException) -> str:
    return masked(str(getattr(error, "orig", None) or error).splitlines()[0])


optuna.logging.set_verbosity(optuna.logging.WARNING)
