"""Storages behind a network, PostgreSQL and Optuna's gRPC server, with an end to each wait.

A server that was stopped, or whose machine hangs, keeps its connections: neither TCP nor libpq would ever give up.
"""

import functools
import hashlib
import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from optuna.storages import GrpcStorageProxy
from sqlalchemy import create_engine, event
from sqlalchemy.engine import URL, Connection, Engine
from sqlalchemy.exc import OperationalError, SQLAlchemyError

from hpo.stopping import ANSWER_SECONDS

CONNECT_SECONDS = 5
"""How long to wait for a server before it counts as away."""
CUT_OFF_SECONDS = 20
"""How long PostgreSQL waits for a session that has a transaction open, and we for PostgreSQL."""
_LOCK_SECONDS = 5
"""How long one statement waits for PostgreSQL's lock: less than `ANSWER_SECONDS`."""
_LISTING_SECONDS = 20.0
"""How long Optuna's gRPC server may take to send all trials of a study, in one answer."""


def engine_arguments(parsed: URL) -> dict[str, Any]:
    """Return what SQLAlchemy is to make PostgreSQL's engine with."""
    from hpo.search.postgres import Impatient  # psycopg: a tenth of a second, which a file needs not

    arguments, keywords = create_engine(parsed).dialect.create_connect_args(parsed)
    keywords = {**keywords, "keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 3}
    keywords |= {"tcp_user_timeout": CUT_OFF_SECONDS * 1000, "connect_timeout": CONNECT_SECONDS}
    return {
        "pool_size": 4,  # one for training, one for the leases, one that holds the lock, one that asks after an outage
        "creator": lambda: Impatient.connect(*arguments, **keywords),
    }


def end_sessions_that_are_cut_off(engine: Engine) -> None:
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


@contextmanager
def advisory_lock(engine: Engine, seconds: float, stopping: Callable[[], bool]) -> Iterator[None]:
    """Hold PostgreSQL's lock of that database; it ends with its transaction, so a killed process frees it.

    It is waited for so long, less where `stopping` says so; a holder that does nothing for a minute loses it. Raises
    TimeoutError, SQLAlchemyError.
    """
    end = time.monotonic() + seconds
    with ExitStack() as stack:
        while not _won(engine, stack, min(_LOCK_SECONDS, seconds)):
            if stopping() or time.monotonic() >= end:
                raise TimeoutError("PostgreSQL's lock could not be taken")
        yield


def _won(engine: Engine, stack: ExitStack, seconds: float) -> bool:
    connection = engine.connect()
    with ExitStack() as unless_won:
        unless_won.callback(_close, connection)
        connection.exec_driver_sql(f"SET LOCAL lock_timeout = '{math.ceil(1000 * seconds)}ms'")
        connection.exec_driver_sql("SET LOCAL idle_in_transaction_session_timeout = '60s'")
        try:
            connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_KEY})")
        except OperationalError as error:
            if getattr(error.orig, "sqlstate", None) != _LOCK_NOT_AVAILABLE:
                raise
            return False
        stack.push(unless_won.pop_all())
    return True


def _close(connection: Connection) -> None:
    with suppress(SQLAlchemyError):  # the server is away, and what the connection held is gone with it
        connection.close()


_LOCK_NOT_AVAILABLE = "55P03"
"""PostgreSQL's code of the error that a lock was waited for too long."""
_KEY = int.from_bytes(hashlib.sha256(b"hpo").digest()[:7])


class GrpcStorage(GrpcStorageProxy):
    """Optuna's client, whose every call has an end."""

    def _setup(self) -> None:
        super()._setup()
        limited: Any = _Limited(self._stub)  # Optuna's stub, as far as it is used
        self._stub = self._cache.grpc_client = limited


class _Limited:
    """Optuna's stub with `timeout` in each call."""

    def __init__(self, stub: Any) -> None:
        self._stub = stub

    def __getattr__(self, name: str) -> Any:
        seconds = _LISTING_SECONDS if name == "GetTrials" else ANSWER_SECONDS
        return functools.partial(getattr(self._stub, name), timeout=seconds)
