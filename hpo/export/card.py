"""MODEL.md: a model card in plain words, from the facts of bundle.json alone."""

from collections.abc import Mapping
from typing import Any

_OUTPUTS = {
    "probabilities": "a probability for each class",
    "logits": "logits; `hpo predict` turns them into probabilities",
    "scores": "a score for each class, the largest of which is the answer; no probabilities",
    "labels": "for each class the probability that the row has it, beside others or none",
    "numbers": "numbers",
}
_OF_SECOND = {
    "probabilities": "the probability that it is {second}",
    "logits": "the logit of {second}; `hpo predict` turns it into a probability",
    "scores": "a score: above 0 it is {second}; no probability",
}
"""Of two classes a model may give one number a row."""

_PARTS = {
    "year": "the year",
    "month": "the month, 1 to 12",
    "weekday": "the weekday, 0 on Mondays",
    "hour": "the hour, 0 to 23, and minutes / 60",
    "days": "the days since {first}, with the time of day as a fraction",
}
_SNIPPET = """
import json
from datetime import datetime, timedelta, timezone

import torch

with open("FOLDER/bundle.json", encoding="utf-8") as file:
    about = json.load(file)


def parts(text, column):
    iso = column["format"] == "ISO8601"
    date = datetime.fromisoformat(text) if iso else datetime.strptime(text, column["format"])
    date = date.astimezone(timezone.utc).replace(tzinfo=None) if date.tzinfo else date
    days = (date - datetime.fromisoformat(column["first"])) / timedelta(days=1)
    every = {"year": date.year, "month": date.month, "weekday": date.weekday(), "hour": date.hour + date.minute / 60}
    return [(every | {"days": days})[part] for part in column["parts"]]


def tensors(row):
    made = {entry["name"]: [] for entry in about["inputs"]}
    for column in about["columns"]:
        value, kind = row[column["name"]], column["kind"]
        if kind == "category":
            named = column["categories"]
            numbers = [named.index(value) + 1 if value in named else 0]
        elif kind == "date":
            numbers = [float("nan")] * len(column["parts"]) if value is None else parts(value, column)
        else:
            numbers = [float("nan") if value is None else value]
        made[column["input"]] += numbers
    return [torch.tensor([made[each["name"]]], dtype=getattr(torch, each["dtype"])) for each in about["inputs"]]


row = about["example"]  # a row of yours: numbers are numbers, all else is text, None is missing
print(torch.jit.load("FOLDER/model.torchscript.pt")(*tensors(row)))
"""


def card(about: Mapping[str, Any]) -> str:
    """Return the model card, as Markdown."""
    name = about.get("study", "model")
    lines = [f"# {name}", "", *_what(about), "", "## What goes in", "", *_inputs(about), "", "## What comes out", ""]
    lines += [*_outputs(about), "", "## How good it is", "", *_metrics(about), "", "## How it was made", ""]
    lines += [*_made(about), "", "## How to use it", "", "```sh", "hpo predict FOLDER new.csv", "```", ""]
    lines += ["```python", "import hpo", "", 'hpo.load_bundle("FOLDER").predict(frame)', "```", ""]
    lines += ["`model.torchscript.pt` needs torch alone, in Python or C++; `bundle.json` has all of this for programs."]
    return "\n".join(lines) + "\n"


def _what(about: Mapping[str, Any]) -> list[str]:
    trial = f", trial {about['trial']}" if "trial" in about else ""
    return [
        f"A model of the objective `{about.get('objective', '?')}`{trial}, with {about['n_parameters']:,} parameters. "
        f"Exported {about['created']} by hpo {about['versions']['hpo']}."
    ]


