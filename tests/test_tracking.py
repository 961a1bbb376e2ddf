"""MLflow as a tracker: what its database holds at the end, read with SQL, whatever happens meanwhile."""

import json
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from mlflow import MlflowClient
from mlflow.tracking._tracking_service import utils

from hpo.errors import InputError
from hpo.processes import this_process
from hpo.stopping import StopToken
from hpo.tracking import process
from hpo.tracking.base import check_address
from hpo.tracking.database import make_database
from hpo.tracking.items import Answer, Item
from hpo.tracking.mlflow import MlflowTracker
from hpo.tracking.opening import open_tracker
from hpo.tracking.process import RunsProcess
from hpo.tracking.runs import Runs
from hpo.tracking.values import sqlite_address
from tests import warm
from tests.databases import MLFLOW, rows
from tests.logged import recorded
from tests.mlflows import RunsHere, TrackerHere, tell, until

pytestmark = pytest.mark.usefixtures("no_warning")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty_database: Path) -> None:
    """Be in a folder whose database for MLflow has its tables."""
    monkeypatch.chdir(tmp_path)
    Path("mlruns").mkdir()
    shutil.copy(empty_database, "mlruns/mlflow.db")


@pytest.fixture
def mlflow(here: None, tmp_path: Path) -> Iterator[MlflowTracker]:
    yield TrackerHere("sqlite:///mlruns/mlflow.db", "s", tmp_path / "unsent")
    assert not list((tmp_path / "unsent").glob("*"))


def query(sql: str) -> list[tuple]:
    return rows(sql, file=MLFLOW)


def test_states_curves_params_and_parents_in_mlflows_tables(mlflow: MlflowTracker) -> None:
    tell(mlflow)
    assert query("select name, status from runs order by name") == [
        ("s", "FINISHED"),
        ("trial 0", "FINISHED"),
        ("trial 1 (pruned)", "FINISHED"),
        ("trial 2 (failed)", "FAILED"),
    ]
    tags = dict(query("select name, value from tags join runs using (run_uuid) where key = 'hpo.state'"))
    assert tags == {"s": "COMPLETE", "trial 0": "COMPLETE", "trial 1 (pruned)": "PRUNED", "trial 2 (failed)": "FAIL"}
    chosen = query("select name, value from tags join runs using (run_uuid) where key = 'hpo.stack'")
    assert chosen == [("s", "one trial at a time")]
    (parent,) = query("select run_uuid from runs where name = 's'")
    parents = query("select distinct value from tags where key = 'mlflow.parentRunId'")
    assert parents == [parent]
    assert query(
        "select key, value from params join runs using (run_uuid) where name = 'trial 1 (pruned)' order by key"
    ) == [
        ("lr", "0.1"),
        ("n", "1"),
    ]
    curve = query(
        "select step, value from metrics join runs using (run_uuid) where name = 'trial 0' and key = 'train_loss' "
        "order by step"
    )
    assert curve == [(0, 1.0), (1, 0.5), (2, pytest.approx(1 / 3)), (3, 0.25)]


def test_an_error_is_kept_without_its_password(mlflow: MlflowTracker) -> None:
    tell(mlflow)
    assert query("select value from tags where key = 'hpo.error'") == [
        ("train_loss became nan; see postgresql://bob:***@h/d",)
    ]


def test_told_twice_there_is_one_run_each(mlflow: MlflowTracker) -> None:
    tell(mlflow)
    tell(MlflowTracker("sqlite:///mlruns/mlflow.db", "s", Path("unsent")))
    assert query("select count(*) from runs") == [(4,)]
    assert query("select count(*) from metrics") != [(0,)]


def test_more_than_mlflow_takes_in_one_call(mlflow: MlflowTracker) -> None:
    mlflow.start_study({}, {})
    mlflow.start_trial(0, {f"p{i}": i for i in range(250)})
    for epoch in range(1500):
        mlflow.log_metrics(0, epoch, {"a": float(epoch), "b": 0.0})
    mlflow.close()
    assert query("select count(*) from metrics") == [(3000,)]
    assert query("select count(*) from params") == [(250,)]


