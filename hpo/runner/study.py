"""A whole study, without a screen: opened, run to its end, repaired, a trial of it exported.

The command line (`hpo.cli.commands`) and the Python API (`hpo.api`) call the same functions. What is to be said is
logged (`hpo.log`); how the trials are shown is up to the caller, who hands in `show`.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hpo.errors import HpoError, InputError, Interrupted
from hpo.export.bundle import require_place, require_writable
from hpo.export.formats import Formats
from hpo.log import log
from hpo.runner import checkpoints
from hpo.runner.advice import file_advice, start_advice
from hpo.runner.deadline import set_end
from hpo.runner.describing import announcement
from hpo.runner.joining import join_stored
from hpo.runner.launch import STOP_SECONDS, StudyMonitor, Workers, gpus, how_many
from hpo.runner.opening import (
    load_data,
    open_study,
    remember_source,
    require_same_unnamed,
    tell_of_data,
    warn_of_bundle,
    warn_of_source,
)
from hpo.runner.outcome import Outcome, outcome
from hpo.runner.preflight import preflight
from hpo.runner.prepare import Plan
from hpo.runner.progress import Progress
from hpo.runner.ray_workers import RayWorkers
from hpo.runner.refit import bundle_folder, conclude, finish
from hpo.runner.replay import note_environment
from hpo.runner.tracked import (
    TrackedProgress,
    begin_study,
    end_study,
    settle_runs,
    tell_export,
    tell_result,
    tracker_of,
)
from hpo.runner.worker import INTERRUPTED, work
from hpo.search import adoption, schema
from hpo.search.away import StorageAway
from hpo.search.confirmed import chosen
from hpo.search.identity import FRESH
from hpo.search.search import Search
from hpo.search.storage import close_storage, open_storage
from hpo.search.view import StudyView
from hpo.stopping import ANSWER_SECONDS, StopToken, signals
from hpo.study.data import Data
from hpo.study.trust import code_references

_LOOK_SECONDS = 1.0
"""How often to look what other processes have done."""
Show = Callable[[bool], AbstractContextManager[Progress]]
"""Gives what shows the trials; told whether this process alone trains them."""


@dataclass(frozen=True, kw_only=True)
class WorkerOptions:
    """How many processes are to train: `workers` (None: as many as there are GPUs, or cores), here or on Ray."""

    workers: int | None = 1
    ray: str | None = None
    gpus_per_worker: float | None = None
    """On Ray; None: one where the study may use CUDA and the cluster has GPUs, else none."""


@dataclass(frozen=True, kw_only=True)
class StudyFile:
    """What other processes are given to find the same study: a file, and what is laid over it (`--set`)."""

    path: Path
    overrides: Mapping[str, str]

    def command(self) -> Sequence[str]:
        """Return the arguments of `hpo` that make a process a worker of this study."""
        sets = [part for key, value in self.overrides.items() for part in ("--set", f"{key}={value}")]
        return ["worker", str(self.path), *sets]


def run(
    plan: Plan, search: Search, file: StudyFile, show: Show, options: WorkerOptions
) -> tuple[Outcome | None, StudyView]:
    """Train what is left of the study's trials, refit, test and export the best.

    Return the outcome, if there is one, and the study as it was seen at its end.

    Where all of that is done already, the stored outcome is returned and nothing is trained.
    Raises HpoError where no trial is complete, Interrupted when asked to stop.
    """
    require_same_unnamed(plan, search)
    search.settle_stop()
    seen = search.view()
    for line in start_advice(plan, seen):
        log.warning(line)
    best, done = chosen(search, seen), None
    over = seen.counts.unfinished == 0
    if over:
        done = outcome(search, best)
        seen = checkpoints.settle_weights(plan, search)
        settle_runs(plan, search)
        if seen.stopped is None:
            log.info("%s: all %d trials are done", plan.spec.name, plan.spec.trials)
    if done is not None or (over and best is not None and plan.function is not None):
        warn_of_source(plan, search)
    else:
        with signals() as stopping:
            search.storage.interrupt = stopping.requested
            done, seen = _run(plan, search, file, show, options, stopping, seen)
    warn_of_bundle(plan, done.bundle if done is not None else None)
    return done, seen


def _run(
    plan: Plan,
    search: Search,
    file: StudyFile,
    show: Show,
    options: WorkerOptions,
    stopping: StopToken,
    before: StudyView,
) -> tuple[Outcome | None, StudyView]:
    set_end(plan, search)
    if plan.function is None:
        _take_output(plan, search)
    data = load_data(plan, search)
    for line in file_advice(plan):
        log.warning(line)
    tracker = tracker_of(plan, search, stopping)
    for line in announcement(plan, data, before):
        log.info("%s", line)
    if data is not None:
        tell_of_data(data)
    _remember(plan, search)
    state, seen = "FAIL", None
    try:
        curve = begin_study(plan, search, tracker, data, file.path.read_text(encoding="utf-8"), before)
        n = how_many(options.workers, plan)
        alone = options.ray is None and n == 1
        with show(alone) as shown:
            progress = shown if curve is None else TrackedProgress(shown, curve)
            if alone:
                work(plan, data, search, tracker, progress, stopping)
            else:
                workers = _workers(plan, search, file, options, n)
                _watch(plan, search, workers, progress, stopping)
        seen = checkpoints.settle_weights(plan, search)  # the last trial may have been trained elsewhere
        if seen.counts.running == 0:
            tracker.reconcile(seen.ends, seen.is_shared)
        ended = conclude(plan, data, search, tracker, stopping.requested, seen) if data else None
        best = seen.best()
        if best is None:
            raise HpoError(_why_no_best(seen, plan))
        if data is None:
            tell_result(plan, search, tracker, seen, best, None)
        whole = seen.counts.waiting + seen.counts.paused == 0 or plan.spec.time is not None
        state = "COMPLETE" if whole else "INTERRUPTED"
        return ended, seen
    except Interrupted:
        state = "INTERRUPTED"
        raise
    finally:
        end_study(plan, search, tracker, state, seen)


def _take_output(plan: Plan, search: Search) -> None:
    """Raise an error where bundle and checkpoints cannot be written, or are another study's."""
    require_writable(bundle_folder(plan).parent)
    checkpoints.claim_folder(plan, search)


