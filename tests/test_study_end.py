"""`hpo run` killed with -9 at each moment of a study's end: the next `run`, or `repair`, tells MLflow all of it."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests import warm
from tests.cli import invoke, summary
from tests.conftest import run_hpo
from tests.mlflows import Mlflow, in_store
from tests.servers import MlflowServer

KILLED = """
import os, signal, sys
from pathlib import Path
from mlflow import MlflowClient
from hpo.runner import refit as selection
from hpo.cli.app import main
from hpo.tracking.mlflow import MlflowTracker
from hpo.tracking.runs import Runs
from hpo.search.search import Search

def die(*args, **keys):
    os.kill(os.getpid(), signal.SIGKILL)

def before(owner, name, what=die):
    plain = getattr(owner, name)
    def first(*args, **keys):
        what(*args, **keys)
        return plain(*args, **keys)
    setattr(owner, name, first)

def remembered(key, state=None):
    plain = Search.remember
    def remember(self, name, value):
        if name != key or (state and value["state"] != state):
            return plain(self, name, value)
        if state is None:
            plain(self, name, value)
        die()
    Search.remember = remember

class Here(Runs):  # the process that sends, as a part of this one
    def close(self):
        pass

def open_here(tracker, uri, study, **about):
    return Here(uri, study, **about)

def amid_the_files():
    MlflowTracker._open_runs = open_here
    before(MlflowClient, "log_artifacts", part_of)

def part_of(client, run, folder, name):
    client.log_artifact(run, sorted(map(str, Path(folder).iterdir()))[0], name)
    die()

def sent(tracker, state):
    assert tracker.close()
    die()

moments = {
    "before the refit": lambda: before(selection, "finish"),
    "result stored": lambda: remembered("hpo:result"),
    "told, not sent": lambda: before(MlflowTracker, "end_study"),
    "sent, not ended": lambda: before(MlflowTracker, "end_study", sent),
    "amid the files": amid_the_files,
    "ended, not noted": lambda: remembered("hpo:tracked", "COMPLETE"),
}
moments[sys.argv[1]]()
sys.argv = ["hpo", "run", *sys.argv[2:]]
main()
"""
QUICK = [
    ("before the refit", "run", "sqlite"),
    ("ended, not noted", "repair", "sqlite"),
    ("amid the files", "run", "http"),
]
SLOW = [
    ("told, not sent", "run", "sqlite"),
    ("result stored", "repair", "sqlite"),
    ("result stored", "run", "http"),
    ("told, not sent", "repair", "http"),
    ("sent, not ended", "run", "sqlite"),
    ("sent, not ended", "repair", "sqlite"),
    ("amid the files", "repair", "sqlite"),
    ("ended, not noted", "run", "sqlite"),
]
SHORT = "trials: 2\nepochs: 1\nstack: 1\npruner: none\n"


def kill_at(moment: str, *arguments: object) -> None:
    done = warm.run(KILLED, moment, *arguments)
    assert done.returncode == -9, done.stdout + done.stderr


@pytest.fixture
def tracked(
    request: pytest.FixtureRequest, study: Callable[..., Path], tmp_path: Path
) -> Callable[[str], tuple[Path, Mlflow]]:
    """Return a function that writes a short study that is tracked in `sqlite` or over `http`."""

    def write(kind: str) -> tuple[Path, Mlflow]:
        mlflow = in_store(kind, request, tmp_path)
        mlflow.outbox = tmp_path / "mlruns/unsent"
        return study(f"{SHORT}name: {mlflow.study}\ntracking: {mlflow.uri}\n"), mlflow

    return write


def told(mlflow: Mlflow) -> dict[str, object]:
    """Return what MLflow knows of the study's end."""
    run = mlflow.runs()["study"]
    return {
        "statuses": mlflow.statuses(),
        "state": run.data.tags.get("hpo.state"),
        "metrics": {key: x for key, x in run.data.metrics.items() if key != "seconds"},
        "points": {key: len(mlflow.curve("study", key)) for key in run.data.metrics},
        "best": run.data.params["best.trial"],
        "marked": [mark for mark, each in mlflow.runs().items() if each.data.tags.get("hpo.best") == "true"],
        "files": mlflow.files("study", "bundle"),
    }


