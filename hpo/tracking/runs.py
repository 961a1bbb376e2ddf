"""The runs of one study in MLflow: found, made, written to and ended. MLflow is imported here only, and when needed.

One run a trial under one parent run for the study, all with the tags `hpo.study` and `hpo.trial`, and with
`hpo.making`, which tells a study from another one of its name (two storages may share a tracking server). COMPLETE and
PRUNED end as FINISHED, told apart by the run's name and the tag `hpo.state`; FAIL as FAILED with `hpo.error`; a trial
that a successor replaces is INTERRUPTED, which ends as KILLED. One that is paused is SCHEDULED.
"""

import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from hpo.log import log
from hpo.tracking.base import unlogged
from hpo.tracking.calls import all_runs, log_all, write
from hpo.tracking.ends import in_time, may_be_late, reconcile
from hpo.tracking.experiment import alone, open_experiment
from hpo.tracking.items import FILES, MERGED, Answer, Item
from hpo.tracking.models import log_model
from hpo.tracking.parent import Known, installed, log_data, log_folder, mark_best, system_monitor
from hpo.tracking.single import in_order, made_one
from hpo.tracking.tables import Change, NewRun, Tables
from hpo.tracking.values import (
    MAX_PARAM,
    MAX_TAG,
    NOTE,
    legal_name,
    linked,
    now_ms,
    plain,
    run_name,
    sqlite_path,
)

_REFUSED = ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS", "NOT_FOUND")
_UNCLEAR = ("BAD_REQUEST", "INTERNAL_ERROR")
"""What MLflow also says of a cut connection, a proxy's refusal, or a time-out: others must be taken meanwhile."""
_AWAY_STATUS = (401, 403, 404, 407, 408, 425, 429)
_TRIES = 3


