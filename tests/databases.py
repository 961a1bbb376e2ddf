"""What a study's SQLite files hold, read by SQL: another reader than Optuna and MLflow."""

import sqlite3
import weakref
from contextlib import closing
from pathlib import Path
from typing import Any

import optuna

from hpo.search.storage import close_storage

OPTUNA = "mlruns/optuna.db"
MLFLOW = "mlruns/mlflow.db"


def rows(statement: str, *values: object, file: str | Path = OPTUNA) -> list[tuple[Any, ...]]:
    """Return what a statement selects. The connection is closed: Python 3.13 warns of one that is not."""
    with closing(sqlite3.connect(file, timeout=30)) as database:
        return database.execute(statement, values).fetchall()


def closed_in_time(study: optuna.Study) -> optuna.Study:
    """Return `study`, of plain Optuna in a database: its connections, which Optuna leaves open, are closed with it."""
    weakref.finalize(study, close_storage, study._storage._backend)  # type: ignore[attr-defined]
    return study
