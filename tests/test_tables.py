"""Runs written straight into MLflow's tables: row by row what its own client writes, and nothing where it refuses."""

import math
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from hpo.tracking.calls import write
from hpo.tracking.database import make_database
from hpo.tracking.tables import Change, NewRun, Tables
from hpo.tracking.values import RUN_NAME, sqlite_address

CURVE = [(key, 1.0 / (step + 1), 1000 + step, step) for step in range(300) for key in ("loss", "r2", "a/b c")]
CHANGES = {
    "nothing": [Change()],
    "a trial whole": [
        Change(CURVE, {"rate": "0.1", "layers": "[24, 24]"}, {"hpo.state": "COMPLETE"}, status="FINISHED", end=5000)
    ],
    "in parts": [
        Change(params={"rate": "0.1"}, tags={"a": "1"}),
        Change(CURVE[:90]),
        Change(CURVE[90:], tags={"a": "2", "b": "ü\n'\"", RUN_NAME: "trial 7 (pruned)"}),
        Change(status="KILLED", end=7, tags={"hpo.state": "PRUNED"}),
    ],
    "all of it twice": [Change(CURVE, {"rate": "0.1"}, {"a": "1"}, "FAILED", 9)] * 2,
    "numbers": [
        Change(
            [
                ("x", math.nan, 1, 0),
                ("y", math.inf, 1, 0),
                ("z", -math.inf, 1, 0),
                ("w", -0.0, 1, 0),
                ("v", 5e-324, 1, 0),
            ]
        ),
        Change([("x", math.nan, 1, 0), ("x", 3.0, 1, 0), ("y", 1.0, 1, -5), ("z", 2.0, 1, 2**62)]),
    ],
    "late and equal": [
        Change([("x", 1.0, 50, 5), ("x", 2.0, 60, 4), ("x", 0.5, 50, 5), ("x", 1.0, 50, 5)]),
        Change([("x", 9.0, 40, 5), ("x", 9.0, 99, 3)]),
        Change([("x", 4.0, 50, 5), ("x", math.nan, 50, 5)]),
        Change([("x", -1.0, 51, 5)]),
    ],
    "paused and resumed": [
        Change(tags={RUN_NAME: "trial 7 (paused)"}, status="SCHEDULED"),
        Change(tags={RUN_NAME: "trial 7"}, status="RUNNING"),
        Change(status="FINISHED", end=3),
        Change([("x", 1.0, 1, 1)], tags={RUN_NAME: "trial 7 (best)"}),
    ],
    "long": [Change(params={"p" * 250: "v" * 6000}, tags={"t" * 250: "v" * 5000}, metrics=[("m" * 250, 1.0, 1, 1)])],
}
PARENT = "0" * 32
NEW = NewRun("1", "trial 7", 100, {"hpo.trial": "7", "mlflow.parentRunId": PARENT, "mlflow.user": "ü"})


class Database:
    """A file of MLflow's with one experiment."""

    def __init__(self, folder: Path, artifacts: str | None = None) -> None:
        from mlflow import MlflowClient

        folder.mkdir()
        self.file = folder / "mlflow.db"
        make_database(self.file)
        self.client = MlflowClient(sqlite_address(self.file))
        self.experiment = self.client.create_experiment("study", artifact_location=artifacts or "file:///a%20b")
        self.tables = Tables(self.file)
        run = self.client.create_run(self.experiment, 1, run_name="study").info.run_id
        for table in ("runs", "tags"):
            self.do(f"UPDATE {table} SET run_uuid = ? WHERE run_uuid = ?", PARENT, run)
        self.do("UPDATE runs SET artifact_uri = ''")

    def do(self, statement: str, *values: Any) -> list[Any]:
        with closing(sqlite3.connect(self.file)) as sql, sql:
            return sql.execute(statement, values).fetchall()

    def dump(self, run: str) -> list[str]:
        """Return every row of every table, the run's id as one name."""
        rows = []
        for (table,) in self.do("SELECT name FROM sqlite_master WHERE type = 'table' AND name != 'experiments'"):
            names = [name for _, name, *_ in self.do(f"PRAGMA table_info({table})")]
            for row in self.do(f"SELECT * FROM {table}"):
                pairs = sorted(zip(names, row, strict=True))
                rows.append(f"{table} {pairs}".replace(run, "RUN"))
        return sorted(rows)


@pytest.fixture
def both(tmp_path: Path) -> tuple[Database, Database]:
    return Database(tmp_path / "ours"), Database(tmp_path / "theirs")


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_the_rows_are_those_of_mlflows_client(both: tuple[Database, Database], changes: list[Change]) -> None:
    ours, theirs = both
    first, *others = changes
    run = ours.tables.create(NEW, first)
    assert run is not None
    for change in others:
        assert ours.tables.write(run, change)
    their_run = theirs.client.create_run(NEW.experiment, NEW.start, dict(NEW.tags), NEW.name).info.run_id
    for change in changes:
        write(theirs.client, their_run, change)
    assert ours.dump(run) == theirs.dump(their_run)
    seen, expected = ours.client.get_run(run), theirs.client.get_run(their_run)
    for kind in ("metrics", "params", "tags"):  # as texts: NaN is not NaN
        assert str(sorted(getattr(seen.data, kind).items())) == str(sorted(getattr(expected.data, kind).items()))
    assert seen.info.artifact_uri == f"file:///a%20b/{run}/artifacts"


def test_the_known_tables_are_those_of_the_installed_mlflow(tmp_path: Path) -> None:
    assert Database(tmp_path / "new").tables.create(NEW, Change()) is not None