def _remember(plan: Plan, search: Search) -> None:
    """Store what workers without a study file need, and what the study is run with.

    Say so where the objective's code is another one by now.
    """
    if warn_of_source(plan, search):
        remember_source(plan, search)
        if search.attrs.get(schema.CONFIRMED):
            search.remember(schema.CONFIRMED, {})
            log.warning("what was confirmed before is confirmed again: its seeds were trained by the former code")
    search.remember(schema.STUDY_FILE, plan.document.as_json(without=("storage",)))
    note_environment(plan, search)


def _workers(plan: Plan, search: Search, file: StudyFile, options: WorkerOptions, n: int) -> Workers | RayWorkers:
    """Return `n` processes that are to train, here or on Ray."""
    if options.ray is None:
        return Workers(file.command(), n, gpus(plan), search)
    places = {key: json.dumps(getattr(plan.spec, key)) for key in ("storage", "tracking", "output")}
    named = [code for _, code in code_references(plan.spec)]
    share = partial(join_stored, plan.spec.name, {**file.overrides, **places}, named)
    per_worker = 0.0 if plan.spec.device == "cpu" and options.gpus_per_worker is None else options.gpus_per_worker
    return RayWorkers(options.ray, n, per_worker, share)


def _watch(plan: Plan, search: Search, workers: Workers | RayWorkers, progress: Progress, stopping: StopToken) -> None:
    """Have the workers train and show what they do, until they are done. Raises Interrupted when asked to stop."""
    monitor = StudyMonitor(plan, search, progress)
    log.info("starting workers; each imports PyTorch and loads the data")
    if isinstance(workers, Workers):  # a look at a storage that hangs would keep the signal from them for seconds
        stopping.heard = workers.ask
    workers.start()
    try:
        while workers.look():
            if stopping.requested():
                raise search.storage.stopped() if search.storage.away else Interrupted(INTERRUPTED)
            with suppress(StorageAway), search.storage.at_once():  # a storage that is away must not hold up a stop
                monitor.look()
            time.sleep(_LOOK_SECONDS)
    finally:
        workers.stop(min(STOP_SECONDS, max(0.0, stopping.seconds_left() - 1)))
        if stopping.seconds_left() > ANSWER_SECONDS:
            with suppress(StorageAway), search.storage.at_once():
                monitor.look()


