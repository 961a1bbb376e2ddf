"""`hpo compare`: which study is best, where that can be said, what each has cost, and in what they differ."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hpo.report.comparison import Compared, differences, verdict
from hpo.search.budget import Counts
from hpo.search.view import Best
from tests.cli import invoke, refused, summary

Write = Callable[..., Path]


def _study(label: str, value: float | None, **keys: Any) -> Compared:
    best = None if value is None else Best(number=3, value=value, params={}, epoch=0, seed=0, metrics={})
    counts = Counts(complete=6, pruned=3, failed=1, running=0, waiting=2)
    settings = {"objective": "o", "data": "d", "seed": 1} | keys.pop("settings", {})
    given = {"metric": "accuracy", "maximize": True, "test": {}, "storage": "s", "epochs": 30, "seconds": 1800.0}
    return Compared(label=label, best=best, counts=counts, settings=settings, **(given | keys))


@pytest.mark.parametrize(
    ("studies", "best", "text"),
    [
        ([_study("a", 0.9), _study("b", 0.95)], "b", "b is best: accuracy 0.95, 0.05 ahead of a"),
        (
            [_study("a", 0.9, maximize=False), _study("b", 0.95, maximize=False), _study("c", None, maximize=False)],
            "a",
            "a is best: accuracy 0.9, 0.05 ahead of b",
        ),
        ([_study("a", 0.9), _study("b", 0.9)], None, "a, b are even: accuracy 0.9"),
        ([_study("a", 0.9), _study("b", None)], None, "there is nothing to compare yet: fewer than two of them"),
        (
            [_study("a", 0.9), _study("b", 0.1, metric="loss", maximize=False)],
            None,
            "their values do not compare: they look for the highest accuracy and for the lowest loss",
        ),
        (
            [_study("a", 0.9), _study("b", 0.8, settings={"objective": "p", "data": "e", "options.x": 1})],
            "a",
            "a is best: accuracy 0.9, 0.1 ahead of b (of different objectives and data and options, so their values "
            "may not compare)",
        ),
    ],
)
def test_which_is_best(studies: list[Compared], best: str | None, text: str) -> None:
    found, said = verdict(studies)
    assert found == best
    assert said.startswith(text)


def test_only_what_differs_is_listed() -> None:
    studies = [_study("a", 0.9), _study("b", 0.9, settings={"seed": 2, "params.x": 4}), _study("c", 0.9)]
    assert differences(studies) == {"seed": [1, 2, 1], "params.x": ["-", 4, "-"]}
    assert _study("a", 0.9).trials_an_hour == 20.0


def test_two_studies_side_by_side(study: Write) -> None:
    first = study("epochs: 2")
    invoke("run", first)
    other = study("epochs: 3\nsampler: random\nparams: {batch_size: 25}", name="other.yaml")
    invoke("run", other, "--trials", "4")
    printed = invoke("compare", first, "other")
    lines = [[part.strip() for part in line.split("│")] for line in printed.splitlines()]
    assert ["complete", "3", "4"] in lines
    assert ["epochs trained", "6", "12"] in lines
    assert ["epochs", "2", "3"] in lines
    assert ["params.batch_size", "50", "25"] in lines
    assert ["sampler.name", "tpe", "random"] in lines
    assert ["trials", "3", "4"] in lines
    assert "other is best: r2 " in printed or "study is best: r2 " in printed
    assert "metric" not in {line[0] for line in lines}, "it is the same"
    found = summary(invoke("compare", first, other, "--json"))
    assert [each["study"] for each in found["studies"]] == ["study", "other"]
    assert set(found["studies"][0]["test"]) == {"loss", "r2"}
    assert found["differs"]["epochs"] == [2, 3]
    code = f"import sys; from hpo.cli.app import app; sys.argv[1:] = ['compare', {str(first)!r}, 'other']\n"
    code += "try: app()\nfinally: assert not {'torch', 'mlflow', 'pandas'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_studies_of_one_name_in_two_storages(study: Write) -> None:
    invoke("run", study())
    path = study("storage: journal:///mlruns/j.log\nseed: 3", name="second.yaml")
    invoke("run", path, "--set", "name=study")
    second = study("name: study\nstorage: journal:///mlruns/j.log\nseed: 3", name="second.yaml")
    printed = invoke("compare", "study", second)
    assert "study in sqlite:///mlruns/optuna.db" in printed
    assert "study in journal:///mlruns/j.log" in printed


def test_what_cannot_be_compared_is_refused(study: Write) -> None:
    invoke("run", study())
    assert refused("compare", "study").startswith("give two studies at least")
    assert refused("compare", "study", "study") == "a study is named twice; give each once"
    assert "has no study 'gone'" in refused("compare", "study", "gone")
