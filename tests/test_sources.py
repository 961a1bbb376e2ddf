"""What an objective is written in, of a notebook's cells too, and the plain values that it holds."""

import datetime
import enum
import functools
import logging
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import hpo
from hpo.errors import InputError
from hpo.study.held import held, other_values
from hpo.study.objective import Function, Objective
from hpo.study.sources import digest, source_file, source_fingerprint
from tests.conftest import ROOT

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


def names_in(digests: dict[str, str]) -> set[str]:
    """Return the names of what is held."""
    return {name.removeprefix(".") for name in digests} - {"", ":form"}


def test_what_is_held_are_the_values_of_the_instance_and_its_classes() -> None:
    class Base(Objective):
        depth, names, made = 1, ["a"], object()

        def data(self) -> Any: ...
        def metrics(self) -> Any: ...

    class Own(Base):
        depth = 2

    one, other = Own(), Own()
    other.depth, other.given = 3, [0] * 5
    assert names_in(held(one)) == {"depth", "names", "made"}
    assert "2" not in held(one).values(), "a value may be a password"
    assert other_values(held(other), held(one)) == other_values(held(one), held(other)) == ["depth", "given"]
    assert names_in(held(Function(print))) == set()


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


@pytest.mark.parametrize("how", ["an attribute", pytest.param("an argument", marks=pytest.mark.slow), "the class"])
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


def slow(value: Any) -> Any:
    return pytest.param(value, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "value", [np.ones(9), {1, 2, 3}, *(slow(x) for x in (9, torch.ones(9), object()))], ids=lambda x: type(x).__name__
)
def test_nor_one_that_lacks_what_only_the_instance_has(sized: Any, value: Any) -> None:
    given = sized()
    given.more = value
    with pytest.raises(InputError, match="the value of more of objective sized_module:Sized is not what"):
        hpo.run(given, workers=2, **QUICK)


def test_nor_one_whose_loss_has_another_setting(sized: Any, tmp_path: Path) -> None:
    text = MODULE.replace("(options)\n", "(options)\n        self.criterion = nn.HuberLoss()\n")
    (tmp_path / "criterion.py").write_text(text)
    given = __import__("criterion").Sized()
    given.criterion = nn.HuberLoss(delta=100.0)
    with pytest.raises(InputError, match="the value of criterion of objective criterion:Sized is not what"):
        hpo.run(given, workers=2, **QUICK)


def test_what_an_instance_has_cached_is_no_other_objective(sized: Any, tmp_path: Path) -> None:
    text = MODULE.replace("        x = torch.randn", "        self.read = x = torch.randn")
    (tmp_path / "caching.py").write_text(text)
    given = __import__("caching").Sized()
    assert hpo.run(given, workers=1, name="one", **QUICK).counts.complete == 2
    assert hpo.run(given, workers=2, name="two", **QUICK).counts.complete == 2


def test_nor_another_function_than_the_program_has(sized: Any, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "squares.py").write_text(
        "C = 2.0\ndef of(trial):\n    return (trial.suggest_float('x', 0, 10) - C) ** 2\n"
    )
    squares = __import__("squares")
    squares.C = 8.0
    few = {"trials": 2, "tracking": "off", "quiet": True}
    with pytest.raises(InputError, match="the value of global C of objective squares:of is not what"):
        hpo.run(squares.of, workers=2, **few)
    assert hpo.run(squares.of, name="alone", **few).counts.complete == 2


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


@dataclass(repr=False)
class Mixed:
    width: int
    call: Any = object()  # noqa: RUF009


class Kind(enum.Enum):
    ONE, OTHER = 1, 2


class Sharpened(nn.Module):
    def __init__(self, by: float) -> None:
        super().__init__()
        self.by, self.inner = by, nn.HuberLoss(delta=by)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.cached = x
        return x * self.by


def weights(value: float) -> nn.Module:
    return nn.CrossEntropyLoss(weight=torch.full((3,), value))


