"""What an objective is written in, of a notebook's cells too, and the plain values that it holds."""

import functools
import logging
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import hpo
from hpo.errors import InputError
from hpo.study.objective import Function, Objective
from hpo.study.sources import held, other_values, source_file, source_fingerprint

CELL = """
import math
from torch import nn
import hpo

FACTOR = 2.0

def scaled(loss):
    return FACTOR * loss

class Net(nn.Sequential):
    WIDTH = 8
    def forward(self, x):
        return super().forward(x) + 0

class Mine(hpo.Objective):
    depth = 1
    def data(self):
        return None
    def build(self, params, info):
        return Net(nn.Linear(4, 8), *(nn.Linear(8, 8) for _ in range(self.depth)))
    def loss(self, outputs, targets, params):
        return scaled(outputs.mean())
    def metrics(self):
        return {}
    @property
    def shown(self):
        return math.pi
    @staticmethod
    def help():
        return 1

def plain(trial):
    return scaled(trial.suggest_float("x", 0, 1))
"""


def cell(old: str = "", new: str = "") -> dict[str, Any]:
    """Return what a notebook's cell defines, with `old` replaced."""
    assert old in CELL
    namespace: dict[str, Any] = {"__name__": "__main__of_a_notebook"}
    exec(CELL.replace(old, new) if old else CELL, namespace)
    return namespace


@pytest.mark.parametrize("of", ["Mine", "plain"])
@pytest.mark.parametrize(
    ("old", "new", "reads"),
    [
        ("FACTOR = 2.0", "FACTOR = 3.0", ("Mine", "plain")),
        ("return FACTOR * loss", "return loss / FACTOR", ("Mine", "plain")),
        ("WIDTH = 8", "WIDTH = 9", ("Mine",)),
        ("forward(x) + 0", "forward(x) - 0", ("Mine",)),
        ("depth = 1", "depth = 2", ("Mine",)),
        ("return math.pi", "return math.e", ("Mine",)),
        ("return 1", "return 2", ("Mine",)),
        ('"x", 0, 1', '"y", 0, 1', ("plain",)),
    ],
)
def test_a_changed_cell_is_another_source(of: str, old: str, new: str, reads: tuple[str, ...]) -> None:
    make: Callable[[Any], Any] = (lambda cls: cls()) if of == "Mine" else Function
    before, again, after = (make(cell(*change)[of]) for change in ((), (), (old, new)))
    assert source_fingerprint(before) == source_fingerprint(again)
    assert (source_fingerprint(before) != source_fingerprint(after)) == (of in reads)


def test_a_callable_object_has_no_source() -> None:
    assert source_fingerprint(Function(functools.partial(print))) == source_fingerprint(
        Function(functools.partial(max))
    )


def test_what_is_held_are_plain_values_of_the_instance_and_its_classes() -> None:
    class Base(Objective):
        depth, names, made = 1, ["a"], object()

        def data(self) -> Any: ...
        def metrics(self) -> Any: ...

    class Own(Base):
        depth = 2

    one, other = Own(), Own()
    other.depth, other.cached = 3, [0] * 5
    assert {name for name in held(one) if name[0] != "_"} == {"depth", "names"}
    assert "2" not in held(one).values(), "a value may be a password"
    assert other_values(held(other), held(one)) == ["depth"]
    assert held(Function(print)) == {}


MODULE = """
import torch
from torch import nn
from torch.nn import functional as F
from torchmetrics.regression import MeanSquaredError
import hpo

class Sized(hpo.Objective):
    width = 4
    defaults = {"batch_size": 10}
    space = {"learning_rate": {"type": "float", "low": 1e-3, "high": 1e-1}}
    def __init__(self, options=None, width=None):
        super().__init__(options)
        self.width = width or self.width
    def data(self):
        x = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
        part = lambda a, b: hpo.Split(inputs={"x": x[a:b]}, targets=x[a:b, :1])
        return hpo.Data(train=part(0, 40), valid=part(40, 50), test=part(50, 60))
    def build(self, params, info):
        return nn.Sequential(nn.Linear(4, self.width), nn.ReLU(), nn.Linear(self.width, 1))
    def loss(self, outputs, targets, params):
        return F.mse_loss(outputs, targets)
    def metrics(self):
        return {"mse": MeanSquaredError()}
"""


@pytest.fixture
def sized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "sized_module.py").write_text(MODULE)
    monkeypatch.delitem(__import__("sys").modules, "sized_module", raising=False)
    return __import__("sized_module").Sized


QUICK: dict[str, Any] = {"trials": 2, "epochs": 2, "tracking": "off", "quiet": True, "baseline": False}


@pytest.mark.parametrize("how", ["an attribute", "an argument", "the class"])
def test_workers_do_not_train_another_objective_than_is_exported(sized: Any, how: str) -> None:
    """They make it by its class and options, and the process that exports has the instance that was given."""
    given = sized(width=9) if how == "an argument" else sized()
    if how == "an attribute":
        given.width = 9
    if how == "the class":
        sized.width, given = 9, sized
    with pytest.raises(InputError, match="the value of width of objective sized_module:Sized is not what"):
        hpo.run(given, workers=2, **QUICK)
    assert hpo.run(given, workers=1, **QUICK).counts.complete == 2


