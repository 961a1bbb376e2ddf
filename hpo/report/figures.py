"""The figures of a report, as plain data that plotly draws: `{"data": [...], "layout": {...}}`, and a note on each.

What is told apart by colour is told apart by shape, dash or pattern too. However many trials there are, a figure has so
many points that a browser draws it at once; what is left out is said in its note.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from hpo.report.axes import text
from hpo.report.facts import Facts, Point

Item = TypeVar("Item")

BLUE, ORANGE, GREEN, PURPLE, BLACK, GREY = "#0072B2", "#D55E00", "#009E73", "#8E4A86", "#222222", "#6F6F6F"
MOST_POINTS = 2000
MOST_CURVES, MOST_FAINT_CURVES, MOST_EPOCHS = 50, 150, 200
BOLD_CURVES = 5
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
_COLOURS = (BLUE, ORANGE, GREEN, PURPLE, BLACK)
INFEASIBLE = "INFEASIBLE"
"""What a complete trial that breaks a constraint is drawn as."""
STATES: Mapping[str, tuple[str, str, str]] = {
    "COMPLETE": ("complete", BLUE, "circle"),
    INFEASIBLE: ("infeasible", BLUE, "circle-open"),
    "PRUNED": ("pruned", ORANGE, "triangle-down-open"),
    "FAIL": ("failed", BLACK, "x"),
    "PAUSED": ("paused", PURPLE, "square-open"),
    "RUNNING": ("running", GREEN, "diamond-open"),
}
"""Of each state its word, its colour and its shape."""


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """A figure: `figure` is plotly's, `title` and `note` are the page's; `note` says what is thinned or left out."""

    title: str
    note: str
    figure: dict[str, Any]
    wide: bool = False
    """Whether it is at least so wide that a small screen scrolls it."""


def layout(height: int = 360, **more: Any) -> dict[str, Any]:
    """Return a layout in the report's own look; `more` is laid over it."""
    grid = {"gridcolor": "#E3E3E3", "zerolinecolor": "#BBBBBB", "automargin": True}
    own = {
        "height": height,
        "margin": {"l": 60, "r": 16, "t": 30, "b": 48},
        "font": {"family": "system-ui, sans-serif", "size": 13, "color": BLACK},
        "paper_bgcolor": "#FFFFFF",
        "plot_bgcolor": "#FFFFFF",
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        "hovermode": "closest",
    }
    axes = {key: grid | more.pop(key, {}) for key in ("xaxis", "yaxis")}
    return own | axes | more


def thinned(items: Sequence[Item], most: int, keep: Callable[[Item], bool] = lambda item: False) -> list[Item]:
    """Return at most about `most` of the items, evenly taken; those to `keep` are all among them."""
    if len(items) <= most:
        return list(items)
    step = len(items) / max(1, most)
    even = {int(i * step) for i in range(most)}
    return [item for i, item in enumerate(items) if i in even or keep(item)]


def note_of(shown: int, of: int, what: str) -> str:
    """Return what is said of a figure that shows only some."""
    return "" if shown >= of else f"{shown:,} of {of:,} {what} are drawn."


def history(facts: Facts) -> Drawing | None:
    """Return each trial's value by its number, and the best so far."""
    started = [point for point in facts.points if point.state != "WAITING"]
    if not started:
        return None
    numbers, values = _best_so_far(facts)
    steps = set(numbers)
    drawn = thinned(started, MOST_POINTS, lambda point: point.number in steps)
    traces = [trace for state in STATES for trace in _of_state(state, [p for p in drawn if _drawn_as(p) == state])]
    if numbers:
        last = max(point.number for point in started)
        line = {"color": BLUE, "width": 2, "shape": "hv"}
        traces.append(trace_of("best so far", [*numbers, last], [*values, values[-1]], mode="lines", line=line))
    valueless = sum(point.value is None for point in started)
    beyond, limits = _limits(facts, [point.value for point in started if point.value is not None])
    notes = [
        note_of(len(drawn), len(started), "trials"),
        "A trial that is not complete stands at the last value that it reported.",
        f"{valueless:,} without any finite value stand at the bottom edge." if valueless else "",
        f"{beyond:,} far worse ones are beyond the axis; a double click shows all." if beyond else "",
    ]
    shape = layout(
        420,
        xaxis={"title": {"text": "trial"}},
        yaxis={"title": {"text": text(facts.metric)}} | ({"range": limits} if limits else {}),
        yaxis2={"overlaying": "y", "range": [0, 1], "visible": False, "fixedrange": True},
    )
    return Drawing(title="History", note=joined(notes), figure={"data": traces, "layout": shape})


def _drawn_as(point: Point) -> str:
    return INFEASIBLE if point.state == "COMPLETE" and point.feasible is False else point.state


def _of_state(state: str, points: Sequence[Point]) -> list[dict[str, Any]]:
    """Return the trials of a state that have a value, and those that have none, along the bottom edge."""
    word, colour, symbol = STATES[state]
    look = {"marker": {"color": colour, "symbol": symbol, "size": 8, "line": {"width": 1.5}}, "legendgroup": state}
    known = [point for point in points if point.value is not None]
    rest = [point for point in points if point.value is None]
    traces = []
    if known:
        traces.append(trace_of(word, [p.number for p in known], [p.value for p in known], **look))
    if rest:
        edge = {"yaxis": "y2", "showlegend": not known, "hovertemplate": "trial %{x}<br>no value"}
        traces.append(trace_of(word, [p.number for p in rest], [0.02] * len(rest), **look, **edge))
    return traces


