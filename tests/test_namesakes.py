"""Studies of one name in two storages, on one tracking server: each finds the runs of its own making only."""

from pathlib import Path
from typing import Any

import pytest

from hpo.tracking.mlflow import MlflowTracker
from tests.cli import invoke, summary
from tests.mlflows import Mlflow, TrackerHere, by_default_in_sqlite, quietly


def tracker(mlflow: Mlflow, making: str, adopts: bool = False) -> MlflowTracker:
    return TrackerHere(mlflow.uri, mlflow.study, mlflow.outbox, making=making, adopts=adopts)


def runs(mlflow: Mlflow) -> list[tuple[str, str, str]]:
    """Return (making, trial, status) of each run."""
    with quietly():
        found = mlflow.client.search_runs([mlflow.experiment.experiment_id], max_results=1000)
    return sorted((run.data.tags.get("hpo.making", ""), run.data.tags["hpo.trial"], run.info.status) for run in found)


def told(opened: MlflowTracker, lr: float) -> None:
    opened.start_study({}, {})
    opened.start_trial(0, {"lr": lr})
    opened.log_metrics(0, 0, {"a": lr})
    opened.end_trial(0, "COMPLETE")
    assert opened.end_study("COMPLETE")


@by_default_in_sqlite
def test_each_has_runs_of_its_own(mlflow: Mlflow) -> None:
    for making, lr in (("a1", 0.1), ("b2", 0.2), ("a1", 0.1)):
        told(tracker(mlflow, making), lr)
    assert runs(mlflow) == [(making, trial, "FINISHED") for making in ("a1", "b2") for trial in ("0", "study")]
    with quietly():
        found = mlflow.client.search_runs([mlflow.experiment.experiment_id], "tags.`hpo.trial` = '0'")
        parents = {run.data.tags["hpo.making"]: run.data.tags["mlflow.parentRunId"] for run in found}
        assert {run.data.tags["hpo.making"]: run.data.params["lr"] for run in found} == {"a1": "0.1", "b2": "0.2"}
        for making, parent in parents.items():
            assert mlflow.client.get_run(parent).data.tags["hpo.making"] == making


@by_default_in_sqlite
def test_reconcile_ends_no_run_of_a_namesake(mlflow: Mlflow) -> None:
    for making in ("a1", "b2"):
        opened = tracker(mlflow, making)
        opened.start_study({}, {})
        opened.start_trial(0, {})
        assert opened.close()
    opened = tracker(mlflow, "a1")
    opened.reconcile({0: ("FAIL", "died")})
    assert opened.close()
    assert [(making, status) for making, trial, status in runs(mlflow) if trial == "0"] == [
        ("a1", "FAILED"),
        ("b2", "RUNNING"),
    ]


def before(mlflow: Mlflow) -> None:
    """Leave the runs of a study that an older version was killed in: without a making."""
    opened = mlflow.tracker()
    opened.start_study({}, {})
    for trial in range(2):
        opened.start_trial(trial, {"lr": 0.1})
    opened.end_trial(0, "COMPLETE")
    assert opened.close()


@by_default_in_sqlite
def test_what_an_older_version_made_is_found_marked_and_reconciled(mlflow: Mlflow) -> None:
    before(mlflow)
    opened = tracker(mlflow, "a1", adopts=True)
    opened.reconcile({1: ("PRUNED", None)})
    opened.start_trial(1, {"lr": 0.1})
    assert opened.end_study("COMPLETE")
    assert runs(mlflow) == [("", "0", "FINISHED"), ("a1", "1", "FINISHED"), ("a1", "study", "FINISHED")]
    again = tracker(mlflow, "b2", adopts=True)  # the namesake finds no study's run left to adopt, so no trial's
    told(again, 0.2)
    assert [each for each in runs(mlflow) if each[0] == "b2"] == [("b2", "0", "FINISHED"), ("b2", "study", "FINISHED")]
    assert ("", "0", "FINISHED") in runs(mlflow)


@by_default_in_sqlite
def test_a_study_that_never_was_of_an_older_version_adopts_none(mlflow: Mlflow) -> None:
    before(mlflow)
    told(tracker(mlflow, "a1"), 0.2)
    opened = tracker(mlflow, "a1")
    opened.reconcile({1: ("FAIL", "died")})
    assert opened.close()
    assert runs(mlflow) == [
        ("", "0", "FINISHED"),
        ("", "1", "RUNNING"),
        ("", "study", "RUNNING"),
        ("a1", "0", "FINISHED"),
        ("a1", "study", "FINISHED"),
    ]


@pytest.mark.parametrize("mlflow", ["sqlite"], indirect=True)
def test_two_storages_in_one_folder_end_to_end(mlflow: Mlflow, study: Any, said: list[str]) -> None:
    path = study(f"name: {mlflow.study}\ntracking: {mlflow.uri}\ntrials: 2\n")
    for storage in ("one", "two", "one"):
        done = summary(invoke("run", path, "--json", "--storage", f"sqlite:///mlruns/{storage}.db"))
        assert done["trials"]["complete"] == 2
    found = runs(mlflow)
    makings = {making for making, _, _ in found}
    assert len(makings) == 2
    assert "" not in makings
    assert [(trial, status) for _, trial, status in found] == [(t, "FINISHED") for t in ("0", "1", "study")] * 2
    assert not list(Path("mlruns/unsent").glob("*"))
    assert not [text for text in said if text.startswith("tracking: ")]
