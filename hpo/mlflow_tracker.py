"""MLflow as a tracker: imported here only, and when first used.

`MlflowTracker` puts everything into an outbox and sends it in batches from a thread; where sending fails it says so
once, and tries again later, also in the next run of the study.

MLflow's side: one run a trial under one parent run for the study, all with the tag `hpo.study`, a trial's with
`hpo.trial`. COMPLETE ends as FINISHED, PRUNED as KILLED with the tag `hpo.state`, FAIL as FAILED with `hpo.error`.
"""

import json
import logging
import os
import re
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, TextIO

from filelock import FileLock, Timeout

from hpo.errors import InputError, masked
from hpo.processes import is_gone, this_process
from hpo.tracking import STATUS, NullTracker, Tracker, check_address

_ADOPT_SECONDS = 10.0
_LONG_SECONDS = 3600.0
"""A tracker that works sends within seconds, one that does not writes its outbox anew whenever it has tried."""


class MlflowTracker(Tracker):
    """MLflow through `MlflowClient` and run ids: the fluent API has one active run for the whole process.

    What is told goes into an outbox that a thread empties, since one call can take minutes (MLflow tries to connect to
    a database for 100 s). The outbox is also a file, so that what a kill leaves unsent is sent by the next run; each
    item may be sent twice without harm.
    """

    FLUSH_SECONDS = 10.0
    """How long metrics may wait for others to be sent with."""
    RETRY_SECONDS = 30.0
    CONNECT_SECONDS = 20.0
    """How long the study's start waits for MLflow, which needs seconds to make a new database."""
    START_SECONDS = 5.0
    """How long a trial's start waits for its run id, which the trial's attributes are to hold."""
    PEER_SECONDS = 5.0
    """How long to wait for the study's run where a peer has made the experiment: two would make it twice."""
    CLOSE_SECONDS = 15.0
    """How long the study's end waits for a tracker that does not work; for one that works, as long as it takes."""

    def __init__(self, uri: str, study: str, outbox: Path, warn: Callable[[str], None]) -> None:
        self._uri, self._study = uri, study
        self._warn = lambda text: warn(masked(text))
        self._file = outbox / f"{study}.{this_process()}.jsonl"
        self._client: Any = None
        self._experiment = ""
        self._is_first = False
        """Whether this process has made the experiment, so that the study's run is its to make, not its peers'."""
        self._runs: dict[int | None, str] = {}
        self._log: TextIO | None = None
        self._outbox: deque[dict[str, Any]] = deque()
        self._open: dict[int | None, dict[str, Any]] = {}  # of each trial, the metrics that more may be added to
        self._changed = threading.Condition()  # guards all that follows, and the outbox
        self._thread: threading.Thread | None = None
        self._due = self._closing = self._sending = self._failing = self._slow = False
        self._retry_at = 0.0
        self._adopt([*_left_behind(outbox, study), *([self._file] if self._file.exists() else [])])

    def _adopt(self, files: Sequence[Path]) -> None:
        """Take over what other trackers could not send; a line that a kill cut short is left out."""
        if not files:
            return
        lock = self._file.parent.with_name(f".{self._file.parent.name}.lock")
        with suppress(OSError, Timeout), FileLock(lock, timeout=_ADOPT_SECONDS):
            read = []
            with self._changed:
                for file in files:
                    with suppress(OSError, UnicodeDecodeError):  # a peer was faster; another user's; damaged
                        lines = file.read_text().splitlines()
                        read.append(file)
                        for line in lines:
                            with suppress(json.JSONDecodeError):
                                self._outbox.append(json.loads(line))
                if self._write_file():  # before theirs go, so that a kill in between loses nothing
                    for file in read:
                        if file != self._file:
                            file.unlink(missing_ok=True)

    def start_study(self, tags: Mapping[str, str], texts: Mapping[str, str]) -> None:
        self._put("start", None, tags=dict(tags), texts=dict(texts))
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
                self._slow = not self._changed.wait_for(lambda: trial in self._runs or self._failing, seconds)
            return self._runs.get(trial)

    def log_metrics(self, trial: int | None, step: int, metrics: Mapping[str, float]) -> None:
        rows = [[key, value, _now(), step] for key, value in metrics.items()]
        with self._changed:
            item = self._open.get(trial)
            if item is not None and len(item["rows"]) < 900 and not self._failing:
                item["rows"] += rows  # one batch: MLflow takes at most 1,000 metrics in a call
                self._append({**item, "rows": rows})
                return
            self._open[trial] = self._put("metrics", trial, due=False, rows=rows)

    def end_trial(self, trial: int, state: str, error: str | None = None) -> None:
        self._put("end", trial, status=STATUS[state], tags=_end_tags(state, error))

    def log_folder(self, folder: Path, name: str) -> None:
        self._put("folder", None, folder=str(folder.resolve()), name=name)

    def reconcile(self, ends: Mapping[int, tuple[str, str | None]]) -> None:
        self._adopt(_left_behind(self._file.parent, self._study))
        self._put("reconcile", None, ends={str(trial): end for trial, end in ends.items()})

    def end_study(self, state: str) -> None:
        self._put("end", None, status=STATUS[state], tags={"hpo.state": state})
        self.close()

    def send(self) -> None:
        """Send the outbox as it is, with nothing new in it."""
        self._start_thread()
        self.close()

    def _start_thread(self) -> None:
        if self._thread is None or not self._thread.is_alive():
            self._closing = False
            self._thread = threading.Thread(target=self._run, name="hpo-mlflow", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Send what is left, if it can be sent; the outbox's file keeps it where not."""
        with self._changed:
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
            if self._outbox:
                self._write_file()

    def _put(self, do: str, trial: int | None, due: bool = True, **what: Any) -> dict[str, Any]:
        item = {"do": do, "trial": trial, "time": _now(), **what}
        with self._changed:
            self._outbox.append(item)
            self._due |= due
            self._append(item)
            self._start_thread()
            self._changed.notify_all()
        return item

    def _append(self, item: Mapping[str, Any]) -> None:
        with suppress(OSError):  # a full disk must not stop training either
            if self._log is None:
                self._file.parent.mkdir(parents=True, exist_ok=True)
                self._log = self._file.open("a")
            self._log.write(json.dumps(item) + "\n")
            self._log.flush()

    def _run(self) -> None:
        """Send whenever something is due, in batches, until the tracker is closed."""
        closing = False
        while not closing:
            with self._changed:
                self._changed.wait_for(lambda: self._due or self._closing, self.FLUSH_SECONDS)
                closing, self._due = self._closing, False
            if closing or time.monotonic() >= self._retry_at:
                try:
                    with _quiet():
                        self._send_all()
                except Exception as error:  # whatever MLflow, its server or its database raise must not stop training
                    self._note_failure(error)

    def _send_all(self) -> None:
        self._connect()
        while True:
            with self._changed:
                self._sending = bool(self._outbox)
                if not self._outbox:
                    self._forget()
                    break
                item = self._outbox[0]
                if item is self._open.get(item["trial"]):
                    del self._open[item["trial"]]
            getattr(self, f"_send_{item['do']}")(item)
            with self._changed:
                self._outbox.popleft()
                self._slow = False
                self._changed.notify_all()
        if self._failing:
            self._failing = False
            self._warn(f"tracking: {self._uri} is back; everything that was kept has been sent")

    def _note_failure(self, error: Exception) -> None:
        with self._changed:
            said, self._failing, self._sending = self._failing, True, False
            self._retry_at = time.monotonic() + self.RETRY_SECONDS
            self._write_file()
            self._changed.notify_all()
        if not said:
            self._warn(
                f"tracking: {self._uri} does not work ({_cause(error)}); training goes on, and what could not be sent "
                f"is kept in {self._file} and sent later"
            )

    def _forget(self) -> None:
        """Remove the outbox's file, since everything in it was sent."""
        self._close_file()
        self._file.unlink(missing_ok=True)

    def _close_file(self) -> None:
        log, self._log = self._log, None
        if log is not None:
            with suppress(OSError):  # a full disk, and a rest in its buffer
                log.close()

    def _write_file(self) -> bool:
        """Write the outbox as it is; return whether its file holds it now."""
        if not self._outbox:
            self._forget()
            return True
        part = self._file.with_suffix(".part")
        try:
            self._close_file()
            self._file.parent.mkdir(parents=True, exist_ok=True)
            part.write_text("".join(json.dumps(item) + "\n" for item in self._outbox))
            part.replace(self._file)
        except OSError:  # a full disk: what the file held before, it still holds
            part.unlink(missing_ok=True)
            return False
        return True

    def _connect(self) -> None:
        if self._client is not None:
            return
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        path = sqlite_path(self._uri)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
        # MLflow makes its schema when first asked; processes that do so together crash all but one.
        with FileLock(f"{path}.lock", timeout=120) if path is not None else nullcontext():
            # absolute: MLflow keeps one store per address, also when the process changes its folder
            client = MlflowClient(self._uri if path is None else f"sqlite:///{path.resolve()}")
            experiment = client.get_experiment_by_name(self._study)
            if experiment is None:
                where = None if path is None else (path.parent.resolve() / "artifacts" / self._study).as_uri()
                try:
                    client.create_experiment(self._study, artifact_location=where)
                    self._is_first = True
                except MlflowException:
                    if client.get_experiment_by_name(self._study) is None:
                        raise  # it is not that another machine's worker has made it just now
                experiment = client.get_experiment_by_name(self._study)
            if experiment.lifecycle_stage == "deleted":
                client.restore_experiment(experiment.experiment_id)
            self._experiment = experiment.experiment_id
        self._client = client

    def _run_of(self, trial: int | None, item: Mapping[str, Any]) -> str:
        """Return the id of a trial's run, found by its tags or made: sending the same thing twice does no harm."""
        if trial not in self._runs:
            found = self._find_or_make(trial, item)
            with self._changed:
                self._runs[trial] = found
                self._changed.notify_all()
        return self._runs[trial]

    def _find_or_make(self, trial: int | None, item: Mapping[str, Any]) -> str:
        mark = "study" if trial is None else str(trial)
        wait = trial is None and not self._is_first
        end = time.monotonic() + (self.PEER_SECONDS if wait else 0.0)
        while not (found := self._search_one(mark)) and time.monotonic() < end:
            time.sleep(0.2)
        if found:
            return found[0].info.run_id
        tags = {"hpo.study": self._study, "hpo.trial": mark}
        if trial is not None:
            tags["mlflow.parentRunId"] = self._run_of(None, item)
        name = self._study if trial is None else f"trial {trial}"
        run = self._client.create_run(self._experiment, start_time=item["time"], tags=tags, run_name=name)
        return run.info.run_id

    def _search_one(self, mark: str) -> Sequence[Any]:
        return self._client.search_runs([self._experiment], f"tags.`hpo.trial` = '{mark}'", max_results=1)

    def _send_start(self, item: Mapping[str, Any]) -> None:
        from mlflow.entities import Param, RunTag

        run = self._run_of(item["trial"], item)
        params = [Param(key, value) for key, value in item.get("params", {}).items()]
        tags = [RunTag(key, value) for key, value in item.get("tags", {}).items()]
        for start in range(0, max(len(params), len(tags), 1), 100):
            self._client.log_batch(run, params=params[start : start + 100], tags=tags[start : start + 100])
        for name, text in item.get("texts", {}).items():
            self._client.log_text(run, text, name)
        if item["trial"] is None:
            self._client.update_run(run, status="RUNNING")

    def _send_metrics(self, item: Mapping[str, Any]) -> None:
        from mlflow.entities import Metric

        metrics = [Metric(key, value, when, step) for key, value, when, step in item["rows"]]
        run = self._run_of(item["trial"], item)
        for start in range(0, len(metrics), 1000):
            self._client.log_batch(run, metrics=metrics[start : start + 1000])

    def _send_end(self, item: Mapping[str, Any]) -> None:
        self._end(self._run_of(item["trial"], item), item["status"], item["tags"], item["time"])

    def _end(self, run: str, status: str, tags: Mapping[str, str], time: int) -> None:
        from mlflow.entities import RunTag

        self._client.log_batch(run, tags=[RunTag(key, value) for key, value in tags.items()])
        self._client.set_terminated(run, status, end_time=time)

    def _send_reconcile(self, item: Mapping[str, Any]) -> None:
        token = None
        while True:
            page = self._client.search_runs(
                [self._experiment], "attributes.status = 'RUNNING'", max_results=1000, page_token=token
            )
            for run in page:
                state, error = item["ends"].get(run.data.tags.get("hpo.trial"), (None, None))
                if state is not None:
                    self._end(run.info.run_id, STATUS[state], _end_tags(state, error), item["time"])
            token = page.token
            if not token:
                return

    def _send_folder(self, item: Mapping[str, Any]) -> None:
        if Path(item["folder"]).is_dir():
            self._client.log_artifacts(self._run_of(None, item), item["folder"], item["name"])


def open_tracker(uri: str, study: str, outbox: Path, warn: Callable[[str], None]) -> Tracker:
    """Return the tracker that `tracking:` names. Raises InputError for an address that can never work."""
    check_address(uri)
    if uri == "off":
        return NullTracker()
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")  # its own 7 retries of 120 s stall the trainer
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    try:
        import mlflow  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"tracking {uri}: MLflow cannot be imported ({error}); pip install mlflow, or set tracking: off"
        ) from error
    return MlflowTracker(uri, study, outbox, warn)