def expected(done: dict) -> dict[str, object]:
    metrics = {f"test_{name}": value for name, value in done["test"].items()} | {"best_valid_r2": done["best"]["value"]}
    metrics |= {"trials_complete": 2, "trials_pruned": 0, "trials_failed": 0}
    metrics |= {"epochs_trained": 2, "epochs_without_pruning": 2}
    beside = done["baselines"]
    (cheap,) = [each for each in beside["models"] if each["name"] == beside["best"]]
    metrics |= {f"baseline_{name}": value for name, value in cheap["metrics"].items()}
    metrics |= {"baseline_seconds": cheap["seconds"]}
    metrics |= {f"default_{name}": value for name, value in (beside["default"]["metrics"] or {}).items()}
    return {
        "statuses": {"study": "FINISHED", "0": "FINISHED", "1": "FINISHED"},
        "state": "COMPLETE",
        "metrics": metrics,
        "points": dict.fromkeys([*metrics, "seconds"], 1) | {"best_valid_r2": 2},
        "best": str(done["best"]["number"]),
        "marked": [str(done["best"]["number"])],
        "files": [
            f"bundle/{name}" for name in ("MODEL.md", "bundle.json", "model.pt", "model.pt2", "model.torchscript.pt")
        ],
    }


@pytest.fixture(autouse=True)
def without_pt2() -> None:
    """Bundles here are whole."""


@pytest.mark.parametrize(
    ("moment", "cure", "kind"), [*QUICK, *(pytest.param(*each, marks=pytest.mark.slow) for each in SLOW)]
)
def test_whenever_it_is_killed_mlflow_is_told_the_studys_end(tracked, moment: str, cure: str, kind: str) -> None:
    path, mlflow = tracked(kind)
    kill_at(moment, path)
    if moment not in ("ended, not noted",):
        assert mlflow.experiment is None or mlflow.statuses().get("study") != "FINISHED"
    invoke(cure, path)
    cured = told(mlflow)
    assert cured == expected(summary(invoke("run", path, "--json")))
    assert not mlflow.unsent()
    invoke("repair", path)
    assert told(mlflow) == cured  # and told again, nothing is there twice


NO_MLFLOW = """
import sys
sys.modules["mlflow"] = None  # importing it fails
from hpo.cli.app import main
sys.argv = ["hpo", "run", sys.argv[1]]
main()
"""


@pytest.mark.parametrize("killed", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_finished_study_whose_end_has_arrived_does_not_ask_mlflow(tracked, killed: bool) -> None:
    path, mlflow = tracked("sqlite")
    if killed:
        kill_at("result stored", path)
        refused = warm.run(NO_MLFLOW, path)
        assert refused.returncode == 2
        assert "MLflow is not installed" in refused.stderr
    invoke("run", path)
    again = warm.run(NO_MLFLOW, path)
    assert again.returncode == 0, again.stderr
    assert f"{mlflow.study}: all 2 trials are done" in again.stdout


def test_a_study_that_is_not_tracked_asks_no_mlflow(study: Callable[..., Path]) -> None:
    path = study(SHORT)
    for _ in range(2):
        done = warm.run(NO_MLFLOW, path)
        assert done.returncode == 0, done.stderr
    assert not Path("mlruns/unsent").exists()


def test_more_trials_after_the_end_are_an_end_of_their_own(tracked) -> None:
    path, mlflow = tracked("sqlite")
    invoke("run", path)
    kill_at("sent, not ended", path, "--trials", "3")
    assert mlflow.statuses()["study"] == "RUNNING"
    invoke("run", path, "--trials", 3)
    assert mlflow.statuses() == {"study": "FINISHED", "0": "FINISHED", "1": "FINISHED", "2": "FINISHED"}


@pytest.mark.slow
def test_a_tracking_server_that_was_away_too_is_told_when_it_is_back(study, tmp_path: Path) -> None:
    server = MlflowServer(tmp_path / "server", starts=False)
    try:
        mlflow = Mlflow(server.address, "away", tmp_path / "mlruns/unsent")
        path = study(f"{SHORT}name: away\ntracking: {server.address}\n")
        kill_at("result stored", path)
        away = run_hpo("run", path)
        assert away.returncode == 0, away.stderr
        assert "does not work" in away.stdout
        assert mlflow.unsent()
        server.start()
        done = summary(invoke("run", path, "--json"))
        assert told(mlflow) == expected(done)
        assert not mlflow.unsent()
    finally:
        server.stop()
