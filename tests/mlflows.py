"""What the tests of tracking share: MLflow as it is looked at from outside, over SQLite and over HTTP."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hpo.mlflow_tracker import MlflowTracker


def no_warning(text: str) -> None:
    raise AssertionError(text)


@contextmanager
def quietly() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def new_database(folder: Path) -> Path:
    """Return a database that MLflow has made its tables in, to be copied: that takes seconds."""
    tracker = MlflowTracker(f"sqlite:///{folder}/mlflow.db", "other", folder / "unsent", no_warning)
    tracker.start_study({}, {})
    assert tracker.end_study("COMPLETE")
    return folder / "mlflow.db"


class Mlflow:
    """One study in a tracking store: trackers that write to it, and what a person finds there."""

    def __init__(self, uri: str, study: str, outbox: Path) -> None:
        self.uri, self.study, self.outbox = uri, study, outbox

    def tracker(self, warn: Callable[[str], None] = no_warning, cls: type[MlflowTracker] = MlflowTracker) -> Any:
        return cls(self.uri, self.study, self.outbox, warn)

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

    def unsent(self) -> list[Path]:
        """Return the files in the outbox but those of what was refused."""
        return [p for p in self.outbox.rglob("*") if p.is_file() and p.name != "refused.jsonl"]

    def refused(self) -> str:
        return "".join(file.read_text() for file in self.outbox.rglob("refused.jsonl"))