class _Server(TrackerHere):
    """A tracker whose server is away for as long as `away` says."""

    away = True

    def _open_runs(self, uri: str, study: str, **about: Any) -> RunsHere:
        runs = super()._open_runs(uri, study, **about)
        connect = runs.runs.connect

        def connect_if_it_is_there() -> None:
            if self.away:
                raise ConnectionError("http://bob:s3cret@h:5000 refused")
            connect()

        runs.runs.connect = connect_if_it_is_there  # type: ignore[method-assign]
        return runs


def test_a_tracker_that_fails_says_it_once_and_sends_everything_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    tell(_Server("sqlite:///mlruns/mlflow.db", "s", tmp_path / "unsent"))
    assert len(said) == 1
    assert "sqlite:///mlruns/mlflow.db does not work (ConnectionError: http://bob:***@h:5000 refused)" in said[0]
    assert "training continues, and what could not be sent is kept in" in said[0]
    (unsent,) = (tmp_path / "unsent/s").iterdir()
    assert b"s3cret" not in unsent.read_bytes()

    later = MlflowTracker("sqlite:///mlruns/mlflow.db", "s", tmp_path / "unsent")
    later.start_study({}, {})
    later.end_study("COMPLETE")
    assert query("select name, status from runs order by name") == [
        ("s", "FINISHED"),
        ("trial 0", "FINISHED"),
        ("trial 1 (pruned)", "FINISHED"),
        ("trial 2 (failed)", "FAILED"),
    ]
    assert len(said) == 1, "the next run has nothing to say"
    assert query("select count(*) from metrics") == [(24,)]
    assert not list((tmp_path / "unsent").glob("*"))


def test_a_tracker_that_fails_does_not_hold_up_training(tmp_path: Path, said: list[str]) -> None:
    tracker = _Server("sqlite:///mlruns/mlflow.db", "s", tmp_path / "unsent")
    start = time.monotonic()
    tracker.start_study({}, {})
    for trial in range(50):
        tracker.start_trial(trial, {"a": 1})
        tracker.log_metrics(trial, 0, {"m": 1.0})
        tracker.end_trial(trial, "COMPLETE")
    assert time.monotonic() - start < 2.0
    tracker.close()
    assert len(said) == 1


