"""The one run that a trial has: where processes have made several, the first is kept, with what the others hold.

Whoever trains a trial may be the first to write to its run, and MLflow takes two runs of the same tags. Which one is
kept is the same to all who look. The others are deleted before they are read, so that whoever still writes to one of
them is refused, looks again, and finds the one that is kept.
"""

from collections.abc import Sequence
from typing import Any

from hpo.tracking.calls import log_all
from hpo.tracking.values import MAX_TAG, RUN_NAME

MERGED = "hpo.merged"
"""The tag of a run that has what other runs of its trial held: their ids."""
OVER = ("FINISHED", "FAILED", "KILLED")
"""MLflow's statuses of a run that has ended."""
_OF_THE_END = ("hpo.state", "hpo.error", RUN_NAME)


def in_order(runs: Sequence[Any]) -> list[Any]:
    """Return the runs of one trial, the one that counts first: active before deleted, then by their beginnings."""
    return sorted(runs, key=lambda run: (run.info.lifecycle_stage, run.info.start_time, run.info.run_id))


def made_one(client: Any, runs: Sequence[Any]) -> Any:
    """Return the one of a trial's `runs` that counts, once it has all that they hold; doing so twice does no harm."""
    first, *others = in_order(runs)
    done = str(first.data.tags.get(MERGED, "")).split()
    for other in others:
        if other.info.run_id not in done and first.info.lifecycle_stage == "active":
            done.append(other.info.run_id)
            first = _merge(client, first.info.run_id, other, " ".join(done))
    return first


def _merge(client: Any, kept: str, other: Any, done: str) -> Any:
    """Have a run hold what another one does, which is deleted; return it then. `done` are the ids of all such."""
    from mlflow.entities import Param, RunTag

    there = other.info.run_id
    if other.info.lifecycle_stage == "active":
        client.delete_run(there)
    run, other = client.get_run(kept), client.get_run(there)
    ends = other.info.status in OVER and run.info.status not in OVER
    missing = other.data.tags.items() - run.data.tags.items()
    tags = {key: x for key, x in missing if key not in run.data.tags or (ends and key in _OF_THE_END)}
    log_all(
        client,
        kept,
        metrics=[row for key in other.data.metrics for row in client.get_metric_history(there, key)],
        params=[Param(key, x) for key, x in other.data.params.items() if key not in run.data.params],
        tags=[RunTag(key, x) for key, x in tags.items() if key != MERGED],
    )
    if ends:
        client.set_terminated(kept, other.info.status, end_time=other.info.end_time)
    client.set_tag(kept, MERGED, done[-MAX_TAG:])
    return client.get_run(kept)