class Runs:
    """MLflow through `MlflowClient` and run ids: the fluent API has one active run for the whole process."""

    PEER_SECONDS = 5.0
    """How long to wait for the study's run where a peer has made the experiment: two would make it twice."""

    def __init__(
        self, uri: str, study: str, *, making: str = "", adopts: bool = True, tags: Mapping[str, str] | None = None
    ) -> None:
        """`making`, `adopts` and `tags`: see `hpo.tracking.opening.open_tracker`."""
        self._uri, self._study = uri, study
        self._making, self._adopts, self._tags = making, adopts, dict(tags or {})
        self._client: Any = None
        self._tables: Tables | None = None
        self._address = uri
        self._experiment = ""
        self._is_first = False
        """Whether this process has made the experiment, so that the study's run is its to make, not its peers'."""
        self._ids: dict[int | None, str] = {}
        self._found: list[tuple[int | None, str]] = []
        """Those of them that no answer has named yet."""
        self._known = Known()
        self._monitor: Any = None
        self._renamed: set[str] = set()
        self._indigestible: set[str] = set()
        """What the server answers again and again to some items, while it takes others."""

    def connect(self) -> None:
        """Find the study's experiment, or make it; one that was deleted is restored."""
        if self._client is not None:
            return
        opened = open_experiment(self._uri, self._study)
        self._address, self._experiment = opened.address, opened.id
        self._is_first = self._is_first or opened.is_first
        path = sqlite_path(opened.address)
        self._tables = None if path is None else Tables(path)
        self._client = opened.client

    def attempt(self, item: Item) -> Answer:
        """Send `item`; sending the same one twice does no harm.

        When it is refused for the first time, experiment and runs are looked for again when they are next needed, since
        they may have been deleted.
        """
        refused = False
        try:
            self.connect()
            try:
                self._send(item)
            except Exception as error:
                refused = self._refuses(item, error)
                raise
        except Exception as error:  # whatever MLflow, its server or its database raise
            self._known.forget()
            if refused and not item.get("again"):
                self._client = None
                self._ids.clear()
            return Answer(False, cause(error), refused, item.get("tries"))
        found, self._found = self._found, []
        return Answer(runs=found)

    def _send(self, item: Item) -> None:
        sends: dict[str, Callable[[Item], None]] = {
            **dict.fromkeys(MERGED, self._write),
            "texts": self._texts,
            "folder": lambda item: log_folder(
                self._client, self._id_of(None, item), Path(item["folder"]), item["name"]
            ),
            "model": lambda item: log_model(self._client, self._address, self._id_of(None, item), self._study, item),
            "data": lambda item: log_data(self._client, self._id_of(None, item), item["data"]),
            "best": self._best,
            "reconcile": self._reconcile,
        }
        sends[item["do"]](item)

    def _refuses(self, item: Item, error: Exception) -> bool:
        """Whether `error` says that `item` will never be taken, not that MLflow is away for a while."""
        code = getattr(error, "error_code", None)
        if code in _REFUSED:
            return True
        answer = getattr(getattr(error, "response", None), "status_code", None)  # of a store of files
        if answer is not None:
            return 400 <= answer < 500 and answer not in _AWAY_STATUS
        wrong = isinstance(error, TypeError | ValueError | OverflowError | KeyError)  # it cannot even be sent
        if item["do"] in FILES or not (wrong or code in _UNCLEAR) or not self._takes_something():
            return False
        item["tries"] = item.get("tries", 0) + 1
        answer = str(error)[:150]
        if item["tries"] >= _TRIES and not answer.startswith("API request to http"):  # that is: there was no answer
            self._indigestible.add(answer)
        return code != "INTERNAL_ERROR" or item["tries"] >= _TRIES or answer in self._indigestible

    def _takes_something(self) -> bool:
        try:
            self._client.set_experiment_tag(self._experiment, "hpo.alive", str(now_ms()))
        except Exception:  # whatever it is: MLflow is away
            return False
        return True

    def _id_of(self, trial: int | None, item: Item) -> str:
        """Return the id of a trial's run, found by its tags, restored or made."""
        if trial not in self._ids:
            self._note(trial, self._find_or_make(trial, item))
        return self._ids[trial]

    def _note(self, trial: int | None, run: str) -> None:
        self._ids[trial] = run
        self._found.append((trial, run))

    def _find_or_make(self, trial: int | None, item: Item) -> str:
        if trial is not None and item.get("is_new"):
            return self._make(trial, item)
        mark = "study" if trial is None else str(trial)
        parent = None if trial is None else self._id_of(None, item)
        end = time.monotonic() + (self.PEER_SECONDS if trial is None and not self._is_first else 0.0)
        while time.monotonic() < end and not self._search(mark, parent):
            time.sleep(0.2)
        with alone(self._address):
            found = self._search(mark, parent)
            made = None if found else self._make(trial, item)
        if made is not None and (trial is None or sqlite_path(self._address) is not None):
            return made
        if made is not None:  # another machine may have looked and made one meanwhile
            found = self._search(mark, parent)
        several = trial is not None and len(found) > 1
        return self._taken(trial, made_one(self._client, found) if several else in_order(found)[0])

    def _make(self, trial: int | None, item: Item) -> str:
        new = self._new(trial, item)
        run = self._client.create_run(new.experiment, start_time=new.start, tags=new.tags, run_name=new.name)
        return str(run.info.run_id)

    def _new(self, trial: int | None, item: Item) -> NewRun:
        parent = None if trial is None else self._id_of(None, item)
        tags = self._tags | {"hpo.study": self._study, "hpo.trial": "study" if trial is None else str(trial)}
        tags |= {"hpo.making": self._making} if self._making else {}
        tags |= {"mlflow.parentRunId": parent} if parent is not None else {}
        return NewRun(self._experiment, self._study if trial is None else run_name(trial), item["time"], tags)

    def _taken(self, trial: int | None, run: Any) -> str:
        """Return the id of a run that was found: restored if it was deleted, marked as ours if it was not yet."""
        run_id = str(run.info.run_id)
        if run.info.lifecycle_stage == "deleted":
            self._client.restore_run(run_id)
            which = "the study" if trial is None else f"trial {trial}"
            log.warning(f"tracking: the run of {which} was deleted, but is still written to: it is restored")
        if self._making and "hpo.making" not in run.data.tags:
            self._client.set_tag(run_id, "hpo.making", self._making)
        return run_id

    def _search(self, mark: str, parent: str | None) -> Sequence[Any]:
        """Return the runs with that mark that are this study's: of its making, else as an older version left them.

        Those are of no making: a trial's under the study's own run, the study's own where it `adopts` one.
        """
        of_mark = f"tags.`hpo.trial` = '{mark}'"
        if not self._making:
            return self._all_runs(of_mark)
        if found := self._all_runs(f"{of_mark} and tags.`hpo.making` = '{self._making}'"):
            return found
        if not self._adopts:
            return []
        under = "" if parent is None else f" and tags.`mlflow.parentRunId` = '{parent}'"
        return [run for run in self._all_runs(of_mark + under) if "hpo.making" not in run.data.tags]

    def _all_runs(self, query: str) -> list[Any]:
        return all_runs(self._client, self._experiment, query)

    def _write(self, item: Item) -> None:
        """Write an item's params, metrics, tags and status to its run."""
        if self._is_made_with(item):
            return
        run = self._id_of(item["trial"], item)
        if may_be_late(item):
            item = in_time(item, self._client.get_run(run))
        if item["trial"] is None and item["do"] == "end" and item.get("left"):
            info = self._client.get_run(run).info
            if info.end_time is not None and info.end_time >= item["time"]:
                return  # the study was resumed since
        change = self._change(item)
        if item["trial"] is None:
            change = self._of_the_study(run, change)
        if self._tables is None or not self._tables.write(run, change):
            write(self._client, run, change)
        if item["trial"] is None:
            self._known.add(change.metrics)
            self._watch_system(run, item)

    def _is_made_with(self, item: Item) -> bool:
        """Whether the item's trial had no run, and has one now, with what the item says of it."""
        trial = item["trial"]
        if self._tables is None or trial is None or trial in self._ids:
            return False
        new, change = self._new(trial, item), self._change(item)
        with nullcontext() if item.get("is_new") else alone(self._address):
            run = self._tables.create(new, change, only=not item.get("is_new"))
        if run is not None:
            self._note(trial, run)
        return run is not None

    def _change(self, item: Item) -> Change:
        return Change(
            metrics=[(self._legal(key), float(value), when, step) for key, value, when, step in item.get("rows", [])],
            params={self._legal(key): plain(x, MAX_PARAM) for key, x in item.get("params", {}).items()},
            tags={self._legal(key): plain(x, MAX_TAG) for key, x in item.get("tags", {}).items()},
            status=item.get("status"),
            end=item.get("ended", item["time"]) if item["do"] == "end" else None,
        )

    def _of_the_study(self, run: str, change: Change) -> Change:
        """Return what is to be written of that to the study's own run, which may have some of it already."""
        rows, params, tags = self._known.missing(self._client, run, change.metrics), change.params, change.tags
        if params:
            params = unlogged(self._client.get_run(run).data.params, params)
        if NOTE in tags:
            tags = {**tags, NOTE: linked(tags[NOTE], self._page_of)}
        return change._replace(metrics=rows, params=params, tags=tags)

    def _watch_system(self, run: str, item: Item) -> None:
        """Have MLflow log CPU, memory, GPU and network to the study's run, from its start to its end, if it is to."""
        if item["do"] == "start" and item.get("status") == "RUNNING" and self._monitor is None:
            self._monitor = system_monitor(run, self._uri)
        elif item["do"] == "end" and self._monitor is not None:
            self._monitor.finish()
            self._monitor = None

    def _page_of(self, trial: int) -> str | None:
        """Return where MLflow shows a trial's run, if there is one."""
        run = self._found_run(trial)
        return None if run is None else f"#/experiments/{self._experiment}/runs/{run}"

    def _found_run(self, trial: int) -> str | None:
        """Return the id of a trial's run, if there is one."""
        if trial not in self._ids and (found := self._search(str(trial), self._ids.get(None))):
            return str(in_order(found)[0].info.run_id)
        return self._ids.get(trial)

    def _best(self, item: Item) -> None:
        self._id_of(None, item)
        if self._found_run(item["trial"]) is not None:
            run = self._id_of(item["trial"], item)  # restored, where it was deleted
            marked = self._all_runs("tags.`hpo.best` = 'true'")
            ours = [each for each in marked if each.data.tags.get("hpo.making", self._making) == self._making]
            active = [each for each in ours if each.info.lifecycle_stage == "active"]
            mark_best(self._client, run, item["trial"], active)

    def _tag(self, run: str, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        log_all(self._client, run, tags=[RunTag(key, plain(value, MAX_TAG)) for key, value in tags.items()])

    def _reconcile(self, item: Item) -> None:
        """End the runs of ended trials that are open, or that have another end; most are FINISHED and right.

        Where several processes have written to them, all are looked at: one trial may have two, or a late pause.
        """
        parents = {self._ids[None]} if None in self._ids else {run.info.run_id for run in self._search("study", None)}

        def is_ours(run: Any) -> bool:
            making, parent = run.data.tags.get("hpo.making"), run.data.tags.get("mlflow.parentRunId")
            return not self._making or making == self._making or (making is None and parent in parents)

        runs = self._all_runs("" if item.get("shared") else "attributes.status != 'FINISHED'")
        reconcile(self._client, [run for run in runs if is_ours(run)], item["ends"], item["time"], self._tag)

    def _texts(self, item: Item) -> None:
        run = self._id_of(item["trial"], item)
        texts = item["texts"] | ({"requirements.txt": installed()} if item["trial"] is None else {})
        for name, text in texts.items():
            self._client.log_text(run, plain(text, sys.maxsize), name)

    def _legal(self, name: str) -> str:
        legal = legal_name(name)
        if legal != name and name not in self._renamed:
            self._renamed.add(name)
            log.warning(f"tracking: MLflow does not take the name {name!r:.80}: there it is {legal!r}")
        return legal


def cause(error: Exception) -> str:
    """Return the line of `error` that says most: a database's own, in what SQLAlchemy makes of it, else the first."""
    lines = f"{type(error).__name__}: {error}".splitlines()
    said = next((line for line in lines if re.match(r"\([a-z0-9_.]+\.\w*Error\)", line)), lines[0])[:300]
    return f"{said}; move that file away, and a new one is made" if _is_no_database(said) else said


def _is_no_database(said: str) -> bool:
    return "file is not a database" in said or "disk image is malformed" in said
