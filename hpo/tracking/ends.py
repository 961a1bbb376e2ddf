"""The ends of trials' runs, which arrive from several processes: what a trial has come to is not undone.

A process may send late that it has paused a trial which a peer has resumed and ended since.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hpo.tracking.base import STATUS
from hpo.tracking.items import Item
from hpo.tracking.single import OVER, made_one
from hpo.tracking.values import RUN_NAME, end_tags, run_name


def may_be_late(item: Item) -> bool:
    """Whether `item` says of a trial's run what a peer may have overtaken, so that the run is to be looked at first."""
    if item["trial"] is None or item.get("is_new") or item.get("status") is None:
        return False
    state = item.get("tags", {}).get("hpo.state")
    return item["do"] != "end" or state == "INTERRUPTED" or (state == "COMPLETE" and RUN_NAME in item["tags"])


def in_time(item: Item, run: Any) -> Item:
    """Return what of `item` is to be written to its run as that is now: of one that has ended, no other state."""
    tags, trial = dict(item.get("tags", {})), item["trial"]
    if tags.get("hpo.state") == "COMPLETE":
        if run.data.tags.get("hpo.best") == "true":
            tags[RUN_NAME] = run_name(trial, "best")
        return item | {"tags": tags}
    if run.info.status not in OVER:
        return item
    state = ("hpo.state", "hpo.error", RUN_NAME)
    return item | {"do": "start", "status": None, "tags": {key: x for key, x in tags.items() if key not in state}}


def reconcile(
    client: Any,
    runs: Sequence[Any],
    ends: Mapping[str, tuple[str, str | None]],
    when: int,
    tag: Callable[[str, Mapping[str, str]], None],
) -> None:
    """Give the trials of these runs one run each, and those that have ended their `ends`, as `Tracker.reconcile`.

    `when` is the end of those that have none, in ms; `tag` writes tags to a run.
    """
    of_trial: dict[str, list[Any]] = {}
    for run in runs:
        of_trial.setdefault(run.data.tags.get("hpo.trial", ""), []).append(run)
    for mark, several in of_trial.items():
        if not mark.isdecimal():
            continue
        run = made_one(client, several) if len(several) > 1 else several[0]
        state, error = ends.get(mark, (None, None))
        if state is None or run.info.lifecycle_stage != "active" or _is_right(run, int(mark), state):
            continue
        name = {RUN_NAME: run_name(int(mark), "best" if run.data.tags.get("hpo.best") == "true" else "")}
        tag(run.info.run_id, name | end_tags(int(mark), state, error))
        client.set_terminated(run.info.run_id, STATUS[state], end_time=run.info.end_time or when)


def _is_right(run: Any, trial: int, state: str) -> bool:
    is_paused = run.data.tags.get(RUN_NAME) == run_name(trial, "paused")
    return (run.info.status, run.data.tags.get("hpo.state")) == (STATUS[state], state) and not is_paused
