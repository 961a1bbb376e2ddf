"""The timeline: who trained which trial when, with pauses, interruptions and retries."""

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from hpo.report.axes import text
from hpo.report.facts import Facts, Span
from hpo.report.figures import BLACK, BLUE, GREEN, ORANGE, PURPLE, Drawing, joined, layout
from hpo.search.clock import duration

MOST_SPANS = 1500
_SEVERAL = "SEVERAL"
_KINDS = {
    "COMPLETE": ("complete", BLUE, ""),
    "PRUNED": ("pruned", ORANGE, "/"),
    "PAUSED": ("until it was paused", PURPLE, "."),
    "FAIL": ("failed", BLACK, "x"),
    "INTERRUPTED": ("interrupted, and retried", "#A6A6A6", "\\"),
    "RUNNING": ("running", GREEN, "-"),
    _SEVERAL: ("one trial after the other, of any state", BLUE, ""),
}
"""Of each kind its words, its colour and its pattern."""


def timeline(facts: Facts) -> Drawing | None:
    """Return a bar for each stretch of training, in a row for each trial that a worker trained at the same time."""
    spans = [span for span in facts.work.spans if span.kind in _KINDS]
    if not spans:
        return None
    start = min(span.start for span in spans)
    rows, workers = _rows(spans)
    drawn = list(zip(spans, rows, strict=True))
    joint = 0.0
    if len(drawn) > MOST_SPANS:
        joint = (max(span.end for span in spans) - start) * (max(rows) + 1) / MOST_SPANS
        drawn = _merged(drawn, joint)
    data = [_bars(kind, [each for each in drawn if each[0].kind == kind], start) for kind in _KINDS]
    labels = [text(worker) for worker in workers.values()]
    n_rows = max(rows) + 1
    ticks = {"tickvals": list(workers), "ticktext": labels, "range": [n_rows - 0.4, -0.6], "showgrid": False}
    began = datetime.fromtimestamp(start, UTC).strftime("%Y-%m-%d %H:%M:%S")
    shape = layout(
        min(900, 130 + 24 * n_rows),
        barmode="overlay",
        xaxis={"title": {"text": f"seconds since {began} UTC"}},
        yaxis=ticks,
    )
    notes = [
        "Each row is one trial at a time; a worker that trains a stack has several.",
        f"There are too many to tell them apart: what is less than {duration(joint)} apart is one bar."
        if joint
        else "",
        "What was trained before a pause is drawn at the worker that had the trial last."
        if any(span.kind == "PAUSED" for span in spans)
        else "",
    ]
    figure = {"data": [bars for bars in data if bars["x"]], "layout": shape}
    return Drawing(title="Timeline", note=joined(notes), figure=figure, wide=True)


def _bars(kind: str, spans: Sequence[tuple[Span, int]], start: float) -> dict[str, Any]:
    words, colour, pattern = _KINDS[kind]
    return {
        "type": "bar",
        "orientation": "h",
        "width": 0.8,
        "name": words,
        "base": [round(span.start - start, 3) for span, _ in spans],
        "x": [round(span.end - span.start, 3) for span, _ in spans],
        "y": [row for _, row in spans],
        "customdata": [[span.number, round(span.end - span.start, 3)] for span, _ in spans],
        "hovertemplate": f"{'from ' if kind == _SEVERAL else ''}trial %{{customdata[0]}}: {words}<br>"
        "%{customdata[1]} s<extra></extra>",
        "marker": {"color": colour, "pattern": {"shape": pattern, "size": 6}, "line": {"width": 0.5, "color": colour}},
    }


def _rows(spans: Sequence[Span]) -> tuple[list[int], dict[int, str]]:
    """Return each span's row (`spans` are in the order of their starts), and each worker by its first row."""
    lanes: dict[str, list[float]] = {}
    lane_of = []
    for span in spans:
        ends = lanes.setdefault(span.worker, [])
        free = next((i for i, end in enumerate(ends) if end <= span.start + 1e-3), len(ends))
        ends[free:] = [span.end, *ends[free + 1 :]]
        lane_of.append(free)
    first, row = {}, 0
    for worker, ends in lanes.items():
        first[worker] = row
        row += len(ends)
    rows = [first[span.worker] + lane for span, lane in zip(spans, lane_of, strict=True)]
    return rows, {row: worker for worker, row in first.items()}


def _merged(drawn: Sequence[tuple[Span, int]], joint: float) -> list[tuple[Span, int]]:
    """Return the spans of each row as one where less than `joint` seconds are between them, whatever their kind."""
    latest: dict[int, int] = {}
    merged: list[tuple[Span, int]] = []
    for span, row in drawn:
        at = latest.get(row)
        if at is not None and span.start - merged[at][0].end < joint:
            merged[at] = (replace(merged[at][0], end=max(span.end, merged[at][0].end), kind=_SEVERAL), row)
            continue
        latest[row] = len(merged)
        merged.append((span, row))
    return merged
