"""A report as Markdown, JSON and CSV, and the sentences that it shares with the page."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

from hpo.export.files import finite
from hpo.report.facts import Facts
from hpo.report.rows import CONSTRAINED, OTHER, PARAM
from hpo.search.beside import beside_in
from hpo.search.pareto import goals_text

TOP = 10
MOST_ON_FRONT = 100
"""Trials on the Pareto front that a table has."""
RUNNERS_UP = 3


def number(value: Any) -> str:
    """Return a value as a person reads it."""
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def counts_text(facts: Facts) -> str:
    """Return how many trials there are of each state."""
    counts = facts.counts
    more = [(counts.running, "running"), (counts.paused, "paused"), (counts.waiting, "waiting")]
    parts = [f"{counts.complete} complete", f"{counts.pruned} pruned", f"{counts.failed} failed"]
    parts += [f"{n} {word}" for n, word in more if n]
    stopped = f"; the search was {facts.stopped}" if facts.stopped else ""
    codes = f"; {facts.origin.codes}" if facts.origin.codes else ""
    done = f"{counts.finished} of {counts.finished + counts.unfinished} trials done"
    return f"{done}: {', '.join(parts)}{stopped}{codes}"


def certainty(facts: Facts) -> list[str]:
    """Return, in sentences, how sure the best value is: what is known, and what is not."""
    best = facts.best
    if best is None:
        return []
    n, ranked = len(facts.ranking), facts.ranked()[1:]
    kind = "feasible" if n < facts.counts.complete else "complete"
    value = "The search's best value" if facts.confirmed else "The value"
    equal = sum(row["value"] == best.value for row in ranked)
    said = [
        f"{value} is one number, measured on the validation split, and the best of {n:,} {kind} "
        f"{'trial' if n == 1 else 'trials'}: picked as the best, it flatters, and less is to be expected of new data."
        if n > 1
        else f"{value} is one number, measured on the validation split, of the only {kind} trial."
    ]
    if equal:
        said.append(f"{equal:,} other {'trial has' if equal == 1 else 'trials have'} exactly the same value.")
    behind = [row for row in ranked if row["value"] != best.value][:RUNNERS_UP]
    if behind:
        gaps = ", ".join(
            f"trial {row['number']} with {number(row['value'])} (gap {number(abs(row['value'] - best.value))})"
            for row in behind
        )
        said.append(f"Next behind: {gaps}.")
    if facts.confirmed:
        said += facts.confirmed["said"]
    elif ranked:
        said.append("No trial was run twice with other seeds, so it is not known which of these gaps are only noise.")
    return said


def confirmed_table(facts: Facts) -> tuple[list[str], list[list[str]]]:
    """Return the names of the columns, and a row for each configuration that was trained again."""
    rows = [
        [number(each[key]) for key in ("number", "search_value", "mean", "std")]
        + [str(len(each["values"])), f"{each['chance_of_best']:.0%}"]
        for each in facts.confirmed["configurations"]
    ]
    return ["trial", "in the search", "mean of fresh seeds", "standard deviation", "trainings", "chance of best"], rows


def front_text(facts: Facts) -> str:
    """Return what the Pareto front is of."""
    goals = {facts.metric: facts.direction, **facts.others}
    names = goals_text({name: goal == "maximize" for name, goal in goals.items()})
    return f"{len(facts.front):,} of {facts.counts.complete:,} complete trials: no other is better in {names}."


def front_table(facts: Facts) -> tuple[list[str], list[list[str]]]:
    """Return the names of the columns, and a row for each trial on the Pareto front, at most MOST_ON_FRONT."""
    rows = {row["number"]: row for row in facts.rows}
    params = [name for name in facts.columns if name.startswith(PARAM)]
    keys = ["number", "value", *(f"{OTHER}{name}" for name in facts.others), *params]
    names = ["trial", facts.metric, *facts.others, *(name.removeprefix(PARAM) for name in params)]
    return names, [[number(rows[of].get(key)) for key in keys] for of in facts.front[:MOST_ON_FRONT]]


def tests_text(facts: Facts) -> str:
    """Return what the test set said of the exported model, and how often it was read."""
    test = facts.result.get("test")
    n = facts.n_test_evaluations
    unknown = "It is not known how often the test set was read."
    readings = f"The test set was read {'once' if n == 1 else f'{n} times'}" + (
        "." if n <= 1 else "; the more often, the less it says."
    )
    if not isinstance(test, Mapping) or not test:
        return f"There is no test result of the best trial yet. {readings}" if n else "The test set was not read."
    of = facts.result.get("number")
    chosen = facts.confirmed.get("number", None if facts.best is None else facts.best.number)
    stale = "" if of == chosen else ", which is not the best trial now"
    values = ", ".join(f"{name} {number(value)}" for name, value in test.items())
    how = f"trial {of}'s params{stale}, trained from scratch on train + validation"
    if (seeds := _over_seeds(facts.result.get("seeds"))) is not None:
        how += f". {seeds}"
    beside = beside_in(facts.result.get("baselines"))
    said = "" if beside is None else " ".join(["", *beside.sentences()])
    return f"{values}: {how}. {readings if n else unknown}{said}"


def _over_seeds(seeds: Any) -> str | None:
    """Return the test metrics over several seeds; None: there is one, or what is stored is not ours."""
    try:
        pairs = [f"{name} {number(seeds['mean'][name])} ({number(seeds['std'][name])})" for name in seeds["mean"]]
        return f"Mean (standard deviation) of {seeds['n']} seeds: {', '.join(pairs)}" if pairs else None
    except (KeyError, TypeError):
        return None


def as_json(facts: Facts, judged: Mapping[str, Any] | None) -> str:
    """Return everything as JSON, without NaN."""
    whole = facts.as_data() | {"judged": judged}
    whole["trials"] = whole.pop("rows")
    return json.dumps(finite(whole), indent=1, allow_nan=False) + "\n"


def as_csv(facts: Facts) -> str:
    """Return the table of all trials; a param that is null is `null`, one that was not asked for is empty."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(facts.columns)
    writer.writerows([_csv_field(row, column) for column in facts.columns] for row in facts.rows)
    return out.getvalue()


