"""What a person finds in MLflow of a study that was run: its own run, and the runs of its trials."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from hpo.tracking.parent import installed
from hpo.tracking.values import linked
from tests.cli import invoke, refused, summary
from tests.mlflows import Mlflow, in_store

SHORT = "trials: 3\nepochs: 2\nstack: 1\npruner: none\n"


by_default_in_sqlite = pytest.mark.parametrize(
    "tracked", ["sqlite", pytest.param("http", marks=pytest.mark.slow)], indirect=True
)


@pytest.fixture(params=["sqlite", "http"])
def tracked(request: pytest.FixtureRequest, study: Callable[..., Path], tmp_path: Path) -> tuple[Path, Mlflow]:
    """Return the file of a short study, and where it is tracked."""
    mlflow = in_store(request.param, request, tmp_path)
    return study(f"{SHORT}name: {mlflow.study}\ntracking: {mlflow.uri}\n"), mlflow


@by_default_in_sqlite
def test_the_studys_run_says_what_was_searched_and_what_was_found(tracked: tuple[Path, Mlflow]) -> None:
    path, mlflow = tracked
    done = summary(invoke("run", path, "--json"))
    best, runs = done["best"], mlflow.runs()
    run = runs["study"]
    params, tags = run.data.params, run.data.tags
    assert {"trials": "3", "epochs": "2", "metric": "r2", "direction": "maximize"}.items() <= params.items()
    assert params["best.trial"] == str(best["number"])
    searched = {name.removeprefix("space.") for name in params if name.startswith("space.")}
    assert searched
    for name in searched:
        assert float(params[f"best.{name}"]) == best["params"][name]
        assert f"fixed.{name}" not in params

    values = [float(runs[str(n)].data.metrics["valid_r2"]) for n in range(3)]
    assert mlflow.curve("study", "best_valid_r2")[-1] == (3, pytest.approx(best["value"], abs=1e-12))
    assert [x for _, x in mlflow.curve("study", "best_valid_r2")] == sorted(
        x for _, x in mlflow.curve("study", "best_valid_r2")
    )
    assert max(values) <= best["value"]
    assert run.data.metrics["trials_complete"] == 3
    assert run.data.metrics["seconds"] > 0
    assert {f"test_{name}": value for name, value in done["test"].items()}.items() <= run.data.metrics.items()

    assert tags["hpo.best_trial"] == str(best["number"])
    assert tags["hpo.bundle"] == done["bundle"]
    assert tags["mlflow.source.name"] == str(path)
    assert tags["mlflow.user"]
    note = tags["mlflow.note.content"]
    assert f"/runs/{runs[str(best['number'])].info.run_id})" in note
    assert "hpo:trial/" not in note
    (data,) = run.inputs.dataset_inputs
    assert data.dataset.digest == tags["hpo.data"]
    assert json.loads(data.dataset.profile)["num_rows"] > 0
    assert {"study.yaml", "requirements.txt", "linear.py"} <= set(mlflow.files("study"))
    assert "torch==" in mlflow.text("study", "requirements.txt")
    assert mlflow.experiment.tags["mlflow.experimentKind"] == "custom_model_development"

    for mark, each in runs.items():
        is_best = mark == str(best["number"])
        if mark != "study":
            assert each.info.run_name == f"trial {mark}" + (" (best)" if is_best else "")
            assert each.data.metrics["seconds"] > 0
            assert each.data.metrics["samples_per_second"] > 0
            assert each.data.metrics["memory_mib"] > 10
            assert each.data.tags["mlflow.parentRunId"] == run.info.run_id


@by_default_in_sqlite
def test_a_trial_that_is_exported_by_itself_is_tracked_too(tracked: tuple[Path, Mlflow]) -> None:
    path, mlflow = tracked
    best = summary(invoke("run", path, "--json"))["best"]["number"]
    other = next(n for n in range(3) if n != best)
    said = invoke("export", path, "--trial", other, "--json")
    exported = summary(said)
    assert (exported["best"]["number"], exported["exported"]["number"]) == (best, other)
    assert f"(trial {other}, " in next(line for line in said.splitlines() if line.startswith("exported "))
    assert mlflow.runs()[str(other)].data.metrics["test_r2"] == pytest.approx(exported["test"]["r2"])
    assert f"bundle-trial-{other}/bundle.json" in mlflow.files("study", f"bundle-trial-{other}")
    assert mlflow.statuses()["study"] == "FINISHED"


def test_a_learning_rate_that_changes_is_there_at_every_epoch(
    study: Callable[..., Path], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    mlflow = in_store("sqlite", request, tmp_path)
    path = study(
        f"name: {mlflow.study}\ntracking: {mlflow.uri}\ntrials: 1\nepochs: 4\nstack: 1\n"
        "params: {learning_rate: 0.1, schedule: step, schedule_step_size: 2, schedule_gamma: 0.5}\n"
    )
    invoke("run", path)
    assert mlflow.curve("0", "learning_rate") == [(0, 0.1), (1, 0.1), (2, 0.05), (3, 0.05)]


def test_mlflows_own_variable_has_the_machines_load_logged(
    study: Callable[..., Path], tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = in_store("sqlite", request, tmp_path)
    path = study(f"{SHORT}name: {mlflow.study}\ntracking: {mlflow.uri}\n")
    invoke("run", path)
    assert not [name for name in mlflow.runs()["study"].data.metrics if name.startswith("system/")]
    monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "true")
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.2")
    invoke("run", path, "--trials", "12")
    metrics = mlflow.runs()["study"].data.metrics
    assert 0 < metrics["system/system_memory_usage_percentage"] < 100


@by_default_in_sqlite
def test_the_report_is_kept_with_the_studys_run(tracked: tuple[Path, Mlflow]) -> None:
    path, mlflow = tracked
    invoke("run", path)
    out = invoke("report", path, "--log", "--no-baselines")
    assert "it is in `report` among the artifacts of the study's run" in out
    assert mlflow.files("study", "report") == ["report/report.html"]
    assert mlflow.text("study", "report/report.html").startswith("<!DOCTYPE html>")
    assert mlflow.statuses()["study"] == "FINISHED"
    assert "leave --out and --format out" in refused("report", path, "--log", "--out", "x.html")
    assert "the study is not tracked" in refused("report", path, "--log", "--tracking", "off")


def test_a_link_to_a_trial_without_a_run_is_plain_text() -> None:
    text = "by [trial 7](hpo:trial/7) and [trial 8](hpo:trial/8)"
    page = {7: "#/experiments/3/runs/abc"}.get
    assert linked(text, page) == "by [trial 7](#/experiments/3/runs/abc) and [trial 8]"


def test_what_is_installed_is_a_list_that_pip_reads() -> None:
    lines = installed().splitlines()
    assert any(line.startswith("torch==") for line in lines)
    assert all(re.fullmatch(r"[\w.-]+==\S+", line) for line in lines)


def test_trials_that_ended_without_tracking_or_elsewhere_are_said_to_have_no_run(
    study: Callable[..., Path], tmp_path: Path, said: list[str]
) -> None:
    path, here, there = study(SHORT), f"sqlite:///{tmp_path}/here.db", f"sqlite:///{tmp_path}/there.db"
    for trials, tracking in enumerate(("off", here, here, there), start=3):
        invoke("run", path, "--trials", str(trials), "--tracking", tracking)
    assert [
        line.removesuffix("; `hpo report` and `hpo status` have all") for line in said if "have no run" in line
    ] == [
        f"MLflow: 3 trials ended without tracking and have no run in {here}",
        f"MLflow: 5 trials ended with tracking {here} and have no run in {there}",
    ]
