"""`hpo status`, and the summary that `--json` prints: from what is stored, without torch and the objective's code."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from hpo.cli.screen import screen
from hpo.errors import SpecError, masked
from hpo.export.files import finite
from hpo.garbage import uncollected
from hpo.runner.outcome import Outcome, outcome, stack_paths
from hpo.runner.progress import ProgressState, count_text, number_text, shown
from hpo.search.clock import duration
from hpo.search.codes import codes_text
from hpo.search.confirmed import chosen, confirmation, progress_text, sentences
from hpo.search.opening import is_over, no_study, open_stored, workers_of
from hpo.search.pareto import front_data, front_lines
from hpo.search.retrained import Confirmed
from hpo.search.search import Search
from hpo.search.view import Best, StudyView
from hpo.study.draft import read
from hpo.study.spec import UNBOUNDED, StudySpec

_TIME = "time used "


def status(path: Path, overrides: Mapping[str, str], watch: float | None = None) -> dict[str, Any]:
    """`hpo status`; with `watch` it is shown again every so many seconds, until the study is done."""
    with screen() as out, ExitStack() as stack:
        with uncollected():
            draft = read(path, overrides)
            if draft.faults or draft.spec is None:
                raise SpecError(draft.document.render(draft.faults))
            search = open_stored(draft.spec, overrides)
            if search is None:
                raise no_study(draft.spec, path)
            stack.callback(search.close)
            lines, whole, over = _look(search)
        if watch is None:
            out.print("\n".join(lines))
            return whole
        show = stack.enter_context(_redrawn(out) if out.is_terminal else _printed_when_changed(out))
        show(lines)
        while not over:
            time.sleep(watch)
            lines, whole, over = _look(search)
            show(lines)
        return whole


@contextmanager
def _redrawn(out: Console) -> Iterator[Callable[[list[str]], None]]:
    """Give what shows lines on a terminal, in place of those before."""
    from rich.live import Live

    with Live(console=out, auto_refresh=False) as live:
        yield lambda lines: live.update(Text(masked("\n".join(lines))), refresh=True)


@contextmanager
def _printed_when_changed(out: Console) -> Iterator[Callable[[list[str]], None]]:
    """Give what prints lines, unless but for the time they are those before."""
    before: list[str] = []

    def show(lines: list[str]) -> None:
        untimed = [line for line in lines if not line.startswith(_TIME)]
        if untimed != before:
            out.print("\n".join(["", *lines] if before else lines))
            out.file.flush()
        before[:] = untimed

    yield show


def _look(search: Search) -> tuple[list[str], dict[str, Any], bool]:
    """Return what there is to say of a study, what `--json` prints, and whether it is done."""
    spec, seen = search.spec, search.view()  # a grid has no more trials than configurations
    counts, best = seen.counts, seen.best()
    used = search.seconds_used(seen)
    board = ProgressState(counts, best, spec.trials, search.metric)
    lines = [
        f"{spec.name}: {counts.finished} of {spec.budget_text} done "
        f"({count_text(counts)}), "
        f"{counts.running} running"
        + (f", {counts.paused} paused" if counts.paused else "")
        + ("" if spec.trials == UNBOUNDED else f", {counts.waiting} waiting"),
        *([] if seen.stopped is None else [seen.stopped.text()]),
        *([text] if (text := codes_text(search.attrs, seen.trials)) else []),
        *([text] if (text := seen.effort.text()) else []),
        board.best_text() + (f": {shown(search.space.searched(best.params))}" if best else ""),
        *([f"constraints: {seen.feasible_text}"] if seen.feasible_text else []),
        *front_lines(seen),
    ]
    for trial in seen.running:
        value = "" if trial.value is None else f", {search.metric} {number_text(trial.value)}"
        lines.append(f"  trial {trial.number}: epoch {trial.epoch}/{spec.epochs}{value}")
    left = used / counts.finished * counts.unfinished if counts.finished and counts.unfinished else None
    if spec.limit is not None and counts.unfinished:
        over = search.seconds_left(spec.limit, seen)
        left = over if left is None else min(over, left)
    lines.append(f"{_TIME}{duration(used)}" + (f", about {duration(left)} left" if left is not None else ""))
    done, paths = outcome(search, chosen(search, seen)), stack_paths(search)
    confirmed = confirmation(search, seen)
    lines += [] if done is None else filter(None, [done.seeds_text and f"test, {done.seeds_text}", done.readings])
    lines += [] if done is None or done.beside is None else done.beside.sentences()
    lines += [text] if (text := progress_text(search, seen)) else []
    lines += [] if confirmed is None else sentences(confirmed, search.metric)
    lines += [f"stacks run {how}" for how in paths]
    ended = is_over(search, seen) and (done is not None or not workers_of(search, seen))
    return lines, summary(spec, seen, best, done, confirmed) | {"stacks": paths}, ended


def summary(
    spec: StudySpec, seen: StudyView, best: Best | None, done: Outcome | None, confirmed: Confirmed | None = None
) -> dict[str, Any]:
    """Return what `--json` prints; scripts rely on its keys."""
    counts = seen.counts
    summary = {
        "study": spec.name,
        "storage": masked(spec.storage),
        "trials": counts.by_state(),
        "stopped": None if seen.stopped is None else seen.stopped.as_dict(),
        "epochs": seen.effort.as_dict(),
        "best": as_dict(best),
        **({"constraints": seen.constrained} if seen.feasible_text else {}),
        **({"metrics": front_data(seen)} if seen.others else {}),
        "confirmed": None if confirmed is None else confirmed.as_dict() | {"params": _params(seen, confirmed)},
        "test": None if done is None else dict(done.test),
        "test_of_seeds": None if done is None or not done.seeds else dict(done.seeds),
        "test_evaluations": 0 if done is None else done.n_tests,
        "baselines": None if done is None or done.beside is None else done.beside.as_dict(),
        "bundle": None if done is None or done.bundle is None else str(done.bundle),
    }
    whole: dict[str, Any] = finite(summary)
    return whole


def as_dict(best: Best | None) -> dict[str, Any] | None:
    """Return a trial as `--json` has it."""
    return None if best is None else {"number": best.number, "value": best.value, "params": dict(best.params)}


def _params(seen: StudyView, confirmed: Confirmed) -> dict[str, Any]:
    winner = seen.best(confirmed.winner.number)
    return {} if winner is None else dict(winner.params)