def made(width: Any, factor: float = 1.0, **own: Any) -> Objective:
    """Return an objective whose class is made in a function, as in a notebook's factory."""

    class Made(Objective):
        def data(self) -> Any: ...
        def metrics(self) -> Any:
            self.cached = 3

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
        (made(4, given=1), made(4), ["given"]),
        (made(4, cached=torch.ones(2), init=3), made(4), ["init"]),
        (made(4, cached=torch.ones(2)), made(4, cached=None), []),
        (made(4, _cache={"x": torch.ones(2)}), made(4, _cache={}), []),
        (made(4, _x=1), made(4, _x=2), ["_x"]),
        (made(4, x=torch.ones(2)), made(4, x=torch.ones(2)), []),
        (made(4, x=torch.ones(2)), made(4, x=torch.tensor([1.0, 2.0])), ["x"]),
        (made(4, x=torch.ones(2)), made(4, x=torch.ones(2, dtype=torch.bfloat16)), ["x"]),
        (made(4, x=[np.ones(2)]), made(4, x=[np.zeros(2)]), ["x"]),
        (made(4, x={"a": np.float32(1)}), made(4, x={"a": np.float32(2)}), ["x"]),
        (made(4, x={"a", "b", "c"}), made(4, x={"c", "b", "a"}), []),
        (made(4, x={"a", "b", "c"}), made(4, x={"c", "b", "d"}), ["x"]),
        (made(4, x=weights(1.0)), made(4, x=weights(1.0)), []),
        (made(4, x=weights(1.0)), made(4, x=weights(2.0)), ["x"]),
        (made(4, x=object()), made(4, x=object()), []),
        (made(4, x=object()), made(4), ["x"]),
        (made(4, data=lambda: 1), made(4), ["data"]),
        (made(torch.ones(2)), made(torch.zeros(2)), ["build: width"]),
    ],
)
def test_what_a_factory_or_an_instance_differs_in_is_seen(
    before: Objective, after: Objective, names: list[str]
) -> None:
    assert other_values(held(after), held(before)) == names


MANY_KINDS: list[Callable[[Any], Any]] = [
    lambda n: nn.HuberLoss(delta=n),
    lambda n: nn.Sequential(nn.Dropout(n / 10)),
    lambda n: nn.CrossEntropyLoss(label_smoothing=n / 10),
    lambda n: nn.MSELoss(reduction=["mean", "sum"][n - 1]),
    Sharpened,
    lambda n: np.array(["a", str(n)]),
    lambda n: np.array([n, "a", None], dtype=object),
    lambda n: np.array([Kind(n)], dtype=object),
    lambda n: np.array([f"202{n}-01-01"], dtype="M8[D]"),
    lambda n: n * torch.eye(3).to_sparse(),
    lambda n: lambda x, n=n: x + n,
    lambda n: lambda x, *, n=n: x + n,
    lambda n: [lambda x: x + n],
    lambda n: functools.partial(F.huber_loss, delta=n),
    lambda n: Config(n).__eq__,
    lambda n: Mixed(n),
    lambda n: Mixed(3, call=Kind(n)),
    Kind,
    lambda n: Path(str(n)),
    lambda n: bytes([n]),
    lambda n: [torch.float32, torch.float64][n - 1],
    lambda n: torch.device("cpu", n),
    lambda n: [torch.optim.SGD, torch.optim.Adam][n - 1],
    lambda n: [F.relu, F.gelu][n - 1],
    lambda n: [F.mse_loss, F.l1_loss][n - 1],
    lambda n: {"a", "b", Kind(n), ("c", n)},
    lambda n: slice(0, n),
    lambda n: datetime.timedelta(n),
    lambda n: pd.DataFrame({"a": [1, n], "b": ["x", str(n)]}),
    lambda n: pd.Series(["x", str(n)], dtype="category"),
    lambda n: pd.MultiIndex.from_tuples([("a", n)]),
]


@pytest.mark.parametrize("of", range(len(MANY_KINDS)))
def test_values_of_many_kinds_are_looked_into(of: int) -> None:
    one, again, other = (held(made(4, x=MANY_KINDS[of](n))) for n in (1, 1, 2))
    assert one == again
    assert other_values(other, one) == ["x"]


