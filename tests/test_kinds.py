"""Classes written inside of a function: the same where nothing that their code may read differs, else never."""

import functools
import itertools
import random
import time
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from hpo.stacks.padding import PaddingPlan
from hpo.stacks.pool import Pool
from hpo.stacks.vmap_stack import VmapStack
from hpo.study.space import build as build_space
from hpo.study.spec import parse_param
from hpo.training.kinds import Kinds
from hpo.training.loop_stack import LoopStack
from hpo.training.outside import Outside
from hpo.training.stack import Member, Stack, Stacks, Task
from tests.logged import recorded
from tests.stacking import CPU, INFO, Built, assert_same_curves, sines
from tests.stacking import trained as train_in

GLOBAL = "tanh"


def net_class(params: Any) -> type[nn.Module]:
    """The usual notebook: a class inside of `build`, whose __init__ closes over params."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, params["width"]), nn.Linear(params["width"], 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.tanh(self.first(x)))

    return Net


def blocks(params: Any) -> nn.Module:
    """Layers of a class of one's own in an nn.Sequential, as many as `depth` says."""
    width = params["width"]

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(width, width)

        def forward(self, x: Tensor) -> Tensor:
            return x + torch.sigmoid(self.linear(x))

    class Head(nn.Linear):
        pass

    return nn.Sequential(nn.Linear(6, width), *(Block() for _ in range(params["depth"])), Head(width, 1))


def by_forward(code: str) -> Callable[[Any], nn.Module]:
    """A network whose forward is `code`, an expression of x, self and what stands around it in `build`."""
    text = f"""
def build(params):
    width, activation = params["width"], getattr(torch, params.get("name", "tanh"))
    factor = params["factor"]
    constant, trained = torch.tensor(factor), torch.tensor(factor, requires_grad=True)
    space, array = SimpleNamespace(**params), np.array([factor])
    part = functools.partial(torch.mul, other=factor)
    layer, thing = getattr(nn, params.get("layer", "Tanh"))(), object()
    def helper(x):
        return x * factor
    def plain(x, by=params["factor"]):
        return x * by
    class Net(nn.Module):
        number = factor
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(6, width), nn.Linear(width, 1)
            self.call = (lambda x: x * 1.0) if factor == 1 else (lambda x: x * 2.0)
            self.method = self.scaled
        def scaled(self, x):
            return x * factor
        def forward(self, x):
            x = torch.tanh(self.first(x))
            return self.last({code})
    return Net()
"""
    names: dict[str, Any] = {
        "__name__": "tests.written",
        "torch": torch,
        "nn": nn,
        "np": np,
        "functools": functools,
        "SimpleNamespace": types.SimpleNamespace,
    }
    exec(text, names)
    return names["build"]


SAME = {
    "nothing": "x",
    "an activation": "activation(x)",
    "a layer without weights": "layer(x)",
    "a key that is the same": 'x * params["batch_size"]',
    "a constant": "x * 2",
}
"""Nothing here differs between members that differ in `factor` and `learning_rate` only."""
OTHER = {
    "a number": "x * factor",
    "a key": 'x * params["factor"]',
    "a branch on a key": 'x if params["factor"] == 1 else -x',
    "a get": 'x * params.get("factor")',
    "all of the params": "x * dict(params)['factor']",
    "a comprehension": "sum(x * params['factor'] for _ in range(2))",
    "a nested function": "helper(x)",
    "a lambda in it": "(lambda y: y * factor)(x)",
    "a default": "plain(x)",
    "a class's attribute": "x * self.number",
    "a module's lambda": "self.call(x)",
    "a method that it keeps": "self.method(x)",
    "a tensor": "x * constant",
    "a tensor that is trained": "x * trained",
    "an array": "x * float(array[0])",
    "a namespace": "x * space.factor",
    "a partial": "part(x)",
}


SPACE = {"width": {"type": "int", "low": 4, "high": 20}, "depth": {"type": "int", "low": 1, "high": 3}}


