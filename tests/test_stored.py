"""A study that an earlier version began, and that was interrupted in its third trial, is resumed by this one.

`tests/stored/<commit>/` holds what that commit left behind: the study file, its objective, SQLite's dump of the
storage, and the checkpoint of the interrupted trial. Nothing in them may be edited to make a test pass.
"""

import json
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import optuna
import pytest

from tests.conftest import ROOT, run_hpo
from tests.databases import closed_in_time

STORED = sorted((ROOT / "tests" / "stored").iterdir())
FROM_SCRATCH = ("ff12883",)
"""Whose checkpoints did not yet say which study they are of: they are not trusted, the trial restarts from scratch."""
UNDISTURBED = {
    0: -0.13910722732543945,
    1: 0.7966746091842651,
    2: 0.9930147528648376,
    3: -0.2423006296157837,
}
"""The values of the four trials in a run that was not interrupted (trial 3 is that of the fourth place)."""


@pytest.fixture(params=STORED, ids=lambda folder: folder.name)
def begun(request, tmp_path: Path, monkeypatch) -> Path:
    for name in ("study.yaml", "linear.py"):
        shutil.copy(request.param / name, tmp_path)
    shutil.copytree(request.param / "checkpoints", tmp_path / "mlruns" / "checkpoints")
    with closing(sqlite3.connect(tmp_path / "optuna.db")) as database:
        database.executescript((request.param / "optuna.sql").read_text())
    monkeypatch.chdir(tmp_path)
    return tmp_path / "study.yaml"


def test_a_study_of_an_earlier_version_is_resumed(begun: Path, request: pytest.FixtureRequest) -> None:
    seen = run_hpo("status", begun)
    assert "2 of 4 trials done" in seen.stdout, seen.stderr
    done = run_hpo("run", begun, "--json")
    assert done.returncode == 0, done.stderr
    assert "code has changed" not in done.stdout
    from_scratch = "place-2.pt is not resumed from: it is of other params or of another version" in done.stdout
    assert from_scratch == (request.node.callspec.params["begun"].name in FROM_SCRATCH), done.stdout
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["trials"] == {"complete": 4, "pruned": 0, "failed": 0, "running": 0, "paused": 0, "waiting": 0}
    url = f"sqlite:///{begun.parent}/optuna.db"
    trials = closed_in_time(optuna.load_study(study_name="stored", storage=url)).trials
    complete = {trial.user_attrs["place"]: trial for trial in trials if trial.state.name == "COMPLETE"}
    assert {place: trial.value for place, trial in complete.items()} == UNDISTURBED
    retried = complete[2]
    assert retried.user_attrs["retry_of"] == 2
    assert len(retried.intermediate_values) == 8
    curves = retried.user_attrs["curves"]  # also of the epochs before the checkpoint, which that commit wrote
    assert curves["valid_r2"] == list(retried.intermediate_values.values())
    assert [len(values) for values in curves.values()] == [8] * 3
    assert (begun.parent / "mlruns" / "bundles" / "stored" / "model.pt").is_file()
