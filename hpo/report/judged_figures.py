"""The figures of what `hpo.runner.judging` found on the validation split: confusion, or residuals."""

from collections.abc import Mapping
from typing import Any

from hpo.report.axes import text
from hpo.report.figures import BLACK, BLUE, Drawing, layout

_MOST_NUMBERS = 20
"""Up to so many classes each cell has its count written in it."""


def confusion(found: Mapping[str, Any]) -> Drawing:
    """Return how often each class was taken for each: rows are the true classes, shaded by their share of a row."""
    counts = found["counts"]
    n = len(counts)
    shares = [[count / max(1, sum(row)) for count in row] for row in counts]
    labels = [text(name) for name in found["classes"]]
    ticks = {"tickvals": list(range(n)), "ticktext": labels, "showgrid": False, "zeroline": False}
    heat = {
        "type": "heatmap",
        "z": shares,
        "zmin": 0,
        "zmax": 1,
        "colorscale": [[0, "#FFFFFF"], [1, "#2171B5"]],
        "text": [[f"{count:,}" for count in row] for row in counts],
        "texttemplate": "%{text}" if n <= _MOST_NUMBERS else "",
        "hovertemplate": "%{text} rows, %{z:.1%} of the true class<extra></extra>",
        "xgap": 1,
        "ygap": 1,
        "colorbar": {"title": {"text": "share of row"}, "tickformat": ".0%", "thickness": 10},
    }
    shape = layout(
        max(320, min(760, 160 + 42 * n)),
        xaxis=ticks | {"title": {"text": "predicted"}},
        yaxis=ticks | {"title": {"text": "true"}, "autorange": "reversed"},
    )
    right = sum(counts[i][i] for i in range(n))
    total = sum(map(sum, counts))
    note = f"{right:,} of {total:,} validation rows are right."
    return Drawing(title="Confusion matrix", note=note, figure={"data": [heat], "layout": shape})


def residuals(found: Mapping[str, Any]) -> list[Drawing]:
    """Return predictions by targets, and how the differences are spread."""
    targets, predictions = found["targets"], found["predictions"]
    ends = [min(targets), max(targets)]
    marker = {"size": 5, "color": BLUE, "opacity": 0.5}
    hover = "target %{x:.6g}<br>predicted %{y:.6g}<extra></extra>"
    points = {"type": "scatter", "mode": "markers", "x": targets, "y": predictions, "marker": marker}
    line = {"color": BLACK, "dash": "dash", "width": 1.5}
    equal = {"type": "scatter", "mode": "lines", "x": ends, "y": ends, "line": line, "hoverinfo": "skip"}
    shape = layout(360, xaxis={"title": {"text": "target"}}, yaxis={"title": {"text": "predicted"}}, showlegend=False)
    shown = len(targets)
    thin = "" if shown == found["n"] else f"{shown:,} of {found['n']:,} values are drawn. "
    differences = [p - t for p, t in zip(predictions, targets, strict=True)]
    bars = {"type": "histogram", "x": differences, "nbinsx": 40, "marker": {"color": BLUE, "line": {"width": 0.5}}}
    spread = layout(360, xaxis={"title": {"text": "predicted - target"}}, yaxis={"title": {"text": "rows"}})
    return [
        Drawing(
            title="Predictions by targets",
            note=f"{thin}On the dashed line a prediction is right.",
            figure={"data": [points | {"hovertemplate": hover}, equal], "layout": shape},
        ),
        Drawing(
            title="Residuals",
            note=f"{thin}Of all values: mean {found['mean']:.4g}, standard deviation {found['std']:.4g}.",
            figure={"data": [bars], "layout": spread},
        ),
    ]
