"""What a study's SQLite files hold, read by SQL: another reader than Optuna and MLflow."""

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

OPTUNA = "mlruns/optuna.db"
MLFLOW = "mlruns/mlflow.db"


def rows(statement: str, *values: object, file: str | Path = OPTUNA) -> list[tuple[Any, ...]]:
    """Return what a statement selects. The connection is closed: Python 3.13 warns of one that is not."""
    with closing(sqlite3.connect(file, timeout=30)) as database:
        return database.execute(statement, values).fetchall()
