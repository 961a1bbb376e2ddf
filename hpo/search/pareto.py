"""The Pareto front of a study of several metrics, for a person and for `--json`."""

from typing import Any

from hpo.search.front import directions_of
from hpo.search.view import StudyView
from hpo.study.constraints import LATENCY


def front_lines(seen: StudyView, most: int = 10) -> list[str]:
    """Return the Pareto front for a person: what it is of, and a line for each trial, at most so many; empty: none."""
    front, metrics, complete = seen.front, seen.metrics, len(seen.complete)
    if not front:
        return []
    goals = " and ".join(f"{name} ({'more' if more else 'less'} is better)" for name, more in metrics.items())
    lines = [f"Pareto front of {goals}: {len(front)} of {complete} complete trials"]
    for best in front[:most]:
        values = zip(metrics, (best.value, *best.others.values()), strict=False)
        lines.append(f"  trial {best.number}: {', '.join(_value_text(*each) for each in values)}")
    return [*lines, f"  and {len(front) - most} more"] if len(front) > most else lines


def front_data(seen: StudyView) -> dict[str, Any]:
    """Return the Pareto front as `--json` prints it: the `directions` by name, and a mapping for each trial."""
    trials = [
        {
            "number": best.number,
            "values": dict(zip(seen.metrics, (best.value, *best.others.values()), strict=False)),
            "params": dict(best.params),
        }
        for best in seen.front
    ]
    return {"directions": directions_of(seen.metrics), "front": trials}


def _value_text(name: str, value: float) -> str:
    whole = 1 < abs(value) < 1e15 and value == int(value)
    return f"{name} " + (f"{value:,.0f}" if whole else f"{value:.4g}") + (" ms" if name in LATENCY else "")
