"""What is in a storage: each study in one line, read once."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from optuna.trial import FrozenTrial, TrialState

from hpo.errors import HpoError, said
from hpo.search import schema
from hpo.search.budget import Counts, spans_of, wrong_row
from hpo.search.named import StoredStudy, is_ours, opened, stored_spec
from hpo.search.opening import as_stored, is_over, workers_of
from hpo.search.retrying import RetryingStorage
from hpo.search.view import Best

State = Literal["done", "running", "unfinished", "not hpo's", "unreadable"]


@dataclass(frozen=True, kw_only=True)
class Listed:
    """A study in a storage; of one that hpo has not made only the name, the state and the trials are known."""

    name: str
    state: State
    objective: str | None = None
    counts: Counts | None = None
    trials: int
    """Of its budget; of another program's study: how many there are."""
    metric: str | None = None
    maximize: bool | None = None
    best: Best | None = None
    active: datetime | None = None
    """When a trial was started or ended last (UTC)."""
    workers: Mapping[str, float]
    """Which processes work on it, each with until when its lease holds, in seconds since 1970."""
    why: str | None = None
    """Why it is unreadable."""

    def as_dict(self) -> dict[str, Any]:
        """Return what `--json` prints of it."""
        finished = None if self.counts is None else self.counts.finished
        best = None if self.best is None else {"number": self.best.number, "value": self.best.value}
        return {
            "study": self.name,
            "state": self.state,
            "objective": self.objective,
            "trials": {"finished": finished, "of": self.trials},
            "metric": self.metric,
            "direction": None if self.maximize is None else "maximize" if self.maximize else "minimize",
            "best": best,
            "last_active": None if self.active is None else self.active.isoformat(timespec="seconds"),
            "workers": sorted(self.workers),
        }


def studies_in(url: str) -> list[Listed]:
    """Return all studies in the storage at `url`, the one that was active last first.

    Raises InputError where there is no storage, StorageError where it cannot be opened.
    """
    with opened(url) as storage:
        listed = [listing(storage, url, study) for study in storage.get_all_studies()]
    return sorted(listed, key=lambda each: each.active or datetime.min.replace(tzinfo=UTC), reverse=True)


def listing(storage: RetryingStorage, url: str, study: StoredStudy) -> Listed:
    """Return what is known of one study of an opened storage."""
    trials = storage.get_all_trials(study._study_id, deepcopy=False)
    if not is_ours(study):
        active = _active(trials)
        return Listed(name=study.study_name, state="not hpo's", trials=len(trials), active=active, workers={})
    try:
        spec = stored_spec(study, url)
        search = as_stored(spec, storage)
        seen = search.view()
        best = seen.best()
    except HpoError as error:
        why = said(error)
        return Listed(name=study.study_name, state="unreadable", trials=len(trials), workers={}, why=why)
    workers = workers_of(search, seen)
    return Listed(
        name=study.study_name,
        state="running" if workers else "done" if is_over(search, seen) else "unfinished",
        objective=spec.objective,
        counts=seen.counts,
        trials=search.spec.trials if schema.STUDY_FILE in study.user_attrs else len(seen.trials),
        metric=search.metric,
        maximize=search.maximize,
        best=best,
        active=_active(trials, bool(workers)),
        workers=workers,
    )


def _active(trials: Sequence[FrozenTrial], workers: bool = False) -> datetime | None:
    """Return when a trial was started, paused or ended last; now, where there are `workers`."""
    moments = [time.time()] if workers else []
    for trial in trials:
        if wrong_row(trial) is None:
            which = 0 if trial.state == TrialState.RUNNING else 1  # of one that is dead it is not known when it ended
            moments += [span[which] for span in spans_of(trial)]
    return datetime.fromtimestamp(max(moments), UTC) if moments else None
