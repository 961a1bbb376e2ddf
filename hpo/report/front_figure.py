"""The figure of a study of several metrics: each of the others against the one that leads, the Pareto front marked."""

from hpo.report.axes import text
from hpo.report.facts import Facts
from hpo.report.figures import BLUE, GREY, MOST_POINTS, ORANGE, Drawing, joined, layout, note_of, thinned, trace_of
from hpo.report.rows import OTHER

MOST_OTHERS = 4


def fronts(facts: Facts) -> list[Drawing]:
    """Return a figure for each other metric, at most MOST_OTHERS; none where there is no front."""
    return [_front(facts, name) for name in list(facts.others)[:MOST_OTHERS]] if facts.front else []


def _front(facts: Facts, other: str) -> Drawing:
    on = set(facts.front)
    rows = [row for row in facts.ranked() if row.get(f"{OTHER}{other}") is not None]
    drawn = thinned(rows, MOST_POINTS, lambda row: row["number"] in on)
    parts = {
        "complete": ([row for row in drawn if row["number"] not in on], {"color": GREY, "symbol": "circle-open"}),
        "on the Pareto front": ([row for row in drawn if row["number"] in on], {"color": ORANGE, "symbol": "diamond"}),
    }
    traces = []
    for word, (some, marker) in parts.items():
        some = sorted(some, key=lambda row: row[f"{OTHER}{other}"])
        line = {"mode": "lines+markers", "line": {"color": BLUE, "width": 1, "dash": "dot"}}
        more = line if word != "complete" and len(facts.others) == 1 else {}  # of three metrics it would zigzag
        traces.append(
            trace_of(
                word,
                [row[f"{OTHER}{other}"] for row in some],
                [row["value"] for row in some],
                marker=marker | {"size": 9, "line": {"width": 1.5}},
                text=[f"trial {row['number']}" for row in some],
                hovertemplate="%{text}<br>%{x:.6g}, %{y:.6g}",
                **more,
            )
        )
    values = [row[f"{OTHER}{other}"] for row in drawn]
    spread = bool(values) and min(values) > 0 and max(values) > 30 * min(values)
    axis = {"title": {"text": text(other)}} | ({"type": "log"} if spread else {})
    shape = layout(420, xaxis=axis, yaxis={"title": {"text": text(facts.metric)}})
    notes = [note_of(len(drawn), len(rows), "trials"), "Complete trials that break no constraint."]
    figure = {"data": traces, "layout": shape}
    return Drawing(title=f"{facts.metric} and {other}", note=joined(notes), figure=figure)
