"""What the commands do: each prints for a person and returns the summary that `--json` prints."""

import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from hpo.cli import console as view
from hpo.cli.console import Notes
from hpo.errors import HpoError, InputError, Interrupted, masked
from hpo.export.bundle import finite, require_place
from hpo.runner import checkpoints
from hpo.runner.launch import LAUNCHED, LAUNCHER, StudyMonitor, Workers, how_many
from hpo.runner.preflight import preflight
from hpo.runner.prepare import OUTPUT, Plan, prepare
from hpo.runner.progress import Progress
from hpo.runner.ray_workers import RayWorkers
from hpo.runner.refit import (
    Outcome,
    begin_tracking,
    bundle_folder,
    conclude,
    end_tracking,
    finish,
    outcome,
    settle_runs,
    tracker_of,
)
from hpo.runner.worker import INTERRUPTED, work
from hpo.search.retrying import StorageAway
from hpo.search.search import CODE, DATA, STUDY_FILE, Best, Search, open_search, stored_file
from hpo.search.storage import close_storage, open_storage, serve_storage
from hpo.stopping import Stop, signals
from hpo.study import loading as objectives
from hpo.study.data import Data
from hpo.study.objective import Function
from hpo.study.trust import code_references, require_harmless, require_passwords

_LOOK_SECONDS = 1.0
"""How often to look what other processes have done."""


@dataclass(frozen=True, kw_only=True)
class WorkerOptions:
    """How many processes are to train: `workers` (None: as many as there are GPUs, or cores), here or on Ray."""

    workers: int | None = 1
    ray: str | None = None
    gpus_per_worker: float = 0.0


def run(path: Path, overrides: Mapping[str, str], several: WorkerOptions | None = None) -> dict[str, Any]:
    """`hpo run`."""
    out = _console()
    plan = _prepare(path, overrides, out)
    search = _open(plan, out)
    assert search is not None
    with ExitStack() as stack:
        stack.callback(search.close)
        best, done = search.best(), None
        over = search.counts().unfinished == 0
        if over:
            done = outcome(search, best)
            checkpoints.settle_weights(plan, search, out.print)
            settle_runs(plan, search, out.print)
            out.print(f"{plan.spec.name}: all {plan.spec.trials} trials are done")
        if done is None and not (over and best is not None and isinstance(plan.objective, Function)):
            stopping = search.storage.interrupt = stack.enter_context(signals())
            done = _run(plan, search, stopping, out, overrides, several or WorkerOptions())
        best = search.best()
        _print_result(plan, search, best, done, out)
        return _summary(plan, search, best, done)


def _run(
    plan: Plan, search: Search, stopping: Stop, out: Console, overrides: Mapping[str, str], several: WorkerOptions
) -> Outcome | None:
    data = _load(plan, search)
    tracker = tracker_of(plan, search, out.print)
    begin_tracking(plan, search)
    of_what = f"of {plan.spec.epochs} epochs on {plan.device}, {len(data.train)} rows" if data else "of a function"
    out.print(f"{plan.spec.name}: {plan.spec.trials} trials {of_what}; {masked(plan.spec.storage)}")
    if code_differs(plan, search):
        out.print("the objective's code has changed since the study began: its earlier trials may not compare")
        search.remember(CODE, objectives.source_fingerprint(plan.objective))
    search.remember(STUDY_FILE, plan.document.as_json(without=("storage",)))
    state = "FAIL"
    try:
        tracker.start_study(_tags(plan), {"study.yaml": masked(Path(plan.document.name).read_text(encoding="utf-8"))})
        n = how_many(several.workers, plan.device)
        alone = several.ray is None and n == 1
        with _progress(plan, search, out, alone) as progress:
            if alone:
                work(plan, data, search, tracker, progress, stopping, stopping.overdue)
            else:
                _work_together(plan, search, progress, stopping, overrides, several, n)
        checkpoints.settle_weights(plan, search, out.print)  # the last trial may have been trained elsewhere
        if search.counts().running == 0:
            tracker.reconcile(search.ends())
        ended = conclude(plan, data, search, tracker, stopping, out.print) if data else None
        if search.best() is None:
            raise HpoError(_why_no_best(search))
        state = "COMPLETE" if search.counts().waiting == 0 else "INTERRUPTED"
        return ended
    except Interrupted:
        state = "INTERRUPTED"
        raise
    finally:
        end_tracking(plan, search, tracker, state)


