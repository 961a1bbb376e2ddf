"""Runs written straight into the tables of MLflow's SQLite file, for an eighth of the CPU time of MLflow's client.

MLflow's client opens a transaction for each of a dozen steps of a run and makes an object of each row; beside a stack
of 64 it takes as much CPU as training does. Here the rows of one call are one transaction, the same ones that
`mlflow.store.tracking.sqlalchemy_store.SqlAlchemyStore` writes in `create_run`, `log_batch` and `update_run_info`
(`benchmarks/runs.py` has the figures, tests/test_tables.py compares the two, row by row).

Only what is ordinary is written. Where the tables are not the known ones, a run or its experiment is deleted, a param
has another value, or SQLite says anything at all, nothing is, and MLflow's client is to do it or to say what is wrong.
"""

import sqlite3
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from hpo.tracking.values import RUN_NAME, stored

_COLUMNS = {
    "runs": "run_uuid name source_type source_name entry_point_name user_id status start_time end_time source_version "
    "lifecycle_stage artifact_uri experiment_id deleted_time",
    "metrics": "key value timestamp run_uuid step is_nan",
    "latest_metrics": "key value timestamp step is_nan run_uuid",
    "params": "key value run_uuid",
    "tags": "key value run_uuid",
}
"""The columns of the tables that are written to: those of MLflow 3.10 to 3.18."""
_USER, _PARENT = "mlflow.user", "mlflow.parentRunId"
_WAIT_SECONDS = 5.0
"""How long another process may keep the file's lock."""

_RUN = """INSERT INTO runs (run_uuid, name, source_type, source_name, entry_point_name, user_id, status, start_time,
source_version, lifecycle_stage, artifact_uri, experiment_id)
VALUES (?, ?, 'UNKNOWN', '', '', ?, 'RUNNING', ?, '', 'active', ?, ?)"""
_INFO = """UPDATE runs SET name = coalesce(?, name), status = coalesce(?, status), end_time = coalesce(?, end_time)
WHERE run_uuid = ?"""
_IN_EXPERIMENT = "SELECT 1 FROM runs WHERE run_uuid = ? AND experiment_id = ?"
_EXPERIMENT = """SELECT experiment_id, artifact_location FROM experiments
WHERE experiment_id = CAST(? AS INTEGER) AND lifecycle_stage = 'active' AND artifact_location IS NOT NULL"""
_OF_TRIAL = """SELECT 1 FROM tags JOIN runs USING (run_uuid)
WHERE tags.key = 'hpo.trial' AND tags.value = ? AND runs.experiment_id = CAST(? AS INTEGER) AND (? = '' OR NOT EXISTS
(SELECT 1 FROM tags AS its WHERE its.run_uuid = tags.run_uuid AND its.key = 'hpo.making' AND its.value != ?))"""
"""Of another making: of a study of the same name that was started with `--fresh`."""
_PARAM = "INSERT INTO params (key, value, run_uuid) VALUES (?, ?, ?) ON CONFLICT (key, run_uuid) DO NOTHING"
_TAG = """INSERT INTO tags (key, value, run_uuid) VALUES (?, ?, ?)
ON CONFLICT (key, run_uuid) DO UPDATE SET value = excluded.value"""
_METRIC = """INSERT INTO metrics (key, step, timestamp, value, is_nan, run_uuid) VALUES (?, ?, ?, ?, ?, ?)
ON CONFLICT (key, timestamp, step, run_uuid, value, is_nan) DO NOTHING"""
_LATEST = """INSERT INTO latest_metrics (key, step, timestamp, value, is_nan, run_uuid) VALUES (?, ?, ?, ?, ?, ?)
ON CONFLICT (key, run_uuid) DO UPDATE SET step = excluded.step, timestamp = excluded.timestamp,
value = excluded.value, is_nan = excluded.is_nan
WHERE (excluded.step, excluded.timestamp, excluded.value) > (step, timestamp, value)"""


class NewRun(NamedTuple):
    """A run that is to be made."""

    experiment: str
    name: str
    start: int
    """In ms since 1970."""
    tags: Mapping[str, str]


class Change(NamedTuple):
    """What is to be written to a run: names, texts and numbers that MLflow takes."""

    metrics: Sequence[tuple[str, float, int, int]] = ()
    """(key, value, when in ms since 1970, step)"""
    params: Mapping[str, str] = {}
    tags: Mapping[str, str] = {}
    status: str | None = None
    end: int | None = None
    """When the run ended, in ms since 1970."""