def trace_of(name: str, x: Sequence[Any], y: Sequence[Any], **more: Any) -> dict[str, Any]:
    hover = "trial %{x}<br>%{y:.6g}"
    return {
        "type": "scatter",
        "name": name,
        "x": list(x),
        "y": list(y),
        "mode": "markers",
        "hovertemplate": hover,
    } | more


def _best_so_far(facts: Facts) -> tuple[list[int], list[float]]:
    numbers: list[int] = []
    values: list[float] = []
    for point in facts.points:
        if _drawn_as(point) != "COMPLETE" or point.value is None:
            continue
        if not values or facts.sign(point.value) < facts.sign(values[-1]):
            numbers.append(point.number)
            values.append(point.value)
    return numbers, values


def _limits(facts: Facts, values: Sequence[float]) -> tuple[int, list[float] | None]:
    """Return how many values are so bad that an axis with them shows nothing of the others, and an axis without."""
    signed = sorted(facts.sign(value) for value in values)
    if len(signed) < 5:
        return 0, None
    best, middle, worst = signed[0], signed[len(signed) // 2], signed[-1]
    far = middle + 10 * (middle - best)
    if middle == best or worst <= far:
        return 0, None
    high = max(value for value in signed if value <= far)
    room = 0.05 * (high - best)
    ends = sorted((facts.sign(best - room), facts.sign(high + room)))
    return sum(value > far for value in signed), ends


def joined(notes: Sequence[str]) -> str:
    return " ".join(note for note in notes if note)


def curves(facts: Facts, metric: str) -> Drawing:
    """Return the learning curves of all trials: the best bold, the next ones fine, the others faint."""
    found = facts.curves[metric]
    ranked = [row["number"] for row in facts.ranked() if row["number"] in found]
    others = sorted(found.keys() - set(ranked))
    bold, fine = ranked[:BOLD_CURVES], ranked[BOLD_CURVES:MOST_CURVES]
    faint = thinned([*ranked[MOST_CURVES:], *others], MOST_FAINT_CURVES)
    traces = []
    for name, numbers, line in (
        ("the rest", faint, {"color": "#B5B5B5", "width": 0.8}),
        (f"best {BOLD_CURVES + 1} to {BOLD_CURVES + len(fine)}", fine, {"color": "#7FB2D5", "width": 1.2}),
    ):
        if numbers:
            traces.append(_many(name, {number: found[number] for number in numbers}, facts.steps) | {"line": line})
    for number, colour, dash in zip(bold, _COLOURS, _DASHES, strict=False):
        line = {"color": colour, "dash": dash, "width": 3}
        traces.append(_many(f"trial {number}", {number: found[number]}, facts.steps) | {"line": line})
    shown = len(bold) + len(fine) + len(faint)
    notes = [note_of(shown, len(found), "trials")]
    if any(len(values) > MOST_EPOCHS for values in found.values()):
        notes.append(f"Of a trial about {MOST_EPOCHS} epochs are drawn.")
    last = max(map(len, found.values()))
    unit = "step" if facts.steps else "epoch"
    epochs = {"title": {"text": unit}} | ({"dtick": 1} if last <= 10 and not facts.steps else {})
    shape = layout(420, xaxis=epochs, yaxis={"title": {"text": text(metric)}})
    return Drawing(title="Learning curves", note=joined(notes), figure={"data": traces, "layout": shape})


def _many(name: str, curves: Mapping[int, Sequence[float]], steps: Mapping[int, Sequence[int]]) -> dict[str, Any]:
    """Return several curves as one trace, with a gap between two; by epochs, from 1, or their own `steps`."""
    x: list[int | None] = []
    y: list[float | None] = []
    label: list[int | None] = []
    for number, values in curves.items():
        last = len(values)
        at = thinned(range(1, last + 1), MOST_EPOCHS, lambda epoch, last=last: epoch == last)  # type: ignore[misc]
        x += [*(steps[number][epoch - 1] if number in steps else epoch for epoch in at), None]
        y += [*(values[epoch - 1] for epoch in at), None]
        label += [number] * (len(at) + 1)
    unit = "step" if curves.keys() & steps else "epoch"
    mode = "lines+markers" if all(len(values) < 3 for values in curves.values()) else "lines"
    hover = "trial %{customdata}, " + unit + " %{x}<br>%{y:.6g}<extra></extra>"
    return {"type": "scatter", "name": name, "x": x, "y": y, "mode": mode, "customdata": label, "hovertemplate": hover}


def importance(facts: Facts) -> Drawing | None:
    """Return each param's importance."""
    if not facts.importances:
        return None
    pairs = list(facts.importances.items())[:20][::-1]
    bar = {
        "type": "bar",
        "orientation": "h",
        "y": list(range(len(pairs))),
        "x": [share for _, share in pairs],
        "text": [f"{share:.0%}" for _, share in pairs],
        "textposition": "outside",
        "marker": {"color": BLUE},
        "hovertemplate": "%{x:.3f}<extra></extra>",
    }
    ticks = {"tickvals": bar["y"], "ticktext": [text(name) for name, _ in pairs], "showgrid": False}
    shares = {"title": {"text": "share"}, "tickformat": ".0%", "range": [0, 1.15 * pairs[-1][1]]}
    shape = layout(90 + 30 * len(pairs), xaxis=shares, yaxis=ticks)
    note = (
        "By Optuna's PED-ANOVA: how much the params of the best tenth differ from those of all complete trials. "
        "It says what mattered within the ranges that were searched, for the trials that were tried."
    )
    return Drawing(title="Importance of the params", note=note, figure={"data": [bar], "layout": shape})
