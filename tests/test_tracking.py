"""Trackers: one contract for all, and what MLflow's database holds at the end, read with SQL."""

import json
import math
import os
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from hpo.errors import InputError
from hpo.mlflow_tracker import MlflowTracker, open_tracker
from hpo.processes import this_process
from hpo.tracking import STATUS, MemoryTracker, NullTracker, Tracker, check_address
from tests.mlflows import Mlflow, in_store, no_warning


def tell(tracker: Tracker) -> None:
    """A whole study of three trials: one complete, one pruned, one failed."""
    tracker.start_study({"hpo.objective": "o"}, {"study.yaml": "objective: o\n"})
    tracker.tag_study({"hpo.stack": "one trial at a time"})
    for trial in range(3):
        tracker.start_trial(trial, {"lr": 0.1, "n": trial})
        for epoch in range(4):
            tracker.log_metrics(
                trial, epoch, {"train_loss": 1.0 / (epoch + 1), "valid_loss": math.nan if trial == 2 else 0.5}
            )
    tracker.end_trial(0, "COMPLETE")
    tracker.end_trial(1, "PRUNED")
    tracker.end_trial(2, "FAIL", "train_loss became nan; see postgresql://bob:s3cret@h/d")
    tracker.end_study("COMPLETE")


@dataclass
class Seen:
    """What a tracker holds of a study, by trial (None: the study); NaN as text, since it equals nothing."""

    ends: dict[int | None, str] = field(default_factory=dict)
    errors: dict[int | None, str] = field(default_factory=dict)
    params: dict[int, dict[str, str]] = field(default_factory=dict)
    curves: dict[int | None, dict[str, dict[int, float | str]]] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)


def _shown(value: float) -> float | str:
    return "nan" if math.isnan(value) else value


def _of_memory(tracker: MemoryTracker) -> Seen:
    curves: dict[int | None, dict[str, dict[int, float | str]]] = {}
    for trial, rows in tracker.metrics.items():
        for step, metrics in rows:
            for key, value in metrics.items():
                curves.setdefault(trial, {}).setdefault(key, {})[step] = _shown(value)
    return Seen(
        ends={trial: state for trial, (state, _) in tracker.ended.items()},
        errors={trial: error for trial, (_, error) in tracker.ended.items() if error},
        params={trial: {key: str(value) for key, value in params.items()} for trial, params in tracker.params.items()},
        curves=curves,
        files={file.name: file.read_text() for folder in tracker.folders for file in folder.iterdir()},
        tags=dict(tracker.tags),
    )


def _of_mlflow(mlflow: Mlflow) -> Seen:
    seen = Seen()
    for mark, run in mlflow.runs().items():
        trial, tags = None if mark == "study" else int(mark), run.data.tags
        if "hpo.state" in tags:
            assert run.info.status == STATUS[tags["hpo.state"]]
            seen.ends[trial] = tags["hpo.state"]
        if "hpo.error" in tags:
            seen.errors[trial] = tags["hpo.error"]
        if run.data.metrics:
            curves = {key: mlflow.curve(mark, key) for key in run.data.metrics}
            seen.curves[trial] = {key: {step: _shown(x) for step, x in curve} for key, curve in curves.items()}
        if trial is None:
            seen.files = {Path(name).name: mlflow.text("study", name) for name in mlflow.files("study", "bundle")}
            seen.tags = {key: value for key, value in tags.items() if key == "hpo.stack"}
        else:
            seen.params[trial] = run.data.params
    return seen


Opened = tuple[Callable[[], Tracker], Callable[[], Seen]]


