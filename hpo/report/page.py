"""The report as one HTML page, with plotly's JavaScript in it: nothing is loaded from anywhere.

Texts of the user's reach it escaped by Jinja, in JSON whose `<`, `>` and `&` are escapes, or as plotly's texts
(`hpo.report.axes.text`). Beyond that the page's own policy lets no script run but the two that are written here, and no
request be made.
"""

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from hpo.export.files import finite
from hpo.report import figures, front_figure, judged_figures, space_figures, texts, time_figures
from hpo.report.facts import Facts
from hpo.report.figures import Drawing
from hpo.search.clock import duration

_SECTIONS = (
    ("best", "Best"),
    ("front", "Pareto front"),
    ("search", "Search"),
    ("params", "Params"),
    ("time", "Time"),
    ("validation", "Validation"),
    ("trials", "Trials"),
    ("reproduce", "Repeat it"),
)
MOST_METRICS = 12
"""How many metrics' curves are in the page."""


def page(facts: Facts, judged: Mapping[str, Any] | None = None) -> str:
    """Return the page; `judged` is what `hpo.runner.judging.judge` gave, None: nothing was judged."""
    groups = _groups(facts, judged or {})
    drawings = {f"{group}-{i}" if group in _SEVERAL else group: drawing for group, i, drawing in _numbered(groups)}
    keys = {group: [key for key in drawings if key.partition("-")[0] == group] for group in groups}
    metrics = list(facts.curves)[:MOST_METRICS]
    script, plotly = _resource("page.js"), get_plotlyjs()
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"number": texts.number, "short": _short, "duration": duration}
    return environment.from_string(_resource("page.html")).render(
        facts=facts,
        judged=judged,
        drawings=drawings,
        groups=keys,
        sections=[section for section in _SECTIONS if facts.front or section[0] != "front"],
        curve_keys=list(zip(keys["curves"], metrics, strict=True)),
        policy=_policy(plotly, script),
        css=Markup(_resource("page.css")),
        plotly=Markup(plotly),
        script=Markup(script),
        data=Markup(_in_script(_data(facts, drawings))),
        **_sentences(facts, judged or {}),
    )


_SEVERAL = ("front", "curves", "slice", "contour", "judged")


def _groups(facts: Facts, judged: Mapping[str, Any]) -> dict[str, Sequence[Drawing | None]]:
    """Return the figures by the part of the page in which they stand."""
    validation: list[Drawing] = []
    if "confusion" in judged:
        validation = [judged_figures.confusion(judged["confusion"])]
    elif "residuals" in judged:
        validation = judged_figures.residuals(judged["residuals"])
    return {
        "history": [figures.history(facts)],
        "front": front_figure.fronts(facts),
        "curves": [figures.curves(facts, metric) for metric in list(facts.curves)[:MOST_METRICS]],
        "importance": [figures.importance(facts)],
        "slice": space_figures.slices(facts),
        "contour": space_figures.contours(facts),
        "parallel": [space_figures.parallel(facts)],
        "timeline": [time_figures.timeline(facts)],
        "judged": validation,
    }


def _numbered(groups: Mapping[str, Sequence[Drawing | None]]) -> list[tuple[str, int, Drawing]]:
    return [(name, i, each) for name, group in groups.items() for i, each in enumerate(group) if each is not None]


def _data(facts: Facts, drawings: Mapping[str, Drawing]) -> dict[str, Any]:
    """Return what the page's script reads."""
    columns = [column for column in facts.columns if any(row.get(column) is not None for row in facts.rows)]
    return {
        "figures": {key: drawing.figure for key, drawing in drawings.items()},
        "notes": {key: drawing.note for key, drawing in drawings.items()},
        "table": {
            "columns": [texts.heading(column) for column in columns],
            "rows": [[row.get(column) for column in columns] for row in facts.rows],
        },
    }


def _sentences(facts: Facts, judged: Mapping[str, Any]) -> dict[str, Any]:
    """Return the texts and the small tables of the page."""
    best, origin = facts.best, facts.origin
    seeds = [("seed of the study", origin.study_file.get("seed", "42 (the default)"))]
    if best is not None:
        seeds.append((f"seed of trial {best.number}", best.seed))
    prints = [(f"fingerprint of the {what}", value) for what, value in origin.fingerprints.items()]
    packages = {
        "the model was exported with": origin.exported_with,
        "this page was made with": origin.versions,
    }
    versions = [(what, ", ".join(map(" ".join, each.items()))) for what, each in packages.items() if each]
    bundle = [("bundle", facts.result["bundle"])] if facts.result.get("bundle") else []
    at_once = facts.work.seconds_summed / facts.work.seconds_used if facts.work.seconds_used > 0 else 0.0
    return {
        "certainty": texts.certainty(facts),
        "front": (texts.front_text(facts), *texts.front_table(facts)) if facts.front else None,
        "confirmed": texts.confirmed_table(facts) if facts.confirmed else None,
        "counts": texts.counts_text(facts),
        "test": texts.tests_text(facts),
        "best_params": _shown(facts.confirmed.get("params", best.params)) if best is not None else [],
        "fixed": _shown(origin.fixed),
        "effort": f"{facts.work.effort_text}." if facts.work.effort_text else "Pruning has saved no epochs.",
        "at_once": f"{at_once:.1f}" if at_once > 1.05 else "",
        "measured": ", ".join(f"{name} {texts.number(value)}" for name, value in judged.get("measured", {}).items()),
        "stacks": [f"Stacks ran {each}." for each in origin.stacks]
        + ([f"How many trials were trained at once: {origin.stack_choice}."] if origin.stack_choice else []),
        "study_file": json.dumps(origin.study_file, indent=2, ensure_ascii=False),
        "origins": [*seeds, *prints, *bundle, *versions],
    }


def _shown(params: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(name, texts.number(value)) for name, value in params.items()]


def _in_script(value: Any) -> str:
    """Return JSON that cannot end the script that it stands in; it is ASCII."""
    text = json.dumps(finite(value), allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}"


def _policy(*scripts: str) -> str:
    """Return a policy that lets these scripts run and no other, and no request be made."""
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    may_run = " ".join(f"'sha256-{each}'" for each in hashes)
    # plotly compiles its parallel coordinates' shaders' calls, and sets styles
    rest = "style-src 'unsafe-inline'; img-src data: blob:; font-src data:; base-uri 'none'; form-action 'none'"
    return f"default-src 'none'; script-src {may_run} 'unsafe-eval'; {rest}"


def _resource(name: str) -> str:
    return files("hpo.report").joinpath(name).read_text(encoding="utf-8")
