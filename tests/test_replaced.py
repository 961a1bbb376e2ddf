"""Networks whose code looks at the layers that a stack replaces: they do the same, or are left alone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hpo.stacks.alone import NotStackable
from hpo.stacks.candidate import candidate
from hpo.stacks.padding import unpadded
from hpo.stacks.structure import common_structure
from hpo.stacks.tensor_modules import RateDropout, masks_of_a_step
from hpo.stacks.vmap_stack import VmapStack
from hpo.training.loop_stack import LoopStack
from hpo.training.stack import Member, Task
from tests.stacking import CPU, INFO, Built, assert_same_curves, assert_same_weights, sines, trained

Build = Callable[[Any], nn.Module]


def task(build: Build) -> Task:
    return Task(objective=Built(build), info=INFO, device=CPU, n_rows=12, epochs=2)


def members(*several: dict[str, Any]) -> list[Member]:
    engine = {"optimizer": "adam", "learning_rate": 1e-2, "batch_size": 6}
    return [Member(number=n, seed=n, params=engine | params) for n, params in enumerate(several)]


def check(build: Build, *several: dict[str, Any]) -> None:
    """Raises NotStackable."""
    stack, rows = VmapStack(task(build), len(several), sines(8), "eager", unpadded), sines(12, seed=3)
    got, expected, alone = members(*several), members(*several), {}
    weights = trained(stack, got, rows, sines(10, seed=1), epochs=2)
    for member in expected:
        alone |= trained(LoopStack(task(build)), [member], rows, sines(10, seed=1), epochs=2)
    assert_same_curves(got, expected)
    assert_same_weights(weights, alone, range(len(several)))


class Network(nn.Module):
    """Two layers, and dropout of a rate that leaves nothing to chance."""

    def __init__(self, rate: float, inplace: bool = False) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 1)
        self.drop = nn.Dropout(rate, inplace)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.drop(self.first(x)).cos())


class InPlace(Network):
    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        self.drop(x)
        return self.last(x.cos())


class OfType(Network):
    """Dropout stays on in evaluation (Monte Carlo dropout)."""

    def train(self, mode: bool = True) -> "OfType":
        super().train(mode)
        for each in self.modules():
            if isinstance(each, nn.Dropout):
                each.training = True
        return self


class OfName(Network):
    def train(self, mode: bool = True) -> "OfName":
        super().train(mode)
        for each in self.modules():
            if type(each).__name__.startswith("Dropout"):
                each.training = True
        return self


class Scheduled(Network):
    def forward(self, x: Tensor) -> Tensor:
        for each in self.modules():
            if isinstance(each, nn.Dropout):
                each.p = 1.0
        return super().forward(x)


class ScheduledByType(Network):
    def forward(self, x: Tensor) -> Tensor:
        for each in self.modules():
            if type(each) is nn.Dropout:
                each.p = 1.0
        return super().forward(x)


class Reading(Network):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.dropout(self.first(x), self.drop.p, self.training).cos())


class Requiring(Network):
    def forward(self, x: Tensor) -> Tensor:
        if type(self.drop) is not nn.Dropout:
            raise TypeError(f"what is a {type(self.drop).__name__}?")
        return super().forward(x)


class Elsewhere(Network):
    """Its dropout is in a list too, that is not replaced."""

    def __init__(self, rate: float) -> None:
        super().__init__(rate)
        self.drops = [self.drop]

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.drops[0](self.first(x)).cos())


def test_dropout_in_place_is_in_place_where_what_it_was_given_is_used_after() -> None:
    check(lambda p: InPlace(p["rate"], inplace=True), {"rate": 1.0}, {"rate": 0.0})


def test_dropout_in_place_is_not_where_only_its_result_is_used() -> None:
    build: Build = lambda p: nn.Sequential(nn.Dropout(0.3, inplace=True), nn.Linear(6, 1))  # noqa: E731
    stack = VmapStack(task(build), 1, sines(8))  # of rows that all members share
    stack.join(*members({}))
    assert len(stack.members) == 1


def test_the_masks_of_dropout_in_place_are_those_of_dropout() -> None:
    layer, x = RateDropout.like(nn.Dropout(0.4, inplace=True), 0, writes=True), torch.randn(9, 5)
    given = x.clone()
    with masks_of_a_step():
        assert layer(given) is given
    with masks_of_a_step():
        assert torch.equal(RateDropout(0.4)(x), given)


REFUSED: dict[str, tuple[Build, str]] = {
    "dropout in evaluation": (lambda p: OfType(1.0), "draws random numbers in evaluation"),
    "dropout in evaluation by its name": (lambda p: OfName(1.0), "in evaluation depends on its dropout layers"),
    "a schedule": (lambda p: Scheduled(0.0), r"sets the rate \(p\) of a dropout layer"),
    "a schedule by type": (lambda p: ScheduledByType(0.0), r"sets the rate \(p\) of a dropout layer"),
    "a rate that is read": (lambda p: Reading(0.0), r"reads the rate \(p\) of a dropout layer"),
    "an error": (lambda p: Requiring(0.0), r"in place of nn.Dropout \(TypeError in evaluation\)"),
    "dropout that is elsewhere too": (lambda p: Elsewhere(1.0), "in training depends on its dropout layers"),
}


@pytest.mark.parametrize(("build", "reason"), REFUSED.values(), ids=REFUSED)
def test_a_network_that_looks_at_its_dropout_is_trained_alone_for_a_reason(build: Build, reason: str) -> None:
    with pytest.raises(NotStackable, match=reason) as refused:
        check(build, {})
    assert "RateDropout" not in str(refused.value)


def test_what_a_dropout_layer_holds_and_its_hooks_stay() -> None:
    def build(params: Any) -> nn.Module:
        network = Network(0.0)
        network.drop.scale = 0.5  # type: ignore[assignment]
        network.drop.register_forward_hook(lambda module, inputs, output: output * module.scale)
        return network

    check(build, {}, {"learning_rate": 3e-2})


def test_what_fails_as_it_is_built_fails_as_that() -> None:
    class Failing(Network):
        def forward(self, x: Tensor) -> Tensor:
            raise ValueError("of its own")

    with pytest.raises(NotStackable, match=r"failed \(ValueError: of its own\)"):  # alone it is raised
        candidate(task(lambda p: Failing(0.5)), *members({}), unpadded, sines(8))


def test_comparing_draws_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks that draw in a stack do so of torch's stream, of which no more is used than earlier versions did."""

    def after() -> Tensor:
        candidate(task(lambda p: Network(0.5)), *members({}), unpadded, sines(8))
        return torch.rand(3)

    got = after()
    monkeypatch.setattr("hpo.stacks.candidate.with_tensor_dropout", lambda task, network, example: network)
    assert torch.equal(got, after())


