"""`hpo compare`: studies side by side, from what is stored, without torch and any objective's code."""

from collections.abc import Callable, Sequence
from typing import Any

from hpo.cli.console import table
from hpo.cli.screen import screen
from hpo.errors import InputError, masked
from hpo.export.files import finite
from hpo.report.comparison import Compared, compared, differences, verdict
from hpo.search.clock import duration
from hpo.search.named import named


def compare(studies: Sequence[str], storage: str | None) -> dict[str, Any]:
    """`hpo compare`."""
    if len(studies) < 2:
        raise InputError("give two studies at least, each by its file or by its name in the --storage")
    with screen() as out:
        whats = [named(study, storage) for study in studies]
        if len({(what.name, what.storage) for what in whats}) < len(whats):
            raise InputError("a study is named twice; give each once")
        found = compared(whats)
        best, text = verdict(found)
        differs = differences(found)
        columns = ["", *(masked(each.label) for each in found)]
        out.print(table("", columns, _rows(found)))
        out.print()
        out.print(text)
        out.print()
        if differs:
            out.print(table("what differs", columns, [[key, *map(_shown, values)] for key, values in differs.items()]))
        else:
            out.print("nothing that they were run with differs")
        listed = [{**each.as_dict(), "storage": masked(each.storage)} for each in found]
        whole: dict[str, Any] = finite({"studies": listed, "best": best, "verdict": masked(text), "differs": differs})
        return whole


def _rows(studies: Sequence[Compared]) -> list[list[str]]:
    rows: list[tuple[str, Callable[[Compared], str]]] = [
        ("best", _best),
        ("complete", lambda study: str(study.counts.complete)),
        ("pruned", lambda study: str(study.counts.pruned)),
        ("failed", lambda study: str(study.counts.failed)),
        ("unfinished", lambda study: str(study.counts.unfinished)),
        ("epochs trained", lambda study: str(study.epochs)),
        ("time used", lambda study: duration(study.seconds)),
        ("trials an hour", lambda study: "-" if study.trials_an_hour is None else f"{study.trials_an_hour:.0f}"),
    ]
    tests = dict.fromkeys(name for study in studies for name in study.test)
    made = [[name, *map(cell, studies)] for name, cell in rows]
    return made + [[f"test {name}", *(_number(study.test.get(name)) for study in studies)] for name in tests]


def _best(study: Compared) -> str:
    return "-" if study.best is None else f"{study.metric} {study.best.value:.6g} (trial {study.best.number})"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.6g}"


def _shown(value: Any) -> str:
    """Return a setting as a study file would have it, on one line."""
    if isinstance(value, dict):
        return masked(", ".join(f"{key}: {each}" for key, each in value.items()))
    return masked(str(value))