def test_another_instance_under_the_same_name_is_said(sized: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "hpo")
    said = "the objective's value of width has changed since the study began"
    hpo.run(sized(width=3), name="one", **QUICK)
    hpo.run(sized(width=3), name="one", **(QUICK | {"trials": 3}))
    assert said not in caplog.text
    hpo.run(sized(width=5), name="one", **(QUICK | {"trials": 3}))  # all are done
    assert caplog.text.count(said) == 1
    hpo.run(sized(width=5), name="one", **(QUICK | {"trials": 4}))
    assert caplog.text.count(said) == 2
    hpo.run(sized(width=5), name="one", **(QUICK | {"trials": 5}))
    assert caplog.text.count(said) == 2


@dataclass
class Config:
    width: int


def made(width: int, factor: float = 1.0, **own: Any) -> Objective:
    """Return an objective whose class is made in a function, as in a notebook's factory."""

    class Made(Objective):
        def data(self) -> Any: ...
        def metrics(self) -> Any: ...
        def build(self, params: Any, info: Any) -> Any:
            return width * factor

    instance = Made()
    vars(instance).update(own)
    return instance


@pytest.mark.parametrize(
    ("before", "after", "names"),
    [
        (made(4), made(32), ["build: width"]),
        (made(4, 1.0), made(4, 2.0), ["build: factor"]),
        (made(4, config=Config(1)), made(4, config=Config(2)), ["config"]),
        (made(4, call=lambda x: x + 1), made(4, call=lambda x: x + 2), ["call"]),
        (made(4, config=Config(1), call=lambda x: x + 1), made(4, config=Config(1), call=lambda x: x + 1), []),
        (made(4, cached=1), made(4), []),
    ],
)
def test_what_a_factory_or_an_instance_differs_in_is_seen(
    before: Objective, after: Objective, names: list[str]
) -> None:
    assert other_values(held(after), held(before)) == names


def test_what_cannot_be_looked_at_is_not_held() -> None:
    itself: list[Any] = []
    itself.append(itself)
    assert "itself" not in held(made(4, itself=itself))


def test_workers_cannot_make_what_is_no_options(sized: Any) -> None:
    class Needs(sized):  # type: ignore[misc]
        def __init__(self, width: int) -> None:
            super().__init__(None, width)

    sys.modules["sized_module"].Needs = Needs  # type: ignore[attr-defined]
    Needs.__module__, Needs.__qualname__ = "sized_module", "Needs"
    with pytest.raises(InputError, match=r"Needs\.__init__ takes width, but each worker makes its own Needs"):
        hpo.run(Needs(8), workers=2, **QUICK)
    assert hpo.run(Needs(8), workers=1, **QUICK).counts.complete == 2


def test_a_class_of_a_text_on_stdin_has_a_source(tmp_path: Path) -> None:
    code = CELL + "from hpo.study.sources import source_fingerprint; print(source_fingerprint(Mine()))"
    found = [
        subprocess.run(
            [sys.executable, "-"], input=text, capture_output=True, text=True, check=True, cwd=tmp_path
        ).stdout
        for text in (code, code, code.replace("depth = 1", "depth = 2"))
    ]
    assert found[0] == found[1] != found[2]


def of_a_trial(trial: Any, shift: float, factor: float = 1.0) -> float:
    return float(trial.suggest_float("x", 0, 1)) * factor + shift


class Shifted:
    def __init__(self, shift: float) -> None:
        self.shift = shift

    def __call__(self, trial: Any) -> float:
        return of_a_trial(trial, self.shift)

    def measured(self, trial: Any) -> float:
        return of_a_trial(trial, self.shift)


def shifted(shift: float) -> Any:
    def measured(trial: Any, *, factor: float = shift) -> float:
        return of_a_trial(trial, shift, factor)

    return measured


@pytest.mark.parametrize(
    ("made_by", "name", "names"),
    [
        (lambda shift: functools.partial(of_a_trial, shift=shift), "of_a_trial", "shift"),
        (Shifted, "shifted", "shift"),
        (lambda shift: Shifted(shift).measured, "measured", "shift"),
        (shifted, "measured", "factor, shift"),
    ],
)
def test_a_function_that_holds_another_value_is_said(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    made_by: Any,
    name: str,
    names: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.WARNING, "hpo")
    assert hpo.run(made_by(1.0), trials=1, **FUNCTION).name == name
    assert hpo.run(made_by(1.0), trials=2, **FUNCTION).counts.complete == 2
    assert "has changed" not in caplog.text
    hpo.run(made_by(100.0), trials=3, **FUNCTION)
    assert f"the objective's value of {names} has changed since the study began" in caplog.text


FUNCTION: dict[str, Any] = {"tracking": "off", "quiet": True}


def test_the_code_of_a_callable_is_that_of_what_it_runs() -> None:
    one, other = (Function(functools.partial(each, shift=1.0)) for each in (of_a_trial, shifted(1.0)))
    assert source_file(one) == Path(__file__) == source_file(Function(Shifted(1.0)))
    assert source_fingerprint(one) == source_fingerprint(Function(of_a_trial)) != source_fingerprint(Function(print))
    assert held(one).keys() == {"default 1", "shift"}
    assert held(other)["shift"] == held(one)["shift"]
