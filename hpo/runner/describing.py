"""A study in words: what it searches, as its start says it, and the description of its run in MLflow, in Markdown."""

from collections.abc import Mapping
from typing import Any

from hpo.errors import masked
from hpo.runner.outcome import Outcome
from hpo.runner.prepare import Plan
from hpo.runner.progress import count_text, shown
from hpo.search.confirmed import sentences
from hpo.search.curves import where
from hpo.search.pareto import front_lines
from hpo.search.retrained import Confirmed
from hpo.search.samplers import CONSTRAINED
from hpo.search.view import Best, StudyView
from hpo.study.data import Data

_MOST_CHARACTERS = 4_000
"""MLflow takes 5,000 in a description; links become longer."""
_MOST_ROWS = 30


def announcement(plan: Plan, data: Data | None, seen: StudyView) -> list[str]:
    """Return what is said as a study starts: how much, of what, where; what is searched, and what is held fixed."""
    spec, space = plan.spec, plan.space
    of_what = f"of {spec.epochs} epochs on {plan.device}, {len(data.train)} rows" if data else "of a function"
    lines = [f"{spec.name}: {spec.budget_text}{',' if spec.time else ''} {of_what}; {masked(spec.storage)}"]
    if seen.counts.finished:
        lines.append(f"  resumed: {seen.counts.finished} trials have ended, of {spec.budget_text}")
    if plan.function is not None:
        return lines
    searched = [f"{each.name} {each.describe()}" for each in space.dimensions]
    lines.append(f"  searched: {'; '.join(searched) or 'nothing'}")
    if spec.constraints:
        lines.append(f"  constraints: {', '.join(f'{name} {text}' for name, text in spec.constraints.items())}")
        if spec.sampler.name not in CONSTRAINED:
            lines.append(f"  the sampler {spec.sampler.name} does not look at constraints; {', '.join(CONSTRAINED)} do")
    lines += [f"  tried first: {shown(entry)}" for entry in spec.start_with[: 0 if seen.counts.finished else 3]]
    if space.fixed:
        lines.append(f"  fixed: {shown(space.fixed)}")
    if unsearched := [name for name in plan.objective.space if name in space.fixed and name not in spec.params]:
        lines.append(
            f"  the study file has ranges of its own, so the objective's are not used: {', '.join(unsearched)} "
            "would be searched without them"
        )
    return lines


def intention(plan: Plan) -> str:
    """Return what a study is to find, before it has found anything."""
    return "\n".join([*_head(plan), "It has not ended yet.", "", *_space(plan)])[:_MOST_CHARACTERS]


def description(
    plan: Plan, seen: StudyView, best: Best, done: Outcome | None, confirmed: Confirmed | None = None
) -> str:
    """Return what a study has found; a link to a trial is `hpo:trial/<number>` (`hpo.tracking.values.linked`).

    `best` is the trial that the study ends with, the `confirmed` one where there is one.
    """
    lines = _head(plan)
    first = seen.best() or best
    epoch = "" if plan.function is not None else f", {where(plan.spec.value, first.epoch)}"
    lines += [
        f"**Best {_escaped(plan.metric)}: {first.value:.6g}** on validation, by [trial {first.number}]"
        f"(hpo:trial/{first.number}){epoch}.",
        "",
    ]
    if confirmed is not None:
        lines += [_escaped(" ".join(sentences(confirmed, plan.metric))), ""]
    if done is not None and done.test:
        tests = ", ".join(f"{_escaped(name)} {value:.6g}" for name, value in done.test.items())
        lines += [f"Trained again on train + validation and tested: {tests}.", ""]
        lines += [f"{_escaped(done.seeds_text.capitalize())}.", ""] if done.seeds else []
        lines += [f"{done.readings.capitalize()}.", ""] if done.readings else []
        lines += [_escaped(" ".join(done.beside.sentences())), ""] if done.beside is not None else []
    if done is not None and done.bundle is not None:
        lines += [f"The model is in the artifacts, in `bundle`; it was written to `{masked(str(done.bundle))}`.", ""]
    stopped = "" if seen.stopped is None else f" The search was {seen.stopped.text()}."
    lines += [f"{count_text(seen.counts)}.{stopped} {seen.effort.text()}".strip(), ""]
    lines += [f"Constraints: {_escaped(seen.feasible_text)}.", ""] if seen.feasible_text else []
    lines += [line for text in front_lines(seen) for line in (_escaped(text.strip()), "")]
    lines += _table(["parameter", "best value"], plan.space.searched(best.params) or best.params)
    lines += ["", *_space(plan)]
    return "\n".join(lines)[:_MOST_CHARACTERS]


def goal_text(plan: Plan) -> str:
    """Return what a study searches for: `highest accuracy and lowest n_parameters`."""
    goals = {plan.metric: plan.maximize, **plan.others}
    return " and ".join(f"{'highest' if more else 'lowest'} {name}" for name, more in goals.items())


def _head(plan: Plan) -> list[str]:
    spec = plan.spec
    return [
        f"A search for the **{_escaped(goal_text(plan))}** of `{spec.objective}`, by hpo.",
        "",
        f"{spec.budget_text} of {spec.epochs} epochs; sampler `{spec.sampler.name}`, pruner `{spec.pruner.name}`, "
        f"seed {spec.seed}; storage `{masked(spec.storage)}`, study `{spec.name}`.",
        "",
    ]


def _space(plan: Plan) -> list[str]:
    rows = {each.name: each.describe() for each in plan.space.dimensions}
    fixed = {name: f"{value} (fixed)" for name, value in plan.space.fixed.items()}
    return _table(["parameter", "searched"], rows | fixed) if rows or fixed else []


def _table(columns: list[str], rows: Mapping[str, Any]) -> list[str]:
    lines = [f"| {' | '.join(columns)} |", "|---|---|"]
    for name, value in list(rows.items())[:_MOST_ROWS]:
        text = f"{value:.6g}" if isinstance(value, float) else str(value)
        lines.append(f"| {_escaped(name)} | {_escaped(text[:100])} |")
    return lines


def _escaped(text: str) -> str:
    """Return text that is no Markdown and no HTML."""
    return "".join(f"\\{c}" if c in r"\`*_[]|<>#" else c for c in text.replace("\n", " "))
