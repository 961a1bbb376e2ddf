"""The Pareto front of a study of several metrics, for a person and for `--json`."""

from collections.abc import Mapping
from typing import Any

from hpo.search.front import directions_by_name
from hpo.search.view import Best, StudyView
from hpo.study.constraints import LATENCY


def front_lines(seen: StudyView, most: int = 10) -> list[str]:
    """Return the Pareto front for a person: what it is of, and a line for each trial, at most so many; empty: none."""
    front, metrics, complete = seen.front, seen.metrics, len(seen.complete)
    if not front:
        return []
    lines = [f"Pareto front of {goals_text(metrics)}: {len(front)} of {complete} complete trials"]
    for best in front[:most]:
        values = _values_of(best, metrics)
        lines.append(f"  trial {best.number}: {', '.join(_value_text(*each) for each in values.items())}")
    return [*lines, f"  and {len(front) - most} more"] if len(front) > most else lines


def front_data(seen: StudyView) -> dict[str, Any]:
    """Return the Pareto front as `--json` prints it: the `directions` by name, and a mapping for each trial."""
    trials = [
        {
            "number": best.number,
            "values": _values_of(best, seen.metrics),
            "params": dict(best.params),
        }
        for best in seen.front
    ]
    return {"directions": directions_by_name(seen.metrics), "front": trials}


def goals_text(metrics: Mapping[str, bool]) -> str:
    """Return `accuracy (more is better) and n_parameters (less is better)`."""
    return " and ".join(f"{name} ({'more' if more else 'less'} is better)" for name, more in metrics.items())


def _values_of(best: Best, metrics: Mapping[str, bool]) -> dict[str, float]:
    return dict(zip(metrics, (best.value, *best.others.values()), strict=False))


def _value_text(name: str, value: float) -> str:
    whole = 1 < abs(value) < 1e15 and value == int(value)
    return f"{name} " + (f"{value:,.0f}" if whole else f"{value:.4g}") + (" ms" if name in LATENCY else "")