@pytest.fixture(params=["null", "memory", "sqlite", "http"])
def opened(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Opened:
    """Return a function that opens the study's tracker, and one that looks at what is there then."""
    monkeypatch.chdir(tmp_path)
    if request.param == "null":
        return NullTracker, Seen
    if request.param == "memory":
        memory = MemoryTracker()
        return lambda: memory, lambda: _of_memory(memory)
    mlflow = in_store(request.param, request, tmp_path)
    return mlflow.tracker, lambda: _of_mlflow(mlflow)


def expected(tracker: Tracker, **what: object) -> Seen:
    """Return what must be seen: all of it, or nothing where there is no tracker."""
    return Seen() if isinstance(tracker, NullTracker) else Seen(**what)  # type: ignore[arg-type]


class TestContract:
    """Every tracker holds in the end what it was told, however often; one that is none holds nothing."""

    @pytest.mark.parametrize("times", [1, 2])
    def test_a_whole_study(self, opened: Opened, times: int) -> None:
        open_it, look = opened
        for _ in range(times):
            tracker = open_it()
            tell(tracker)
        train = {epoch: 1.0 / (epoch + 1) for epoch in range(4)}
        valid = [dict.fromkeys(range(4), 0.5)] * 2 + [dict.fromkeys(range(4), "nan")]
        assert look() == expected(
            tracker,
            ends={0: "COMPLETE", 1: "PRUNED", 2: "FAIL", None: "COMPLETE"},
            errors={2: look().errors.get(2)},  # the password in it: below
            params={trial: {"lr": "0.1", "n": str(trial)} for trial in range(3)},
            curves={trial: {"train_loss": train, "valid_loss": valid[trial]} for trial in range(3)},
            tags={"hpo.stack": "one trial at a time"},
        )

    def test_a_run_id_is_text_or_nothing(self, opened: Opened) -> None:
        tracker = opened[0]()
        tracker.start_study({}, {})
        run = tracker.start_trial(0, {})
        assert run is None if isinstance(tracker, NullTracker) else (isinstance(run, str) and run)
        assert tracker.close() is True

    def test_params_that_become_known_later_are_added(self, opened: Opened) -> None:
        open_it, look = opened
        tracker = open_it()
        tracker.start_trial(0, {"a": 1})
        tracker.log_params(0, {"b": 2})
        assert tracker.close() is True
        assert look() == expected(tracker, params={0: {"a": "1", "b": "2"}})

    def test_a_folder_is_kept_and_replaced_by_what_is_in_it_later(self, opened: Opened, tmp_path: Path) -> None:
        open_it, look = opened
        (tmp_path / "b").mkdir()
        for text in ("one", "two", "two"):
            (tmp_path / "b/model.pt").write_text(text)
            tracker = open_it()
            tracker.start_study({}, {})
            tracker.log_folder(tmp_path / "b", "bundle")
            assert tracker.end_study("COMPLETE") is True
            assert look() == expected(tracker, ends={None: "COMPLETE"}, files={"model.pt": text})

    def test_reconcile_and_end_agree(self, opened: Opened) -> None:
        """One that is open is ended, one with another end corrected, a right one left, one without a run not made."""
        open_it, look = opened
        tracker = open_it()
        tracker.start_study({}, {})
        for trial in range(6):
            tracker.start_trial(trial, {})
        ends = {
            0: ("COMPLETE", None),
            1: ("PRUNED", None),
            2: ("FAIL", "worker w died"),
            3: ("INTERRUPTED", "worker w died"),
            4: ("INTERRUPTED", "worker w died"),
            9: ("COMPLETE", None),
        }
        tracker.end_trial(0, "COMPLETE")
        tracker.end_trial(2, "INTERRUPTED", "worker w died")
        tracker.end_trial(3, "FAIL", "worker w died")
        for _ in range(2):
            tracker.reconcile(ends)
            assert tracker.close() is True
            assert look() == expected(
                tracker,
                ends={0: "COMPLETE", 1: "PRUNED", 2: "FAIL", 3: "INTERRUPTED", 4: "INTERRUPTED"},
                errors=dict.fromkeys((2, 3, 4), "worker w died"),
                params={trial: {} for trial in range(6)},
            )

    def test_a_study_that_is_run_again_is_open_until_it_ends(self, opened: Opened) -> None:
        open_it, look = opened
        for state in ("INTERRUPTED", "COMPLETE"):
            tracker = open_it()
            tracker.start_study({}, {})
            tracker.log_metrics(None, 3, {"test_r2": 0.5})
            assert tracker.end_study(state) is True
            assert look() == expected(tracker, ends={None: state}, curves={None: {"test_r2": {3: 0.5}}})


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty_database: Path) -> None:
    """Be in a folder whose database for MLflow has its tables."""
    monkeypatch.chdir(tmp_path)
    Path("mlruns").mkdir()
    shutil.copy(empty_database, "mlruns/mlflow.db")


@pytest.fixture
def mlflow(here: None, tmp_path: Path) -> Iterator[MlflowTracker]:
    yield MlflowTracker("sqlite:///mlruns/mlflow.db", "s", tmp_path / "unsent", no_warning)
    assert not list((tmp_path / "unsent").glob("*"))


def query(sql: str) -> list[tuple]:
    with sqlite3.connect("mlruns/mlflow.db") as db:
        return db.execute(sql).fetchall()


