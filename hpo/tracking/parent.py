"""What is particular about a study's own run in MLflow: it is written to again whenever the study is run again.

MLflow keeps the first value of a param and every value of a metric, so that what is there already is left out.
"""

from collections.abc import Mapping, Sequence
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from hpo.tracking.values import RUN_NAME, digest_of, run_name, same

MetricRow = tuple[str, float, int, int]
"""(key, value, when in ms, step)"""


class Known:
    """What the study's run has of each metric, as far as this process has asked for it or written it."""

    def __init__(self) -> None:
        self._values: dict[str, dict[int, list[float]]] = {}

    def missing(self, client: Any, run: str, rows: Sequence[MetricRow]) -> list[MetricRow]:
        """Return those of `rows` that the run does not have."""
        for key in {key for key, *_ in rows} - self._values.keys():
            self._values[key] = {}
            for metric in client.get_metric_history(run, key):
                self._values[key].setdefault(metric.step, []).append(metric.value)
        return [row for row in rows if not any(same(x, row[1]) for x in self._values[row[0]].get(row[3], ()))]

    def add(self, rows: Sequence[MetricRow]) -> None:
        """Note that the run has `rows` now."""
        for key, value, _, step in rows:
            self._values[key].setdefault(step, []).append(value)

    def forget(self) -> None:
        """Ask again next time: it is not known what has arrived."""
        self._values.clear()


def installed() -> str:
    """Return what is installed beside hpo, a line each, as pip takes it."""
    several = (each.metadata for each in distributions())  # which is parsed again whenever it is asked for
    there = {(each["Name"] or "", each["Version"]) for each in several}
    return "".join(f"{name}=={version}\n" for name, version in sorted(there) if name)


def log_data(client: Any, run: str, data: Mapping[str, str]) -> None:
    """Log the study's data as a dataset of its run; MLflow keeps one of the same name and digest once."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    dataset = Dataset(
        name=data["name"],
        digest=data["digest"],
        source_type="hpo",
        source=data["source"],
        schema=data.get("schema"),
        profile=data.get("profile"),
    )
    context = InputTag("mlflow.data.context", "training")
    client.log_inputs(run, [DatasetInput(dataset, [context])])


def log_folder(client: Any, run: str, folder: Path, name: str) -> None:
    """Send the files of a folder, unless they are there: a tag with their digest is set once all are."""
    if not folder.is_dir():
        return
    mark, digest = f"hpo.files.{name}", digest_of(folder)
    there = len(client.list_artifacts(run, name))
    if there and client.get_run(run).data.tags.get(mark) == digest:
        return
    client.log_artifacts(run, str(folder), name)
    client.set_tag(run, mark, digest)


def system_monitor(run: str, uri: str) -> Any:
    """Return what logs the machine's load to a run, where MLflow's own variable asks for it; else None."""
    from mlflow import environment_variables

    asked: Any = environment_variables.MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING
    if not asked.get():
        return None
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    monitor: Any = SystemMetricsMonitor(run, resume_logging=True, tracking_uri=uri)  # type: ignore[no-untyped-call]
    monitor.start()
    return monitor


def mark_best(client: Any, run: str, trial: int, marked: Sequence[Any]) -> None:
    """Mark the run of the best trial; those that are `marked` are not the best any more."""
    for other in marked:
        if other.info.run_id != run:
            client.set_tag(other.info.run_id, "hpo.best", "false")
            client.set_tag(other.info.run_id, RUN_NAME, run_name(int(other.data.tags["hpo.trial"])))
    client.set_tag(run, "hpo.best", "true")
    client.set_tag(run, RUN_NAME, run_name(trial, "best"))
