"""Finding an objective by name, import path or file, and what is said where there is none that can be used."""

import sys
from pathlib import Path
from textwrap import dedent

import pytest
import torch
from torch import nn

from hpo.study import catalog
from hpo.study.loading import load
from hpo.study.objective import NoOptions

GOOD = """
    from dataclasses import dataclass
    from typing import Literal
    from torch import nn
    from hpo.study.objective import Objective

    @dataclass(frozen=True)
    class Options:
        kind: Literal["big", "small"] = "small"
        n_rows: int = 10

        def __post_init__(self):
            if self.n_rows % 5:
                raise ValueError("n_rows must be divisible by 5")

    class Mine(Objective):
        Options = Options
        def data(self): ...
        def build(self, params, info): return nn.Linear(1, 1)
        def loss(self, outputs, targets, params): ...
        def metrics(self): return {}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Return an empty folder, which is the current one and importable; what is imported from it is forgotten."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith(("hpo_objective_", "mine")):
            del sys.modules[name]


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dedent(text), encoding="utf-8")


def refused(where, folder, options=None):
    """Return the faults of an objective that cannot be used, as (path, message)."""
    made, faults = load(where, options or {}, folder)
    assert made is None
    return [(".".join(map(str, fault.path)), fault.message) for fault in faults]


def message(where, folder):
    """Return the one fault that there is with `objective:`."""
    [(path, text)] = refused(where, folder)
    assert path == "objective"
    return text


def test_an_objective_is_found_by_name(tmp_path):
    made, faults = load("breast_cancer", {}, tmp_path)
    assert not faults
    assert (type(made).__name__, type(made).__module__) == ("BreastCancer", "hpo.objectives.breast_cancer")


def test_an_objective_is_found_in_a_module(folder):
    write(folder / "mine" / "__init__.py", "")
    write(folder / "mine" / "deep.py", GOOD + "\n    class Other(Mine): ...\n")
    for name in ("Mine", "Other"):
        made, faults = load(f"mine.deep:{name}", {}, folder / "elsewhere")
        assert not faults
        assert type(made).__name__ == name


def test_an_objective_is_found_in_a_file_beside_the_study_first(folder):
    write(folder / "a.py", GOOD.replace("Mine", "Current"))
    write(folder / "studies" / "a.py", GOOD)
    beside, _ = load("a.py", {}, folder / "studies")
    current, _ = load("a.py:Current", {}, folder / "no" / "studies")
    absolute, _ = load(str(folder / "a.py"), {}, folder / "studies")
    assert [type(made).__name__ for made in (beside, current, absolute)] == ["Mine", "Current", "Current"]


def test_an_objective_has_parts_that_do_nothing_by_default(folder):
    write(folder / "a.py", GOOD)
    made, _ = load("a.py", {}, folder)
    assert isinstance(made.preprocess(None), nn.Identity)
    assert isinstance(made.head(), nn.Identity)
    assert (dict(made.defaults), dict(made.space)) == ({}, {})


def test_options_reach_the_objective(folder):
    write(folder / "a.py", GOOD)
    made, faults = load("a.py", {"kind": "big"}, folder)
    assert not faults
    assert (made.options.kind, made.options.n_rows) == ("big", 10)


@pytest.mark.parametrize(
    ("options", "faults"),
    [
        ({"n_row": 5}, [("options.n_row", 'unknown option; did you mean "n_rows"?')]),
        ({"kind": "huge"}, [("options.kind", "must be 'big' or 'small', but got 'huge'")]),
        (
            {"n_rows": 1.5, "zzz": 0},
            [
                ("options.zzz", "unknown option; known: kind, n_rows"),
                ("options.n_rows", "must be an integer, but got 1.5"),
            ],
        ),
        ({"n_rows": "ten"}, [("options.n_rows", "must be an integer, but got 'ten'")]),
        ({"n_rows": 7}, [("options", "n_rows must be divisible by 5")]),
    ],
)
def test_options_are_checked_by_their_annotations(folder, options, faults):
    write(folder / "a.py", GOOD)
    assert refused("a.py", folder, options) == faults


def test_an_objective_without_options_takes_none(folder):
    write(folder / "a.py", GOOD.replace("        Options = Options\n", ""))
    assert refused("a.py", folder, {"n": 1}) == [("options.n", "unknown option; known: none")]
    assert load("a.py", {}, folder)[0].options == NoOptions()


@pytest.mark.parametrize(
    ("where", "text"),
    [
        ("breast_cancr", "there is no objective and no module 'breast_cancr'; did you mean \"breast_cancer\"?"),
        ("zzz", "there is no objective and no module 'zzz'; known: " + ", ".join(catalog.names())),
        ("no.such", "there is no module no.such"),
        ("a.py", "no such file: {folder}/sub/a.py nor a.py"),
        ("{folder}/a.py", "no such file: {folder}/a.py"),
    ],
)
def test_what_is_not_there_is_named(folder, where, text):
    assert message(where.format(folder=folder), folder / "sub") == text.format(folder=folder)


@pytest.mark.parametrize(
    ("code", "shown"),
    [
        ("import torch\n\nimport no_such_module\n", "ModuleNotFoundError: No module named 'no_such_module' ({file}:3)"),
        ("from torch import no_such_name\n", "ImportError: cannot import name 'no_such_name' from 'torch'"),
        ("x = 1\ny = x / 0\n", "ZeroDivisionError: division by zero ({file}:2)"),
        ("def f():\n    return nothing\n\nf()\n", "NameError: name 'nothing' is not defined ({file}:2)"),
        ("x = (1\n", "SyntaxError: '(' was never closed"),
    ],
)
def test_an_error_while_importing_is_shown_with_file_and_line(folder, code, shown):
    file = folder / "mine_broken.py"
    write(file, code)
    text = message("mine_broken.py", folder)
    assert text.startswith(f"mine_broken.py cannot be imported: {shown.format(file=file)}")
    assert f"({file}:" in text


def test_a_module_that_imports_what_is_not_there_is_not_taken_for_missing(folder):
    write(folder / "mine_pkg" / "__init__.py", "")
    write(folder / "mine_pkg" / "a.py", "import mine_pkg.b\n")
    assert message("mine_pkg.a", folder) == (
        f"mine_pkg.a cannot be imported: ModuleNotFoundError: No module named 'mine_pkg.b' ({folder}/mine_pkg/a.py:1)"
    )


def test_a_method_that_is_missing_is_named(folder):
    write(
        folder / "a.py", "from hpo.study.objective import Objective\nclass Half(Objective):\n    def data(self): ...\n"
    )
    assert message("a.py", folder) == "a.py:Half does not define metrics, build (or train)"


def test_a_file_must_say_which_objective_is_meant(folder):
    write(folder / "none.py", "from hpo.study.objective import Objective\n")
    write(folder / "two.py", GOOD + "\n    class Other(Mine): ...\n")
    assert message("none.py", folder) == (
        "none.py must hold exactly one objective, but holds 0; subclass hpo.study.objective.Objective, "
        "or write none.py:function for a plain Optuna objective"
    )
    assert message("two.py", folder) == (
        "two.py must hold exactly one objective, but holds 2; write two.py:Name with one of Mine, Other"
    )
    assert message("two.py:Othr", folder) == "two.py has no objective and no function 'Othr'; did you mean \"Other\"?"
    assert message("none.py:X", folder) == "none.py has no objective and no function 'X'; known: none"


def test_an_objective_that_cannot_be_made_says_where(folder):
    write(folder / "a.py", GOOD + "\n        def __init__(self, options):\n            raise OSError('no disk')\n")
    line = (folder / "a.py").read_text().splitlines().index("        raise OSError('no disk')") + 1
    assert message("a.py", folder) == f"a.py:Mine cannot be made: OSError: no disk ({folder / 'a.py'}:{line})"


def test_the_example_of_the_module_is_an_objective(folder):
    """Its docstring is what a user copies; only the `...` in it are filled in."""
    text = dedent(sys.modules["hpo.study.objective"].__doc__.split("A whole one:")[1])
    text = text.replace("nn.ReLU(), ...", "nn.ReLU()")
    write(
        folder / "iris.py",
        "from torch import nn\nfrom torch.nn import functional as F\n"
        "from torchmetrics.classification import MulticlassAccuracy\nfrom hpo.study.objective import Objective\n"
        + text,
    )
    made, faults = load("iris.py", {}, Path(folder))
    assert not faults
    assert made.build({"n_hidden": 7}, None)(torch.zeros(2, 4)).shape == (2, 7)
    assert list(made.metrics()) == ["accuracy"]