N_ROWS, N_EPOCHS = 40, 3


def members(*several: dict[str, Any]) -> list[Member]:
    base = {"optimizer": "adam", "batch_size": 12}
    return [
        Member(number=n, seed=n, params={**base, "learning_rate": 0.002 * (n + 1), **params})
        for n, params in enumerate(several)
    ]


def fit(stacks: Stack | Stacks, everyone: list[Member], **more: Any) -> None:
    train_in(stacks, everyone, sines(N_ROWS), sines(20, 1), epochs=N_EPOCHS, **more)


def trained(
    build: Callable[[Any], nn.Module], several: list[dict[str, Any]], **space: Any
) -> tuple[set[Any], list[str]]:
    """Train members in a pool, each as it is alone; return the kinds of stacks and what was said."""
    task = Task(
        objective=Built(build),
        info=INFO,
        device=CPU,
        n_rows=N_ROWS,
        epochs=N_EPOCHS,
    )
    entries = {**several[0], "optimizer": "adam", "batch_size": 12, **space}
    made, faults = build_space({name: parse_param(entry) for name, entry in entries.items()}, ())
    assert not faults
    plan = PaddingPlan(made, lambda params: task.objective.build(params, task.info))
    stacks = set()
    got, expected = members(*several), members(*several)
    with recorded() as said:
        pool = Pool(task, len(several), sines(8), plan)
        fit(pool, got, seen=lambda stack, member, metrics: stacks.add((id(stack), type(stack))))
    for alone in expected:
        fit(LoopStack(task), [alone])
    assert_same_curves(got, expected)
    return {kind for _, kind in stacks}, said


BASE = {"width": 8, "factor": 1.0}


def test_a_class_inside_of_build_is_stacked() -> None:
    assert trained(lambda params: net_class(params)(), [BASE] * 4) == ({VmapStack}, [])


HOW = [parametrizations.weight_norm, pytest.param(parametrizations.orthogonal, marks=pytest.mark.slow)]


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("how", HOW)
def test_a_parametrized_weight_is_stacked(how: Callable[[nn.Module], nn.Module]) -> None:
    """torch makes a class for each module whose weight is parametrized, and has it close over the module."""

    def build(params: Any) -> nn.Module:
        return nn.Sequential(how(nn.Linear(6, 8)), nn.Tanh(), nn.Linear(8, 1)).double()

    assert trained(build, [BASE] * 4) == ({VmapStack}, [])


def test_of_any_width_and_depth() -> None:
    several = [{"width": w, "depth": d} for w, d in ((4, 1), (9, 2), (6, 3))]
    assert trained(blocks, several, **SPACE) == ({VmapStack}, [])
    wide = [{"width": w} for w in (4, 9, 12)]
    assert trained(lambda params: net_class(params)(), wide, width=SPACE["width"])[0] == {VmapStack}


@pytest.mark.parametrize("code", SAME.values(), ids=SAME)
def test_what_does_not_differ_is_stacked(code: str) -> None:
    build = by_forward(code)
    several = [BASE | {"factor": factor} for factor in (1.0, 2.0, 1.0, 2.0)]
    alike = "factor" not in code and "call" not in code
    kinds = [Kinds().of(type(build(params | {"batch_size": 12})).forward) for params in several]
    assert alike
    assert len(set(kinds)) == 1


@pytest.mark.parametrize("code", OTHER.values(), ids=OTHER)
def test_what_differs_in_what_forward_reads_is_never_trained_as_another(code: str) -> None:
    """In a stack or out of it, each member has the curve that it has alone."""
    trained(by_forward(code), [BASE | {"factor": factor} for factor in (1.0, 2.0, 1.0)])