def test_a_database_whose_making_is_killed_midway_is_made_by_the_next_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    """It has some of MLflow's tables then, of which MLflow never makes more."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    code = (
        "import os; from mlflow.store.db import utils; utils._upgrade_db = lambda engine: os._exit(9)\n"
        "from hpo.tracking.runs import Runs; Runs('sqlite:///mlruns/mlflow.db', 's').connect()"
    )
    assert warm.run(code).returncode == 9
    tell(TrackerHere("sqlite:///mlruns/mlflow.db", "s", tmp_path / "unsent"))
    assert said == []
    assert query("select count(*) from metrics") == [(24,)]


@pytest.mark.parametrize("name", ["p%20q", "q?x=1", "100% #1"])
def test_a_folder_may_have_any_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty_database: Path, name: str
) -> None:
    """SQLAlchemy reads codes and options in the address that MLflow is given, and MLflow itself does not."""
    folder = tmp_path / name
    (folder / "mlruns").mkdir(parents=True)
    shutil.copy(empty_database, folder / "mlruns/mlflow.db")
    monkeypatch.chdir(folder)
    tell(TrackerHere("sqlite:///mlruns/mlflow.db", "s", tmp_path / "unsent"))
    assert query("select count(*) from metrics") == [(24,)]
    assert len(list(folder.glob("mlruns/artifacts/s/*/artifacts/study.yaml"))) == 1
    assert {each.name for each in tmp_path.iterdir()} <= {name, "unsent"}
    client = MlflowClient(sqlite_address(folder / "mlruns/mlflow.db"))
    client.create_registered_model("m")
    assert query("select name from registered_models") == [("m",)]


def in_folder(folder: Path, monkeypatch: pytest.MonkeyPatch, trial: int) -> None:
    """Run a study of one more trial in a folder, with a file of its run, as a process of its own does."""
    monkeypatch.chdir(folder)
    utils._artifact_repos_cache.clear()
    tracker = TrackerHere("sqlite:///mlruns/mlflow.db", "s", folder / "unsent")
    tracker.start_study({}, {f"{trial}.txt": "text"})
    tracker.start_trial(trial, {})
    tracker.end_trial(trial, "COMPLETE")
    assert tracker.end_study("COMPLETE")


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("mlruns/artifacts/**/*") if path.is_file())


@pytest.mark.parametrize("how", ["moved", "copied", "copied without its artifacts"])
def test_a_folder_that_is_moved_or_copied_has_its_artifacts_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty_database: Path, how: str
) -> None:
    old, new = tmp_path / "the old", tmp_path / "new"
    (old / "mlruns").mkdir(parents=True)
    shutil.copy(empty_database, old / "mlruns/mlflow.db")
    with recorded(logging.INFO) as said:
        in_folder(old, monkeypatch, 0)
        address = sqlite_address(old / "mlruns/mlflow.db")
        model = MlflowClient(address).create_logged_model("1", name="m")
        assert said == []
        if how == "moved":
            old.rename(new)
        else:
            shutil.copytree(old, new, ignore=None if how == "copied" else shutil.ignore_patterns("artifacts"))
        in_folder(new, monkeypatch, 1)
        in_folder(new, monkeypatch, 2)
    assert len(said) == 1
    assert f"was made in {old / 'mlruns'}, and its folder has been moved or copied since" in said[0]
    assert {"1.txt", "2.txt"} < set(files_in(new))
    assert "1.txt" not in files_in(old)
    assert ("0.txt" in files_in(new)) == (how != "copied without its artifacts")
    client = MlflowClient(sqlite_address(new / "mlruns/mlflow.db"))
    (study,) = client.search_runs(["1"], "tags.`hpo.trial` = 'study'")
    assert {"1.txt", "2.txt"} < {each.path for each in client.list_artifacts(study.info.run_id)}
    places = [place for (place,) in query("select artifact_uri from runs")]
    places.append(client.get_logged_model(model.model_id).artifact_location)
    assert all(place.startswith((new / "mlruns/artifacts/s").as_uri() + "/") for place in places)


@pytest.mark.parametrize("where", ["chosen by somebody", "the same folder by another path"])
def test_artifacts_elsewhere_stay_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty_database: Path, where: str
) -> None:
    (tmp_path / "here/mlruns").mkdir(parents=True)
    shutil.copy(empty_database, tmp_path / "here/mlruns/mlflow.db")
    elsewhere = tmp_path / "disk/artifacts/s"
    if where == "chosen by somebody":
        elsewhere.mkdir(parents=True)
    else:
        (tmp_path / "disk").symlink_to(tmp_path / "here/mlruns")
    client = MlflowClient(sqlite_address(tmp_path / "here/mlruns/mlflow.db"))
    client.create_experiment("s", artifact_location=elsewhere.as_uri())
    with recorded(logging.INFO) as said:
        in_folder(tmp_path / "here", monkeypatch, 0)
    assert said == []
    assert query("select artifact_location from experiments where name = 's'") == [(elsewhere.as_uri(),)]


def test_why_a_database_cannot_be_opened_is_said(here: None, tmp_path: Path, said: list[str]) -> None:
    """MLflow itself tries again and again, and tells nobody."""
    Path("mlruns/mlflow.db").unlink()
    Path("mlruns/mlflow.db").mkdir()
    tracker = TrackerHere("sqlite:///mlruns/mlflow.db", "s", tmp_path / "unsent")
    tracker.start_study({}, {})
    assert not tracker.end_study("COMPLETE")
    assert len(said) == 1
    assert "does not work (OperationalError: unable to open database file); training continues" in said[0]


@pytest.mark.parametrize("is_there", ["an empty file", "a link to nothing"])
def test_a_database_without_tables_gets_them_where_it_is(here: None, tmp_path: Path, is_there: str) -> None:
    """Python's sqlite3 leaves an empty file where it only looked; a link may say on which disk it is to be."""
    Path("mlruns/mlflow.db").unlink()
    if is_there == "an empty file":
        Path("mlruns/mlflow.db").touch()
    else:
        Path("mlruns/mlflow.db").symlink_to(tmp_path / "elsewhere.db")
    tell(TrackerHere("sqlite:///mlruns/mlflow.db", "s", tmp_path / "unsent"))
    assert query("select count(*) from metrics") == [(24,)]
    assert Path("mlruns/mlflow.db").is_symlink() == (is_there == "a link to nothing")