def send_unsent(uri: str, study: str, outbox: Path, warn: Callable[[str], None]) -> None:
    """Send what an earlier run of `study` could not, if there is anything."""
    if uri != "off" and _left_behind(outbox, study):
        tracker = open_tracker(uri, study, outbox, warn)
        assert isinstance(tracker, MlflowTracker)
        tracker.send()


def sqlite_path(uri: str) -> Path | None:
    """Return the file of a `sqlite:///` address; None for any other."""
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def _texts(params: Mapping[str, Any]) -> dict[str, str]:
    """Return params as MLflow takes them."""
    return {key: str(value)[:6000] for key, value in params.items()}


def _end_tags(state: str, error: str | None) -> dict[str, str]:
    """Return what a trial's run is tagged with at its end."""
    return {"hpo.state": state} | ({"hpo.error": masked(error)[:5000]} if error else {})


def _cause(error: Exception) -> str:
    """Return the line of `error` that says most: a database's own, in what SQLAlchemy makes of it, else the first."""
    lines = f"{type(error).__name__}: {error}".splitlines()
    return next((line for line in lines if re.match(r"\([a-z0-9_.]+\.\w*Error\)", line)), lines[0])[:300]


def _now() -> int:
    return int(time.time() * 1000)


def _left_behind(outbox: Path, study: str) -> list[Path]:
    """Return the outbox files of `study`, `<study>.<process>.jsonl`, whose process is gone.

    Of another machine's, or of one that was started anew, that is so where nothing has been written for long.
    """
    found = []
    for file in sorted(outbox.glob("*.jsonl")):
        process = file.stem.removeprefix(f"{study}.")
        if process not in (file.stem, this_process()):
            with suppress(OSError):
                if is_gone(process) or time.time() - file.stat().st_mtime > _LONG_SECONDS:
                    found.append(file)
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep MLflow's and alembic's own lines (tables made, runs viewed, deprecations in their code) off the terminal."""
    loggers = [logging.getLogger(name) for name in ("mlflow", "alembic", "mlflow.store.db.utils")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)  # what fails is said in one line of ours
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
