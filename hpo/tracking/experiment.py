"""A study's experiment in MLflow: found, made or restored."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple
from urllib.parse import unquote

from filelock import FileLock

from hpo.garbage import uncollected
from hpo.log import log
from hpo.tracking.database import fail_soon, make_database, require_opened
from hpo.tracking.moved import set_places
from hpo.tracking.values import sqlite_address, sqlite_path

_KIND = {"mlflow.experimentKind": "custom_model_development"}
"""By this tag of the experiment MLflow's page opens on its runs, not on traces."""


class Experiment(NamedTuple):
    """An experiment that is there, and the client that has found it."""

    client: Any
    address: str
    id: str
    is_first: bool
    """Whether this process has made it, so that the study's run is its to make, not its peers'."""


def alone(uri: str) -> AbstractContextManager[Any]:
    """Give what no two processes have at once where the runs are in an SQLite file; elsewhere there is no such lock."""
    path = sqlite_path(uri)
    return nullcontext() if path is None else FileLock(f"{path}.lock", timeout=120)


def open_experiment(uri: str, study: str) -> Experiment:
    """Find the study's experiment, or make it; one that was deleted is restored. Raises what MLflow raises."""
    with uncollected():  # none of all that it makes is garbage
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

    path = sqlite_path(uri)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
    is_first = False
    with alone(uri):  # MLflow makes its schema when first asked; processes that do so together crash all but one
        if path is not None:
            if not path.exists():
                make_database(path.resolve())  # a link may be there already, to where it is to be
            require_opened(path)
            set_places(path)
        if path is None and "://" in uri and not uri.startswith("http"):
            fail_soon()
        # absolute: MLflow keeps one store per address, also when the process changes its folder
        address = uri if path is None else sqlite_address(path.resolve())
        with uncollected():  # imports as much again
            client = MlflowClient(address)
        experiment = client.get_experiment_by_name(study)
        if experiment is None:
            where = None if path is None else (path.parent.resolve() / "artifacts" / study).as_uri()
            try:
                client.create_experiment(study, artifact_location=where, tags=_KIND)
                is_first = True
                if where is not None and unquote(unquote(where)) != unquote(where):
                    log.info(
                        f"tracking: MLflow reads the % in {unquote(where)} as an escape when it loads a registered "
                        "model, and does not find it; the bundle is not affected; give the folder a name without %"
                    )
            except MlflowException:
                if client.get_experiment_by_name(study) is None:
                    raise  # it is not that another machine's worker has made it just now
            experiment = client.get_experiment_by_name(study)
        if experiment is None:
            raise MlflowException(f"the experiment {study!r} was made, but is not there")
        if experiment.lifecycle_stage == "deleted":
            client.restore_experiment(experiment.experiment_id)
            log.warning(f"tracking: the experiment {study!r} was deleted, but is still written to: it is restored")
        for key, value in _KIND.items() - experiment.tags.items():  # an older version made it
            client.set_experiment_tag(experiment.experiment_id, key, value)
    return Experiment(client, address, str(experiment.experiment_id), is_first)