def test_a_full_disk_keeps_no_half_of_a_new_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_database(tmp_path / "first.db")

    def half(source: Path, target: Path) -> None:
        target.write_bytes(source.read_bytes()[:100_000])
        raise OSError("No space left on device")

    monkeypatch.setattr("hpo.tracking.database.shutil.copyfile", half)
    with pytest.raises(OSError, match="No space left"):
        make_database(tmp_path / "second.db")
    assert [file.name for file in tmp_path.iterdir() if "second" in file.name] == []


def test_why_a_databases_server_does_not_answer_is_said_within_seconds() -> None:
    start = time.monotonic()
    answer = Runs("postgresql+psycopg://me:pw@127.0.0.1:1/db", "s").attempt({"do": "start", "trial": None, "time": 1})
    assert "Connection refused" in answer.why
    assert (answer.sent, answer.refused) == (False, False)
    assert time.monotonic() - start < 20


def test_an_empty_database_is_kept_to_be_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes MLflow seconds to make; no copy has the experiment whose artifacts lie where the first was made."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        make_database(tmp_path / name / "mlflow.db")
    (kept,) = (tmp_path / "cache/hpo").iterdir()
    assert kept.read_bytes() == (tmp_path / "two/mlflow.db").read_bytes()
    with monkeypatch.context() as here:
        here.chdir(tmp_path / "two")
        (default,) = MlflowClient("sqlite:///mlflow.db").search_experiments()
        assert default.artifact_location.startswith(str(tmp_path / "two"))


DAMAGED_TOO = [
    pytest.param(damage, marks=pytest.mark.slow) for damage in ("no database", "a folder", "a cache that is a file")
]


@pytest.mark.parametrize("damage", ["cut off", "with a study", *DAMAGED_TOO])
def test_what_is_no_empty_database_is_not_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    make_database(tmp_path / "first.db")
    (kept,) = (tmp_path / "cache/hpo").iterdir()
    if damage == "cut off":
        kept.write_bytes(kept.read_bytes()[:100_000])
    elif damage == "no database":
        kept.write_text("no database")
    elif damage == "a folder":
        kept.unlink()
        kept.mkdir()
    elif damage == "with a study":
        MlflowClient(f"sqlite:///{kept}").create_experiment("another's")
    else:
        kept.unlink()
        kept.parent.rmdir()
        kept.parent.write_text("")
    make_database(tmp_path / "second.db")
    names = [each.name for each in MlflowClient(f"sqlite:///{tmp_path}/second.db").search_experiments()]
    assert names == ["Default"]


def test_sending_takes_at_most_a_fifth_of_the_time_while_trials_train(tmp_path: Path) -> None:
    sent: list[Item] = []

    class Slow(RunsHere):
        def attempt(self, item: Item) -> Answer:
            sent.append(item)
            time.sleep(0.1)
            return Answer()

    class Tracked(TrackerHere):
        FLUSH_SECONDS = 0.01

        def _open_runs(self, uri: str, study: str, **about: Any) -> RunsHere:
            return Slow(uri, study, **about)

    tracker = Tracked("sqlite:///mlruns/mlflow.db", "s", tmp_path / "unsent")
    start, step = time.monotonic(), 0
    while time.monotonic() < start + 2.0:
        tracker.log_metrics(0, step, {"m": 1.0})
        step += 1
        time.sleep(0.005)
    assert 2 <= len(sent) <= 6, "0.1 s of every half second"
    tracker.reconcile({})
    ended = time.monotonic()
    until(lambda: sent[-1]["do"] == "reconcile")
    assert time.monotonic() - ended < 0.4, "nor is rested when the trials are over"
    tracker.close()
    assert sum(len(item.get("rows", ())) for item in sent) == step, "at the end all is sent at once"