class Tables:
    """The runs in one file of MLflow's. Each call opens it, since it may be moved, deleted or upgraded meanwhile."""

    def __init__(self, path: Path) -> None:
        self._address = f"{path.resolve().as_uri()}?mode=rw"
        self._checked: tuple[int, bool] | None = None
        """SQLite's number of the schema that was looked at last, and whether it is the known one."""

    def create(self, new: NewRun, change: Change, *, only: bool = False) -> str | None:
        """Make a run with what is to be written to it, and return its id; None: nothing was written.

        only: where the experiment has no run of the same trial that may be this study's, the deleted ones too.
        """
        run = uuid.uuid4().hex

        def work(sql: sqlite3.Connection) -> None:
            if only:
                _require_none(sql, new)
            _create(sql, run, new)
            _write(sql, run, change)

        return run if self._has_done(work) else None

    def write(self, run: str, change: Change) -> bool:
        """Write to an active run; the same twice does no harm. Return False where nothing was written."""

        def work(sql: sqlite3.Connection) -> None:
            _require_active(sql, run)
            _write(sql, run, change)

        return self._has_done(work)

    def _has_done(self, work: Callable[[sqlite3.Connection], None]) -> bool:
        """Whether all that `work` does was done in one transaction; else nothing was."""
        try:
            with closing(sqlite3.connect(self._address, uri=True, timeout=_WAIT_SECONDS, isolation_level=None)) as sql:
                sql.execute("BEGIN IMMEDIATE")
                self._require_known(sql)
                work(sql)
                sql.execute("COMMIT")
        except (sqlite3.Error, OverflowError, UnicodeError, _NotHereError):
            return False
        return True

    def _require_known(self, sql: sqlite3.Connection) -> None:
        schema = int(sql.execute("PRAGMA schema_version").fetchone()[0])
        if self._checked is None or self._checked[0] != schema:
            self._checked = schema, _is_known(sql)
        if not self._checked[1]:
            raise _NotHereError


class _NotHereError(Exception):
    """What is to be written is not for this module."""


def _is_known(sql: sqlite3.Connection) -> bool:
    for table, columns in _COLUMNS.items():
        if {name for _, name, *_ in sql.execute(f"PRAGMA table_info({table})")} != set(columns.split()):
            return False
    return True


def _create(sql: sqlite3.Connection, run: str, new: NewRun) -> None:
    from mlflow.utils.uri import append_to_uri_path

    found = sql.execute(_EXPERIMENT, (new.experiment,)).fetchone()
    if found is None:
        raise _NotHereError
    if _PARENT in new.tags and sql.execute(_IN_EXPERIMENT, (new.tags[_PARENT], found[0])).fetchone() is None:
        raise _NotHereError  # the file is another one since its ids were asked for
    where = append_to_uri_path(found[1], run, "artifacts")  # type: ignore[no-untyped-call]
    sql.execute(_RUN, (run, new.name, new.tags.get(_USER, "unknown"), new.start, where, found[0]))
    sql.executemany(_TAG, [(key, text, run) for key, text in ({RUN_NAME: new.name} | dict(new.tags)).items()])


def _write(sql: sqlite3.Connection, run: str, change: Change) -> None:
    _require_same(sql, run, change.params)
    sql.executemany(_PARAM, [(key, text, run) for key, text in change.params.items()])
    rows = [(key, step, when, *stored(value), run) for key, value, when, step in change.metrics]
    sql.executemany(_METRIC, rows)
    latest: dict[str, tuple[Any, ...]] = {}
    for row in rows:
        if row[0] not in latest or row[1:4] > latest[row[0]][1:4]:
            latest[row[0]] = row
    sql.executemany(_LATEST, list(latest.values()))
    sql.executemany(_TAG, [(key, text, run) for key, text in change.tags.items()])
    sql.execute(_INFO, (change.tags.get(RUN_NAME), change.status, change.end, run))


def _require_none(sql: sqlite3.Connection, new: NewRun) -> None:
    making = new.tags.get("hpo.making", "")
    if sql.execute(_OF_TRIAL, (new.tags["hpo.trial"], new.experiment, making, making)).fetchone() is not None:
        raise _NotHereError


def _require_active(sql: sqlite3.Connection, run: str) -> None:
    found = sql.execute("SELECT lifecycle_stage FROM runs WHERE run_uuid = ?", (run,)).fetchone()
    if found != ("active",):
        raise _NotHereError


def _require_same(sql: sqlite3.Connection, run: str, params: Mapping[str, str]) -> None:
    """Raise _NotHereError where a run has one of these params with another value: MLflow says which."""
    there = dict(sql.execute("SELECT key, value FROM params WHERE run_uuid = ?", (run,))) if params else {}
    if any(there.get(key, value) != value for key, value in params.items()):
        raise _NotHereError
