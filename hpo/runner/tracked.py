"""The study's own run in the tracker: begun, kept up while trials end, ended, and brought in line after a kill."""

import json
import math
import time
from collections.abc import Mapping
from typing import Any

import torch

from hpo.errors import masked
from hpo.export.environment import git_commit, user
from hpo.log import log
from hpo.runner.describing import description, intention
from hpo.runner.keeping import unsent_of
from hpo.runner.outcome import Outcome, outcome
from hpo.runner.prepare import Plan
from hpo.runner.progress import Progress
from hpo.search import schema
from hpo.search.confirmed import chosen, confirmation
from hpo.search.notes import trial_page, write_note
from hpo.search.retrained import Confirmed
from hpo.search.search import Search
from hpo.search.view import Best, StudyView
from hpo.stopping import StopToken
from hpo.study.data import Data
from hpo.study.goals import direction_of
from hpo.tracking.base import NullTracker, Row, Tracker
from hpo.tracking.leftovers import left_behind
from hpo.tracking.opening import open_tracker
from hpo.tracking.values import NOTE, linked


def tracker_of(plan: Plan, search: Search, stop: StopToken | None = None) -> Tracker:
    """Return the study's tracker, in a hurry once `stop` says so. Raises InputError for an address that never works."""
    if schema.OWN_RUNS not in search.attrs and search.view().n_claimed == 0:
        search.remember(schema.OWN_RUNS, True)
    tracker = open_tracker(
        plan.spec.tracking,
        plan.spec.name,
        unsent_of(plan.spec),
        making=search.making,
        adopts=schema.OWN_RUNS not in search.attrs,
        tags={} if plan.spec.tracking == "off" else _source(plan),
        lease=plan.spec.grace / 2,
    )
    tracker.stop = stop or tracker.stop
    return tracker


def _source(plan: Plan) -> dict[str, str]:
    """Return MLflow's tags for where a run comes from."""
    commit = git_commit()
    return {
        "mlflow.user": user(),
        "mlflow.source.name": masked(plan.document.name if plan.document.lines else plan.spec.objective),
        "mlflow.source.type": "LOCAL",
    } | ({"mlflow.source.git.commit": commit} if commit else {})


def begin_study(
    plan: Plan, search: Search, tracker: Tracker, data: Data | None, file: str, seen: StudyView
) -> "BestSoFar | None":
    """Begin the study's run, or resume it, and return what keeps its curve up; None: it is not tracked.

    The storage holds that it is open, until `end_study` has closed it. `file` is the text of the study file, `seen` a
    view of the study.
    """
    if isinstance(tracker, NullTracker):
        return None
    now, before = _tracked(plan, seen, "RUNNING"), search.attrs.get(schema.TRACKED)
    if seen.counts.finished and (before is None or before["tracking"] != now["tracking"]):
        was = "without tracking" if before is None else f"with tracking {before['tracking']}"
        log.info(
            f"MLflow: {seen.counts.finished} trials ended {was} and have no run in {now['tracking']}; `hpo report` and "
            "`hpo status` have all"
        )
    search.remember(schema.TRACKED, now)
    spec = plan.spec
    tags = {
        "hpo.objective": spec.objective,
        "hpo.metric": plan.metric,
        "hpo.storage": masked(spec.storage),
        "hpo.sampler": spec.sampler.name,
        "hpo.pruner": spec.pruner.name,
        "hpo.device": str(plan.device),
        NOTE: intention(plan),
    }
    tracker.start_study(tags, {"study.yaml": masked(file)} | _sources(plan), _settings(plan))
    if data is not None:
        tracker.log_data(_dataset(plan, data, search.attrs.get(schema.DATA, "")))
    best = BestSoFar(plan, search, tracker)
    best.tell(seen)
    return best


def _settings(plan: Plan) -> dict[str, Any]:
    """Return the study's settings, as the params of its run; those of its trials are in `space.` and `fixed.`."""
    spec = plan.spec
    settings = {
        "objective": spec.objective,
        "metric": plan.metric,
        "direction": "maximize" if plan.maximize else "minimize",
        **{name: getattr(spec, name) for name in ("trials", "epochs", "seed", "value", "patience", "stack", "timeout")},
        "sampler": spec.sampler.name,
        "pruner": spec.pruner.name,
    }
    settings |= {f"direction.{name}": direction_of(more) for name, more in plan.others.items()}
    settings |= {f"constraints.{name}": text for name, text in spec.constraints.items()}
    options = {f"options.{name}": masked(str(value)) for name, value in plan.options.items()}
    space = {f"space.{each.name}": each.describe() for each in plan.space.dimensions}
    fixed = {f"fixed.{name}": value for name, value in plan.space.fixed.items()}
    return {name: value for name, value in (settings | options | space | fixed).items() if value is not None}


