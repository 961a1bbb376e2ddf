"""`hpo status`, and the summary that `--json` prints: from what is stored, without torch and the objective's code."""

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from hpo.cli.screen import screen
from hpo.errors import SpecError, masked
from hpo.export.files import finite
from hpo.runner.outcome import Outcome, outcome, stack_paths
from hpo.runner.progress import ProgressState, shown
from hpo.search.clock import duration
from hpo.search.opening import no_study, open_stored
from hpo.search.view import Best, StudyView
from hpo.study.draft import read
from hpo.study.spec import StudySpec

_STATES = ("complete", "pruned", "failed", "running", "paused", "waiting")


def status(path: Path, overrides: Mapping[str, str]) -> dict[str, Any]:
    """`hpo status`."""
    draft = read(path, overrides)
    if draft.faults or draft.spec is None:
        raise SpecError(draft.document.render(draft.faults))
    spec = draft.spec
    with screen() as out, ExitStack() as stack:
        search = open_stored(spec)
        if search is None:
            raise no_study(spec, path)
        stack.callback(search.close)
        spec = search.spec  # a grid has no more trials than configurations
        seen = search.view()
        counts, best = seen.counts, seen.best()
        used = search.seconds_used(seen)
        board = ProgressState(counts, best, spec.trials, search.metric)
        out.print(
            f"{spec.name}: {counts.finished} of {spec.trials} trials done "
            f"({counts.complete} complete, {counts.pruned} pruned, {counts.failed} failed), "
            f"{counts.running} running, "
            + (f"{counts.paused} paused, " if counts.paused else "")
            + f"{counts.waiting} waiting"
        )
        if text := seen.effort.text():
            out.print(text)
        out.print(board.best_text() + (f": {shown(search.space.searched(best.params))}" if best else ""))
        for trial in seen.running:
            value = "" if trial.value is None else f", {search.metric} {trial.value:.4f}"
            out.print(f"  trial {trial.number}: epoch {trial.epoch}/{spec.epochs}{value}")
        left = used / counts.finished * counts.unfinished if counts.finished and counts.unfinished else None
        if spec.timeout is not None and counts.unfinished:
            over = search.seconds_left(spec.timeout, seen)
            left = over if left is None else min(over, left)
        out.print(f"time used {duration(used)}" + (f", about {duration(left)} left" if left is not None else ""))
        paths = stack_paths(search)
        for how in paths:
            out.print(f"stacks run {how}")
        return summary(spec, seen, best, outcome(search, best)) | {"stacks": paths}


def summary(spec: StudySpec, seen: StudyView, best: Best | None, done: Outcome | None) -> dict[str, Any]:
    """Return what `--json` prints; scripts rely on its keys."""
    counts = seen.counts
    summary = {
        "study": spec.name,
        "storage": masked(spec.storage),
        "trials": {key: getattr(counts, key) for key in _STATES},
        "epochs": seen.effort.as_dict(),
        "best": None if best is None else {"number": best.number, "value": best.value, "params": dict(best.params)},
        "test": None if done is None else dict(done.test),
        "bundle": None if done is None or done.bundle is None else str(done.bundle),
    }
    whole: dict[str, Any] = finite(summary)
    return whole
