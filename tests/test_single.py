"""One run in MLflow for each trial, with all of it, in whatever order processes send what they have done of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from hpo.tracking.calls import all_runs
from hpo.tracking.mlflow import MlflowTracker
from hpo.tracking.runs import Runs
from hpo.tracking.single import made_one
from hpo.tracking.tables import Tables
from tests.mlflows import Mlflow, TrackerHere, by_default_in_sqlite, in_store, quietly

CURVE = [(epoch, 1.0 / (epoch + 1)) for epoch in range(4)]


class Held(TrackerHere):
    """Sends nothing until it is closed, as one that imports MLflow or rests."""

    held = True

    def _start_thread(self) -> None:
        if not self.held:
            super()._start_thread()

    def close(self) -> bool:
        self.held = False
        sent = super().close()
        self.held = True
        return sent


def worker(mlflow: Mlflow, name: str, **about: Any) -> MlflowTracker:
    """Return a tracker of a process of its own."""
    tracker = Held(mlflow.uri, mlflow.study, mlflow.outbox / name, making="m", adopts=False, **about)
    tracker.start_study({}, {})
    return tracker


def train(tracker: MlflowTracker, epochs: range) -> None:
    for epoch in epochs:
        tracker.log_metrics(0, epoch, {"loss": CURVE[epoch][1]})


def found(mlflow: Mlflow, name: str, state: str, status: str = "FINISHED") -> Any:
    """Return the only run of trial 0, which is whole, has that name, and has ended so."""
    run = mlflow.runs()["0"]
    assert run.data.params == {"lr": "0.1", "n": "3"}
    assert mlflow.curve("0", "loss") == CURVE
    assert (run.info.run_name, run.data.tags["hpo.state"], run.info.status) == (name, state, status)
    return run


@pytest.mark.parametrize("first", ["starter", "resumer"])
@pytest.mark.parametrize("is_best", [False, True])
def test_a_trial_that_a_peer_resumes_and_ends(mlflow: Mlflow, first: str, is_best: bool) -> None:
    """The peer's items may all arrive before those of the process that started the trial."""
    a, b = worker(mlflow, "a"), worker(mlflow, "b")
    a.start_trial(0, {"lr": 0.1, "n": 3}, is_new=True)
    train(a, range(2))
    a.pause_trial(0, {"seconds": 1.0})
    b.resume_trial(0)
    train(b, range(2, 4))
    b.end_trial(0, "COMPLETE", effort={"seconds": 2.0})
    if is_best:
        b.mark_best(0)
    for tracker in (a, b) if first == "starter" else (b, a):
        assert tracker.close()
    found(mlflow, "trial 0 (best)" if is_best else "trial 0", "COMPLETE")


@pytest.mark.parametrize("state", ["COMPLETE", "PRUNED"])
@by_default_in_sqlite
def test_a_pause_that_arrives_after_the_end(mlflow: Mlflow, state: str) -> None:
    a, b = worker(mlflow, "a"), worker(mlflow, "b")
    a.start_trial(0, {"lr": 0.1, "n": 3}, is_new=True)
    assert a.close()
    train(a, range(2))
    a.pause_trial(0)
    b.resume_trial(0)
    train(b, range(2, 4))
    b.end_trial(0, state)
    assert b.close()
    assert a.close()
    found(mlflow, {"COMPLETE": "trial 0", "PRUNED": "trial 0 (pruned)"}[state], state)


def test_a_trial_that_a_peer_ends_whose_process_lives_after_all(mlflow: Mlflow) -> None:
    a, b = worker(mlflow, "a", lease=0.0), worker(mlflow, "b")
    a.start_trial(0, {"lr": 0.1, "n": 3}, is_new=True)
    train(a, range(4))
    b.end_trial(0, "PRUNED")
    assert b.close()
    assert a.close()
    a.end_trial(0, "INTERRUPTED", "another worker took this trial over")
    assert a.close()
    found(mlflow, "trial 0 (pruned)", "PRUNED")


def two_runs(mlflow: Mlflow) -> tuple[MlflowTracker, MlflowTracker]:
    """Have two processes make a run of trial 0, as two machines may in the same moment."""
    a, b = worker(mlflow, "a"), worker(mlflow, "b")
    a.start_trial(0, {"lr": 0.1, "n": 3}, is_new=True, tags={"hpo.attempt": "1"})
    train(a, range(2))
    assert a.close()
    b.start_trial(0, {}, is_new=True, tags={"hpo.retry_of": "7"})
    train(b, range(2, 3))
    b.end_trial(0, "COMPLETE", effort={"seconds": 2.0})
    assert b.close()
    with pytest.raises(AssertionError, match="two runs of one trial"):
        mlflow.runs()
    return a, b