def test_a_tracker_that_comes_back_midway_says_so(here: None, tmp_path: Path, said: list[str]) -> None:
    tracker = _Server("sqlite:///mlruns/mlflow.db", "s", tmp_path / "unsent")
    tracker.start_study({}, {})
    tracker.start_trial(0, {"a": 1})
    until(lambda: said)
    tracker.away = False
    tracker.start_trial(1, {"a": 1})
    until(lambda: tracker.run_of(1))
    tracker.end_trial(0, "COMPLETE")
    tracker.end_study("COMPLETE")
    assert len(said) == 2
    assert said[1].endswith("is back; everything that was kept has been sent")
    assert {("s",), ("trial 0",), ("trial 1",)} <= set(query("select name from runs"))


def test_an_outbox_cut_short_by_a_kill_is_read_as_far_as_it_goes(here: None, tmp_path: Path) -> None:
    (tmp_path / "unsent").mkdir()
    place, _, _ = this_process().rpartition("-")
    (tmp_path / f"unsent/s.{place}-999999999.jsonl").write_text(
        '{"do": "start", "trial": null, "time": 1}\n{"do": "sta'
    )
    MlflowTracker("sqlite:///mlruns/mlflow.db", "s", tmp_path / "unsent").end_study("COMPLETE")
    assert query("select name from runs") == [("s",)]