def check(plan: Plan) -> tuple[Data | None, torch.nn.Module | None]:
    """Return the study's data and a network of its space, once both are tried out (None: the objective is a function).

    Raises InputError with all that is wrong with the storage's study, the output, the data and the networks.
    """
    problems: list[InputError] = []
    data = model = None
    try:
        search = open_study(plan, make=False)
        if search is not None:
            search.close()
        close_storage(open_storage(plan.spec.storage))
    except InputError as error:
        problems.append(error)
    try:
        require_writable(bundle_folder(plan).parent)
    except InputError as error:
        problems.append(error)
    try:
        data = plan.load_data()
        if data is not None:
            tell_of_data(data)
            model, warnings = preflight(plan, data)
            for warning in [*warnings, *file_advice(plan)]:
                log.warning(warning)
    except InputError as error:
        problems.append(error)
    if problems:
        raise InputError("\n".join(str(problem) for problem in problems))
    return data, model


def repair(plan: Plan, search: Search) -> tuple[StudyView, bool]:
    """Free the budget's slots of trials whose worker died, bring the tracker's runs in line.

    Return the study then, and whether the tracker has taken all that it was to be told.
    """
    end = time.monotonic() + plan.spec.grace
    while search.repair() and time.monotonic() < end:
        time.sleep(_LOOK_SECONDS)  # to see whether a lease that has run out is renewed
    for lost in search.drain_lost():
        what = "its retries are spent" if lost.state == "FAIL" else "it will be retried"
        log.warning("trial %d is ended: %s; %s", lost.number, lost.reason, what)
    seen = checkpoints.settle_weights(plan, search)
    return seen, settle_runs(plan, search, always=True)


def adopt(plan: Plan, search: Search, trials: Sequence[Any], source: str) -> int:
    """Add another study's `trials` as history for the sampler; return how many, and log why others are left out."""
    n, left_out = adoption.adopt(search.study, search.storage, plan.spec.storage, plan.space, trials, source)
    if schema.STUDY_FILE not in search.attrs:  # so that who lists it before it is run knows its budget
        search.remember(schema.STUDY_FILE, plan.document.as_json(without=("storage",)))
    log.info("%s: %d of %d trials of %s are history for the sampler now", plan.spec.name, n, len(trials), source)
    for reason, times in left_out.most_common():
        log.info("  left out: %d trials, %s", times, reason)
    return n


def export(
    plan: Plan, search: Search, seen: StudyView, number: int | None, folder: Path | None, formats: Formats
) -> Outcome:
    """Train a complete trial's params on train + validation, test and export them; `number` None: the best.

    Raises InputError where there is no such trial or no network, ExportError, Interrupted.
    """
    best = (chosen(search, seen) if number is None else None) or seen.best(number)
    if best is None:
        raise InputError(_no_such_trial(seen, plan, number))
    if broken := seen.broken(best.number):
        log.warning("trial %d is exported though it breaks a constraint: %s", best.number, broken)
    if folder is not None:
        require_place(folder)
    warn_of_source(plan, search)
    data = load_data(plan, search)
    if data is None:
        raise InputError(f"objective {plan.spec.objective} is a function: it has no model to export")
    with signals() as stopping:
        search.storage.interrupt = stopping.requested
        done = finish(plan, data, search, best, folder or bundle_folder(plan, number), stopping.requested, formats)
    tell_export(plan, search, done)
    return done


def _no_such_trial(seen: StudyView, plan: Plan, number: int | None) -> str:
    study, complete = plan.spec.name, [trial.number for trial in seen.complete]
    if number is None and complete:
        return _none_feasible(seen, plan)
    if number is None:
        return f"study {study!r} has no complete trial yet, so there is nothing to export"
    some = ", ".join(map(str, complete[:20])) or "none"
    return f"--trial {number}: is not a complete trial of study {study!r}; complete are: {some}"


def _why_no_best(seen: StudyView, plan: Plan) -> str:
    study, counts = plan.spec.name, seen.counts
    if seen.constrained["infeasible"]:
        return _none_feasible(seen, plan)
    reasons = [t.user_attrs[schema.ERROR] for t in seen.trials if schema.ERROR in t.user_attrs]
    last = f"; the last one failed: {reasons[-1]}" if reasons else ""
    return (
        f"study {study!r} has no complete trial to choose from: {counts.pruned} pruned, "
        f"{counts.failed} failed, {counts.waiting} not started{last}"
    )


def _none_feasible(seen: StudyView, plan: Plan) -> str:
    """Return which constraint keeps a study from having a best trial, by how much, and what to do."""
    return (
        f"study {plan.spec.name!r} has no feasible trial, so there is nothing to export: "
        f"{seen.feasible_text}; raise `trials`, or loosen the constraint or search other params in a new study "
        f"({FRESH})"
    )