def test_their_digests_are_the_same_in_another_process() -> None:
    code = """
import sys, types, torch
from tests.test_sources import Config, MANY_KINDS, held, made
itself = [object(), {1, 2.5, "a", ("b", None)}]
itself.append(itself)
several = [make(1) for make in MANY_KINDS] + [object(), itself, torch.nn.GRU(2, 2), lambda x: x in {"a", "b", "c"}]
for each in several[-2].parameters():
    torch.nn.init.ones_(each)
print(*held(made(4, **{f"x{place}": each for place, each in enumerate(several)})).items(), sep="\\n")
"""
    found = [
        subprocess.run(
            [sys.executable, "-c", "x = [object()] * 1000\n" * (seed == "7") + code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "7")
    ]
    assert found[0] == found[1]
    assert found[0].count("\n") > len(MANY_KINDS)


def test_what_a_module_caches_is_no_other_value() -> None:
    used = Sharpened(2.0)
    used(torch.ones(3))
    assert other_values(held(made(4, x=used)), held(made(4, x=Sharpened(2.0)))) == []


def test_the_numbers_of_a_module_that_a_function_reads_are_held() -> None:
    def of(**values: Any) -> dict[str, str]:
        names = {"math": math, "f": len, "told": [], "n": 0, **values}
        exec("def read(trial):\n global n\n n += 1\n told.append(f(x) + w * math.pi)", names)
        return held(Function(names["read"]))

    assert names_in(of(x="a", w=2)) == {"global x", "global w"}
    assert other_values(of(x="a", w=torch.ones(2)), of(x="b", w=torch.ones(2))) == ["global x"]
    assert other_values(of(x="a", w=torch.ones(2)), of(x="a", w=torch.zeros(2))) == ["global w"]
    assert other_values(of(x="a", w=1, told=[1], n=3), of(x="a", w=1)) == []


def of_module(**values: Any) -> dict[str, str]:
    """Return what is held of a function that reads x and y of its module, where another function sets y."""
    names = {**values}
    exec("def read(trial): return x, y\ndef load():\n global y\n y = 1\n", names)
    return held(Function(names["read"]))


@pytest.mark.parametrize(
    ("before", "after", "names"),
    [
        ({"x": (1, 2)}, {"x": (1, 3)}, ["global x"]),
        ({"x": frozenset({"a", "b"})}, {"x": frozenset({"a", "c"})}, ["global x"]),
        ({"x": frozenset({"a", "b"})}, {"x": frozenset({"b", "a"})}, []),
        ({"x": None}, {"x": "big"}, ["global x"]),
        ({"x": "big"}, {"x": None}, ["global x"]),
        ({"x": None}, {"x": torch.ones(2)}, ["global x"]),
        ({"x": None}, {"x": [1]}, []),  # as of a list, nothing is known of it
        ({"x": 1, "y": None}, {"x": 1, "y": torch.ones(2)}, []),  # a cache
        ({"x": 1}, {"x": 1, "y": None}, []),
        ({"x": "/a/b/c.csv"}, {"x": "/a/b/d.csv"}, ["global x"]),
        ({"x": "/a/b/c.csv", "__file__": "/a/b/m.py"}, {"x": "/d/c.csv", "__file__": "/d/m.py"}, []),
        ({"x": "/a/b/c.csv", "__file__": "/a/b/m.py"}, {"x": "/d/e.csv", "__file__": "/d/m.py"}, ["global x"]),
        ({"x": "/a/b", "__file__": "/a/b/m.py"}, {"x": "/d", "__file__": "/d/m.py"}, []),
    ],
)
def test_the_constants_of_a_module_are_held(before: Any, after: Any, names: list[str]) -> None:
    assert other_values(of_module(**after), of_module(**before)) == names


def test_where_a_module_is_is_nothing_that_a_function_holds() -> None:
    def of(name: str) -> dict[str, str]:
        names = {"__name__": name, "__file__": f"/{name}.py", "A": 1}
        exec("def read(trial):\n return (__name__, __file__, A)", names)
        return held(Function(names["read"]))

    assert of("__main__") == of("script")
    before = {**of("script"), "global __file__": digest("'/other.py'")}  # as an earlier version stored it
    assert other_values(of("script"), before) == []


def test_of_what_cannot_be_looked_into_the_type_is_held() -> None:
    itself: list[Any] = []
    itself += [itself, object()] * 50
    one, other = held(made(4, x=itself)), held(made(4, x=[0] * 200_000))
    assert other_values(one, held(made(4, x=itself))) == []
    assert other_values(one, other) == other_values(held(made(4, x=3)), one) == ["x"]


def test_what_an_earlier_version_held_is_compared_as_it_was() -> None:
    before = {"size": digest("4"), "names": digest("['a']")}  # plain values only, and without marks
    for now in (made(4, size=4, names=["a"], more=1, x=torch.ones(2)), made(4, size=4)):
        assert other_values(held(now), before) == []
    assert other_values(held(made(4, size=5)), before) == ["size"]
    assert other_values(held(made(4)), {}) == []
    marked = {".": "", ".size": digest("4"), ".x": digest("as it said that then")}  # and of other values other digests
    for each in (torch.ones(2), Config(1), nn.MSELoss()):
        assert other_values(held(made(4, size=4, x=each)), marked) == []
    assert other_values(held(made(4, size=5, x=3, more=1)), marked) == ["more", "size", "x"]


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
def test_a_function_that_holds_another_value_is_another(
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
    with pytest.raises(hpo.InputError, match=f"its value of {names} differs"):
        hpo.run(made_by(100.0), trials=3, **FUNCTION)


FUNCTION: dict[str, Any] = {"tracking": "off", "quiet": True}


def test_the_code_of_a_callable_is_that_of_what_it_runs() -> None:
    one, other = (Function(functools.partial(each, shift=1.0)) for each in (of_a_trial, shifted(1.0)))
    assert source_file(one) == Path(__file__) == source_file(Function(Shifted(1.0)))
    assert source_fingerprint(one) == source_fingerprint(Function(of_a_trial)) != source_fingerprint(Function(print))
    assert names_in(held(one)) == {"default 1", "shift"}
    assert held(other)[".shift"] == held(one)[".shift"]