@pytest.mark.parametrize("how", ["training", "rarely"])
def test_what_no_probe_would_show_is_kept_apart_too(how: str) -> None:
    """What differs is read in training only, or for rows that the example has not."""

    def build(params: Any) -> nn.Module:
        factor = params["factor"]

        class Net(nn.Sequential):
            def forward(self, x: Tensor) -> Tensor:
                y = super().forward(x)
                if how == "training":
                    return y * factor if self.training else y
                return torch.where(x.abs().amax(1, keepdim=True) > 2.2, y * factor, y)

        return Net(nn.Linear(6, params["width"]), nn.Tanh(), nn.Linear(params["width"], 1))

    kinds, _ = trained(build, [BASE | {"factor": f} for f in (1.0, 1.0, 1.0, 3.0, 3.0, 3.0)])
    assert kinds == {VmapStack}  # one for each factor


def test_an_activation_that_is_chosen_by_name_divides_members_or_is_a_choice() -> None:
    several = [BASE | {"name": name} for name in ("tanh", "sigmoid", "tanh", "sigmoid", "tanh", "sigmoid")]
    assert trained(by_forward("activation(x)"), several) == ({VmapStack}, [])
    layers = [BASE | {"layer": name} for name in ("Tanh", "ReLU", "Tanh", "ReLU", "Tanh", "ReLU")]
    assert trained(by_forward("layer(x)"), layers) == ({VmapStack}, [])


def test_a_forward_that_counts_in_what_it_closes_over_is_not_stacked() -> None:
    def build(params: Any) -> nn.Module:
        calls = {"n": 0}

        class Net(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                calls["n"] += 1
                return super().forward(x) / calls["n"]

        return Net(6, 1)

    kinds, said = trained(build, [BASE] * 3)
    assert kinds == {LoopStack}
    assert said[0].endswith("its forward or loss changes what is neither a weight nor a buffer")


def test_hooks_are_part_of_what_a_layer_is() -> None:
    def build(params: Any) -> nn.Module:
        network = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
        network[0].register_forward_hook(lambda module, given, out: out * params["factor"])
        return network

    trained(build, [BASE | {"factor": factor} for factor in (1.0, 2.0, 1.0)])


def made(value: Any) -> Any:
    """Return values of which two made alike are other objects."""

    class Local:
        attribute = value

        def read(self) -> Any:
            return value

        @property
        def shown(self) -> Any:
            return value

        @staticmethod
        def still() -> Any:
            return value

        @functools.cached_property
        def kept(self) -> Any:
            return value

    @dataclass
    class Record:
        field: Any = None

    return {
        "a class": Local,
        "a method": Local.read,
        "a static method": vars(Local)["still"],
        "a cached property": vars(Local)["kept"],
        "a subclass": type("Sub", (Local,), {}),
        "a list": [1, (value,), {"a": {value}}],
        "a tensor": torch.full((3,), float(value)),
        "an array": np.full(3, value),
        "a dataclass": Record(value),
        "a partial": functools.partial(made, value),
        "a layer": nn.Softplus(float(value)),
        "a dropout": nn.Sequential(nn.Dropout(value / 10)),
        "a bool": value == 1,
        "a number": float(value),
    }


@pytest.mark.parametrize("name", made(1))
def test_kinds_are_equal_for_equal_contents_only(name: str) -> None:
    one, again, other = (Kinds().of(made(value)[name]) for value in (1, 1, 2))
    assert one == again
    assert hash(one) == hash(again)
    assert one != other


def test_what_cannot_be_looked_into_is_only_itself() -> None:
    for make in (
        object,
        lambda: nn.Linear(2, 2),
        lambda: torch.zeros(2, requires_grad=True),
        lambda: torch.zeros(20_000),
    ):
        one, other = make(), make()
        assert Kinds().of(one) == Kinds().of(one)
        assert Kinds().of(one) != Kinds().of(other)
    assert Kinds().of(1) != Kinds().of(True)
    assert Kinds().of(1) != Kinds().of(1.0)


class Holder:
    """Holds whatever it is given, and itself."""

    n_of_all = 0

    def __init__(self, **held: Any) -> None:
        self.itself = self
        vars(self).update(held)


class Slotted:
    __slots__ = ("n", "unset")

    def __init__(self) -> None:
        self.n = 0


def within(value: Any, depth: int = 3) -> Any:
    return Holder(inner=within(value, depth - 1)) if depth else value


def add_to_all(holder: Holder) -> None:
    type(holder).n_of_all += 1


COUNTING: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "number": (lambda: Holder(n=0), lambda holder: vars(holder).update(n=1)),
    "list": (lambda: Holder(seen=[]), lambda holder: holder.seen.append(1)),
    "in a list": (lambda: Holder(inner=[Holder(n=0)]), lambda holder: vars(holder.inner[0]).update(n=1)),
    "slot": (Slotted, lambda holder: setattr(holder, "n", 1)),
    "class": (Holder, add_to_all),
    "torch's generator": (torch.Generator, lambda generator: torch.rand(1, generator=generator)),
    "numpy's generator": (lambda: np.random.default_rng(0), lambda generator: generator.random()),
    "count": (itertools.count, next),
    "a layer without weights": (lambda: Dropping(0.5), lambda layer: vars(layer).update(p=0.4)),
}


