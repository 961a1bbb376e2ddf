"""What the commands do: each prints for a person and returns the summary that `--json` prints."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text

from hpo.cli import console as view
from hpo.cli.after import next_steps
from hpo.cli.live import LiveProgress
from hpo.cli.screen import Shown, console, screen
from hpo.cli.status import as_dict, summary
from hpo.errors import HpoError, masked
from hpo.export.formats import formats_of
from hpo.runner import keeping
from hpo.runner import replay as replaying
from hpo.runner import study as studies
from hpo.runner.describing import goal_text
from hpo.runner.joining import is_launched, joined, no_progress, stored_study
from hpo.runner.opening import open_existing, open_or_make, torch_set
from hpo.runner.outcome import Outcome
from hpo.runner.prepare import Plan, prepare
from hpo.runner.progress import PlainProgress, Progress, Refresh, count_text, number_text, shown, state_of
from hpo.runner.study import StudyFile, WorkerOptions
from hpo.search import adoption
from hpo.search.beside import Beside
from hpo.search.confirmed import confirmation, mean_text, sentences
from hpo.search.curves import where
from hpo.search.pareto import front_lines
from hpo.search.retrained import Confirmed
from hpo.search.search import Search
from hpo.search.storage import serve_storage
from hpo.search.view import Best, StudyView
from hpo.study.data import Data


def run(
    path: Path,
    overrides: Mapping[str, str],
    options: WorkerOptions | None = None,
    fresh: bool = False,
    how: Shown = Shown(),
) -> dict[str, Any]:
    """`hpo run`; `fresh`: a study of that name is kept under another one, and a new one starts."""
    with screen(how) as out, ExitStack() as stack:
        plan = _prepared(path, overrides, stack)
        plan = plan if how.started is None else replace(plan, made=how.started)
        if fresh:
            keeping.set_aside(plan.spec)
        search = open_or_make(plan)
        stack.callback(search.close)
        file = StudyFile(path=path, overrides=overrides)

        def show(alone: bool) -> AbstractContextManager[Progress]:
            return _progress(plan, search, out, alone, live=not how.quiet)

        done, seen = studies.run(plan, search, file, show, options or WorkerOptions())
        confirmed = confirmation(search, seen)
        _print_result(plan, seen, seen.best(), done, out, confirmed)
        if not how.quiet:
            _print_next(next_steps(path, overrides, plan.spec, done, seen), out)
        return summary(plan.spec, seen, seen.best(), done, confirmed)


def worker(
    path: Path | None,
    study: str | None,
    overrides: Mapping[str, str],
    named: Collection[str] | None = (),
    how: Shown = Shown(),
) -> dict[str, Any]:
    """`hpo worker`: of a study file, or of a `study` that the storage knows; until a signal ends it.

    Of such a study only code that is among the `named` is run; None: whatever the storage names.
    """
    with screen(how) as out, ExitStack() as stack:
        is_ours = path is not None
        if path is None:
            path = stack.enter_context(stored_study(study, overrides, named))

        def show(plan: Plan, search: Search) -> AbstractContextManager[Progress]:
            return no_progress(plan, search) if is_launched() else _progress(plan, search, out, live=not how.quiet)

        plan, search = stack.enter_context(joined(path, overrides, show, named=None if is_ours else named))
        seen = search.view()
        return summary(plan.spec, seen, seen.best(), None)


def repair(path: Path, overrides: Mapping[str, str]) -> dict[str, Any]:
    """`hpo repair`."""
    plan = prepare(path, overrides)
    with screen() as out, ExitStack() as stack:
        search = open_existing(plan, path)
        stack.callback(search.close)
        seen, told = studies.repair(plan, search)
        counts = seen.counts
        agree = told and plan.spec.tracking != "off"
        runs = f"; the runs in {masked(plan.spec.tracking)} say the same" if agree else ""
        out.print(
            f"{plan.spec.name}: {counts.finished} of {plan.spec.budget_text} done, {counts.running} running, "
            f"{counts.waiting} waiting{runs}"
        )
        return summary(plan.spec, seen, seen.best(), None)


def adopt(path: Path, overrides: Mapping[str, str], source: str, name: str) -> None:
    """`hpo adopt`."""
    with screen(), ExitStack() as stack:
        plan = _prepared(path, overrides, stack)
        trials = adoption.trials_of(source, name, maximize=plan.maximize)
        search = open_or_make(plan)
        stack.callback(search.close)
        studies.adopt(plan, search, trials, name)


def serve(path: Path, overrides: Mapping[str, str], host: str, port: int) -> None:
    """`hpo serve`."""
    plan = prepare(path, overrides)
    serve_storage(plan.spec.storage, host, port, partial(_print_served, plan.spec.storage, host, port))


def _print_served(storage: str, host: str, port: int) -> None:
    out = console()
    out.print(
        f"there is no login: whoever reaches {host}:{port} can read, change and delete every study in this storage, "
        "and with it what workers search, report and write to MLflow; no code of theirs runs (see SECURITY.md)"
    )
    out.print(f"{masked(storage)} is served; workers: --storage grpc://{host}:{port}; Ctrl-C ends it")


def export(
    path: Path, overrides: Mapping[str, str], number: int | None, folder: Path | None, formats: str | None
) -> dict[str, Any]:
    """`hpo export`."""
    chosen = formats_of(formats)
    with screen() as out, ExitStack() as stack:
        plan = _prepared(path, overrides, stack)
        search = open_existing(plan, path)
        stack.callback(search.close)
        seen = search.view()
        done = studies.export(plan, search, seen, number, folder, chosen)
        confirmed = None if number is not None else confirmation(search, seen)
        _print_result(plan, seen, seen.best(number), done, out, confirmed)
        exported = as_dict(seen.best(done.number))  # of a confirmed study not the best of the search
        return summary(plan.spec, seen, seen.best(), done, confirmed) | {"exported": exported}


def replay(path: Path, overrides: Mapping[str, str], number: int, epochs: int | None) -> dict[str, Any]:
    """`hpo replay`. Raises HpoError where the trial is not what was recorded."""
    with screen() as out, ExitStack() as stack:
        plan = _prepared(path, overrides, stack)
        search = open_existing(plan, path)
        stack.callback(search.close)
        done = replaying.replay(plan, search, search.view(), number, epochs)
        _print_replay(plan, done, out)
        if not done.agrees:
            why = "; ".join(done.changed) or (
                "nothing that is stored has changed; what a network draws at random in a stack, but for nn.Dropout's "
                "masks, it does not draw alone, nor these where it was trained partly in a stack and partly alone; of "
                "Python's and NumPy's random numbers nothing is stored; and where a gradient is nothing but rounding, "
                "as that of a bias before BatchNorm, Adam makes whole steps of it"
            )
            raise HpoError(f"trial {number} is another one from epoch {done.first_other} on: {why}")
        return {
            "study": plan.spec.name,
            "trial": number,
            "epochs": done.epochs,
            "max_difference": max(done.differences),
            "changed": list(done.changed),
        }


def _print_replay(plan: Plan, done: replaying.Replay, out: Console) -> None:
    key = plan.metric_key if plan.metric_key in done.recorded else next(iter(done.recorded))
    rows = [
        [str(i + 1), f"{done.recorded[key][i]:.6g}", f"{done.replayed[key][i]:.6g}", f"{difference:.1e}"]
        for i, difference in enumerate(done.differences)
    ]
    columns = ["epoch", f"{key} recorded", "replayed", "largest difference of all metrics"]
    out.print(view.table(f"trial {done.number} of {plan.spec.name}", columns, rows))
    for change in done.changed:
        out.print(f"changed since: {change}")
    if done.agrees:
        most = max(done.differences)
        out.print("identical, to the last bit" if most == 0 else f"the same, within {most:.1e}")


def check(path: Path, overrides: Mapping[str, str]) -> None:
    """`hpo check`."""
    with screen() as out, ExitStack() as stack:
        plan = _prepared(path, overrides, stack)
        data, model = studies.check(plan)
        _print_check(plan, data, model, out)


def _print_check(plan: Plan, data: Data | None, model: torch.nn.Module | None, out: Console) -> None:
    goal = goal_text(plan)
    out.print(
        view.table(
            f"{plan.spec.name}: the {goal} on validation, of {plan.spec.budget_text}, of "
            f"{plan.spec.epochs} epochs each",
            ["parameter", "values"],
            [[d.name, d.describe()] for d in plan.space.dimensions]
            + [[name, f"{value} (fixed)"] for name, value in plan.space.fixed.items()]
            + [[name, f"{text} (constraint)"] for name, text in plan.spec.constraints.items()]
            + ([["(any)", "the function suggests its own"]] if plan.function is not None else []),
        )
    )
    if model is not None:
        _print_model(model, out)
    if data is not None:
        _print_data(data, out)
    is_open = "pruner" not in plan.spec.model_fields_set and not plan.trains_itself and plan.function is None
    pruner = plan.spec.pruner.name + (", or halving where a stack holds several trials" if is_open else "")
    out.print(
        f"\nsampler {plan.spec.sampler.name}, pruner {pruner}, device {plan.device}, "
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


def _print_result(
    plan: Plan,
    seen: StudyView,
    best: Best | None,
    done: Outcome | None,
    out: Console,
    confirmed: Confirmed | None = None,
) -> None:
    """Print what a study came to; `best` is its best trial, or the one that was exported by itself."""
    if best is None:
        return
    counts = seen.counts
    when = where(plan.spec.value, best.epoch)
    winner = best if confirmed is None else seen.best(confirmed.winner.number) or best
    named = "best" if (leading := seen.best()) is not None and leading.number == best.number else "exported"
    rows = [
        ["trials", count_text(counts)],
        *([] if seen.stopped is None else [["stopped", seen.stopped.text().removeprefix("stopped ")]]),
        [named, f"{plan.metric} {number_text(best.value)} on validation (trial {best.number}, {when})"]
        if plan.function is None
        else [named, f"{plan.metric} {best.value:.6g} (trial {best.number})"],
        *([["epochs", text]] if (text := seen.effort.text()) else []),
        *_confirmed_rows(plan, confirmed),
        *([["constraints", seen.feasible_text]] if seen.feasible_text else []),
        *([["Pareto front", "\n".join(lines).removeprefix("Pareto front ")]] if (lines := front_lines(seen)) else []),
        ["params", shown(plan.space.searched(winner.params)) or "all fixed"],
    ]
    if done is not None:
        test = ", ".join(f"{name} {number_text(value)}" for name, value in done.test.items())
        rows += [["test", "; ".join(filter(None, [test, done.seeds_text, done.readings]))]] if done.test else []
        rows += [] if done.beside is None else _beside_rows(done.beside)
        if done.bundle is not None:
            rows += [["bundle", f"{done.bundle} (differs from the measured model by at most {done.parity:.1e})"]]
    out.print(view.pairs(plan.spec.name, rows))


def _confirmed_rows(plan: Plan, confirmed: Confirmed | None) -> list[list[str]]:
    if confirmed is None:
        return []
    row = f"{mean_text(confirmed, plan.metric)} (trial {confirmed.winner.number})"
    return [["confirmed", row], ["how sure", " ".join(sentences(confirmed, plan.metric)[1:])]]


def _beside_rows(beside: Beside) -> list[list[str]]:
    texts = {"baselines": beside.values_text, "beside them": beside.verdict, "default": beside.default_text}
    return [[name, text] for name, text in texts.items() if text]


def _print_next(steps: Sequence[str], out: Console) -> None:
    out.print("\nnext:")
    for step in steps:
        out.print(Text(f"  {masked(step)}"), soft_wrap=True)  # a line that is pasted has no breaks in it
    if any("***" in masked(step) and "***" not in step for step in steps):
        out.print("  (*** stands for a password: write it, or ${NAME} of an environment variable, in its place)")


def _prepared(path: Path, overrides: Mapping[str, str], stack: ExitStack) -> Plan:
    """Return the plan of a study file, with torch set for it until `stack` is closed."""
    plan = prepare(path, overrides)
    stack.enter_context(torch_set(plan))
    return plan


@contextmanager
def _progress(plan: Plan, search: Search, out: Console, alone: bool = True, *, live: bool = True) -> Iterator[Progress]:
    board = state_of(plan, search)
    refresh = Refresh(board, search, alone)
    if live and out.is_terminal:
        with LiveProgress(board, refresh, out) as progress:
            yield progress
    else:
        yield PlainProgress(board, refresh)
