"""What can be done with a study that was run: commands to paste."""

import shlex
from collections.abc import Mapping
from pathlib import Path

from hpo.runner.outcome import Outcome
from hpo.search.view import StudyView
from hpo.study.spec import StudySpec

_PLACES = ("name", "storage", "tracking", "output")
"""What says where a study is: a command needs it to find it. One that searches on needs all that was laid over it."""


def next_steps(
    path: Path, overrides: Mapping[str, str], spec: StudySpec, done: Outcome | None, seen: StudyView
) -> list[str]:
    """Return commands that a person may want next, each with what it does: at most five lines, which can be pasted."""
    study = _command(path, {key: overrides[key] for key in _PLACES if key in overrides})
    steps = {
        f"hpo report {study}": "the whole search on one page",
        f"hpo ui {study}": "in the browser: MLflow, optuna-dashboard",
    }
    if done is not None and done.bundle is not None:
        steps[f"hpo predict {shlex.quote(str(done.bundle))} INPUT"] = "predictions for a table, arrays or images"
    changed, more = "trials", f"--trials {2 * max(spec.trials, seen.counts.finished)}"
    if spec.time is not None:
        changed, more = "time", f"--set time={2 * spec.time:g}s"
    if seen.stopped is not None:
        changed, more = "stop", "--set stop=false"
    same = _command(path, {key: value for key, value in overrides.items() if key != changed})
    steps[f"hpo run {same} {more}"] = "search on"
    width = min(max(map(len, steps)), 60)
    return [f"{command:<{width}}  # {what}" for command, what in steps.items()]


def _command(path: Path, overrides: Mapping[str, str]) -> str:
    """Return the study's file and what is laid over it, as a shell reads them."""
    return " ".join([shlex.quote(str(path)), *(f"--set {shlex.quote(f'{k}={v}')}" for k, v in overrides.items())])
