"""MLflow as a tracker: everything goes into the outbox, and from there to the process that sends it.

Where sending fails, that is said once, and it is tried again later, also in the next run of the study. One thing that
MLflow refuses for good is set aside, and the rest is sent.
"""

import math
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from hpo.log import log
from hpo.tracking.base import PAUSED, STATUS, Row, Tracker
from hpo.tracking.items import FILES, MOST_ROWS, Item, halves, is_new
from hpo.tracking.outbox import Batch, Outbox
from hpo.tracking.process import RunsProcess
from hpo.tracking.values import RUN_NAME, end_tags, now_ms, rows_of, run_name, texts_of


class MlflowTracker(Tracker):
    """Nobody waits for MLflow: a thread hands one item after the other to a process (`hpo.tracking.process`).

    The outbox is also a file, so that what a kill leaves unsent is sent by the next run; each item may be sent twice
    without harm.
    """

    FLUSH_SECONDS = 10.0
    """How long metrics may wait for others to be sent with."""
    REST = 4.0
    """How many times as long as sending took is waited before more is sent: it takes cores from training."""
    REST_SECONDS = 60.0
    """The longest such rest."""
    RETRY_SECONDS = 30.0
    CLOSE_SECONDS = 15.0
    """How long the study's end waits for an answer where MLflow does not work."""
    CONNECT_SECONDS = 40.0
    """How long it waits for the first answer: MLflow needs seconds to be imported, and to make a new database."""
    ANSWER_SECONDS = 600.0
    """How long it waits where MLflow works: large files may be on their way."""

    def __init__(
        self,
        uri: str,
        study: str,
        outbox: Path,
        *,
        making: str = "",
        adopts: bool = True,
        tags: Mapping[str, str] | None = None,
        lease: float = math.inf,
    ) -> None:
        """`making`, `adopts`, `tags` and `lease`: see `hpo.tracking.opening.open_tracker`."""
        self._uri = uri
        self._runs = self._open_runs(uri, study, making=making, adopts=adopts, tags=tags or {})
        self._run_ids: dict[int | None, str] = {}
        self._lease = lease
        self._paused: set[int | None] = set()
        """Trials that were ever paused here, or resumed: peers may have written to their runs."""
        self._gathered: list[tuple[Item, float]] | None = None
        self._outbox = Outbox(outbox, study, making)
        self._changed = threading.Condition()  # guards all that follows, and the outbox
        self._thread: threading.Thread | None = None
        self._closing = False
        self._state: Literal["new", "ok", "failing"] = "new"
        """New: nothing was answered yet; failing: an error was said."""
        self._asked_at = 0.0
        """When the item was handed over that is being sent."""
        self._send_at = math.inf
        self._rests, self._rests_until = True, 0.0
        self._retry_at = 0.0
        self._files_at = 0.0
        """When files may be sent again; 0: their store works."""
        self._refusal_said = False
        self._tried = -1
        """The last item in the outbox that was tried to be sent."""
        self._adopt(own=True)

    def _open_runs(self, uri: str, study: str, **about: Any) -> RunsProcess:
        return RunsProcess(uri, study, **about)

    def _adopt(self, own: bool = False) -> None:
        with self._changed:
            n_bad = self._outbox.adopt(own)
        if n_bad:
            self._refusal_said = True
            log.warning(
                f"tracking: {n_bad} {'line' if n_bad == 1 else 'lines'} left unsent by an earlier run cannot be read; "
                f"kept in {self._outbox.refused}, and the rest is sent"
            )

    # What the engine tells.

    def start_study(
        self, tags: Mapping[str, str], texts: Mapping[str, str], params: Mapping[str, Any] | None = None
    ) -> None:
        self._put("start", None, tags=dict(tags), params=texts_of(params or {}), status="RUNNING")
        if texts:
            self._put("texts", None, texts=dict(texts))

    def log_data(self, data: Mapping[str, str]) -> None:
        self._put("data", None, self.FLUSH_SECONDS, data=dict(data))

    def tag_study(self, tags: Mapping[str, str]) -> None:
        self._put("start", None, self.FLUSH_SECONDS, tags=dict(tags))

    @contextmanager
    def together(self) -> Iterator[None]:
        if self._gathered is not None:
            yield
            return
        self._gathered = []
        try:
            yield
        finally:
            gathered, self._gathered = self._gathered, None
            self._append(gathered)

    def start_trial(
        self, trial: int, params: Mapping[str, Any], is_new: bool = False, tags: Mapping[str, str] | None = None
    ) -> None:
        self._put("start", trial, params=texts_of(params), tags=dict(tags or {}), is_new=is_new)

    def run_of(self, trial: int) -> str | None:
        return self._run_ids.get(trial)

    def log_params(self, trial: int | None, params: Mapping[str, Any]) -> None:
        self._put("start", trial, self.FLUSH_SECONDS, params=texts_of(params))

    def log_metrics(self, trial: int | None, step: int, metrics: Mapping[str, float]) -> None:
        self._put("metrics", trial, self.FLUSH_SECONDS, rows=rows_of(metrics, step))

    def log_curve(self, key: str, rows: Sequence[Row]) -> None:
        for start in range(0, len(rows), MOST_ROWS):
            some = [[key, float(row.value), row.ms, row.step] for row in rows[start : start + MOST_ROWS]]
            self._put("metrics", None, self.FLUSH_SECONDS, rows=some)

    def mark_best(self, trial: int) -> None:
        self._put("best", trial)

    def pause_trial(self, trial: int, effort: Mapping[str, float] | None = None) -> None:
        self._paused.add(trial)
        tags = {"hpo.state": "PAUSED", RUN_NAME: run_name(trial, "paused")}
        self._put("start", trial, status=PAUSED, tags=tags, rows=rows_of(effort))

    def resume_trial(self, trial: int) -> None:
        self._paused.add(trial)
        self._put("start", trial, status="RUNNING", tags={"hpo.state": "RUNNING", RUN_NAME: run_name(trial)})

    def end_trial(
        self, trial: int, state: str, error: str | None = None, effort: Mapping[str, float] | None = None
    ) -> None:
        tags = ({RUN_NAME: run_name(trial)} if trial in self._paused else {}) | end_tags(trial, state, error)
        self._put("end", trial, status=STATUS[state], tags=tags, rows=rows_of(effort))

    def log_folder(self, folder: Path, name: str) -> None:
        self._put("folder", None, folder=str(folder.resolve()), name=name)

    def log_model(self, folder: Path, trial: int, facts: Mapping[str, Any]) -> None:
        self._put("model", None, folder=str(folder.resolve()), of=trial, **facts)

    def reconcile(self, ends: Mapping[int, tuple[str, str | None]], shared: bool = False) -> None:
        self._adopt()
        self._put("reconcile", None, ends={str(trial): end for trial, end in ends.items()}, shared=shared)
        with self._changed:
            self._rests, self._rests_until = False, 0.0  # trials are over: the rest is sent beside refit and export
            self._changed.notify_all()

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
        self._wait_for_thread()
        with self._changed:
            n_left, where = len(self._outbox), self._outbox.where
            self._outbox.close()
        if n_left and self._runs.killed and self._state != "failing":  # nobody was told yet
            log.warning(
                f"tracking: {self._uri} has not answered; what could not be sent is kept in {where} and sent later"
            )
        return n_left == 0

    def _wait_for_thread(self) -> None:
        """Wait until all was sent, or MLflow has not answered for too long: its process is killed then."""
        started = time.monotonic()
        while self._thread is not None and self._thread.is_alive():
            self._thread.join(0.1)
            if self.stop.seconds_left() <= 0 or time.monotonic() - max(started, self._asked_at) > self._patience:
                self._runs.kill()
                self._thread.join(self.CLOSE_SECONDS)
                return

    @property
    def _patience(self) -> float:
        """How many seconds an answer is waited for at the study's end."""
        return {"new": self.CONNECT_SECONDS, "failing": self.CLOSE_SECONDS}.get(self._state, self.ANSWER_SECONDS)

    def _put(self, do: str, trial: int | None, within: float = 0.0, **what: Any) -> None:
        """Have something sent within so many seconds."""
        item = {"do": do, "trial": trial, "time": now_ms(), **what}
        if self._gathered is None:
            self._append([(item, within)])
        else:
            self._gathered.append((item, within))

    def _append(self, items: Sequence[tuple[Item, float]]) -> None:
        """Put items into the outbox, each with the seconds within which it is to be sent."""
        if not items:
            return
        with self._changed:
            self._outbox.append(*(item for item, _ in items))
            self._start_thread()
            self._send_by(time.monotonic() + min(within for _, within in items))

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
                    with self._resting():
                        self._send_all(closing)
                except Exception as error:  # the process, or what MLflow says there: it must not stop training
                    self._note_failure(str(error))
        self._runs.close()
        with self._changed:
            self._outbox.close()

    def _seconds_left(self) -> float:
        """Return the seconds until something is to be sent."""
        return max(self._send_at, self._retry_at, self._rests_until) - time.monotonic()

    @contextmanager
    def _resting(self) -> Iterator[None]:
        """Rest after what is sent within this; not after the first time, in which MLflow is imported."""
        start, is_first = time.monotonic(), self._state == "new"
        yield
        now = time.monotonic()
        if self._rests and not is_first:
            self._rests_until = now + min(self.REST * (now - start), self.REST_SECONDS)

    def _send_all(self, closing: bool) -> None:
        """Send all that is there now; what comes meanwhile is sent later, but for the end, when all is."""
        waiting = FILES if not closing and time.monotonic() < self._files_at else ()
        with self._changed:
            until = math.inf if closing else self._outbox.last()
        while (batch := self._next(waiting, until)) is not None:
            self._asked_at = time.monotonic()
            tried, self._tried = self._tried, max(self._tried, *batch.ids)
            is_first = batch.ids[0] > tried and batch.item["trial"] not in self._paused
            answer = self._runs.attempt(batch.item | {"is_new": is_first and is_new(batch.item, self._lease)})
            self._run_ids.update(answer.runs)
            if answer.sent or answer.refused:
                with self._changed:
                    self._outbox.replace(batch, [] if answer.sent else self._instead_of(batch.item, answer.why))
                self._state = "ok" if self._state == "new" else self._state
                continue
            if answer.tries is not None:
                with self._changed:
                    self._outbox.replace(batch, [batch.item | {"tries": answer.tries}])
            if batch.item["do"] not in FILES:
                raise OSError(answer.why)
            self._note_files(answer.why)
            waiting = FILES
        with self._changed:
            self._files_at = self._files_at if waiting else 0.0
            was, self._state = self._state, "ok"
            self._outbox.save()
        if was == "failing":
            log.warning(f"tracking: {self._uri} is back; everything that was kept has been sent")

    def _next(self, waiting: tuple[str, ...], until: float) -> Batch | None:
        with self._changed:
            return self._outbox.first(waiting, until)

    def _instead_of(self, item: Item, why: str) -> list[Item]:
        """Return what is to be sent in place of an item that was refused; set it aside where that is for good.

        First it is sent again, since runs that were deleted are restored then; what says several things is divided, so
        that only what is refused of it is set aside.
        """
        if not item.get("again"):
            return [item | {"again": True}]
        if not (parts := halves(item)):
            self._set_aside(item, why)
        return parts

    def _set_aside(self, item: Item, why: str) -> None:
        said, self._refusal_said = self._refusal_said, True
        self._outbox.set_aside(item, why)
        if not said:
            whose = "the study" if item["trial"] is None else f"trial {item['trial']}"
            log.warning(
                f"tracking: {self._uri} refused something of {whose} ({why}); it is kept in {self._outbox.refused}, "
                "as whatever else it refuses, and the rest is sent"
            )

    def _note_files(self, why: str) -> None:
        with self._changed:
            said, self._files_at = self._files_at, time.monotonic() + self.RETRY_SECONDS
            self._send_by(self._files_at)
        if not said:
            log.warning(
                f"tracking: {self._uri} does not take files ({why}); all else is sent, and they are kept to "
                "be sent later"
            )

    def _note_failure(self, why: str) -> None:
        with self._changed:
            self._retry_at = time.monotonic() + self.RETRY_SECONDS
            self._send_by(time.monotonic() + self.FLUSH_SECONDS)
            self._outbox.save()
            where = self._outbox.where
            if self._runs.killed:
                return
            was, self._state = self._state, "failing"
        if was != "failing":
            log.warning(
                f"tracking: {self._uri} does not work ({why}); training continues, and what could not be sent "
                f"is kept in {where} and sent later"
            )