def _work_together(
    plan: Plan,
    search: Search,
    progress: Progress,
    stopping: Stop,
    overrides: Mapping[str, str],
    several: WorkerOptions,
    n: int,
) -> None:
    """Have `n` processes train, show what they do, until they are done. Raises Interrupted when asked to stop."""
    workers: Workers | RayWorkers
    if several.ray is None:
        sets = [part for key, value in overrides.items() for part in ("--set", f"{key}={value}")]
        command = ["worker", plan.document.name, *sets]
        workers = Workers(command, n, plan.device, progress.note, search)
    else:
        addresses = {key: json.dumps(getattr(plan.spec, key)) for key in ("storage", "tracking")}
        named = [code for _, code in code_references(plan.spec)]
        share = partial(worker, None, plan.spec.name, {**overrides, **addresses}, named=named)
        workers = RayWorkers(several.ray, n, several.gpus_per_worker, share)
    watch = StudyMonitor(plan, search, progress)
    workers.start()
    try:
        while workers.look():
            if stopping():
                raise Interrupted(INTERRUPTED)
            with suppress(StorageAway), search.storage.at_once():  # a storage that is away must not hold up a stop
                watch.look()
            time.sleep(_LOOK_SECONDS)
    finally:
        workers.stop()
        with suppress(StorageAway), search.storage.at_once():
            watch.look()


def worker(
    path: Path | None,
    study: str | None,
    overrides: Mapping[str, str],
    stop: Stop | None = None,
    named: Collection[str] | None = (),
) -> dict[str, Any]:
    """`hpo worker`: of a study file, or of a `study` that the storage knows; until `stop`, else a signal, ends it.

    Of such a study only code that is among the `named` is run; None: whatever the storage names.
    """
    out = _console()
    with ExitStack() as stack:
        is_ours = path is not None
        if path is None:
            path = stack.enter_context(_stored_study(study, overrides, named))
        plan = _prepare(path, overrides, out, None if is_ours else named)
        launched = LAUNCHED in os.environ
        search = _open(plan, out, wait=launched)  # the study is known to be there then
        assert search is not None
        stack.callback(search.close)
        if code_differs(plan, search):
            raise InputError(
                f"the code of objective {plan.spec.objective} is not what study {plan.spec.name!r} began with: its "
                "trials would not compare; bring that code here, or give another `name`"
            )
        launcher = os.environ.get(LAUNCHER)
        stopping = stack.enter_context(signals(int(launcher) if launcher else None)) if stop is None else stop
        search.storage.interrupt = stopping
        data = _load(plan, search)
        tracker = tracker_of(plan, search, out.print)
        stack.callback(tracker.close)
        with nullcontext(Notes(out.print)) if launched else _progress(plan, search, out) as progress:
            work(plan, data, search, tracker, progress, stopping, stopping.overdue)
        return _summary(plan, search, search.best(), None)


@contextmanager
def _stored_study(name: str | None, overrides: Mapping[str, str], named: Collection[str] | None) -> Iterator[Path]:
    """Give the study file that the storage keeps of a study, as a file."""
    url = overrides.get("storage", "").strip('"')
    if not name or not url:
        raise InputError("give a study file, or --study NAME and --storage URL of a study that was started")
    values = stored_file(url, name) | {"name": name}
    if named is not None:
        require_harmless(name, values, overrides)
    require_passwords(name, values, overrides)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "study.yaml"  # a name may be a path
        path.write_text(json.dumps(values), encoding="utf-8")
        yield path


