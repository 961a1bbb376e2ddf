"""`hpo studies`, `hpo rename`, `hpo delete`: what is in a storage, without torch and any objective's code."""

import sys
from typing import Any

from hpo.cli.screen import console, screen
from hpo.errors import HpoError, InputError, masked
from hpo.export.files import finite
from hpo.report.listing import Listed, listing, studies_in
from hpo.runner import keeping
from hpo.search.named import DEFAULT_STORAGE, Named, found, named, opened
from hpo.study.spec import UNBOUNDED


def studies(storage: str | None) -> dict[str, Any]:
    """`hpo studies`."""
    url = DEFAULT_STORAGE if storage is None else storage
    with screen() as out:
        listed = studies_in(url)
        out.print(f"{len(listed) or 'no'} {'study' if len(listed) == 1 else 'studies'} in {masked(url)}")
        if listed:
            from hpo.cli.console import table

            columns = ["study", "state", "trials", "best", "objective", "last active"]
            out.print(table("", columns, [[masked(cell) for cell in _row(each)] for each in listed]))
        whole: dict[str, Any] = finite({"storage": masked(url), "studies": [each.as_dict() for each in listed]})
        return whole


def _row(study: Listed) -> list[str]:
    trials = str(study.trials) if study.counts is None else str(study.counts.finished)
    if study.counts is not None and study.trials != UNBOUNDED:
        trials += f" of {study.trials}"
    active = "never" if study.active is None else f"{study.active.astimezone():%Y-%m-%d %H:%M}"
    return [study.name, study.state, trials, study.why or _best(study), study.objective or "", active]


def _best(study: Listed) -> str:
    if study.best is None:
        return ""
    goal = "highest" if study.maximize else "lowest"
    return f"{study.metric} {study.best.value:.6g} ({goal}, trial {study.best.number})"


def rename(study: str, storage: str | None, new: str) -> None:
    """`hpo rename`."""
    what = named(study, storage)
    with screen() as out:
        lines = keeping.rename(what, new)
        out.print(f"study {what.name} in {masked(what.storage)} is {new} now")
        for line in lines:
            out.print(line)
        if what.file is not None:
            out.print(f"write `name: {new}` into {study} to go with it; as it is, it names a new study")


def delete(study: str, storage: str | None, *, bundle: bool, yes: bool, force: bool) -> None:
    """`hpo delete`."""
    what = named(study, storage)
    if not yes:
        _confirm(what, bundle)
    with screen() as out:
        for line in keeping.delete(what, bundle=bundle, force=force):
            out.print(line)


def _confirm(what: Named, bundle: bool) -> None:
    """Ask whether a study is to be deleted. Raises InputError where nobody can be asked, HpoError after a no."""
    with opened(what.storage, what.outage) as storage:
        listed = listing(storage, what.storage, found(storage, what.storage, what.name))
    _, state, trials, best, objective, active = _row(listed)
    if not sys.stdin.isatty():
        raise InputError(f"study {what.name!r} ({trials} trials) is deleted for good; confirm with --yes")
    about = ", ".join(part for part in (state, f"{trials} trials", best, objective, f"last active {active}") if part)
    also = " and its bundle" if bundle else ""
    console().print(f"{what.name} in {masked(what.storage)}: {about}")
    try:
        answer = input(f"delete this study{also} for good? [y/N] ")
    except EOFError:
        answer = ""
    if answer.strip().lower() not in ("y", "yes"):
        raise HpoError("nothing was deleted")