def test_states_curves_params_and_parents_in_mlflows_tables(mlflow: MlflowTracker) -> None:
    tell(mlflow)
    assert query("select name, status from runs order by name") == [
        ("s", "FINISHED"),
        ("trial 0", "FINISHED"),
        ("trial 1", "KILLED"),
        ("trial 2", "FAILED"),
    ]
    tags = dict(query("select name, value from tags join runs using (run_uuid) where key = 'hpo.state'"))
    assert tags == {"s": "COMPLETE", "trial 0": "COMPLETE", "trial 1": "PRUNED", "trial 2": "FAIL"}
    chosen = query("select name, value from tags join runs using (run_uuid) where key = 'hpo.stack'")
    assert chosen == [("s", "one trial at a time")]
    (parent,) = query("select run_uuid from runs where name = 's'")
    parents = query("select distinct value from tags where key = 'mlflow.parentRunId'")
    assert parents == [parent]
    assert query("select key, value from params join runs using (run_uuid) where name = 'trial 1' order by key") == [
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
    tell(MlflowTracker("sqlite:///mlruns/mlflow.db", "s", Path("unsent"), no_warning))
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


class _Server(MlflowTracker):
    """A tracker whose server is away for as long as `away` says."""

    RETRY_SECONDS = 0.0
    CLOSE_SECONDS = 2.0
    away = True

    def _connect(self) -> None:
        if self.away:
            raise ConnectionError("http://bob:s3cret@h:5000 refused")
        super()._connect()


def test_a_tracker_that_fails_says_it_once_and_sends_everything_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    warnings: list[str] = []
    tell(_Server("sqlite:///mlruns/mlflow.db", "s", tmp_path / "unsent", warnings.append))
    assert len(warnings) == 1
    assert "sqlite:///mlruns/mlflow.db does not work (ConnectionError: http://bob:***@h:5000 refused)" in warnings[0]
    assert "training goes on, and what could not be sent is kept in" in warnings[0]
    (unsent,) = (tmp_path / "unsent/s").iterdir()
    assert "s3cret" not in unsent.read_text()

    later = MlflowTracker("sqlite:///mlruns/mlflow.db", "s", tmp_path / "unsent", no_warning)
    later.start_study({}, {})
    later.end_study("COMPLETE")
    assert query("select name, status from runs order by name") == [
        ("s", "FINISHED"),
        ("trial 0", "FINISHED"),
        ("trial 1", "KILLED"),
        ("trial 2", "FAILED"),
    ]
    assert query("select count(*) from metrics") == [(24,)]
    assert not list((tmp_path / "unsent").glob("*"))


def test_a_tracker_that_fails_does_not_hold_up_training(tmp_path: Path) -> None:
    tracker = _Server("sqlite:///mlruns/mlflow.db", "s", tmp_path / "unsent", lambda text: None)
    start = time.monotonic()
    tracker.start_study({}, {})
    for trial in range(50):
        tracker.start_trial(trial, {"a": 1})
        tracker.log_metrics(trial, 0, {"m": 1.0})
        tracker.end_trial(trial, "COMPLETE")
    assert time.monotonic() - start < 2.0
    tracker.close()


def test_a_tracker_that_comes_back_midway_says_so(here: None, tmp_path: Path) -> None:
    said: list[str] = []
    tracker = _Server("sqlite:///mlruns/mlflow.db", "s", tmp_path / "unsent", said.append)
    tracker.start_study({}, {})
    assert tracker.start_trial(0, {"a": 1}) is None
    tracker.away = False
    end = time.monotonic() + 30
    while tracker.start_trial(1, {"a": 1}) is None:
        assert time.monotonic() < end
        time.sleep(0.1)
    tracker.end_trial(0, "COMPLETE")
    tracker.end_study("COMPLETE")
    assert said[1].endswith("is back; everything that was kept has been sent")
    assert {("s",), ("trial 0",), ("trial 1",)} <= set(query("select name from runs"))


def test_an_outbox_cut_short_by_a_kill_is_read_as_far_as_it_goes(here: None, tmp_path: Path) -> None:
    (tmp_path / "unsent").mkdir()
    place, _, _ = this_process().rpartition("-")
    (tmp_path / f"unsent/s.{place}-999999999.jsonl").write_text(
        '{"do": "start", "trial": null, "time": 1}\n{"do": "sta'
    )
    MlflowTracker("sqlite:///mlruns/mlflow.db", "s", tmp_path / "unsent", no_warning).end_study("COMPLETE")
    assert query("select name from runs") == [("s",)]


def test_an_outbox_on_a_full_disk_stops_nothing(mlflow: MlflowTracker, tmp_path: Path) -> None:
    mlflow.start_study({}, {})
    mlflow.start_trial(0, {})
    mlflow._warn = lambda text: None
    mlflow._outbox.append({"do": "metrics"})  # opens the file
    mlflow._outbox._log.close()
    mlflow._outbox._log = open("/dev/full", "w")  # noqa: SIM115
    for epoch in range(3):
        mlflow.log_metrics(0, epoch, {"valid_loss": 0.5})
    mlflow._note_failure(RuntimeError("the disk is full"))
    mlflow.log_metrics(0, 3, {"valid_loss": 0.5})
    mlflow.end_trial(0, "COMPLETE")
    mlflow._retry_at = 0.0
    mlflow.end_study("COMPLETE")
    assert query("select count(distinct step) from metrics where key = 'valid_loss'") == [(4,)]


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
        open_tracker(address, "s", Path("unsent"), no_warning)