def repair(path: Path, overrides: Mapping[str, str]) -> dict[str, Any]:
    """`hpo repair`."""
    out = _console()
    plan = prepare(path, overrides)
    search = _open_existing(plan, path, out)
    with ExitStack() as stack:
        stack.callback(search.close)
        end = time.monotonic() + plan.spec.grace
        while search.repair() and time.monotonic() < end:
            time.sleep(_LOOK_SECONDS)  # to see whether a lease that has run out is renewed
        for lost in search.drain_lost():
            what = "its retries are spent" if lost.state == "FAIL" else "it will be retried"
            out.print(f"trial {lost.number} is ended: {lost.reason}; {what}")
        checkpoints.settle_weights(plan, search, out.print)
        settle_runs(plan, search, out.print, always=True)
        counts = search.counts()
        out.print(
            f"{plan.spec.name}: {counts.finished} of {plan.spec.trials} trials done, {counts.running} running, "
            f"{counts.waiting} waiting; the runs in {masked(plan.spec.tracking)} say the same"
        )
        return _summary(plan, search, search.best(), None)


def serve(path: Path, overrides: Mapping[str, str], host: str, port: int) -> None:
    """`hpo serve`."""
    out = _console()
    plan = prepare(path, overrides)
    out.print(
        f"there is no login: whoever reaches {host}:{port} can read, change and delete every study in this storage, "
        "and with it what workers search, report and write to MLflow; no code of theirs runs (see SECURITY.md)"
    )
    out.print(f"{masked(plan.spec.storage)} is served; workers: --storage grpc://{host}:{port}; Ctrl-C ends it")
    serve_storage(plan.spec.storage, host, port)


def check(path: Path, overrides: Mapping[str, str]) -> None:
    """`hpo check`."""
    out = _console()
    plan = _prepare(path, overrides, out)
    problems = []
    data = model = None
    for look in (lambda: _open(plan, out, make=False), lambda: close_storage(open_storage(plan.spec.storage))):
        try:
            look()
        except InputError as error:
            problems.append(error)
            break
    try:
        data = plan.load_data()
        model = preflight(plan, data, out.print) if data else None
    except InputError as error:
        problems.append(error)
    if problems:
        raise InputError("\n".join(str(problem) for problem in problems))
    _print_check(plan, data, model, out)


def _print_check(plan: Plan, data: Data | None, model: torch.nn.Module | None, out: Console) -> None:
    direction = "highest" if plan.maximize else "lowest"
    out.print(
        view.table(
            f"{plan.spec.name}: the {direction} {plan.metric} on validation, of {plan.spec.trials} trials of "
            f"{plan.spec.epochs} epochs",
            ["parameter", "values"],
            [[d.name, d.describe()] for d in plan.space.dimensions]
            + [[name, f"{value} (fixed)"] for name, value in plan.space.fixed.items()]
            + ([["(any)", "the function suggests its own"]] if isinstance(plan.objective, Function) else []),
        )
    )
    if model is not None:
        _print_model(model, out)
    if data is not None:
        _print_data(data, out)
    out.print(
        f"\nsampler {plan.spec.sampler.name}, pruner {plan.spec.pruner.name}, device {plan.device}, "
        f"storage {masked(plan.spec.storage)}, tracking {masked(plan.spec.tracking)}"
    )
    out.print("nothing is wrong")


def _print_model(model: torch.nn.Module, out: Console) -> None:
    rows = [
        [
            name or "(the network)",
            type(module).__name__,
            f"{sum(p.numel() for p in module.parameters(recurse=False)):,}",
        ]
        for name, module in model.named_modules()
        if not list(module.children())
    ]
    n_parameters = sum(p.numel() for p in model.parameters())
    out.print()
    out.print(
        view.table(
            f"model: {n_parameters:,} parameters (the first corner of the space)",
            ["module", "type", "parameters"],
            rows,
        )
    )


def _print_data(data: Data, out: Console) -> None:
    shapes = [
        [
            name,
            str(len(split)),
            ", ".join(f"{n} {tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}" for n, x in split.inputs.items()),
            f"{tuple(split.targets.shape)} {str(split.targets.dtype).removeprefix('torch.')}",
        ]
        for name, split in data.splits.items()
    ]
    out.print()
    out.print(view.table("data", ["split", "rows", "inputs", "targets"], shapes))


