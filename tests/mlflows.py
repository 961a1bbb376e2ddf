"""What the tests of tracking share: MLflow as it is looked at from outside, over SQLite and over HTTP."""

import logging
import math
import shutil
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from hpo.tracking.base import Tracker
from hpo.tracking.items import Answer, Item
from hpo.tracking.mlflow import MlflowTracker
from hpo.tracking.process import RunsProcess
from hpo.tracking.runs import Runs
from hpo.tracking.sender import quiet
from tests.logged import recorded


@pytest.fixture
def no_warning(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test in which a warning is logged, unless it looks itself at what is `said`."""
    with recorded(logging.WARNING) as warned:
        yield
    assert "said" in request.fixturenames or not warned, warned


@pytest.fixture
def through_client(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have all that is written go through MLflow's client, as it does to a server."""
    monkeypatch.setattr("hpo.tracking.tables._is_known", lambda sql: False)


def until(what: Callable[[], Any]) -> None:
    """Wait until `what` returns something true."""
    end = time.monotonic() + 60
    while not what():
        assert time.monotonic() < end
        time.sleep(0.05)


@contextmanager
def quietly() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


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


class RunsHere(RunsProcess):
    """Runs in this process, for tests that put something in MLflow's place."""

    def __init__(self, uri: str, study: str, **about: Any) -> None:
        super().__init__(uri, study, **about)
        self.runs = Runs(uri, study, **about)

    def attempt(self, item: Item) -> Answer:
        return self.runs.attempt(item)


class TrackerHere(MlflowTracker):
    """Sends from this process. Where it cannot, it is tried again at once, and not waited for long."""

    RETRY_SECONDS = 0.0
    CLOSE_SECONDS = 2.0
    ANSWER_SECONDS = 30.0

    def _open_runs(self, uri: str, study: str, **about: Any) -> RunsHere:
        return RunsHere(uri, study, **about)


class Mlflow:
    """One study in a tracking store: trackers that write to it, and what a person finds there."""

    def __init__(self, uri: str, study: str, outbox: Path) -> None:
        self.uri, self.study, self.outbox = uri, study, outbox

    def tracker(self, cls: type[MlflowTracker] | None = None) -> MlflowTracker:
        return (cls or TrackerHere)(self.uri, self.study, self.outbox)

    @property
    def client(self) -> Any:
        from mlflow import MlflowClient

        return MlflowClient(self.uri)

    @property
    def experiment(self) -> Any:
        with quietly():
            return self.client.get_experiment_by_name(self.study)

    def runs(self) -> dict[str, Any]:
        """Return the runs that are not deleted, by their tag `hpo.trial` (`study`, or the trial's number)."""
        with quietly():
            found = self.client.search_runs([self.experiment.experiment_id], max_results=1000)
        runs = {run.data.tags["hpo.trial"]: run for run in found}
        assert len(runs) == len(found), "two runs of one trial"
        return runs

    def statuses(self) -> dict[str, str]:
        return {mark: run.info.status for mark, run in self.runs().items()}

    def curve(self, mark: str, key: str) -> list[tuple[int, float]]:
        with quietly():
            history = self.client.get_metric_history(self.runs()[mark].info.run_id, key)
        return sorted((metric.step, metric.value) for metric in history)

    def files(self, mark: str, folder: str | None = None) -> list[str]:
        with quietly():
            return sorted(file.path for file in self.client.list_artifacts(self.runs()[mark].info.run_id, folder))

    def text(self, mark: str, file: str) -> str:
        with quietly():
            return Path(self.client.download_artifacts(self.runs()[mark].info.run_id, file)).read_text()

    def unsent(self) -> list[Path]:
        """Return the files in the outbox but those of what was refused."""
        return [p for p in self.outbox.rglob("*") if p.is_file() and p.name != "refused.jsonl"]

    def refused(self) -> str:
        return "".join(file.read_text() for file in self.outbox.rglob("refused.jsonl"))


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a database that MLflow has made its tables in, to be copied: that takes seconds."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    with quiet(), quietly():
        MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture(scope="session")
def tracking_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Give the address of an `mlflow server` that all tests share, each with a study of its own name."""
    from tests.servers import MlflowServer

    server = MlflowServer(tmp_path_factory.mktemp("mlflow") / "server")
    yield server.address
    server.stop()


def in_store(kind: str, request: pytest.FixtureRequest, folder: Path) -> Mlflow:
    """Return a study of its own in a tracking store, `sqlite` or `http`, with its outbox in `folder`."""
    study = f"s{uuid.uuid4().hex[:8]}"
    if kind == "http":
        return Mlflow(request.getfixturevalue("tracking_server"), study, folder / "unsent")
    (folder / "mlruns").mkdir()
    shutil.copy(request.getfixturevalue("empty_database"), folder / "mlruns/mlflow.db")
    return Mlflow(f"sqlite:///{folder}/mlruns/mlflow.db", study, folder / "unsent")


by_default_in_sqlite = pytest.mark.parametrize(
    "mlflow", ["sqlite", pytest.param("http", marks=pytest.mark.slow)], indirect=True
)
"""For what the other tests of a file, or of the contract, show to be the same over HTTP."""


@pytest.fixture(params=["sqlite", "http"])
def mlflow(request: pytest.FixtureRequest, no_warning: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Mlflow:
    monkeypatch.chdir(tmp_path)
    return in_store(request.param, request, tmp_path)