def _inputs(about: Mapping[str, Any]) -> list[str]:
    columns = about["columns"]
    if columns and columns[0]["name"]:
        lines = ["| column | values |", "|---|---|"]
        for column in columns:
            named = column.get("categories", ())
            more = f" and {len(named) - 8} more" if len(named) > 8 else ""
            kinds = {"number": "a number", "date": f"a date, as {column.get('format')}"}
            kind = kinds.get(column["kind"], f"a category: {', '.join(named[:8])}{more}")
            lines.append(f"| {_cell(column['name'])} | {_cell(kind)} |")
    else:
        lines = ["| input | shape | type |", "|---|---|---|"]
        for entry in about["inputs"]:
            shape = ", ".join(["rows", *map(str, entry["shape"][1:])])
            lines.append(f"| {_cell(entry['name'])} | ({shape}) | {entry['dtype']} |")
    missing = "Missing values are filled in." if about["missing"] else "No value may be missing."
    scaled = f"{missing} Scaling is inside the model: values go in as they were measured."
    return [*lines, "", scaled, *_from_rows(about)]


def _from_rows(about: Mapping[str, Any]) -> list[str]:
    """Return how a row becomes the module's tensors, where that is more than its numbers in their order."""
    columns = about["columns"]
    if not columns or all(column["kind"] == "number" for column in columns):
        return []
    inputs = " and ".join(
        f"`{entry['name']}` (rows, {entry['shape'][1]}) in {entry['dtype']}" for entry in about["inputs"]
    )
    lines = [
        "",
        "## From a row to tensors",
        "",
        f"The module in `model.torchscript.pt` takes tensors, {inputs}, in the order of the columns above; "
        "`hpo predict` and `load_bundle` make them of a table. Category i of a column's list in `bundle.json`, counted "
        "from 0, is the code i + 1; one that is missing or not in the list is 0. A number that is missing is NaN.",
    ]
    for column in (column for column in columns if column["kind"] == "date"):
        parts = [_PARTS[part].format(first=column["first"]) for part in column["parts"]]
        lines += ["", f"Of `{column['name']}`, {len(parts)} numbers: {'; '.join(parts)}. A time with a zone is in UTC."]
    return [*lines, "", "The same in Python, with torch alone:", "", "```python", _SNIPPET.strip(), "```"]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _outputs(about: Mapping[str, Any]) -> list[str]:
    classes = ", ".join(map(str, about["class_names"]))
    kind, shape = about["output"]["values"], about["output"].get("shape", ())
    if kind in _OF_SECOND and len(about["class_names"]) == 2 and (len(shape) < 2 or shape[-1] == 1):
        first, second = about["class_names"]
        return [f"For each row one number: {_OF_SECOND[kind].format(second=second)}. The other class is {first}."]
    given = f"For each row: {_OUTPUTS[kind]}."
    return [f"{given} The classes, in order: {classes}." if classes else given]


def _metrics(about: Mapping[str, Any]) -> list[str]:
    lines = []
    for group, values in about.get("metrics", {}).items():
        if isinstance(values, Mapping) and values:
            shown = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
            lines.append(f"- {about['protocol'].get(group, group)}: {shown}")
    for what in ("confirmed", "baselines"):
        lines += [f"- {line}" for line in about.get(what, {}).get("said", ())]
    if (n := about.get("n_test_evaluations", 1)) > 1:
        lines.append(f"- The test rows were read {n} times in this study: the more often, the less they say.")
    lines += [f"- Note that {each}." for each in about.get("notes", ())]
    times = about["latency_ms"]
    lines.append(f"- One row takes {times['1']} ms, 256 rows {times['256']} ms, on the machine that exported it.")
    return lines


def _made(about: Mapping[str, Any]) -> list[str]:
    params = ", ".join(f"{name}={value}" for name, value in about["params"].items())
    lines = [f"- params: {params}"]
    if "epochs" in about:
        lines.append(f"- {about['epochs']} epochs on train + validation, seed {about['seed']}")
    if "data_fingerprint" in about:
        lines.append(f"- data {about['data_fingerprint']}, source {about.get('source_fingerprint', 'not known')}")
    versions = about["versions"]
    lines.append(
        f"- Python {versions['python']}, torch {versions['torch']}, commit {about['git_commit'] or 'not known'}"
    )
    worst = max(entry["max_difference"] for entry in about["parity"].values())
    lines.append(f"- what was exported differs from the model that was measured by at most {worst:.1e}")
    return lines