def test_two_runs_of_a_trial_become_one_that_has_all(mlflow: Mlflow) -> None:
    a, b = two_runs(mlflow)
    for _ in range(2):
        a.reconcile({0: ("COMPLETE", None)}, shared=True)
        assert a.close()
    train(b, range(3, 4))  # it takes its own run for the trial's
    assert b.close()
    run = found(mlflow, "trial 0", "COMPLETE")
    assert {"hpo.attempt": "1", "hpo.retry_of": "7"}.items() <= run.data.tags.items()
    assert run.data.metrics["seconds"] == 2.0
    assert not mlflow.refused()


def test_whoever_finds_two_makes_them_one(mlflow: Mlflow) -> None:
    two_runs(mlflow)
    c = worker(mlflow, "c")
    train(c, range(3, 4))
    c.mark_best(0)
    assert c.close()
    found(mlflow, "trial 0 (best)", "COMPLETE")


class _Dies:
    """A client that is killed when it is to read what a deleted run holds."""

    def __init__(self, client: Any) -> None:
        self._client = client

    def __getattr__(self, name: str) -> Any:
        if name == "get_metric_history":
            raise KeyboardInterrupt
        return getattr(self._client, name)


def test_a_process_that_is_killed_while_it_makes_two_runs_one_loses_nothing(mlflow: Mlflow) -> None:
    a, b = two_runs(mlflow)
    with quietly():
        runs = all_runs(mlflow.client, mlflow.experiment.experiment_id, "tags.`hpo.trial` = '0'")
        with pytest.raises(KeyboardInterrupt):
            made_one(_Dies(mlflow.client), runs)
    train(b, range(3, 4))
    assert b.close()
    a.reconcile({0: ("COMPLETE", None)}, shared=True)
    assert a.close()
    found(mlflow, "trial 0", "COMPLETE")


def test_two_machines_that_make_a_run_in_the_same_moment(
    request: pytest.FixtureRequest, no_warning: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server has no lock: each looks once more after it has made a run, and both keep the same one."""
    mlflow = in_store("http", request, tmp_path)
    a, b = worker(mlflow, "a"), worker(mlflow, "b")
    make: Callable[..., str] = Runs._make

    def together(runs: Runs, trial: int | None, item: dict[str, Any]) -> str:
        if trial == 0 and runs is a._runs.runs:  # type: ignore[attr-defined]
            assert b.close()  # it has found no run either, makes one, and writes to it
        return make(runs, trial, item)

    assert a.close()
    assert b.close()
    monkeypatch.setattr(Runs, "_make", together)
    a.start_trial(0, {"lr": 0.1, "n": 3}, is_new=True)
    train(a, range(2))
    a.pause_trial(0)
    b.resume_trial(0)
    train(b, range(2, 4))
    assert a.close()
    mlflow.runs()
    b.end_trial(0, "COMPLETE")
    assert b.close()
    found(mlflow, "trial 0", "COMPLETE")


@by_default_in_sqlite
def test_a_name_that_an_older_version_left_wrong_is_put_right(mlflow: Mlflow) -> None:
    a = worker(mlflow, "a")
    a.start_trial(0, {"lr": 0.1, "n": 3}, is_new=True)
    train(a, range(4))
    a.pause_trial(0)
    a.end_trial(0, "COMPLETE")
    assert a.close()
    with quietly():
        mlflow.client.set_tag(mlflow.runs()["0"].info.run_id, "mlflow.runName", "trial 0 (paused)")
    a.reconcile({0: ("COMPLETE", None)}, shared=True)
    assert a.close()
    found(mlflow, "trial 0", "COMPLETE")


@by_default_in_sqlite
def test_trials_that_no_peer_can_have_touched_are_not_looked_for(
    mlflow: Mlflow, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What one process begins and ends takes the calls that it takes without peers."""
    calls: list[str] = []

    def counted(name: str, of: type = MlflowClient) -> None:
        plain = getattr(of, name)

        def call(*args: Any, **keys: Any) -> Any:
            calls.append(name)
            return plain(*args, **keys)

        monkeypatch.setattr(of, name, call)

    a = worker(mlflow, "a", lease=30.0)
    for name in ("search_runs", "get_run", "create_run", "log_batch", "set_terminated", "update_run", "set_tag"):
        counted(name)
    counted("create", Tables)
    for trial in range(3):
        a.start_trial(trial, {"lr": trial}, is_new=True)
        a.log_metrics(trial, 0, {"loss": 1.0})
        a.end_trial(trial, ["COMPLETE", "PRUNED", "FAIL"][trial])
    assert a.close()
    client = ["create_run", "log_batch", "set_terminated"] * 3
    expected = ["create"] * 3 if mlflow.uri.startswith("sqlite") else client
    assert calls[-len(expected) :] == expected
    assert calls.count("log_batch") <= 1 + 3 * (expected is client)
    assert calls.count("search_runs") == 1, "for the study's run"
    assert "get_run" not in calls