class Noisy(nn.Module):
    """It draws in training, so that its first step is another each time."""

    def __init__(self, activation: nn.Module, looks: bool) -> None:
        super().__init__()
        self.first, self.activation, self.last, self.looks = nn.Linear(6, 6), activation, nn.Linear(6, 1), looks

    def forward(self, x: Tensor) -> Tensor:
        out = self.last(self.activation(self.first(x)))
        looked = self.looks and self.training and isinstance(self.activation, nn.Tanh)
        return (2 * out if looked else out) + (torch.randn_like(out) if self.training else 0)


@pytest.mark.parametrize("looks", [False, True])
def test_a_noisy_network_that_looks_at_a_layer_that_trials_choose_is_trained_alone(looks: bool) -> None:
    def build(params: Any) -> nn.Module:
        return Noisy(nn.Tanh() if params["tanh"] else nn.ReLU(), looks)

    structure = common_structure([build({"tanh": tanh}).double() for tanh in (False, True)])
    stack = VmapStack(task(build), 2, sines(8), padder=lambda module, params: structure.pad(module))
    relu, tanh = members({"tanh": False}, {"tanh": True})
    stack.join(relu)
    if looks:
        with pytest.raises(NotStackable, match="what trials choose among its layers"):
            stack.join(tanh)
    else:
        stack.join(tanh)


def test_a_network_that_writes_into_its_inputs_leaves_the_studys_rows_as_they_are() -> None:
    class Writing(Network):
        def forward(self, x: Tensor) -> Tensor:
            self.drop(x)
            return super().forward(x.mul_(2))

    rows, before = sines(8), sines(8)
    with pytest.raises(NotStackable, match=r"torch.func cannot batch it"):
        VmapStack(task(lambda p: Writing(1.0, inplace=True)), 1, rows).join(*members({}))
    assert torch.equal(rows.inputs["x"], before.inputs["x"])