class Dropping(nn.Dropout):
    """A class of one's own."""


@pytest.mark.parametrize("how", COUNTING)
def test_what_counts_in_objects_within_objects_is_seen(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Holder, "n_of_all", 0)
    make, count = COUNTING[how]
    counting = make()
    outer = within(counting)
    before = Kinds().of(outer)
    assert Kinds().of(outer) == before
    count(counting)
    assert Kinds().of(outer) != before


def test_how_far_objects_are_looked_into_is_bounded() -> None:
    wide, deep = Holder(several=[Holder() for _ in range(20_000)]), within(0, 500)
    many = Holder(**{f"h{i}": Holder(**{f"h{j}": Holder() for j in range(200)}) for i in range(200)})
    for each in (wide, deep, many):
        start = time.perf_counter()
        assert Kinds().of(each) == Kinds().of(each)
        assert time.perf_counter() - start < 2.0


class Broken(Mapping[str, int]):
    def __getitem__(self, key: str) -> int:
        raise OSError(key)

    def __iter__(self) -> Iterator[str]:
        return iter(("a",))

    def __len__(self) -> int:
        return 1


@dataclass
class Unset:
    value: int = field(init=False)


@pytest.mark.parametrize("make", [random.SystemRandom, Broken, Unset])
def test_what_raises_when_it_is_looked_into_is_only_itself(make: Callable[[], Any]) -> None:
    one, other = make(), make()
    assert Kinds().of(one) == Kinds().of(one)
    assert Kinds().of({"a": one}) == Kinds().of({"a": one})
    assert Kinds().of(one) != Kinds().of(other)
    module = nn.Linear(2, 2)
    module.holds = one  # type: ignore[assignment]
    assert Outside(module, Built([])).changed() == ({}, [])


def test_what_is_deeper_than_pythons_stack_is_looked_into_as_far_as_that_goes() -> None:
    outer: list[Any] = []
    for _ in range(5_000):
        outer = [outer]
    assert Kinds().of(outer) == Kinds().of(outer)


def test_what_is_gone_is_equal_to_nothing_that_takes_its_place() -> None:
    gone = Kinds().of(nn.Linear(2, 2))
    later = [nn.Linear(2, 2) for _ in range(100)]
    assert all(Kinds().of(each) != gone for each in later)


def reads_a_global(x: Any) -> Any:
    return x, GLOBAL


def test_a_global_is_what_it_is_now(monkeypatch: pytest.MonkeyPatch) -> None:
    before = Kinds().of(reads_a_global)
    assert Kinds().of(reads_a_global) == before
    monkeypatch.setitem(globals(), "GLOBAL", "relu")
    assert Kinds().of(reads_a_global) != before


def test_what_holds_itself_has_a_kind() -> None:
    def recursive(n: int) -> int:
        return recursive(n - 1) if n else 0

    holder: list[Any] = []
    holder.append(holder)
    assert Kinds().of(recursive) == Kinds().of(recursive)
    assert Kinds().of(holder) == Kinds().of(holder)
