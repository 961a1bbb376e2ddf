"""MLflow as a tracker: everything goes into the outbox, which a thread sends (`hpo.tracking.runs`).

Where sending fails, that is said once, and it is tried again later, also in the next run of the study. One thing that
MLflow refuses for good is set aside, and the rest is sent.
"""

import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hpo.errors import masked
from hpo.tracking.base import STATUS, NullTracker, Tracker, check_address
from hpo.tracking.outbox import FILES, Item, Outbox, halves, is_item
from hpo.tracking.runs import Runs, cause, end_tags, quiet, require_mlflow


class MlflowTracker(Tracker):
    """Sends from a thread, since one call can take minutes (MLflow tries to connect to a database for 100 s).

    The outbox is also a file, so that what a kill leaves unsent is sent by the next run; each item may be sent twice
    without harm.
    """

    FLUSH_SECONDS = 10.0
    """How long metrics may wait for others to be sent with."""
    RETRY_SECONDS = 30.0
    CONNECT_SECONDS = 20.0
    """How long the study's start waits for MLflow, which needs seconds to make a new database."""
    START_SECONDS = 5.0
    """How long a trial's start waits for its run id, which the trial's attributes are to hold."""
    CLOSE_SECONDS = 15.0
    """How long the study's end waits for a tracker that does not work; for one that works, as long as it takes."""

    def __init__(self, uri: str, study: str, outbox: Path, warn: Callable[[str], None]) -> None:
        self._uri = uri
        self._warn = lambda text: warn(masked(text))
        self._runs = Runs(uri, study, lambda text: self._warn(text))
        self._outbox = Outbox(outbox, study)
        self._open: dict[int | None, Item] = {}  # of each trial, the metrics that more may be added to
        self._changed = threading.Condition()  # guards all that follows, and the outbox
        self._thread: threading.Thread | None = None
        self._due = self._closing = self._failing = self._slow = self._files_failing = False
        self._retry_at = self._retry_files_at = 0.0
        self._n_refused = 0
        self._adopt(own=True)

    def _adopt(self, own: bool = False) -> None:
        with self._changed:
            n_bad = self._outbox.adopt(own)
            self._n_refused += n_bad
        if n_bad:
            self._warn(
                f"tracking: {n_bad} lines that an earlier run left unsent cannot be read; they are kept in "
                f"{self._outbox.refused}, and the rest is sent"
            )

    def start_study(self, tags: Mapping[str, str], texts: Mapping[str, str]) -> None:
        self._put("start", None, tags=dict(tags), status="RUNNING")
        if texts:
            self._put("texts", None, texts=dict(texts))
        self._wait_for_run(None, self.CONNECT_SECONDS)

    def tag_study(self, tags: Mapping[str, str]) -> None:
        self._put("start", None, due=False, tags=dict(tags))

    def start_trial(self, trial: int, params: Mapping[str, Any]) -> str | None:
        self._put("start", trial, params=_texts(params))
        return self._wait_for_run(trial, self.START_SECONDS)

    def log_params(self, trial: int, params: Mapping[str, Any]) -> None:
        self._put("start", trial, due=False, params=_texts(params))

    def _wait_for_run(self, trial: int | None, seconds: float) -> str | None:
        with self._changed:
            if not self._slow:  # whoever waited in vain once is not made to wait again
                self._slow = not self._changed.wait_for(lambda: trial in self._runs.ids or self._failing, seconds)
            return self._runs.ids.get(trial)

    def log_metrics(self, trial: int | None, step: int, metrics: Mapping[str, float]) -> None:
        rows = [[key, float(value), _now(), int(step)] for key, value in metrics.items()]
        with self._changed:
            item = self._open.get(trial)
            if item is not None and len(item["rows"]) < 900 and not self._failing:
                item["rows"] += rows  # one batch: MLflow takes at most 1,000 metrics in a call
                self._outbox.append({**item, "rows": rows})
                return
            self._open[trial] = self._put("metrics", trial, due=False, rows=rows)

    def end_trial(self, trial: int, state: str, error: str | None = None) -> None:
        self._put("end", trial, status=STATUS[state], tags=end_tags(state, error))

    def log_folder(self, folder: Path, name: str) -> None:
        self._put("folder", None, folder=str(folder.resolve()), name=name)

    def reconcile(self, ends: Mapping[int, tuple[str, str | None]]) -> None:
        self._adopt()
        self._put("reconcile", None, ends={str(trial): end for trial, end in ends.items()})

    def end_study(self, state: str) -> bool:
        self._put("end", None, status=STATUS[state], tags={"hpo.state": state})
        return self.close()

    def _start_thread(self) -> None:
        if self._thread is None or not self._thread.is_alive():
            self._closing = False
            self._thread = threading.Thread(target=self._run, name="hpo-mlflow", daemon=True)
            self._thread.start()

    def close(self) -> bool:
        """Send what is left, if it can be sent; the outbox's file keeps it where not. Return whether all was sent."""
        with self._changed:
            if self._outbox.items:
                self._start_thread()
            self._closing = True
            self._changed.notify_all()
        end = time.monotonic() + self.CLOSE_SECONDS
        while (
            self._thread is not None
            and self._thread.is_alive()
            and (not (self._failing or self._slow) or time.monotonic() < end)
        ):
            self._thread.join(0.1)
        with self._changed:
            if self._outbox.items:
                self._outbox.write()
            return not self._outbox.items

    def _put(self, do: str, trial: int | None, due: bool = True, **what: Any) -> Item:
        item = {"do": do, "trial": trial, "time": _now(), **what}
        with self._changed:
            self._outbox.items.append(item)
            self._due |= due
            self._outbox.append(item)
            self._start_thread()
            self._changed.notify_all()
        return item

    def _run(self) -> None:
        """Send whenever something is due, in batches, until the tracker is closed."""
        closing = False
        while not closing:
            with self._changed:
                self._changed.wait_for(lambda: self._due or self._closing, self.FLUSH_SECONDS)
                closing, self._due = self._closing, False
            if closing or time.monotonic() >= self._retry_at:
                try:
                    with quiet():
                        self._send_all(closing)
                except Exception as error:  # whatever MLflow, its server or its database raise must not stop training
                    self._note_failure(error)

    def _connect(self) -> None:
        self._runs.connect()

    def _send_all(self, closing: bool) -> None:
        self._connect()
        place, files_wait = 0, not closing and time.monotonic() < self._retry_files_at
        while (item := self._next(place)) is not None:
            if item["do"] in FILES and files_wait:
                place += 1
                continue
            try:
                instead = self._send(item)
            except Exception as error:
                if item["do"] not in FILES:
                    raise
                self._note_files(error)
                files_wait = True
                continue
            with self._changed:
                del self._outbox.items[place]
                for new in reversed(instead):
                    self._outbox.items.insert(place, new)
                self._slow = False
                self._changed.notify_all()
        if self._failing:
            self._failing = False
            self._warn(f"tracking: {self._uri} is back; everything that was kept has been sent")

    def _next(self, place: int) -> Item | None:
        """Return the item at `place` of the outbox; where there is none, bring its file to what is left."""
        with self._changed:
            if place == len(self._outbox.items):
                self._outbox.write()
                self._files_failing &= place > 0
                return None
            item = self._outbox.items[place]
            if item is self._open.get(item["trial"]):
                del self._open[item["trial"]]
            return item

    def _send(self, item: Item) -> list[Item]:
        """Send `item`; return what is to be sent in its place. What is refused for good is set aside.

        Before that, experiment and runs are looked for again, since they may have been deleted; and what says several
        things is divided, so that only what is refused of it is set aside.
        """
        if not is_item(item):
            self._set_aside(item, "is no item of an outbox")
            return []
        self._connect()
        try:
            self._runs.send(item)
        except Exception as error:
            if not self._runs.refuses(item, error):
                raise
            if not item.get("again"):
                self._runs.look_again()
                return [item | {"again": True}]
            if not (parts := halves(item)):
                self._set_aside(item, cause(error))
            return parts
        return []

    def _set_aside(self, item: Item, why: str) -> None:
        self._n_refused += 1
        self._outbox.set_aside(item, why)
        if self._n_refused == 1:
            whose = "the study" if item.get("trial") is None else f"trial {item['trial']}"
            self._warn(
                f"tracking: {self._uri} refused something of {whose} ({why}); it is kept in {self._outbox.refused}, "
                "as whatever else it refuses, and the rest is sent"
            )

    def _note_files(self, error: Exception) -> None:
        said, self._files_failing = self._files_failing, True
        self._retry_files_at = time.monotonic() + self.RETRY_SECONDS
        if not said:
            self._warn(
                f"tracking: {self._uri} does not take files ({cause(error)}); all else is sent, and they are kept to "
                "be sent later"
            )

    def _note_failure(self, error: Exception) -> None:
        with self._changed:
            said, self._failing = self._failing, True
            self._retry_at = time.monotonic() + self.RETRY_SECONDS
            self._outbox.write()
            self._changed.notify_all()
        if not said:
            self._warn(
                f"tracking: {self._uri} does not work ({cause(error)}); training goes on, and what could not be sent "
                f"is kept in {self._outbox.file} and sent later"
            )


def open_tracker(uri: str, study: str, outbox: Path, warn: Callable[[str], None]) -> Tracker:
    """Return the tracker that `tracking:` names. Raises InputError for an address that can never work."""
    check_address(uri)
    if uri == "off":
        return NullTracker()
    require_mlflow(uri)
    return MlflowTracker(uri, study, outbox, warn)


def _texts(params: Mapping[str, Any]) -> dict[str, str]:
    """Return params as MLflow takes them."""
    return {str(key): str(value)[:6000] for key, value in params.items()}


def _now() -> int:
    return int(time.time() * 1000)
