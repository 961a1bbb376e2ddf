"""Whatever a person looks at says the same of every trial: Optuna, MLflow, `hpo status`, the report, Python."""

import json
from collections.abc import Callable
from pathlib import Path

import optuna
import pytest

import hpo
from tests.cli import invoke, summary
from tests.conftest import interrupt_after
from tests.mlflows import in_store

STUDY = """
trials: 14
epochs: 6
stack: 1
sampler: random
pruner: {name: median, n_startup_trials: 2, n_warmup_steps: 1}
start_with: [{kind: good, learning_rate: 0.09}, {kind: nan}, {kind: good, learning_rate: 0.001}]
params:
  learning_rate: {type: float, low: 1.0e-3, high: 1.0e-1, log: true}
  kind: {type: categorical, choices: [good, nan]}
"""


@pytest.mark.parametrize("kind", ["sqlite", pytest.param("http", marks=pytest.mark.slow)])
def test_all_say_the_same_of_every_trial(
    kind: str, study: Callable[..., Path], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    mlflow = in_store(kind, request, tmp_path)
    path = study(f"{STUDY}name: {mlflow.study}\ntracking: {mlflow.uri}\n")
    interrupt_after("trial 1 failed", path)  # trial 2 is in training for a second and more
    done = summary(invoke("run", path, "--json"))
    status = summary(invoke("status", path, "--json"))
    invoke("report", path, "--no-baselines", "--out", "report.json")
    report = json.loads(Path("report.json").read_text())
    table = hpo.open_study(path).trials
    stored = {trial.number: trial for trial in hpo.open_study(path).to_optuna().get_trials()}
    runs = mlflow.runs()

    held = set(table.index)
    states = {number: trial.state.name for number, trial in stored.items() if number in held}
    assert {"COMPLETE", "PRUNED", "FAIL"} == set(states.values()), "the study is not what this test is of"
    assert table["retry_of"].notna().any()
    assert dict(table["state"]) == states == {row["number"]: row["state"] for row in report["trials"]}
    names = {"complete": "COMPLETE", "pruned": "PRUNED", "failed": "FAIL"}
    counts = {name: list(states.values()).count(state) for name, state in names.items()}
    assert {name: status["trials"][name] for name in names} == counts == {n: report["counts"][n] for n in names}
    assert runs.keys() == {"study", *map(str, stored)} - {str(n) for n, t in stored.items() if _withdrawn(t)}

    for row in report["trials"]:
        number, trial, run = row["number"], stored[row["number"]], runs[str(row["number"])]
        epochs = len(trial.intermediate_values)
        assert run.data.tags["hpo.state"] == trial.state.name
        assert row["epochs"] == table["epochs"][number] == epochs
        if epochs:
            curve = mlflow.curve(str(number), "valid_r2")
            assert curve == [
                (step, pytest.approx(x, abs=1e-12)) for step, x in sorted(trial.intermediate_values.items())
            ]
        if trial.state == optuna.trial.TrialState.COMPLETE:
            assert row["value"] == table["value"][number] == trial.value
        for name, value in trial.params.items():
            assert row[f"params_{name}"] == table[f"params_{name}"][number] == value
            assert run.data.params[name] == str(value)

    best = done["best"]
    assert report["best"]["number"] == status["best"]["number"] == best["number"] == hpo.open_study(path).best.number
    assert runs["study"].data.params["best.trial"] == str(best["number"])
    assert mlflow.curve("study", "best_valid_r2")[-1][1] == pytest.approx(best["value"], abs=1e-12)
    for number, trial in stored.items():
        if number not in held and not _withdrawn(trial):
            assert runs[str(number)].data.tags["hpo.state"] == "INTERRUPTED"


def _withdrawn(trial: optuna.trial.FrozenTrial) -> bool:
    return bool(trial.user_attrs.get("withdrawn"))
