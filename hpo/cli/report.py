"""`hpo report`: a study as one HTML page, or as Markdown, JSON or CSV, from what is stored."""

import logging
import sys
from collections.abc import Mapping
from contextlib import ExitStack, redirect_stdout
from pathlib import Path
from typing import Any

from hpo.errors import InputError, SpecError, masked
from hpo.log import log, shown_by
from hpo.report.facts import Facts, leases_of
from hpo.report.facts import read as read_facts
from hpo.report.place import default_path, encoded, write
from hpo.report.texts import as_csv, as_json, as_markdown
from hpo.search import schema
from hpo.search.opening import no_study, open_stored
from hpo.search.search import Search
from hpo.search.view import StudyView
from hpo.study.draft import read
from hpo.study.spec import StudySpec


def report(
    path: Path,
    overrides: Mapping[str, str],
    form: str | None,
    out: Path | None,
    baselines: bool | None,
    *,
    log_it: bool = False,
) -> None:
    """`hpo report`.

    Without a `form`, it is what the ending of `out` says, else html. `out` is `-` for stdout; without one, a page goes
    to its place in `output`, and all else to stdout. `log_it`: a page in its place is kept with the study's run, too.
    """
    if log_it and (out is not None or form not in (None, "html")):
        raise InputError("--log keeps the page as it is in its own place: leave --out and --format out")
    if form is None:
        ending = "" if out is None else out.suffix.removeprefix(".")
        form = ending if ending in ("md", "json", "csv") else "html"
    draft = read(path, overrides)
    if draft.faults or draft.spec is None:
        raise SpecError(draft.document.render(draft.faults))
    with shown_by(logging.StreamHandler(sys.stderr)), ExitStack() as stack:  # stdout may be the report
        search = open_stored(draft.spec)
        if search is None:
            raise no_study(draft.spec, path)
        stack.callback(search.close)
        seen, spec = search.view(), search.spec
        making, adopts = search.making, schema.OWN_RUNS not in search.attrs
        leases = leases_of(search.storage, spec.name)
        facts = read_facts(search.study, seen.everything, leases, budget=spec.trials, epochs=spec.epochs)
        judged = None
        if form in ("html", "json"):
            with redirect_stdout(sys.stderr):  # what the objective's code prints is not part of the report
                judged = _judged(path, overrides, search, seen, baselines)
    text = _text(facts, judged, form)
    if out is None and form == "html":
        out = default_path(spec.output, spec.name)
    if out is None or str(out) == "-":
        sys.stdout.write(encoded(text).decode())
        return
    write(out, text)
    print(masked(str(out)))
    if log_it:
        _keep_with_the_run(spec, out.parent, making, adopts=adopts)


def _keep_with_the_run(spec: StudySpec, folder: Path, making: str, *, adopts: bool) -> None:
    """Have MLflow keep the page among the artifacts of the study's run."""
    if spec.tracking == "off":
        raise InputError("--log: the study is not tracked (tracking: off)")
    from hpo.runner.keeping import unsent_of
    from hpo.tracking.opening import open_tracker

    tracker = open_tracker(spec.tracking, spec.name, unsent_of(spec), making=making, adopts=adopts)
    tracker.log_folder(folder, "report")
    if tracker.close():
        print(f"{masked(spec.tracking)}: it is in `report` among the artifacts of the study's run")


def _judged(
    path: Path, overrides: Mapping[str, str], search: Search, seen: StudyView, baselines: bool | None
) -> dict[str, Any]:
    if not seen.complete:
        return {"absent": "no trial is complete"}
    log.info("looking at the best trial on the validation split, which imports PyTorch")
    from hpo.runner.judging import judge

    return judge(path, overrides, search, seen, baselines)


def _text(facts: Facts, judged: Mapping[str, Any] | None, form: str) -> str:
    if form == "json":
        return as_json(facts, judged)
    if form == "html":
        from hpo.report.page import page

        return page(facts, judged)
    return as_csv(facts) if form == "csv" else as_markdown(facts)