def _sources(plan: Plan) -> dict[str, str]:
    """Return the source of the objective, as a file to keep with the study's run."""
    file = plan.source_file
    if file is None:
        return {}
    try:
        return {file.name: masked(file.read_text(encoding="utf-8"))}
    except (OSError, UnicodeDecodeError):
        return {}


def _dataset(plan: Plan, data: Data, fingerprint: str) -> dict[str, str]:
    info = data.info
    columns = [{"name": name, "type": info.input_dtypes[name], "shape": list(s)} for name, s in info.inputs.items()]
    rows = {f"{name}_rows": len(split) for name, split in data.splits.items()}
    return {
        "name": plan.spec.objective[-500:],
        "digest": fingerprint,
        "source": json.dumps({"objective": plan.spec.objective, "options": masked(str(plan.options))}),
        "schema": json.dumps({"hpo_inputs": columns, "classes": list(info.class_names[:1000])}),
        "profile": json.dumps({"num_rows": sum(rows.values()), **rows}),
    }


class BestSoFar:
    """Keeps the curve of the best value so far in the study's run: a step for each trial that has ended."""

    EVERY_SECONDS = 10.0

    def __init__(self, plan: Plan, search: Search, tracker: Tracker) -> None:
        self._key, self._search, self._tracker = f"best_{plan.metric_key}", search, tracker
        self._n_told = 0
        self._next = 0.0

    def tell(self, seen: StudyView) -> None:
        """Log what has been added to the curve since the last time."""
        rows = [Row(*each) for each in seen.best_so_far]
        self._tracker.log_curve(self._key, rows[self._n_told :])
        self._n_told = len(rows)

    def tell_sometimes(self) -> None:
        """Log it if the last time was long ago, also for how long it takes to read the study."""
        start = time.monotonic()
        if start >= self._next:
            self.tell(self._search.view())
            self._next = time.monotonic() + max(self.EVERY_SECONDS, 20 * (time.monotonic() - start))


class TrackedProgress(Progress):
    """Shows what another one shows, and keeps the curve of the best value up as trials end."""

    def __init__(self, shown: Progress, best: BestSoFar) -> None:
        self._shown, self._best = shown, best

    def looked(self, seen: StudyView) -> None:
        self._shown.looked(seen)

    def trial_started(self, number: int, params: Mapping[str, Any]) -> None:
        self._shown.trial_started(number, params)

    def epoch_ended(self, number: int, epoch: int, epochs: int, metrics: Mapping[str, float]) -> None:
        self._shown.epoch_ended(number, epoch, epochs, metrics)

    def trial_paused(self, number: int, epoch: int) -> None:
        self._shown.trial_paused(number, epoch)

    def trial_ended(
        self, number: int, state: str, value: float | None, reason: str | None, seconds: float | None = None
    ) -> None:
        self._shown.trial_ended(number, state, value, reason, seconds)
        self._best.tell_sometimes()


def tell_result(
    plan: Plan, search: Search, tracker: Tracker, seen: StudyView, best: Best, done: Outcome | None
) -> None:
    """Tell the study's run its best trial, and what has become of that: also what a peer has concluded.

    That one may have been killed before it told it. The storage gets it as the study's note.
    """
    confirmed = confirmation(search, seen)
    found = description(plan, seen, best, done, confirmed)
    write_note(search, linked(found, lambda number: trial_page(search, number)) + _where_tracked(plan))
    if isinstance(tracker, NullTracker):
        return
    counts = seen.counts
    BestSoFar(plan, search, tracker).tell(seen)
    tests = {f"test_{name}": value for name, value in (done.test if done else {}).items()}
    numbers = {
        "trials_complete": counts.complete,
        "trials_pruned": counts.pruned,
        "trials_failed": counts.failed,
        **({"trials_feasible": len(seen.feasible)} if seen.feasible_text else {}),
        "epochs_trained": seen.effort.epochs,
        "epochs_without_pruning": seen.effort.without,
        "seconds": round(search.seconds_used(seen), 3),
    }
    seeds = done.seeds if done else {}
    for what in ("mean", "std") if seeds else ():
        tests |= {f"test_{name}_{what}": value for name, value in seeds[what].items()}
    tests |= _numbers(confirmed)
    tests |= done.beside.numbers() if done is not None and done.beside is not None else {}
    tracker.log_metrics(None, counts.finished, tests | {name: float(value) for name, value in numbers.items()})
    tracker.log_params(None, {"best.trial": best.number} | {f"best.{k}": v for k, v in best.params.items()})
    bundle = {"hpo.bundle": str(done.bundle)} if done and done.bundle else {}
    tags = {"hpo.best_trial": str(best.number), "hpo.data": str(search.attrs.get(schema.DATA, ""))}
    tracker.tag_study(tags | bundle | {NOTE: found})
    tracker.mark_best(best.number)
    if done and done.bundle is not None:
        tracker.log_folder(done.bundle, "bundle")
        tracker.log_model(done.bundle, done.number, _compared_by(plan, search, done))


