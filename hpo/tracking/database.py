"""A new SQLite database of MLflow's, made whole or not at all: one that was killed midway stays without its tables.

MLflow makes its tables by all the migrations that it has ever had: one to two CPU seconds, and a hundred waits for the
disk. So an empty database of each version of MLflow is kept in the user's cache, and copied.
"""

import os
import shutil
import sqlite3
from contextlib import closing, suppress
from pathlib import Path

from hpo.tracking.values import sqlite_address


def make_database(path: Path) -> None:
    """Make a database with MLflow's tables beside `path`, and put it there. Raises what MLflow and the disk raise."""
    new = path.with_name(f".{path.name}.new").resolve()
    _remove(new)  # one that was killed midway has left it
    try:
        empty = _cached()
        if _is_empty(empty):
            shutil.copyfile(empty, new)
        else:
            from mlflow import MlflowClient

            MlflowClient(sqlite_address(new)).search_experiments(max_results=1)
            with suppress(OSError, sqlite3.Error):  # the next study does without it, too
                _keep(new, empty)
        new.replace(path)
    finally:
        _remove(new)  # on a full disk the bundle needs its place


def _remove(database: Path) -> None:
    for file in (database, database.with_name(f"{database.name}-journal")):
        file.unlink(missing_ok=True)


def require_opened(path: Path) -> None:
    """Raise what SQLite says of a database that it cannot open: MLflow tries for minutes, and says nothing of it."""
    with closing(sqlite3.connect(path, timeout=30)) as connection:
        connection.execute("PRAGMA schema_version")


def fail_soon() -> None:
    """Have MLflow raise within seconds what a database's server says; by itself it tries for minutes, in silence."""
    from mlflow.store.db import utils

    utils.MAX_RETRY_COUNT = min(utils.MAX_RETRY_COUNT, 4)  # we try again ourselves


def _cached() -> Path:
    """Return where an empty database of this version of MLflow is kept, if it is."""
    from mlflow.version import VERSION

    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.path.expanduser(home), "hpo", f"mlflow-{VERSION}.db").absolute()


def _is_empty(database: Path) -> bool:
    """Whether a database is there, sound and without any experiment."""
    try:
        with closing(sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True)) as connection:
            sound = connection.execute("PRAGMA quick_check").fetchone()
            version = connection.execute("SELECT version_num FROM alembic_version").fetchall()
            return sound == ("ok",) and len(version) == 1 and not connection.execute(_EXPERIMENTS).fetchall()
    except sqlite3.Error:
        return False


def _keep(database: Path, empty: Path) -> None:
    """Put a copy of `database` at `empty`, without the experiment that MLflow makes: it names this study's folder."""
    empty.parent.mkdir(parents=True, exist_ok=True)
    new = empty.with_name(f".{empty.name}.{os.getpid()}")
    try:
        shutil.copyfile(database, new)
        with closing(sqlite3.connect(new)) as connection, connection:
            connection.execute("DELETE FROM experiments")
        new.replace(empty)
    finally:
        new.unlink(missing_ok=True)


_EXPERIMENTS = "SELECT 1 FROM experiments LIMIT 1"