def _csv_field(row: Mapping[str, Any], column: str) -> Any:
    value = row.get(column)
    return "null" if value is None and column in row and column.startswith(PARAM) else value


def heading(column: str) -> str:
    """Return what stands above a column of the table of trials."""
    begin = next((begin for begin in (PARAM, CONSTRAINED, OTHER) if column.startswith(begin)), None)
    return column.replace("_", " ") if begin is None else column.removeprefix(begin)


def as_markdown(facts: Facts) -> str:
    """Return a short report: the best, counts, the top trials, importances."""
    goals = ", ".join(f"{goal} {name}" for name, goal in {facts.metric: facts.direction, **facts.others}.items())
    lines = [f"# {_cell(facts.name)}", "", f"{_cell(facts.objective)}: {_cell(goals)}. "]
    lines[-1] += f"{counts_text(facts)}."
    if facts.work.effort_text:
        lines[-1] += f" {facts.work.effort_text}."
    if facts.constraints:
        lines += ["", f"Constraints: {_cell(facts.constraints)}."]
    best = facts.best
    lines += ["", "## Best", ""]
    if best is None:
        lines.append(f"No trial {'holds to the constraints' if facts.counts.complete else 'is complete'} yet.")
    else:
        lines.append(f"{_cell(facts.metric)} **{number(best.value)}**, trial {best.number}, {facts.best_when}.")
        if facts.confirmed:
            mean, of = number(facts.confirmed["mean"]), facts.confirmed["number"]
            lines += [
                "",
                f"Confirmed with fresh seeds: {_cell(facts.metric)} **{mean}**, trial {of}, whose params these are.",
            ]
        params = facts.confirmed.get("params", best.params)
        lines += ["", *_table(["param", "value"], [[k, number(v)] for k, v in params.items()])]
        lines += ["", "## How sure", "", _cell(" ".join(certainty(facts)))]
        if facts.confirmed:
            lines += ["", *_table(*confirmed_table(facts))]
        lines += ["", f"Test: {_cell(tests_text(facts))}"]
    if facts.front:
        lines += ["", "## Pareto front", "", front_text(facts), "", *_table(*front_table(facts))]
    ranked = facts.ranked()[:TOP]
    if ranked:
        params = [name for name in facts.columns if name.startswith((OTHER, CONSTRAINED, PARAM))]
        shown = [heading(name) for name in params]
        names = ["trial", facts.metric, *shown, "epochs", "seconds"]
        keys = ["number", "value", *params, "epochs", "seconds"]
        rows = [[number(row.get(key)) for key in keys] for row in ranked]
        lines += ["", f"## Best {len(ranked)} trials", "", *_table(names, rows)]
    if facts.importances:
        shares = [[name, f"{share:.1%}"] for name, share in facts.importances.items()]
        lines += ["", "## Importance of the params", "", *_table(["param", "share"], shares)]
    return "\n".join(lines) + "\n"


def _table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [names, ["---"] * len(names), *rows]
    return ["| " + " | ".join(each if each == "---" else _cell(each) for each in line) + " |" for line in lines]


def _cell(value: str) -> str:
    """Return a text of the user's that is no Markdown, and stays on its line."""
    flat = " ".join(value.split())
    return "".join(f"\\{char}" if char in "\\`*_[]<>|#&" else char for char in flat)
