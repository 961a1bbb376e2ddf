"""Where runs are logged: the contract of a tracker, and two that need nothing: none at all, and one in memory.

MLflow's is in `hpo.tracking.mlflow`. A tracker never stops training.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from hpo.errors import InputError, masked
from hpo.sqlite_files import misread
from hpo.stopping import StopToken

STATUS = {"COMPLETE": "FINISHED", "PRUNED": "FINISHED", "FAIL": "FAILED", "INTERRUPTED": "KILLED"}
"""Optuna's state of a trial (and ours of a study) -> MLflow's status of its run.

A pruned trial did all that it was to do. MLflow shows KILLED as it shows FAILED, with a red cross: a search that prunes
well would look broken. The run's name and the tag `hpo.state` say that it was pruned.
"""
PAUSED = "SCHEDULED"
"""MLflow's status of the run of a trial that is paused: it will run later."""


class Row(NamedTuple):
    """One value of a metric, and when it was reached."""

    step: int
    value: float
    ms: int
    """In milliseconds since 1970."""


class Tracker(ABC):
    """What the engine tells a tracker. `trial` is Optuna's number; None stands for the study's own run."""

    stop: StopToken = StopToken()
    """Once somebody has asked to stop, what is left is not waited for longer than this leaves time for."""

    @abstractmethod
    def start_study(
        self, tags: Mapping[str, str], texts: Mapping[str, str], params: Mapping[str, Any] | None = None
    ) -> None:
        """Begin, or resume, the study's run. `texts` are files to keep with it, by name; `params` its settings."""

    @abstractmethod
    def log_data(self, data: Mapping[str, str]) -> None:
        """Say on what data the study is run: `name`, `digest`, `source`, `schema` and `profile` (both in JSON)."""

    @contextmanager
    def together(self) -> Iterator[None]:
        """Within this, what is told may be kept, until its end: of a stack, the whole epoch is kept at once."""
        yield

    @abstractmethod
    def start_trial(
        self, trial: int, params: Mapping[str, Any], is_new: bool = False, tags: Mapping[str, str] | None = None
    ) -> None:
        """Begin a trial's run. `is_new`: nobody has before; it is looked for only where a peer may have since."""

    @abstractmethod
    def run_of(self, trial: int) -> str | None:
        """Return the id of a trial's run, where it is known by now: none waits for it."""

    @abstractmethod
    def log_params(self, trial: int | None, params: Mapping[str, Any]) -> None:
        """Log params that were not known when the run was begun.

        The study's may get another value later, when it has more trials: that one is logged under a name of its own
        (`best.lr_2`), since MLflow keeps the first value of a param.
        """

    @abstractmethod
    def log_metrics(self, trial: int | None, step: int, metrics: Mapping[str, float]) -> None:
        """Log metrics at an epoch (counted from 0)."""

    @abstractmethod
    def log_curve(self, key: str, rows: Sequence[Row]) -> None:
        """Log a metric of the study at several steps; what is there already is not logged again."""

    @abstractmethod
    def mark_best(self, trial: int) -> None:
        """Mark the run of the best trial, and no other one."""

    @abstractmethod
    def pause_trial(self, trial: int, effort: Mapping[str, float] | None = None) -> None:
        """Say of a trial's run that it is paused; it is resumed, or it ends. `effort` is what it has taken so far."""

    @abstractmethod
    def resume_trial(self, trial: int) -> None:
        """Say of the run of a paused trial, which any process may have begun, that it is resumed."""

    @abstractmethod
    def end_trial(
        self, trial: int, state: str, error: str | None = None, effort: Mapping[str, float] | None = None
    ) -> None:
        """End a trial's run; `state` is a key of STATUS, `effort` what it has taken: `seconds` and the like."""

    @abstractmethod
    def log_folder(self, folder: Path, name: str) -> None:
        """Keep the files of `folder` with the study's run, under `name`."""

    @abstractmethod
    def log_model(self, folder: Path, trial: int, facts: Mapping[str, Any]) -> None:
        """Register the model of the bundle in `folder`, which has `trial`'s params; the best one is the champion.

        `facts` say what it is compared by: `metric`, `direction`, its `test` metrics, and `data`, the fingerprint;
        `torch` is the version that wrote the file.
        """

    @abstractmethod
    def tag_study(self, tags: Mapping[str, str]) -> None:
        """Say more of the study while it runs: what was chosen for it, and why."""

    @abstractmethod
    def reconcile(self, ends: Mapping[int, tuple[str, str | None]], shared: bool = False) -> None:
        """End the runs of trials that have ended: those that a killed worker has left open, or that end otherwise.

        `ends` has each trial's state, a key of STATUS, and its error. A trial without a run gets none. `shared`: where
        several processes have trained the study's trials; of the runs that they have made for one trial, one is kept.
        """

    @abstractmethod
    def end_study(self, state: str) -> bool:
        """End the study's run, and send all that is left to send; return whether all of it was sent."""

    @abstractmethod
    def close(self) -> bool:
        """Send all that is left to send; the study's run goes on. Return whether all of it was sent."""