def status(path: Path, overrides: Mapping[str, str]) -> dict[str, Any]:
    """`hpo status`."""
    out = _console()
    plan = prepare(path, overrides)
    search = _open_existing(plan, path, out)
    try:
        counts, best = search.counts(), search.best()
        used = search.seconds_used()
        board = view.ProgressState(counts, best, plan.spec.trials, plan.metric)
        out.print(
            f"{plan.spec.name}: {counts.finished} of {plan.spec.trials} trials done "
            f"({counts.complete} complete, {counts.pruned} pruned, {counts.failed} failed), "
            f"{counts.running} running, {counts.waiting} waiting"
        )
        out.print(board.best_text() + (f": {view.shown(plan.space.searched(best.params))}" if best else ""))
        for trial in search.running():
            value = "" if trial.value is None else f", {plan.metric} {trial.value:.4f}"
            out.print(f"  trial {trial.number}: epoch {trial.epoch}/{plan.spec.epochs}{value}")
        left = used / counts.finished * counts.unfinished if counts.finished and counts.unfinished else None
        if plan.spec.timeout is not None and counts.unfinished:
            over = search.seconds_left(plan.spec.timeout)
            left = over if left is None else min(over, left)
        out.print(
            f"time used {view.duration(used)}" + (f", about {view.duration(left)} left" if left is not None else "")
        )
        return _summary(plan, search, best, outcome(search, best))
    finally:
        search.close()


def export(path: Path, overrides: Mapping[str, str], number: int | None, folder: Path | None) -> dict[str, Any]:
    """`hpo export`."""
    out = _console()
    plan = _prepare(path, overrides, out)
    search = _open_existing(plan, path, out)
    with ExitStack() as stack:
        stack.callback(search.close)
        best = search.best(number)
        if best is None:
            raise InputError(_no_such_trial(search, number))
        if folder is not None:
            require_place(folder)
        data = _load(plan, search)
        if data is None:
            raise InputError(f"objective {plan.spec.objective} is a function: it has no model to export")
        stopping = search.storage.interrupt = stack.enter_context(signals())
        default = bundle_folder(plan) if number is None else OUTPUT / "bundles" / f"{plan.spec.name}-trial-{number}"
        done = finish(plan, data, search, best, folder or default, stopping, out.print)
        _print_result(plan, search, best, done, out)
        return _summary(plan, search, best, done)


def _no_such_trial(search: Search, number: int | None) -> str:
    complete = [t.number for t in search.trials() if t.state.name == "COMPLETE"]
    if number is None:
        return f"study {search.spec.name!r} has no complete trial yet, so there is nothing to export"
    some = ", ".join(map(str, complete[:20])) or "none"
    return f"--trial {number}: is no complete trial of study {search.spec.name!r}; complete are: {some}"


def _prepare(path: Path, overrides: Mapping[str, str], out: Console, may_run: Collection[str] | None = None) -> Plan:
    """Return the plan, with the threads set for it: torch's own default makes small networks many times slower."""
    plan = prepare(path, overrides, may_run)
    if plan.device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    torch.use_deterministic_algorithms(plan.spec.deterministic)
    if plan.spec.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what CUDA's matrix products need for it
    for text in plan.notes:
        out.print(text)
    return plan


def _open(plan: Plan, out: Console, make: bool = True, wait: bool = False) -> Search | None:
    return open_search(
        plan.spec,
        plan.space,
        plan.metric,
        maximize=plan.maximize,
        options=plan.options,
        make=make,
        wait=wait,
        say=lambda text: out.print(masked(text)),
    )


def _open_existing(plan: Plan, path: Path, out: Console) -> Search:
    search = _open(plan, out, make=False)
    if search is None:
        study = f"the storage {plan.spec.storage} has no study named {plan.spec.name!r}"
        raise InputError(f"{study}; run it first: hpo run {path}")
    return search


def _load(plan: Plan, search: Search) -> Data | None:
    """Return the data, which must be the same for all of a study's trials, and see that networks can be built of it."""
    data = plan.load_data()
    if data is None:
        return None
    fingerprint, before = data.fingerprint(), search.attrs.get(DATA)
    if before not in (None, fingerprint):
        raise InputError(
            f"the data of objective {plan.spec.objective} is not what study {plan.spec.name!r} began with "
            f"(fingerprint {fingerprint} here, {before} there); bring that data back, or give another `name`"
        )
    if before is None:
        search.remember(DATA, fingerprint)
    preflight(plan, data)
    return data


