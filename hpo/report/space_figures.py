"""The figures of the search space: slices, contours, parallel coordinates; of complete trials only."""

import html
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from hpo.report.axes import HAS_NOT, Axis, axis_of, text
from hpo.report.facts import Facts, Point
from hpo.report.figures import BLACK, Drawing, joined, layout, note_of, thinned

MOST_SLICES, MOST_CONTOURS, MOST_AXES = 8, 3, 8
MOST_IN_A_SLICE, MOST_IN_A_CONTOUR, MOST_LINES = 1500, 500, 400
_BEST = 100
"""How many of the best trials are never thinned out."""
_GRID = 40
_FEWEST_FOR_A_SURFACE = 10


def complete_points(facts: Facts) -> list[Point]:
    """Return the complete trials with a finite value, the best first."""
    points = [point for point in facts.points if point.state == "COMPLETE" and point.value is not None]
    return sorted(points, key=lambda point: (facts.sign(point.value or 0.0), point.number))


def params_by_importance(facts: Facts, points: Sequence[Point]) -> list[str]:
    """Return the params that differ between these trials, the most important first."""
    names = dict.fromkeys([*facts.importances, *(name for point in points for name in point.params)])
    return [name for name in names if len({repr(point.params.get(name, HAS_NOT)) for point in points}) > 1]


def slices(facts: Facts) -> list[Drawing]:
    """Return the value by each of the most important params."""
    points = complete_points(facts)
    return [_slice(facts, points, name) for name in params_by_importance(facts, points)[:MOST_SLICES]]


def _slice(facts: Facts, points: Sequence[Point], name: str) -> Drawing:
    having = [point for point in points if name in point.params]
    drawn = _thinned(having, MOST_IN_A_SLICE)
    axis = _axis(facts, having, name)
    places = [axis.place(point.params[name]) + _beside(axis, point) for point in drawn]
    marker = {
        "size": 7,
        "color": [point.number for point in drawn],
        "colorscale": [[0, "#CFE3F1"], [1, "#08306B"]],
        "line": {"width": 0.5, "color": BLACK},
        "colorbar": {"title": {"text": "trial"}, "thickness": 10, "len": 0.9},
    }
    shape = layout(320, xaxis=_drawn(axis), yaxis={"title": {"text": text(facts.metric)}}, showlegend=False)
    note = joined([note_of(len(drawn), len(having), "complete trials"), _gap_note(len(points) - len(having), name)])
    scatter = _scatter(drawn, places, [point.value for point in drawn], marker)
    return Drawing(title=name, note=note, figure={"data": [scatter], "layout": shape})


def contours(facts: Facts) -> list[Drawing]:
    """Return the value over each pair of the three most important params."""
    points = complete_points(facts)
    pairs = itertools.combinations(params_by_importance(facts, points)[:3], 2)
    drawings = (_contour(facts, points, *pair) for pair in itertools.islice(pairs, MOST_CONTOURS))
    return [drawing for drawing in drawings if drawing is not None]


def _contour(facts: Facts, points: Sequence[Point], first: str, second: str) -> Drawing | None:
    having = [point for point in points if first in point.params and second in point.params]
    if len(having) < 2:
        return None
    drawn = _thinned(having, MOST_IN_A_CONTOUR)
    axes = [_axis(facts, having, name) for name in (first, second)]
    x, y = ([axis.place(point.params[axis.name]) for point in drawn] for axis in axes)
    values = [point.value for point in drawn]
    colours = {
        "colorscale": "Viridis",
        "reversescale": not facts.maximize,
        "colorbar": {"title": {"text": text(facts.metric)}, "thickness": 10, "len": 0.9},
    }
    surface = _surface(axes, drawn)
    marker: dict[str, Any] = {"size": 6, "line": {"width": 1, "color": "#FFFFFF"}, "color": BLACK}
    data = []
    if surface is None:
        marker |= {"size": 9, "color": values, **colours}
    else:
        data.append({"type": "contour", **surface, **colours, "ncontours": 12, "hoverinfo": "skip"})
    beside_x, beside_y = (
        [place + _beside(axis, point) for place, point in zip(places, drawn, strict=True)]
        for axis, places in zip(axes, (x, y), strict=True)
    )
    data.append(_scatter(drawn, beside_x, beside_y, marker))
    shape = layout(340, xaxis=_drawn(axes[0]), yaxis=_drawn(axes[1]), showlegend=False)
    note = joined(
        [
            note_of(len(drawn), len(having), "complete trials"),
            "Between the trials (points) the value is interpolated." if surface is not None else "",
        ]
    )
    title = f"{first} and {second}"
    return Drawing(title=title, note=note, figure={"data": data, "layout": shape})