class NullTracker(Tracker):
    """`tracking: off`."""

    def start_study(
        self, tags: Mapping[str, str], texts: Mapping[str, str], params: Mapping[str, Any] | None = None
    ) -> None:
        pass

    def log_data(self, data: Mapping[str, str]) -> None:
        pass

    def tag_study(self, tags: Mapping[str, str]) -> None:
        pass

    def start_trial(
        self, trial: int, params: Mapping[str, Any], is_new: bool = False, tags: Mapping[str, str] | None = None
    ) -> None:
        pass

    def run_of(self, trial: int) -> str | None:
        return None

    def log_params(self, trial: int | None, params: Mapping[str, Any]) -> None:
        pass

    def log_metrics(self, trial: int | None, step: int, metrics: Mapping[str, float]) -> None:
        pass

    def log_curve(self, key: str, rows: Sequence[Row]) -> None:
        pass

    def mark_best(self, trial: int) -> None:
        pass

    def pause_trial(self, trial: int, effort: Mapping[str, float] | None = None) -> None:
        pass

    def resume_trial(self, trial: int) -> None:
        pass

    def end_trial(
        self, trial: int, state: str, error: str | None = None, effort: Mapping[str, float] | None = None
    ) -> None:
        pass

    def log_folder(self, folder: Path, name: str) -> None:
        pass

    def log_model(self, folder: Path, trial: int, facts: Mapping[str, Any]) -> None:
        pass

    def reconcile(self, ends: Mapping[int, tuple[str, str | None]], shared: bool = False) -> None:
        pass

    def end_study(self, state: str) -> bool:
        return True

    def close(self) -> bool:
        return True


class MemoryTracker(Tracker):
    """Keeps everything in dictionaries, by trial (None: the study)."""

    def __init__(self) -> None:
        self.params: dict[int | None, dict[str, Any]] = {}
        self.metrics: dict[int | None, list[tuple[int, dict[str, float]]]] = {}
        self.ended: dict[int | None, tuple[str, str | None]] = {}
        self.paused: set[int] = set()
        self.folders: list[Path] = []
        self.models: dict[int, dict[str, Any]] = {}
        self.tags: dict[str, str] = {}
        self.data: dict[str, str] = {}
        self.best: int | None = None
        self.effort: dict[int, dict[str, float]] = {}
        self.trial_tags: dict[int, dict[str, str]] = {}

    def start_study(
        self, tags: Mapping[str, str], texts: Mapping[str, str], params: Mapping[str, Any] | None = None
    ) -> None:
        self.ended.pop(None, None)
        self.tags |= tags
        if params:
            self.log_params(None, params)

    def log_data(self, data: Mapping[str, str]) -> None:
        self.data = dict(data)

    def tag_study(self, tags: Mapping[str, str]) -> None:
        self.tags |= tags

    def start_trial(
        self, trial: int, params: Mapping[str, Any], is_new: bool = False, tags: Mapping[str, str] | None = None
    ) -> None:
        self.params[trial] = dict(params)
        self.trial_tags[trial] = dict(tags or {})

    def run_of(self, trial: int) -> str | None:
        return f"run-{trial}" if trial in self.params else None

    def log_params(self, trial: int | None, params: Mapping[str, Any]) -> None:
        self.params.setdefault(trial, {}).update(unlogged(self.params.get(trial, {}), params))

    def log_metrics(self, trial: int | None, step: int, metrics: Mapping[str, float]) -> None:
        self.metrics.setdefault(trial, []).append((step, dict(metrics)))

    def log_curve(self, key: str, rows: Sequence[Row]) -> None:
        for row in rows:
            self.log_metrics(None, row.step, {key: row.value})

    def mark_best(self, trial: int) -> None:
        self.best = trial

    def pause_trial(self, trial: int, effort: Mapping[str, float] | None = None) -> None:
        self.paused.add(trial)
        self.effort[trial] = dict(effort or {})

    def resume_trial(self, trial: int) -> None:
        self.paused.discard(trial)

    def end_trial(
        self, trial: int, state: str, error: str | None = None, effort: Mapping[str, float] | None = None
    ) -> None:
        self.paused.discard(trial)
        self.effort[trial] = dict(effort or {})
        self.ended[trial] = (state, error and masked(error))

    def log_folder(self, folder: Path, name: str) -> None:
        self.folders.append(folder)

    def log_model(self, folder: Path, trial: int, facts: Mapping[str, Any]) -> None:
        self.models[trial] = dict(facts)

    def reconcile(self, ends: Mapping[int, tuple[str, str | None]], shared: bool = False) -> None:
        states = {trial: state for trial, (state, _) in self.ended.items()}
        self.ended |= {t: end for t, end in ends.items() if t in self.params and states.get(t) != end[0]}

    def end_study(self, state: str) -> bool:
        self.ended[None] = (state, None)
        return True

    def close(self) -> bool:
        return True


def unlogged(there: Mapping[str, Any], params: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of `params` that a run does not have yet; one of another value gets a number: `lr_2`."""
    new = {}
    for name, value in params.items():
        called, n = name, 1
        while called in there and there[called] != value:
            n += 1
            called = f"{name}_{n}"
        if called not in there:
            new[called] = value
    return new


def check_address(uri: str) -> None:
    """Raise InputError where `uri` is no address that MLflow can track to."""
    if wrong := misread(uri):
        raise InputError(f"tracking {uri}: {wrong}")
    scheme = uri.partition(":")[0]
    if uri == "off" or (":" in uri and scheme not in ("file",) and "/" in uri) or uri.startswith("databricks"):
        return
    raise InputError(
        f"{uri!r} must be off, a server (http://host:5000) or a database "
        "(sqlite:///mlruns/mlflow.db); MLflow gave up its file store"
    )
