"""What the tests of stacks share: toy objectives, and members trained in a stack or each alone."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hpo.study.data import DataInfo, Split
from hpo.study.objective import Objective
from hpo.training.batches import Batches
from hpo.training.loop import Results, train
from hpo.training.stack import Member, SingleStack, Stack, Stacks

CPU = torch.device("cpu")
INFO = DataInfo(inputs={}, input_dtypes={})
Seen = Callable[[Stack, Member, dict[str, float]], object]


class Toy(Objective):
    """A regression without data of its own: a stack is given its rows."""

    def data(self):
        raise AssertionError("a stack is given its data")

    def loss(self, outputs, targets, params):
        return F.mse_loss(outputs, targets)

    def metrics(self):
        return {}


class Built(Toy):
    """Whatever network `build` returns, in double precision."""

    def __init__(self, build: Callable[[Any], nn.Module]) -> None:
        super().__init__()
        self._build = build

    def build(self, params, info):
        return self._build(params).double()


def sines(n: int, seed: int = 0) -> Split:
    """Return n rows of six numbers, in double precision; the target is the sine of their sum."""
    x = torch.randn(n, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return Split(inputs={"x": x}, targets=x.sum(1, keepdim=True).sin())


def asking(members: Iterable[Member]) -> Callable[[int], list[Member]]:
    """Return an `ask` of the training loop that gives out these members, in their order."""
    waiting = list(members)

    def ask(n: int) -> list[Member]:
        taken, waiting[:] = waiting[:n], waiting[n:]
        return taken

    return ask


def one_by_one(keeps: Callable[[Stack, Member, dict[str, float]], bool]) -> Callable[[Stack, Results], list[Member]]:
    """Return a `report` of the training loop that asks `keeps` of each member."""
    return lambda stack, results: [member for member, metrics in results.items() if keeps(stack, member, metrics)]


def keep_all(stack: Stack, results: Results) -> Collection[Member]:
    return results


def trained(
    stacks: Stack | Stacks,
    members: Sequence[Member],
    rows: Split,
    valid: Split | None = None,
    *,
    epochs: int,
    stops: Mapping[int, int] | None = None,
    seen: Seen = lambda stack, member, metrics: None,
) -> dict[int, dict[str, Tensor]]:
    """Train `members`, each up to `stops[number]` epochs or else all; return their last weights by number.

    `seen` is called with every epoch of every member.
    """
    weights = {}

    def keeps(stack: Stack, member: Member, metrics: dict[str, float]) -> bool:
        seen(stack, member, metrics)
        weights[member.number] = stack.state(member)
        return member.epoch < (stops or {}).get(member.number, epochs)

    train(
        SingleStack(stacks) if isinstance(stacks, Stack) else stacks,
        Batches(rows, CPU),
        None if valid is None else Batches(valid, CPU),
        epochs=epochs,
        seed=7,
        ask=asking(members),
        report=one_by_one(keeps),
    )
    return weights


def assert_same_curves(got: Sequence[Member], expected: Sequence[Member], **tolerance: float) -> None:
    """Assert that members have the same metrics in every epoch, to 1e-9 unless told otherwise."""
    for a, b in zip(got, expected, strict=True):
        assert len(a.history) == len(b.history) > 0
        for epoch, reference in zip(a.history, b.history, strict=True):
            assert epoch == pytest.approx(reference, **(tolerance or {"abs": 1e-9})), a.params


def assert_same_weights(
    got: Mapping[int, Mapping[str, Tensor]], expected: Mapping[int, Mapping[str, Tensor]], numbers: Iterable[int]
) -> None:
    """Assert that these members' weights, by number and name, are equal to 1e-9."""
    for number in numbers:
        assert got[number].keys() == expected[number].keys()
        for name, weight in expected[number].items():
            torch.testing.assert_close(
                got[number][name], weight, rtol=0, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}"
            )