def code_differs(plan: Plan, search: Search) -> bool:
    """Whether the objective's source is not that of the study, which is that of the first who asks."""
    code, before = objectives.source_fingerprint(plan.objective), search.attrs.get(CODE)
    older = objectives.file_fingerprint(plan.objective)  # as an older version stored it
    unchanged = before in (None, code, older)
    if unchanged and before != code:
        search.remember(CODE, code)
    return not unchanged


def _tags(plan: Plan) -> dict[str, str]:
    return {
        "hpo.objective": plan.spec.objective,
        "hpo.metric": plan.metric,
        "hpo.storage": masked(plan.spec.storage),
        "hpo.sampler": plan.spec.sampler.name,
        "hpo.pruner": plan.spec.pruner.name,
        "hpo.device": str(plan.device),
    }


def _why_no_best(search: Search) -> str:
    counts = search.counts()
    reasons = [t.user_attrs["error"] for t in search.trials() if "error" in t.user_attrs]
    last = f"; the last one failed: {reasons[-1]}" if reasons else ""
    return (
        f"study {search.spec.name!r} has no complete trial to choose from: {counts.pruned} pruned, "
        f"{counts.failed} failed, {counts.waiting} not begun{last}"
    )


def _print_result(plan: Plan, search: Search, best: Best | None, done: Outcome | None, out: Console) -> None:
    if best is None:
        return
    counts = search.counts()
    rows = [
        ["trials", f"{counts.complete} complete, {counts.pruned} pruned, {counts.failed} failed"],
        ["best", f"{plan.metric} {best.value:.4f} on validation (trial {best.number}, epoch {best.epoch + 1})"]
        if not isinstance(plan.objective, Function)
        else ["best", f"{plan.metric} {best.value:.6g} (trial {best.number})"],
        ["params", view.shown(plan.space.searched(best.params)) or "all fixed"],
    ]
    if done is not None:
        rows += [["test", ", ".join(f"{name} {value:.4f}" for name, value in done.test.items())]] if done.test else []
        if done.bundle is not None:
            rows += [["bundle", f"{done.bundle} (differs from the measured model by at most {done.parity:.1e})"]]
    out.print(view.pairs(plan.spec.name, rows))


def _summary(plan: Plan, search: Search, best: Best | None, done: Outcome | None) -> dict[str, Any]:
    """Return what `--json` prints; scripts rely on its keys."""
    counts = search.counts()
    summary = {
        "study": plan.spec.name,
        "storage": masked(plan.spec.storage),
        "trials": {key: getattr(counts, key) for key in ("complete", "pruned", "failed", "running", "waiting")},
        "best": None if best is None else {"number": best.number, "value": best.value, "params": dict(best.params)},
        "test": None if done is None else dict(done.test),
        "bundle": None if done is None or done.bundle is None else str(done.bundle),
    }
    return finite(summary)


class _MaskingConsole(Console):
    """Shows no secret, whoever prints."""

    def print(self, *objects: Any, **keys: Any) -> None:
        super().print(*(masked(each) if isinstance(each, str) else each for each in objects), **keys)


def _console() -> Console:
    """Return a console on stdout; a file or a pipe is not wrapped at 80 columns."""
    terminal = sys.stdout.isatty()
    return _MaskingConsole(markup=False, highlight=False, soft_wrap=not terminal, width=None if terminal else 200)


@contextmanager
def _progress(plan: Plan, search: Search, out: Console, alone: bool = True) -> Iterator[Any]:
    board = view.ProgressState(search.counts(), search.best(), plan.spec.trials, plan.metric)

    looked, cost = -math.inf, 0.0

    def refresh(state: str, value: float | None) -> None:
        """Read the numbers anew, or, where that is dear and many trials end together, count this one trial."""
        nonlocal looked, cost
        begun = time.monotonic()
        if alone and begun - looked < 20 * cost and not (value is not None and search.may_be_best(value)):
            board.add(state)
            return
        board.counts, board.best = search.counts(), search.best()
        looked = time.monotonic()
        cost = looked - begun

    if out.is_terminal:
        with view.LiveProgress(board, refresh, out) as progress:
            yield progress
    else:
        yield view.PlainProgress(board, refresh, lambda text: out.print(masked(text)))