@contextmanager
def full_disk(n_bytes: int) -> Iterator[None]:
    """Let no file of this process grow beyond so many bytes, as where a disk is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_an_outbox_on_a_full_disk_stops_nothing_and_loses_nothing(here: None, tmp_path: Path, said: list[str]) -> None:
    tracker = _Server("sqlite:///mlruns/mlflow.db", "s", tmp_path / "unsent")
    tracker.start_study({}, {})
    tracker.start_trial(0, {})
    with full_disk(50_000):
        for epoch in range(500):
            tracker.log_metrics(0, epoch, {"valid_loss": 0.5})
        assert tracker._outbox._in_memory
    tracker.end_trial(0, "COMPLETE")
    assert not tracker.end_study("COMPLETE")  # there is room again: now the file holds all
    later = MlflowTracker("sqlite:///mlruns/mlflow.db", "s", tmp_path / "unsent")
    assert later.close()
    assert len(said) == 1, "that it does not work"
    assert query("select count(distinct step) from metrics where key = 'valid_loss'") == [(500,)]
    assert query("select name, status from runs order by name") == [("s", "FINISHED"), ("trial 0", "FINISHED")]


def test_what_another_machine_left_long_ago_is_sent(mlflow: MlflowTracker, tmp_path: Path) -> None:
    mlflow.start_study({}, {})
    left = tmp_path / "unsent/s.elsewhere-1-2.jsonl"
    left.parent.mkdir(exist_ok=True)
    left.write_text(json.dumps({"do": "metrics", "trial": 4, "time": 1, "rows": [["valid_loss", 0.5, 1, 0]]}) + "\n")
    os.utime(left, (time.time() - 7200, time.time() - 7200))
    mlflow.reconcile({})
    mlflow.end_study("COMPLETE")
    assert query("select name from runs order by name") == [("s",), ("trial 4",)]


def test_what_a_worker_left_that_died_is_sent_at_the_studys_end(mlflow: MlflowTracker, tmp_path: Path) -> None:
    mlflow.start_study({}, {})
    place, _, _ = this_process().rpartition("-")
    rows = [["valid_loss", 0.5, 1, 0]]
    left = {"do": "metrics", "trial": 3, "time": 1, "rows": rows}
    (tmp_path / f"unsent/s.{place}-999999999.jsonl").write_text(json.dumps(left) + "\n")
    (tmp_path / "unsent/s.elsewhere-1-2.jsonl").write_text(json.dumps(left | {"trial": 4}) + "\n")
    (tmp_path / "unsent/s.other.elsewhere-1-2.jsonl").write_text("")
    mlflow.reconcile({3: ("COMPLETE", None)})
    mlflow.end_study("COMPLETE")
    assert query("select name, status from runs order by name") == [("s", "FINISHED"), ("trial 3", "FINISHED")]
    for name in ("s.elsewhere-1-2.jsonl", "s.other.elsewhere-1-2.jsonl"):  # another machine's, another study's
        (tmp_path / "unsent" / name).unlink()


@pytest.mark.parametrize(
    "address", ["off", "sqlite:///mlruns/mlflow.db", "http://host:5000", "postgresql://h/d", "databricks"]
)
def test_addresses_that_can_work(address: str) -> None:
    check_address(address)


@pytest.mark.parametrize("address", ["./mlruns", "mlruns", "file:///tmp/mlruns", "", "on"])
def test_addresses_that_never_work(address: str) -> None:
    with pytest.raises(InputError, match=r"must be off, a server \(http://host:5000\) or a database"):
        open_tracker(address, "s", Path("unsent"))


def test_mlflow_is_told_not_to_try_for_minutes_by_names_that_it_reads() -> None:
    code = (
        "import mlflow.environment_variables as known\n"
        "ours = ('MLFLOW_HTTP_REQUEST_MAX_RETRIES', 'MLFLOW_HTTP_REQUEST_TIMEOUT')\n"
        "print(*(getattr(known, name).get() for name in ours))"
    )
    environ = process._ENVIRON | {key: x for key, x in os.environ.items() if not key.startswith("MLFLOW_HTTP")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environ)
    assert done.stdout.split() == ["1", "10"], done.stderr


def sender_of(tracker: MlflowTracker) -> psutil.Process:
    """Return the process that sends, once it has sent something."""
    until(lambda: tracker._run_ids)
    assert isinstance(tracker._runs, process.RunsProcess)
    assert tracker._runs._process is not None
    return psutil.Process(tracker._runs._process.pid)


def test_a_sender_that_is_killed_is_started_again_and_nothing_is_lost(
    here: None, tmp_path: Path, said: list[str]
) -> None:
    tracker = MlflowTracker("sqlite:///mlruns/mlflow.db", "s", tmp_path / "unsent")
    tracker.start_study({}, {})
    sender_of(tracker).kill()
    for trial in range(5):
        tracker.start_trial(trial, {"a": 1})
        tracker.end_trial(trial, "COMPLETE")
    assert tracker.end_study("COMPLETE")
    assert query("select status, count(*) from runs group by status") == [("FINISHED", 6)]
    assert said == ["tracking: the process that sends was killed by signal 9; it is started again"]


def test_a_sender_that_hangs_holds_up_the_end_for_a_while_only(
    here: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    tracker = MlflowTracker("sqlite:///mlruns/mlflow.db", "s", tmp_path / "unsent")
    monkeypatch.setattr(MlflowTracker, "ANSWER_SECONDS", 1.0)
    tracker.start_study({}, {})
    sender = sender_of(tracker)
    sender.suspend()
    tracker.start_trial(0, {})
    start = time.monotonic()
    assert not tracker.end_study("COMPLETE")
    assert time.monotonic() - start < 5.0
    assert len(said) == 1
    assert "has not answered; what could not be sent is kept in" in said[0]
    assert not sender.is_running()
    later = MlflowTracker("sqlite:///mlruns/mlflow.db", "s", tmp_path / "unsent")
    assert later.close()
    assert query("select name, status from runs order by name") == [("s", "FINISHED"), ("trial 0", "RUNNING")]


def test_a_database_that_stays_locked_is_said_once_also_where_an_answer_is_given_up(
    here: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    class Locked(RunsProcess):
        """It fails, and then hangs: each attempt waits for the lock for longer than the end of a study does."""

        n = 0

        def attempt(self, item: Item) -> Answer:
            self.n += 1
            until(lambda: self.n == 1 or self.killed)
            return Answer(False, "OperationalError: database is locked")

    monkeypatch.setattr(MlflowTracker, "_open_runs", lambda self, *args, **keys: Locked(*args, **keys))
    for name, seconds in (("RETRY_SECONDS", 0.0), ("CLOSE_SECONDS", 0.5), ("FLUSH_SECONDS", 0.1)):
        monkeypatch.setattr(MlflowTracker, name, seconds)
    tracker = MlflowTracker("sqlite:///mlruns/mlflow.db", "s", tmp_path / "unsent")
    tracker.start_study({}, {})
    assert not tracker.end_study("COMPLETE")
    assert len(said) == 1
    assert "does not work (OperationalError: database is locked); training continues" in said[0]


def test_an_answer_is_not_waited_for_past_a_stop(
    here: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    monkeypatch.setattr("hpo.stopping.StopToken.END_SECONDS", 1.5)
    tracker = MlflowTracker("sqlite:///mlruns/mlflow.db", "s", tmp_path / "unsent")
    tracker.stop = StopToken()
    tracker.start_study({}, {})
    until(lambda: tracker._run_ids)
    sender_of(tracker).suspend()
    tracker.start_trial(0, {})
    tracker.stop.ask(signal.SIGTERM, None)
    start = time.monotonic()
    assert not tracker.end_study("INTERRUPTED")
    assert 1.0 < time.monotonic() - start < 8.0
    assert len(said) == 1, said
    later = MlflowTracker("sqlite:///mlruns/mlflow.db", "s", tmp_path / "unsent")
    assert later.close()
    assert query("select name, status from runs order by name") == [("s", "KILLED"), ("trial 0", "RUNNING")]


def test_a_sender_ends_with_its_process_and_a_child_of_that_does_not_keep_it(here: None) -> None:
    code = (
        "import os, signal, sys, time; from pathlib import Path; from hpo.tracking.mlflow import MlflowTracker\n"
        "tracker = MlflowTracker('sqlite:///mlruns/mlflow.db', 's', Path('unsent')); tracker.start_study({}, {})\n"
        "while not tracker._run_ids: time.sleep(0.1)\n"
        "child = os.fork() or (os.close(1), time.sleep(60))\n"
        "print(tracker._runs._process.pid, child, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=False)
    sender, child = map(int, done.stdout.split())
    try:
        until(lambda: not psutil.pid_exists(sender) or psutil.Process(sender).status() == psutil.STATUS_ZOMBIE)
        assert psutil.pid_exists(child)
    finally:
        psutil.Process(child).kill()


def test_a_sender_that_cannot_even_start_says_why(
    here: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    monkeypatch.setattr(process, "_SERVE", "raise SystemExit('no room here')")
    tracker = MlflowTracker("sqlite:///mlruns/mlflow.db", "s", tmp_path / "unsent")
    tracker.start_study({}, {})
    assert not tracker.end_study("COMPLETE")
    assert len(said) == 1
    assert "does not work (the process that sends ended with status 1: no room here); training continues" in said[0]
    monkeypatch.undo()
    assert MlflowTracker(f"sqlite:///{tmp_path}/mlruns/mlflow.db", "s", tmp_path / "unsent").close()


def test_training_imports_no_mlflow(here: None) -> None:
    code = (
        "import sys; from pathlib import Path; from hpo.tracking.opening import open_tracker\n"
        "tracker = open_tracker('sqlite:///mlruns/mlflow.db', 's', Path('unsent')); tracker.start_study({}, {})\n"
        "assert tracker.end_study('COMPLETE'); print('mlflow' in sys.modules, 'sqlalchemy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["False", "False"], done.stderr