def _compared_by(plan: Plan, search: Search, done: Outcome) -> dict[str, Any]:
    """Return what tells which of two models of the study is the better one, and the torch that has written it."""
    return {
        "metric": plan.metric,
        "direction": "maximize" if plan.maximize else "minimize",
        "test": dict(done.test),
        "data": str(search.attrs.get(schema.DATA, "")),
        "torch": str(torch.__version__),
    }


def _numbers(confirmed: Confirmed | None) -> dict[str, float]:
    """Return the metrics of a study's run that say how sure its winner is."""
    if confirmed is None:
        return {}
    interval = confirmed.interval
    numbers = {
        "mean": confirmed.winner.mean,
        "std": confirmed.winner.deviation,
        "low": None if interval is None else interval.low,
        "high": None if interval is None else interval.high,
        "chance_of_best": confirmed.chances[0],
        "optimism": confirmed.optimism,
    }
    return {f"confirmed_{name}": x for name, x in numbers.items() if x is not None and math.isfinite(x)}


def _where_tracked(plan: Plan) -> str:
    """Return where the study's runs are, as the end of its note."""
    spec = plan.spec
    if spec.tracking == "off":
        return ""
    return f"\n\nIts runs in MLflow: `{masked(spec.tracking)}`, experiment `{spec.name}`."


def tell_export(plan: Plan, search: Search, done: Outcome) -> None:
    """Tell the run of a trial that was exported by itself its test metrics, and keep its bundle with the study's."""
    tracker = tracker_of(plan, search)
    tracker.log_metrics(done.number, plan.spec.epochs, {f"test_{name}": value for name, value in done.test.items()})
    if done.bundle is not None:
        tracker.log_folder(done.bundle, f"bundle-trial-{done.number}")
    tracker.close()


def end_study(plan: Plan, search: Search, tracker: Tracker, state: str, seen: StudyView | None = None) -> bool:
    """End the study's run, and note in the storage that its end has arrived, if it has; return whether it has.

    `seen` is a view of the study, if there is one since its last trial ended.
    """
    arrived = tracker.end_study(state)
    if arrived and state == "COMPLETE" and plan.spec.tracking != "off":
        search.remember(schema.TRACKED, _tracked(plan, seen or search.view(), state))
    return arrived


def _tracked(plan: Plan, seen: StudyView, state: str) -> dict[str, Any]:
    return {"tracking": masked(plan.spec.tracking), "state": state, "trials": seen.counts.finished}


def settle_runs(plan: Plan, search: Search, always: bool = False) -> bool:
    """Bring the runs of a study in the tracker to the ends that they have in the storage, where they may differ.

    They do where whoever ended the study was killed, or the tracker was away, before all was told. What is there
    already is not told again; where the storage says that all has arrived, the tracker is not even asked, unless
    `always`. The study's own run ends only with its last trial and its export. Return whether all of it has arrived.
    """
    if plan.spec.tracking == "off":
        return True
    seen = search.view()
    best, tracked = chosen(search, seen), search.attrs.get(schema.TRACKED)
    done = outcome(search, best)
    over = seen.counts.unfinished == 0 and (done is not None or (best is not None and plan.function is not None))
    ended = _tracked(plan, seen, "COMPLETE")
    elsewhere = tracked is not None and tracked["tracking"] != ended["tracking"]
    all_told = elsewhere or tracked == ended or not over
    if all_told and not always and not left_behind(unsent_of(plan.spec), plan.spec.name, search.making):
        return True
    tracker = tracker_of(plan, search)
    tracker.reconcile(seen.ends, seen.is_shared)
    if not over:
        return tracker.close()
    if best is not None:
        tell_result(plan, search, tracker, seen, best, done)
    return end_study(plan, search, tracker, "COMPLETE", seen)
