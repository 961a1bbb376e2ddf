"""A worker joins a study from any machine: by its study file, or by its name in a storage."""

import json
import os
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

from hpo.errors import InputError
from hpo.log import log
from hpo.runner.launch import LAUNCHED, LAUNCHER
from hpo.runner.opening import how_source_differs, load_data, open_or_make, torch_set
from hpo.runner.prepare import Plan, prepare
from hpo.runner.progress import NoProgress, Progress
from hpo.runner.tracked import tracker_of
from hpo.runner.worker import work
from hpo.search import schema
from hpo.search.identity import stored_file
from hpo.search.search import Search
from hpo.stopping import StopToken, signals
from hpo.study.trust import require_harmless, require_passwords

ShowOf = Callable[[Plan, Search], AbstractContextManager[Progress]]
"""Gives what shows the trials of a study that was opened."""


def is_launched() -> bool:
    """Whether a run on this machine, or on Ray, has started this process as one of its workers."""
    return LAUNCHED in os.environ


@contextmanager
def no_progress(plan: Plan, search: Search) -> Iterator[Progress]:
    """Show no trial: what a launched worker does is shown by the process that has started it."""
    yield NoProgress()


@contextmanager
def joined(
    path: Path,
    overrides: Mapping[str, str],
    show: ShowOf,
    stop: StopToken | None = None,
    named: Collection[str] | None = None,
) -> Iterator[tuple[Plan, Search]]:
    """Train trials of the study at `path` until there are none left; then give its plan and its opened storage.

    It ends earlier where `stop`, else a signal, says so (Interrupted). Only code that is among the `named` is run;
    None: all that the file names. Raises InputError where the objective's code or data is not that of the study.
    """
    plan = prepare(path, overrides, named)
    with ExitStack() as stack:
        stack.enter_context(torch_set(plan))
        search = open_or_make(plan, wait=is_launched())  # a launched worker's study is known to be there
        stack.callback(search.close)
        _require_same_source(plan, search)
        launcher = os.environ.get(LAUNCHER)
        stopping = stack.enter_context(signals(int(launcher) if launcher else None)) if stop is None else stop
        search.storage.interrupt = stopping.requested
        data = load_data(plan, search)
        tracker = tracker_of(plan, search, stopping)
        stack.callback(tracker.close)
        with show(plan, search) as progress:
            work(plan, data, search, tracker, progress, stopping)
        yield plan, search


def _require_same_source(plan: Plan, search: Search) -> None:
    """Raise InputError where the objective is not the study's; of values that another machine may set, warn only.

    Of what a study file names, a process that a run has started on its own machine may have drawn others at its import.
    """
    what = how_source_differs(plan, search)
    if not what:
        return
    said = (
        f"the {what} of objective {plan.spec.objective} is not what study {plan.spec.name!r} began with: its trials "
        "would not compare"
    )
    if what == "code":
        raise InputError(f"{said}; bring that code here, or give another `name`")
    if not search.attrs.get(schema.HELD):  # the study file names the objective, and whoever is launched here has it
        if LAUNCHER not in os.environ:
            log.warning(said)
        return
    if is_launched():
        raise InputError(
            f"{said}; workers make it by its class and options: have Options hold the value, or train with workers=1"
        )
    log.warning(said)


def join_stored(name: str, overrides: Mapping[str, str], named: Collection[str] | None, stop: StopToken) -> None:
    """Train trials of a study that the storage in `overrides` knows by its `name`, until `stop` or its end."""
    with stored_study(name, overrides, named) as path, joined(path, overrides, no_progress, stop, named):
        pass


@contextmanager
def stored_study(name: str | None, overrides: Mapping[str, str], named: Collection[str] | None) -> Iterator[Path]:
    """Give the study file that the storage keeps of a study, as a file."""
    url = overrides.get("storage", "").strip('"')
    if not name or not url:
        raise InputError("give a study file, or --study NAME and --storage URL of a study that was started")
    values = stored_file(url, name) | {"name": name}
    if named is not None:
        require_harmless(name, values, overrides)
    require_passwords(name, values, overrides)
    with as_file(values) as path:
        yield path


@contextmanager
def as_file(values: Mapping[str, Any]) -> Iterator[Path]:
    """Give the values of a study as a study file, which only its owner may read, for as long as it is needed."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "study.yaml"  # a name may be a path
        path.write_text(json.dumps(values, indent=1), encoding="utf-8")
        yield path