def _surface(axes: Sequence[Axis], points: Sequence[Point]) -> dict[str, Any] | None:
    """Return the values interpolated on a grid; None where that means nothing: between choices, of too few points."""
    from scipy.interpolate import griddata
    from scipy.spatial import QhullError

    within = [point for point in points if all(axis.within(point.params[axis.name]) for axis in axes)]
    if len(within) < _FEWEST_FOR_A_SURFACE:
        return None
    grid = [np.linspace(axis.low, axis.high, _GRID) for axis in axes]
    places = np.array([[axis.place(point.params[axis.name]) for axis in axes] for point in within])
    lows, highs = (np.array([getattr(axis, end) for axis in axes]) for end in ("low", "high"))
    values = np.array([point.value for point in within], dtype=float)
    unit = np.linspace(0.0, 1.0, _GRID)
    try:
        values = griddata(
            (places - lows) / (highs - lows), [point.value for point in within], tuple(np.meshgrid(unit, unit))
        )
    except QhullError:
        return None
    rows = [[None if math.isnan(value) else float(f"{value:.6g}") for value in row] for row in values]
    return {"x": grid[0].tolist(), "y": grid[1].tolist(), "z": rows}


def parallel(facts: Facts) -> Drawing | None:
    """Return parallel coordinates of the most important params and the value."""
    points = complete_points(facts)
    names = params_by_importance(facts, points)[:MOST_AXES]
    if not names or len(points) < 2:
        return None
    drawn = _thinned(points, MOST_LINES)
    values = [point.value for point in drawn if point.value is not None]
    dimensions = []
    for name in names:
        axis = _axis(facts, points, name)
        places, labels = axis.ticks()
        dimensions.append(
            {
                "label": text(name),
                "values": [axis.place(point.params.get(name, HAS_NOT)) + _beside(axis, point) for point in drawn],
                "tickvals": places,
                "ticktext": [html.unescape(label) for label in labels],  # the only texts that plotly takes as they are
                "range": list(axis.ends()),
            }
        )
    dimensions.append({"label": text(facts.metric), "values": values})
    worst, best = max(values, key=facts.sign), min(values, key=facts.sign)
    line = {
        "color": values,
        "colorscale": [[0, "#DDDDDD"], [0.6, "#6BAED6"], [1, "#08306B"]],
        "reversescale": not facts.maximize,
        "cmin": min(worst, best),
        "cmax": max(worst, best),
        "showscale": True,
    }
    figure = {"type": "parcoords", "dimensions": dimensions[::-1], "line": line, "labelangle": -20}
    shape = layout(440, margin={"l": 90, "r": 30, "t": 90, "b": 30})
    note = joined(
        [
            note_of(len(drawn), len(points), "complete trials"),
            "Drag along an axis to choose the trials that are shown; darker is better.",
            note_of(len(names), len(params_by_importance(facts, points)), "params"),
        ]
    )
    return Drawing(title="Parallel coordinates", note=note, figure={"data": [figure], "layout": shape}, wide=True)


def _axis(facts: Facts, points: Sequence[Point], name: str) -> Axis:
    return axis_of(name, facts.distributions.get(name, {}), [point.params.get(name, HAS_NOT) for point in points])


def _thinned(points: Sequence[Point], most: int) -> list[Point]:
    best = {point.number for point in points[:_BEST]}
    return thinned(points, most, lambda point: point.number in best)


def _beside(axis: Axis, point: Point) -> float:
    """Return how far beside its choice a trial is drawn, so that trials of one choice are not all at one place."""
    return 0.0 if axis.numeric else (point.number * 0.618 % 1 - 0.5) * 0.4


def _drawn(axis: Axis) -> dict[str, Any]:
    places, labels = axis.ticks()
    own = {"title": {"text": text(axis.name)}, "tickvals": places, "ticktext": labels}
    return own | {"range": list(axis.ends()), "zeroline": False}


def _scatter(points: Sequence[Point], x: Sequence[float], y: Sequence[Any], marker: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "markers",
        "x": list(x),
        "y": list(y),
        "marker": marker,
        "customdata": [[point.number, point.value] for point in points],
        "hovertemplate": "trial %{customdata[0]}<br>%{customdata[1]:.6g}<extra></extra>",
    }


def _gap_note(missing: int, name: str) -> str:
    return f"{missing:,} complete trials do not have it." if missing else ""