@pytest.mark.parametrize("where", ["file:///a", "/a/b", "s3://bucket/a?version=2", "a/b", "file:relative"])
def test_artifacts_are_where_mlflow_puts_them(tmp_path: Path, where: str) -> None:
    database = Database(tmp_path / "new", where)
    run = database.tables.create(NEW, Change())
    assert run is not None
    theirs = database.client.create_run("1").info
    assert database.client.get_run(run).info.artifact_uri == theirs.artifact_uri.replace(theirs.run_id, run)


class _Refused:
    """What is not written."""

    def deleted_run(self, database: Database, run: str) -> tuple[str, Change]:
        database.client.delete_run(run)
        return run, Change([("x", 1.0, 1, 1)])

    def run_that_is_not_there(self, database: Database, run: str) -> tuple[str, Change]:
        return "f" * 32, Change([("x", 1.0, 1, 1)])

    def param_of_another_value(self, database: Database, run: str) -> tuple[str, Change]:
        return run, Change([("x", 1.0, 1, 1)], {"new": "1", "rate": "0.2"}, {"a": "b"}, "FINISHED", 5)

    def status_that_mlflow_has_not(self, database: Database, run: str) -> tuple[str, Change]:
        return run, Change([("x", 1.0, 1, 1)], status="PAUSED")

    def step_that_no_database_has(self, database: Database, run: str) -> tuple[str, Change]:
        return run, Change([("x", 1.0, 1, 1), ("x", 1.0, 1, 2**63)])

    def half_a_character(self, database: Database, run: str) -> tuple[str, Change]:
        return run, Change([("x", 1.0, 1, 1)], tags={"a": "\ud800"})

    def column_that_is_new(self, database: Database, run: str) -> tuple[str, Change]:
        database.do("ALTER TABLE metrics ADD COLUMN workspace VARCHAR")
        return run, Change([("x", 1.0, 1, 1)])

    def table_that_is_gone(self, database: Database, run: str) -> tuple[str, Change]:
        database.do("ALTER TABLE latest_metrics RENAME TO newest_metrics")
        return run, Change(tags={"a": "b"})


CASES = [name for name in vars(_Refused) if not name.startswith("_")]


@pytest.mark.parametrize("case", CASES)
def test_what_is_not_ordinary_is_left_to_mlflow(tmp_path: Path, case: str) -> None:
    database = Database(tmp_path / "new")
    run = database.tables.create(NEW, Change(params={"rate": "0.1"}))
    assert run is not None
    where, change = getattr(_Refused(), case)(database, run)
    before = database.dump(run)
    assert not database.tables.write(where, change)
    assert database.dump(run) == before


TAGS = {"hpo.trial": "7", "hpo.making": "ours"}
THERE: dict[str, tuple[dict[str, str], bool]] = {
    "nothing": ({}, True),
    "another trial's": (TAGS | {"hpo.trial": "70"}, True),
    "of another making": (TAGS | {"hpo.making": "theirs"}, True),
    "the same": (TAGS, False),
    "of an older version": ({"hpo.trial": "7"}, False),
}


@pytest.mark.parametrize(("there", "made"), THERE.values(), ids=THERE)
@pytest.mark.parametrize("deleted", [False, True])
def test_a_trial_that_may_have_a_run_gets_no_second_one(
    tmp_path: Path, there: dict[str, str], made: bool, deleted: bool
) -> None:
    database = Database(tmp_path / "new")
    run = database.client.create_run("1", tags=there).info.run_id
    other = database.client.create_experiment("another")
    database.client.create_run(other, tags=TAGS)
    if deleted:
        database.client.delete_run(run)
    assert (database.tables.create(NEW._replace(tags=TAGS), Change(), only=True) is not None) == made
    assert database.tables.create(NEW._replace(tags=TAGS), Change(), only=True) is None
    assert database.tables.create(NEW._replace(tags=TAGS), Change()) is not None, "the caller knows better"


def test_without_a_making_every_run_of_the_trial_counts(tmp_path: Path) -> None:
    database = Database(tmp_path / "new")
    database.client.create_run("1", tags=TAGS)
    assert database.tables.create(NEW, Change(), only=True) is None


@pytest.mark.parametrize("case", ["deleted", "none"])
def test_no_run_is_made_where_mlflow_would_make_none(tmp_path: Path, case: str) -> None:
    database = Database(tmp_path / "new")
    if case == "deleted":
        database.client.delete_experiment(database.experiment)
    assert database.tables.create(NEW._replace(experiment="9" if case == "none" else "1"), Change()) is None
    assert database.do("SELECT count(*) FROM runs") == [(1,)]


def test_a_file_that_another_study_has_made_meanwhile_gets_no_run(tmp_path: Path) -> None:
    """Its experiment has the same id."""
    database = Database(tmp_path / "new")
    database.do("DELETE FROM runs")
    assert database.tables.create(NEW, Change()) is None
    another = database.client.create_experiment("another")
    there = database.client.create_run(another).info.run_id
    new = NEW._replace(tags={**NEW.tags, "mlflow.parentRunId": there})
    assert database.tables.create(new, Change()) is None


def test_a_file_that_is_gone_is_not_made_again(tmp_path: Path) -> None:
    database = Database(tmp_path / "new")
    database.file.rename(tmp_path / "elsewhere.db")
    assert database.tables.create(NEW, Change()) is None
    assert not database.file.exists()


@pytest.fixture
def locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Database]:
    monkeypatch.setattr("hpo.tracking.tables._WAIT_SECONDS", 0.05)
    database = Database(tmp_path / "new")
    with closing(sqlite3.connect(database.file, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield database


def test_a_file_that_another_process_keeps_locked(locked: Database) -> None:
    assert locked.tables.create(NEW, Change()) is None


def test_a_path_with_signs(tmp_path: Path) -> None:
    database = Database(tmp_path / "100%41 #? ü")
    assert database.tables.create(NEW, Change()) is not None
