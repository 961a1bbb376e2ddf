"""What can be done with a study that was run: commands to paste."""

import shlex
from collections.abc import Mapping
from pathlib import Path

from hpo.runner.outcome import Outcome
from hpo.search.view import StudyView
from hpo.study.spec import StudySpec

_PLACES = ("name", "storage", "tracking", "output")
"""What says where a study is: a command that is to find it again needs it too."""


def next_steps(
    path: Path, overrides: Mapping[str, str], spec: StudySpec, done: Outcome | None, seen: StudyView
) -> list[str]:
    """Return commands that a person may want next, each with what it does: at most five lines, which can be pasted."""
    places = [f"--set {shlex.quote(f'{key}={overrides[key]}')}" for key in _PLACES if key in overrides]
    study = " ".join([shlex.quote(str(path)), *places])
    steps = {
        f"hpo report {study}": "the whole search on one page",
        f"hpo ui {study}": "in the browser: MLflow, optuna-dashboard",
    }
    if done is not None and done.bundle is not None:
        steps[f"hpo predict {shlex.quote(str(done.bundle))} INPUT"] = "predictions for a table, arrays or images"
    more = (
        f"--trials {2 * max(spec.trials, seen.counts.finished)}"
        if spec.time is None
        else f"--set time={2 * spec.time:g}s"
    )
    more = "--set stop=false" if seen.stopped is not None else more
    steps[f"hpo run {study} {more}"] = "search on"
    width = min(max(map(len, steps)), 60)
    return [f"{command:<{width}}  # {what}" for command, what in steps.items()]
