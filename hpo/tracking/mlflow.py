"""MLflow as a tracker: everything goes into the outbox, which a thread sends (`hpo.tracking.runs`).

Where sending fails, that is said once, and it is tried again later, also in the next run of the study. One thing that
MLflow refuses for good is set aside, and the rest is sent.
"""

import math
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from hpo.log import log
from hpo.tracking.base import STATUS, NullTracker, Tracker, check_address
from hpo.tracking.items import FILES, Item, halves
from hpo.tracking.outbox import Batch, Outbox
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

    def __init__(self, uri: str, study: str, outbox: Path, *, making: str = "", adopts: bool = True) -> None:
        """`making` and `adopts`: see `open_tracker`."""
        self._uri = uri
        self._runs = Runs(uri, study, making=making, adopts=adopts)
        self._outbox = Outbox(outbox, study, making)
        self._changed = threading.Condition()  # guards all that follows, and the outbox
        self._thread: threading.Thread | None = None
        self._closing = False
        self._state: Literal["ok", "slow", "failing"] = "ok"
        """Slow: somebody has waited for it in vain; failing: an error was said. Nobody waits for it then."""
        self._send_at = math.inf
        self._retry_at = 0.0
        self._files_at = 0.0
        """When files may be sent again; 0: their store works."""
        self._refusal_said = False
        self._adopt(own=True)

    def _adopt(self, own: bool = False) -> None:
        with self._changed:
            n_bad = self._outbox.adopt(own)
        if n_bad:
            self._refusal_said = True
            log.warning(
                f"tracking: {n_bad} lines that an earlier run left unsent cannot be read; they are kept in "
                f"{self._outbox.refused}, and the rest is sent"
            )

    # What the engine tells.

    def start_study(self, tags: Mapping[str, str], texts: Mapping[str, str]) -> None:
        self._put("start", None, tags=dict(tags), status="RUNNING")
        if texts:
            self._put("texts", None, texts=dict(texts))
        self._wait_for_run(None, self.CONNECT_SECONDS)

    def tag_study(self, tags: Mapping[str, str]) -> None:
        self._put("start", None, self.FLUSH_SECONDS, tags=dict(tags))

    def start_trial(self, trial: int, params: Mapping[str, Any]) -> str | None:
        self._put("start", trial, params=_texts(params))
        return self._wait_for_run(trial, self.START_SECONDS)

    def log_params(self, trial: int, params: Mapping[str, Any]) -> None:
        self._put("start", trial, self.FLUSH_SECONDS, params=_texts(params))

    def _wait_for_run(self, trial: int | None, seconds: float) -> str | None:
        with self._changed:
            if self._state == "ok" and not self._changed.wait_for(
                lambda: trial in self._runs.ids or self._state != "ok", seconds
            ):
                self._state = "slow"
            return self._runs.ids.get(trial)

    def log_metrics(self, trial: int | None, step: int, metrics: Mapping[str, float]) -> None:
        rows = [[key, float(value), _now(), int(step)] for key, value in metrics.items()]
        self._put("metrics", trial, self.FLUSH_SECONDS, rows=rows)

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

    def close(self) -> bool:
        """Send what is left, if it can be sent; the outbox's file keeps it where not. Return whether all was sent."""
        with self._changed:
            if len(self._outbox):
                self._start_thread()
            self._closing = True
            self._changed.notify_all()
        end = time.monotonic() + self.CLOSE_SECONDS
        while self._thread is not None and self._thread.is_alive() and (self._state == "ok" or time.monotonic() < end):
            self._thread.join(0.1)
        with self._changed:
            n_left, state, where = len(self._outbox), self._state, self._outbox.where
            self._outbox.close()
        if n_left and state == "slow":  # nobody was told yet: it neither answers nor fails
            log.warning(
                f"tracking: {self._uri} has not answered; what could not be sent is kept in {where} and sent later"
            )
        return n_left == 0

    def _put(self, do: str, trial: int | None, within: float = 0.0, **what: Any) -> None:
        """Have something sent within so many seconds."""
        with self._changed:
            self._outbox.append({"do": do, "trial": trial, "time": _now(), **what})
            self._start_thread()
            self._send_by(time.monotonic() + within)

    def _send_by(self, when: float) -> None:
        if when < self._send_at:
            self._send_at = when
            self._changed.notify_all()

    # The thread, which sends.

    def _start_thread(self) -> None:
        if self._thread is None or not self._thread.is_alive():
            self._closing = False
            self._thread = threading.Thread(target=self._run, name="hpo-mlflow", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        """Send whenever something is due, in batches, until the tracker is closed."""
        closing = False
        while not closing:
            with self._changed:
                if not self._closing and self._seconds_left() > 0:
                    self._changed.wait(min(self._seconds_left(), self.FLUSH_SECONDS))
                self._outbox.touch()
                closing, is_due = self._closing, self._seconds_left() <= 0
                self._send_at = math.inf if is_due else self._send_at
            if closing or is_due:
                try:
                    with quiet():
                        self._send_all(closing)
                except Exception as error:  # whatever MLflow, its server or its database raise must not stop training
                    self._note_failure(error)
        with self._changed:
            self._outbox.close()

    def _seconds_left(self) -> float:
        """Return the seconds until something is to be sent."""
        return max(self._send_at, self._retry_at) - time.monotonic()

    def _connect(self) -> None:
        self._runs.connect()

    def _send_all(self, closing: bool) -> None:
        self._connect()
        waiting = FILES if not closing and time.monotonic() < self._files_at else ()
        while (batch := self._next(waiting)) is not None:
            tries = batch.item.get("tries")
            try:
                left = self._send(batch.item)
            except Exception as error:
                if batch.item.get("tries") != tries:
                    with self._changed:
                        self._outbox.replace(batch, [batch.item])
                if batch.item["do"] not in FILES:
                    raise
                self._note_files(error)
                waiting = FILES
                continue
            with self._changed:
                self._outbox.replace(batch, left)
                self._state = "ok" if self._state == "slow" else self._state
                self._changed.notify_all()
        with self._changed:
            self._files_at = self._files_at if waiting else 0.0
            was, self._state = self._state, "ok"
            self._outbox.save()
        if was == "failing":
            log.warning(f"tracking: {self._uri} is back; everything that was kept has been sent")

    def _next(self, waiting: tuple[str, ...]) -> Batch | None:
        with self._changed:
            return self._outbox.first(waiting)

    def _send(self, item: Item) -> list[Item]:
        """Send `item`; return what is to be sent in its place. What is refused for good is set aside.

        Before that, experiment and runs are looked for again, since they may have been deleted; and what says several
        things is divided, so that only what is refused of it is set aside.
        """
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
        said, self._refusal_said = self._refusal_said, True
        self._outbox.set_aside(item, why)
        if not said:
            whose = "the study" if item["trial"] is None else f"trial {item['trial']}"
            log.warning(
                f"tracking: {self._uri} refused something of {whose} ({why}); it is kept in {self._outbox.refused}, "
                "as whatever else it refuses, and the rest is sent"
            )

    def _note_files(self, error: Exception) -> None:
        with self._changed:
            said, self._files_at = self._files_at, time.monotonic() + self.RETRY_SECONDS
            self._send_by(self._files_at)
        if not said:
            log.warning(
                f"tracking: {self._uri} does not take files ({cause(error)}); all else is sent, and they are kept to "
                "be sent later"
            )

    def _note_failure(self, error: Exception) -> None:
        with self._changed:
            was, self._state = self._state, "failing"
            self._retry_at = time.monotonic() + self.RETRY_SECONDS
            self._send_by(time.monotonic() + self.FLUSH_SECONDS)
            self._outbox.save()
            where = self._outbox.where
            self._changed.notify_all()
        if was != "failing":
            log.warning(
                f"tracking: {self._uri} does not work ({cause(error)}); training continues, and what could not be sent "
                f"is kept in {where} and sent later"
            )


def open_tracker(uri: str, study: str, outbox: Path, *, making: str = "", adopts: bool = True) -> Tracker:
    """Return the tracker that `tracking:` names. Raises InputError for an address that can never work.

    `making` tells the study from others of its name (`Search.making`); where it `adopts`, runs that are of no making,
    as older versions made them, are taken for its own.
    """
    check_address(uri)
    if uri == "off":
        return NullTracker()
    require_mlflow(uri)
    return MlflowTracker(uri, study, outbox, making=making, adopts=adopts)


def _texts(params: Mapping[str, Any]) -> dict[str, str]:
    """Return params as MLflow takes them."""
    return {str(key): str(value)[:6000] for key, value in params.items()}


def _now() -> int:
    return int(time.time() * 1000)
