"""Calls that MLflow takes in parts only."""

from typing import Any

from hpo.tracking.tables import Change

_MOST = {"metrics": 800, "params": 100, "tags": 100}
"""What MLflow takes in a call."""


def all_runs(client: Any, experiment: str, query: str) -> list[Any]:
    """Return the runs of a query, those that are deleted too."""
    from mlflow.entities import ViewType

    found: list[Any] = []
    token = None
    while token is None or token:
        page = client.search_runs([experiment], query, ViewType.ALL, 1000, page_token=token)
        found += page
        token = page.token or ""
    return found


def log_all(client: Any, run: str, **what: list[Any]) -> None:
    """Log `metrics`, `params` and `tags`, as MLflow's entities, in as many calls as it needs."""
    while any(what.values()):
        client.log_batch(run, **{kind: things[: _MOST[kind]] for kind, things in what.items()})
        what = {kind: things[_MOST[kind] :] for kind, things in what.items()}


def write(client: Any, run: str, change: Change) -> None:
    """Write to a run, in as few calls as MLflow takes: first what it holds, then how it stands."""
    from mlflow.entities import Metric, Param, RunTag

    log_all(
        client,
        run,
        metrics=[Metric(*row) for row in change.metrics],
        params=[Param(key, text) for key, text in change.params.items()],
        tags=[RunTag(key, text) for key, text in change.tags.items()],
    )
    if change.end is not None:
        client.set_terminated(run, change.status, end_time=change.end)
    elif change.status is not None:
        client.update_run(run, status=change.status)
