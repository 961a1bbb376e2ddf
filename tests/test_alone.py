"""What networks do in training only: a stack does the same, or leaves them alone and says why."""

import copy
import itertools
import math
import random
import threading
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hpo.stacks.alone import Alone, NotStackable, unlike
from hpo.stacks.padding import Padder, PaddingPlan, unpadded
from hpo.stacks.structure import common_structure
from hpo.stacks.trying import Trying
from hpo.stacks.vmap_stack import VmapStack
from hpo.stacks.vmap_step import Execution
from hpo.study.space import build
from hpo.study.spec import parse_param
from hpo.training.batches import Batches
from hpo.training.faults import TrialError
from hpo.training.loop_stack import LoopStack
from hpo.training.stack import Member, Task
from tests.stacking import CPU, INFO, Built, assert_same_curves, assert_same_weights, sines, trained

ENGINE = {"optimizer": "adamw", "learning_rate": 1e-2, "weight_decay": 0.1, "batch_size": 6, "max_grad_norm": 1.0}
Build = Callable[[Any], nn.Module]
Middle = Callable[[nn.Module, Tensor], Tensor]


class Network(nn.Module):
    """Three layers, with something of the test's own in the middle."""

    def __init__(self, middle: Middle, prepare: Callable[[nn.Module], object] = lambda module: None, width: int = 6):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, width), nn.Linear(width, width), nn.Linear(width, 1)
        self.middle, self.kept = middle, 0
        prepare(self)

    def forward(self, x: Tensor) -> Any:
        y = self.middle(self, torch.tanh(self.first(x)))
        return (self.last(y[0]), y[1]) if isinstance(y, tuple) else self.last(y)


def plain(module: nn.Module, x: Tensor) -> Tensor:
    return torch.relu(module.second(x))


class Toy(Built):
    def loss(self, outputs, targets, params):
        if isinstance(outputs, tuple):
            return F.mse_loss(outputs[0], targets) + outputs[1]
        return F.mse_loss(outputs, targets)


def task(objective: Any) -> Task:
    return Task(objective=objective, info=INFO, device=CPU, n_rows=12, epochs=2)


def members(several: list[dict[str, Any]]) -> list[Member]:
    return [Member(number=n, seed=n, params=ENGINE | params) for n, params in enumerate(several)]


def check(
    objective: Any, several: list[dict[str, Any]], padder: Padder = unpadded, execution: Execution = "eager"
) -> None:
    """Raises NotStackable."""
    stack, rows = VmapStack(task(objective), len(several), sines(8), execution, padder), sines(12, seed=3)
    got, expected, alone = members(several), members(several), {}
    weights = trained(stack, got, rows, sines(10, seed=1), epochs=2)
    for member in expected:
        alone |= trained(LoopStack(task(objective)), [member], rows, sines(10, seed=1), epochs=2)
    assert_same_curves(got, expected)
    assert_same_weights(weights, alone, range(len(several)))


def shuffled(module: nn.Module, x: Tensor) -> Tensor:
    return x + 0.1 * x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))] if module.training else x


def shuffled_by_a_fork(module: nn.Module, x: Tensor) -> Tensor:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(99)
        return x + 0.1 * x[torch.randperm(len(x))] if module.training else x


def seeding(module: nn.Module, x: Tensor) -> Tensor:
    if module.training:
        torch.manual_seed(99)
    return F.dropout(plain(module, x), 0.5, module.training)


def forking(module: nn.Module, x: Tensor) -> Tensor:
    return shuffled_by_a_fork(module, x + torch.rand_like(x) if module.training else x)


def average(module: nn.Module, x: Tensor) -> Tensor:
    if module.training:
        module.mean = 0.9 * module.mean + 0.1 * x.mean(0).detach()
    return torch.relu(module.second(x - module.mean))


def shut(module: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.relu(module.second(x))


def evaluated(module: nn.Module, x: Tensor) -> Tensor:
    return x if module.training else module.second(x)


def twice(params: Any) -> nn.Module:
    hidden = nn.Linear(6, 6)
    return nn.Sequential(hidden, nn.Tanh(), hidden, nn.Linear(6, 1))


def masked(module: nn.Module, x: Tensor) -> Tensor:
    return torch.relu(module.second(x.masked_fill(module.mask, 0)))


def with_mask(module: nn.Module) -> None:
    module.register_buffer("mask", torch.tensor([True, *[False] * 5]))
    module.register_buffer("small", torch.tensor(3, dtype=torch.uint8))


SAME: dict[str, Build] = {
    "a mask and a small integer in buffers": lambda p: Network(masked, with_mask),
    "a buffer that is assigned": lambda p: Network(average, lambda m: m.register_buffer("mean", torch.zeros(6))),
    "a bias before BatchNorm, whose gradient is rounding": lambda p: nn.Sequential(
        nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 1)
    ),
    "layers without gradients": lambda p: Network(shut),
    "a layer that is used in evaluation only": lambda p: Network(evaluated),
    "a layer at two places": twice,
}


@pytest.mark.parametrize("build", SAME.values(), ids=SAME)
def test_what_a_network_does_in_training_it_does_in_a_stack(build: Build) -> None:
    check(Toy(build), [{}, {"learning_rate": 3e-2}])


class Marked(Toy):
    """Its network gives a mask and classes beside what the loss is of."""

    def loss(self, outputs, targets, params):
        return F.mse_loss(outputs[0], targets)


def marking(module: nn.Module, x: Tensor) -> Any:
    return plain(module, x), (x.detach() > 0, x.detach().argmax(1))


def test_a_mask_among_the_outputs_is_compared_as_it_is() -> None:
    check(Marked(lambda p: Network(marking)), [{}, {"learning_rate": 3e-2}], execution="graph")


@pytest.mark.parametrize(
    ("got", "expected", "is_same"),
    [
        (torch.tensor([1, 2], dtype=torch.uint8), torch.tensor([2, 2], dtype=torch.uint8), False),  # 1 - 2 is 255
        (torch.tensor([2, 1], dtype=torch.uint8), torch.tensor([2, 1], dtype=torch.uint8), True),
        (torch.tensor([10**6]), torch.tensor([10**6 + 1]), False),
        (torch.tensor([True, False]), torch.tensor([True, True]), False),
        (torch.tensor([1.0]), torch.tensor([1]), False),
        ((torch.ones(1), torch.ones(1)), torch.ones(1), False),
    ],
)
def test_integers_and_masks_are_the_same_or_not(got: Any, expected: Any, is_same: bool) -> None:
    assert (unlike(got, expected, "float32") is None) == is_same


class Root(nn.Module):
    """Of which the gradient at 0 is no number."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sign(x) * x.abs().sqrt()


def roots(params: Any) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 6), nn.ReLU(), Root() if params["root"] else nn.Tanh(), nn.Linear(6, 1))


class Normed(nn.Linear):
    """Weights of length 1: of zeros that is no number."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight / self.weight.norm(), self.bias)


def normed(params: Any) -> nn.Module:
    layers = [Normed(6, 6) for _ in range(params["depth"])]
    return nn.Sequential(nn.Linear(6, 6), *layers, nn.Linear(6, 1))


@pytest.mark.parametrize(
    ("build", "several"),
    [(roots, [{"root": False}, {"root": True}]), (normed, [{"depth": 3}, {"depth": 1}])],
    ids=["an activation of another member", "layers of another member"],
)
def test_what_only_others_use_gives_no_gradient_that_is_no_number(build: Build, several: list[dict[str, Any]]) -> None:
    structure = common_structure([build(params).double() for params in several])
    stack = VmapStack(task(Toy(build)), 2, sines(8), "eager", lambda module, params: structure.pad(module))
    got = members(several)
    trained(stack, got, sines(12, seed=3), epochs=2)
    expected = members(several)
    trained(LoopStack(task(Toy(build)), 2), expected, sines(12, seed=3), epochs=2)
    for one, other in zip(got, expected, strict=True):
        for epoch, reference in zip(one.history, other.history, strict=True):
            assert epoch == pytest.approx(reference, abs=1e-9, nan_ok=True)
        assert one.number or not math.isnan(one.history[-1]["train_loss"])


def skipping(module: nn.Module, x: Tensor) -> Tensor:
    return x if module.training and random.random() < 0.5 else plain(module, x)


def scaling(module: nn.Module, x: Tensor) -> Tensor:
    return plain(module, x) * (np.random.rand() if module.training else 1.0)


def drawing(module: nn.Module, x: Tensor) -> Tensor:
    return plain(module, x) * (module.kept.random() if module.training else 1.0)


def counting(module: nn.Module, x: Tensor) -> Tensor:
    return plain(module, x) * (1 + next(module.kept) if module.training else 1)


def keeping(module: nn.Module, x: Tensor) -> Tensor:
    if module.training:
        module.kept = x.mean(0).detach()
    return plain(module, x)


def listing(module: nn.Module, x: Tensor) -> Tensor:
    return plain(module, x) * float(np.mean(x.detach().numpy()))


def has(kept: Any) -> Callable[[nn.Module], None]:
    return lambda module: setattr(module, "kept", kept)


def scripted(params: Any) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return nn.Sequential(torch.jit.script(nn.Linear(6, 6)), nn.Linear(6, 1))


def without_mean(module: nn.Module) -> None:
    module.register_buffer("mean", None)


def hooked(module: nn.Module) -> None:
    module.second.weight.register_hook(lambda gradient: 0 * gradient)


def beginning(module: nn.Module, x: Tensor) -> Tensor:
    if module.training:
        module.mean = x.mean(0).detach()
    return plain(module, x)


def of_many_rows(module: nn.Module, x: Tensor) -> Tensor:
    return plain(module, x) if len(x) > 6 else x


def observing(module: nn.Module, x: Tensor) -> Tensor:
    module.mean = torch.lerp(module.mean, x.mean(0).detach(), 1e-6)
    return plain(module, x - module.mean)


def observing_in_place(module: nn.Module, x: Tensor) -> Tensor:
    module.mean.mul_(0.9)
    return plain(module, x - module.mean)


def with_mean(module: nn.Module) -> None:
    module.register_buffer("mean", torch.ones(6))


def halving(module: nn.Module, x: Tensor) -> Tensor:
    if not module.training:
        with torch.no_grad():
            module.second.weight.mul_(0.5)
    return plain(module, x)


def sampling(module: nn.Module, x: Tensor) -> Tensor:
    return plain(module, x) + torch.randn_like(x)


def freezing(module: nn.Module, x: Tensor) -> Tensor:
    if module.training:
        module.second.requires_grad_(False)
    return plain(module, x)


def thawing(module: nn.Module, x: Tensor) -> Tensor:
    module.second.requires_grad_(module.training)
    return plain(module, x)


def at_first_use(module: nn.Module, x: Tensor) -> Tensor:
    module.kept = torch.arange(6).to(x) if module.kept is None else module.kept
    return plain(module, x + module.kept)


ATTRIBUTES = "its forward or loss changes what is neither a weight nor a buffer"
REFUSED: dict[str, tuple[Build, str]] = {
    "Python's random numbers": (lambda p: Network(skipping), ATTRIBUTES),
    "NumPy's random numbers": (lambda p: Network(scaling), ATTRIBUTES),
    "a generator of its own": (lambda p: Network(drawing, has(np.random.default_rng(0))), ATTRIBUTES),
    "a counter": (lambda p: Network(counting, has(itertools.count())), ATTRIBUTES),
    "a tensor that it keeps": (lambda p: Network(keeping), ATTRIBUTES),
    "numbers of a batch": (lambda p: Network(listing), "Python's numbers of a batch"),
    "a hook of a weight": (lambda p: Network(plain, hooked), "a hook changes the gradients"),
    "a buffer that is not there yet": (lambda p: Network(beginning, without_mean), "which buffers there are"),
    "a scripted layer": (scripted, "what torch.jit has made"),
    "complex weights": (lambda p: Network(plain, has(nn.Parameter(torch.ones(1, dtype=torch.complex64)))), "complex"),
    "a layer for many rows": (lambda p: Network(of_many_rows), "the number of rows decides .* second.bias, second.wei"),
    "a mean of evaluations": (lambda p: Network(observing, with_mean), r"changes buffers in evaluation \(mean\)"),
    "one in place": (lambda p: Network(observing_in_place, with_mean), r"changes buffers in evaluation \(mean\)"),
    "weights": (lambda p: Network(halving), r"changes weights in evaluation \(second.weight\)"),
    "what is drawn in evaluation": (lambda p: Network(sampling), "draws random numbers in evaluation"),
    "a layer that it freezes": (lambda p: Network(freezing), r"which weights are trained \(second.weight"),
    "one in evaluation": (lambda p: Network(thawing), r"which weights are trained \(second.weight"),
    "a seed of its own": (lambda p: Network(shuffled), "draws random numbers by a seed or generator of its own"),
    "a fork": (lambda p: Network(shuffled_by_a_fork), "draws random numbers by a seed or generator of its own"),
    "a seed for all": (lambda p: Network(seeding), "draws random numbers by a seed or generator of its own"),
    "a fork among others": (lambda p: Network(forking), "draws random numbers by a seed or generator of its own"),
    "what is made at first use": (lambda p: Network(at_first_use, has(None)), ATTRIBUTES),
    "no numbers": (lambda p: Network(lambda m, x: (x - 9).sqrt()), "its outputs are no numbers"),
}


@pytest.mark.parametrize(("build", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_a_stack_would_do_otherwise_is_trained_alone(build: Build, reason: str) -> None:
    objective = Toy(build)
    objective.build = lambda params, info: build(params)  # type: ignore[method-assign]  # `double` would undo types
    rows = sines(8)
    rows = type(rows)(inputs={"x": rows.inputs["x"].float()}, targets=rows.targets.float())
    with pytest.raises(NotStackable, match=reason):
        VmapStack(task(objective), 1, rows).join(members([{}])[0])


def penalized(module: nn.Module, x: Tensor) -> Any:
    return (plain(module, x), x.square().mean()) if module.training else plain(module, x)


def with_room_to_pad(middle: Middle) -> tuple[VmapStack, Member]:
    """Return a stack that has a wide network with that `middle`, and a member whose narrow one would be padded."""

    def build(params: Any) -> nn.Module:
        return Network(middle, width=params["width"])

    structure = common_structure([build({"width": width}).double() for width in (8, 3)])
    shapes = structure.shapes_of(build({"width": 8}).double())
    stack = VmapStack(task(Toy(build)), 2, sines(8), "eager", lambda module, params: structure.pad(module, shapes))
    large, small = members([{"width": 8}, {"width": 3}])
    stack.join(large)
    return stack, small


def test_padding_that_changes_the_loss_in_training_only_is_refused() -> None:
    stack, small = with_room_to_pad(penalized)
    with pytest.raises(NotStackable, match="its gradients in a stack are not those alone"):
        stack.join(small)


def lightly(module: nn.Module, x: Tensor) -> Any:
    return (plain(module, x), 1e-6 * x.square().mean()) if module.training else plain(module, x)


def lightly_always(module: nn.Module, x: Tensor) -> Any:
    return plain(module, x), 1e-6 * x.square().mean()


@pytest.mark.parametrize(("middle", "of"), [(lightly, "gradients"), (lightly_always, "outputs")])
def test_in_double_precision_padding_that_changes_little_is_refused_too(middle: Middle, of: str) -> None:
    stack, small = with_room_to_pad(middle)
    with pytest.raises(NotStackable, match=f"its {of} in a stack are not those alone"):
        stack.join(small)


@pytest.mark.parametrize(
    ("rounding", "by", "is_same"),
    [
        ("float64", 1e-7, False),
        ("float64", 1e-13, True),
        ("float32", 6e-5, False),
        ("float32", 1e-6, True),
        ("bf16", 1e-3, True),
    ],
)
def test_what_is_small_is_compared_by_its_own_size(rounding: Any, by: float, is_same: bool) -> None:
    large, small = torch.ones(2, dtype=torch.float64), torch.tensor([1e-4], dtype=torch.float64)
    assert (unlike((large, small + by), (large, small), rounding) is None) == is_same
    given = {"large": large, "small": small}
    for kept in ({"gradients": given, "buffers": {}}, {"gradients": {}, "buffers": given}):
        alone = Alone(**kept, untrained=frozenset(), is_random=False, draws=False)
        assert alone.is_like({"large": large, "small": small + by}, rounding) == is_same


def noisy(module: nn.Module, x: Tensor) -> Tensor:
    return x + 3 * x.std(1, keepdim=True) * torch.randn_like(x) if module.training else x


def dropping(module: nn.Module, x: Tensor) -> Tensor:
    return F.dropout(plain(module, x), 0.5, module.training)


@pytest.mark.parametrize(("middle", "is_refused"), [(noisy, True), (dropping, False)])
def test_what_draws_random_numbers_is_padded_only_if_that_is_dropout(middle: Middle, is_refused: bool) -> None:
    stack, small = with_room_to_pad(middle)
    with pytest.raises(NotStackable, match="it draws random numbers in training") if is_refused else nullcontext():
        stack.join(small)


class WhenThere(Toy):
    def loss(self, outputs, targets, params):
        return super().loss(outputs, targets, params) * params.get("scale", 1.0)


def test_members_with_and_without_a_param_of_the_loss_are_in_separate_stacks() -> None:
    stack = VmapStack(task(WhenThere(twice)), 2, sines(8))
    with_it, without = members([{"scale": 2.0}, {}])
    stack.join(with_it)
    with pytest.raises(NotStackable):
        stack.join(without)


class OfDistinctRows(Toy):
    def loss(self, outputs, targets, params):
        rows = torch.cat([targets, targets.flip(0)], 1)
        if torch.cdist(rows, rows).fill_diagonal_(1).min() == 0:
            raise RuntimeError("a row is there twice")
        return super().loss(outputs, targets, params)


def test_that_the_rows_it_is_tried_with_are_there_twice_is_no_fault_of_the_loss() -> None:
    check(OfDistinctRows(twice), [{}, {"learning_rate": 3e-2}])


def of_the_good(outputs: Tensor, targets: Tensor) -> Tensor:
    good = (outputs - targets).abs() < 9
    return F.mse_loss(outputs[good], targets[good])


def logged(outputs: Tensor, targets: Tensor) -> Tensor:
    assert F.mse_loss(outputs, targets).item() >= 0
    return F.mse_loss(outputs, targets)


class OtherwiseEvaluated(Toy):
    def loss(self, outputs, targets, params):
        loss = F.mse_loss if torch.is_grad_enabled() else self.evaluated
        return params["scale"] * loss(outputs, targets)


@pytest.mark.parametrize(
    ("evaluated", "reason"),
    [
        (of_the_good, "torch.func cannot batch it .*boolean mask"),
        (logged, "torch.func cannot batch it .*item"),
        (lambda outputs, targets: (outputs - targets).square().mean(0), r"its loss has the shape \(1,\) in evaluation"),
    ],
)
def test_a_loss_that_torch_cannot_batch_in_evaluation_is_trained_alone(evaluated: Any, reason: str) -> None:
    objective = OtherwiseEvaluated(twice)
    objective.evaluated = evaluated
    with pytest.raises(NotStackable, match=reason):
        VmapStack(task(objective), 1, sines(8)).join(members([{"scale": 2.0}])[0])


class OfFloats(Toy):
    """Its loss in evaluation asks what type a param has: in a stack that is a tensor."""

    def loss(self, outputs, targets, params):
        loss = F.mse_loss(outputs, targets)
        return loss if torch.is_grad_enabled() else loss * (2.0 if isinstance(params["scale"], float) else 1.0)


def test_a_loss_that_in_evaluation_is_another_one_in_a_stack_is_trained_alone() -> None:
    with pytest.raises(NotStackable, match="its loss in evaluation in a stack is not the one alone"):
        VmapStack(task(OfFloats(twice)), 1, sines(8)).join(members([{"scale": 2.0}])[0])


@pytest.mark.parametrize(
    "evaluated",
    [
        lambda outputs, targets: F.mse_loss(outputs + torch.randn_like(outputs), targets),
        lambda outputs, targets: torch.nan * F.mse_loss(outputs, targets),
    ],
    ids=["random", "no number"],
)
def test_a_loss_in_evaluation_is_compared_only_where_it_is_a_number_and_the_same_each_time(evaluated: Any) -> None:
    objective = OtherwiseEvaluated(twice)
    objective.evaluated = evaluated
    stack, (member,) = VmapStack(task(objective), 1, sines(8)), members([{"scale": 2.0}])
    stack.join(member)
    assert stack.members == [member]


class Counting(Toy):
    n_calls = 0

    def loss(self, outputs, targets, params):
        self.n_calls += 1
        return super().loss(outputs, targets, params) * (1 + self.n_calls / 10)


def test_an_objective_that_counts_is_trained_alone() -> None:
    with pytest.raises(NotStackable, match=ATTRIBUTES):
        VmapStack(task(Counting(twice)), 1, sines(8)).join(members([{}])[0])


class Masked(Toy):
    """Of which only some targets count, and a param that the loss reads while it trains."""

    def loss(self, outputs, targets, params):
        there = targets > 0.3
        loss = F.mse_loss(outputs[there], targets[there])
        return loss * params["scale"] if torch.is_grad_enabled() else loss


def test_a_loss_that_picks_rows_picks_them_of_each_batch() -> None:
    check(Masked(twice), [{"scale": 1.0}, {"scale": 3.0}], execution="graph")


class OfHard(Toy):
    """It has a param that counts where a batch has a row of a kind; the first eight rows have none."""

    def loss(self, outputs, targets, params):
        loss, hard = super().loss(outputs, targets, params), outputs[targets > self.least]
        return loss + params["scale"] * hard.square().mean() if self.are_some(hard) else loss


ASKED: list[Callable[[Any], bool]] = [
    lambda hard: len(hard) > 0,
    lambda hard: hard.shape[0] > 0,
    lambda hard: hard.size()[0] > 0,
    lambda hard: hard.numel() > 0,
    lambda hard: hard.nelement() > 0,
    lambda hard: any(True for each in hard),
    lambda hard: len(torch.cat([hard, hard]).flatten()) > 0,
    lambda hard: len(hard.split(1)) > 0 and hard.nbytes > 0,
    lambda hard: hard.untyped_storage().nbytes() > 0,
    lambda hard: hard.stride()[0] > 0,
]


@pytest.mark.parametrize("least", [0.3, 2.0])
@pytest.mark.parametrize("are_some", ASKED)
def test_a_loss_that_asks_how_many_rows_a_mask_picks_is_trained_alone(
    are_some: Callable[[Any], bool], least: float
) -> None:
    """By that it may read another param, or leave a weight out, which alone has no gradient then."""
    objective = OfHard(twice)
    objective.are_some, objective.least = are_some, least
    stack = VmapStack(task(objective), 2, sines(8), "graph")
    with pytest.raises(NotStackable, match="asks how many rows a mask picks"):
        stack.join(members([{"scale": 1.0}])[0])


def _written(mask: Tensor, by: Tensor) -> Tensor:
    mask[by] = True
    return mask


PICKED: Mapping[str, Callable[[Tensor], Tensor]] = {
    "nonzero": lambda x: (x > 0).nonzero(),
    "as a tuple": lambda x: (x > 0).nonzero(as_tuple=True)[0],
    "argwhere": lambda x: torch.argwhere(x > 0),
    "where": lambda x: torch.where(x > 0)[0],
    "masked_select": lambda x: x.masked_select(x > 0),
    "unique": lambda x: torch.unique(x.round()),
    "counts": lambda x: x.round().unique(return_counts=True)[1],
    "consecutive": lambda x: torch.unique_consecutive(x.round()),
    "repeated": lambda x: x.repeat_interleave((x > 0).flatten().long(), 0),
    "columns": lambda x: (x.T @ x * x)[:, x[0] > -9].T[:, x[:, 0] > 0].mean(0),
    "rows that are columns": lambda x: x[x[:, 0] > 0].T.mean(0),
    "where, by name": lambda x: torch.where(condition=x > 0)[0],
    "repeated, by name": lambda x: x.repeat_interleave(repeats=(x > 0).flatten().long(), dim=0),
    "repeats": lambda x: torch.repeat_interleave((x > 0).flatten().long()),
    "classes": lambda x: F.one_hot((x > 0).flatten().long()),
    "packed": lambda x: (
        nn.utils.rnn.pack_padded_sequence(x, (x > 0).flatten().long() + 1, enforce_sorted=False, batch_first=True).data
    ),
    "sparse": lambda x: x.to_sparse().values(),
    "a mask that is filled in": lambda x: x[torch.zeros(8, dtype=torch.bool).copy_(x[:, 0] > 0)],
    "a mask that is written into": lambda x: x[_written(torch.zeros(8, dtype=torch.bool), x[:, 0] > 0)],
    "a view that is written into": lambda x: x[_written(torch.zeros(9, dtype=torch.bool)[1:], x[:, 0] > 0)],
    "a mask by a number": lambda x: x[torch.arange(8) < (x > 0).sum().item()],
    "a mask that is drawn": lambda x: x[torch.rand(8) < 0.5],
    "a mask drawn in place": lambda x: x[torch.empty(8).uniform_() < 0.5],
    "bins": lambda x: torch.bincount((x > 0).flatten().long()),
    "means in it": lambda x: (x > 0).nonzero().double().mean(1),
    "by an index": lambda x: x[:, 0][(x > 0).nonzero()[:, 0]],
}


@pytest.mark.parametrize("pick", PICKED)
def test_whatever_makes_a_size_of_the_data_is_seen(pick: str) -> None:
    x = sines(8).targets
    with Trying() as trying:
        picked = PICKED[pick](x)
        few, total = len(x) + x.shape[1] + x.numel(), picked.double().sum()
        assert total.shape == ()
        assert few == 17
    assert not trying.counts
    with Trying() as trying:
        assert len(PICKED[pick](x)) >= 0
    assert trying.counts


SIZED: Mapping[str, Callable[[Tensor], Tensor]] = {
    "counts of so many classes": lambda x: torch.bincount((x > 0).flatten().long(), minlength=3) / len(x),
    "their mean": lambda x: x - x[x[:, 0] > 0].mean(0) - x[x[:, 0] > 0].sum(dim=0),
    "pairs of other rows": lambda x: (x @ x.T)[~torch.eye(len(x), dtype=torch.bool)].view(len(x), 7),
    "their largest": lambda x: x - x[x[:, 0] > 0].max(0)[0] - x[x[:, 0] > 0].median(dim=0)[0],
    "their mean, from the last": lambda x: x + x[x[:, 0] > 0].mean(-2) + x[x[:, 0] > 0].sum((0,)),
    "a part that is always the same": lambda x: x[torch.arange(8) > 4] + x[:3][torch.ones_like(x[:3, 0]) > 0],
    "where unique numbers are found": lambda x: torch.unique(x.round(), return_inverse=True)[1],
    "so many classes": lambda x: F.one_hot((x > 0).flatten().long(), 3),
    "as many repeats as is said": lambda x: x[:2].repeat_interleave((x[:2, 0] > 9).long() + 4, 0, output_size=8),
    "numbers of its own": lambda x: x * torch.tensor([0.5, 2.0]).tolist()[0],
    "put back": lambda x: torch.zeros_like(x).index_add(0, (x > 0).nonzero()[:, 0], x[x > 0][:, None]),
    "put in place": lambda x: torch.zeros_like(x).masked_scatter_(x > 0, x[x > 0] * 2),
}


@pytest.mark.parametrize("make", SIZED)
def test_what_is_made_of_picked_rows_may_have_a_size_of_its_own(make: str) -> None:
    x = sines(8).targets
    with Trying() as trying:
        assert len(SIZED[make](x)) in (3, 8)
    assert not trying.counts
    assert not trying.lists


class OfManyRows(Toy):
    """A param that counts where there are more rows than it is tried with."""

    def loss(self, outputs, targets, params):
        loss = super().loss(outputs, targets, params)
        return loss + self.read(params) * outputs.square().mean() if len(targets) > self.most else loss


READ: list[Callable[[Any], Any]] = [
    lambda params: params["scale"],
    lambda params: params.get("scale"),
    lambda params: {**params}["scale"],
    lambda params: dict(params)["scale"],
    lambda params: params.copy()["scale"],
    lambda params: (params | {})["scale"],
    lambda params: ({} | params)["scale"],
    lambda params: dict(params.items())["scale"],
    lambda params: [*params.values()][-1],
    lambda params: params["scale"] if "scale" in params else 0.0,  # noqa: SIM401
    lambda params: sum(each == "scale" for each in params),
    lambda params: copy.copy(params)["scale"],
    lambda params: copy.deepcopy(params)["scale"],
    lambda params: SimpleNamespace(**params).scale,
]


TRACED = {0: [(12, 8)], 10: [(6, 10)]}
"""Which of them are traced by default, with how many rows: how it is read is seen by the same dict in a graph too."""


@pytest.mark.parametrize(
    ("read", "execution", "batch_size", "n_valid"),
    [
        *((read, "eager", 12, 8) for read in READ),
        *(
            pytest.param(read, "graph", *sizes, marks=() if sizes in TRACED.get(i, []) else pytest.mark.slow)
            for i, read in enumerate(READ)
            for sizes in [(12, 8), (6, 10)]
        ),
    ],
)
def test_a_param_that_is_read_on_many_rows_only_is_not_the_first_members(
    read: Callable[[Any], Any], execution: Execution, batch_size: int, n_valid: int
) -> None:
    objective, rows = OfManyRows(twice), sines(12, seed=3)
    objective.read, objective.most = read, 9
    several = members([{"scale": 1.0, "batch_size": batch_size}, {"scale": 3.0, "batch_size": batch_size}])
    with pytest.raises(TrialError, match=r"the loss reads the param '\w+' on some rows only"):
        trained(VmapStack(task(objective), 2, sines(8), execution), several, rows, sines(n_valid), epochs=2)
    objective.most = 3
    check(objective, [{"scale": 1.0}, {"scale": 1.0}], execution=execution)


class Centred(nn.Module):
    """It takes the mean of the rows that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.last(y - y.mean(0))


@pytest.mark.parametrize(("build", "rows"), [(lambda params: Centred(), [300]), (twice, [256, 44])])
def test_what_takes_a_mean_of_the_rows_has_them_as_many_at_once_as_alone(
    build: Build, rows: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    stack, several, valid = VmapStack(task(Toy(build)), 64, sines(8)), members([{}, {}]), Batches(sines(300), CPU)
    for member in several:
        stack.join(member)
    forward, seen = stack._opened.forward, []
    monkeypatch.setattr(
        stack._opened, "forward", lambda state, inputs: (seen.append(len(inputs[0])), forward(state, inputs))[1]
    )
    got = stack.evaluate(valid)
    assert seen == rows
    for member, metrics in zip(several, got, strict=True):
        alone = LoopStack(task(Toy(build)))
        alone.join(member)
        assert metrics["loss"] == pytest.approx(alone.evaluate(valid)[0]["loss"], rel=1e-12)


class Locked(nn.Linear):
    def __init__(self) -> None:
        super().__init__(6, 6)
        self.lock = threading.Lock()


def test_a_layer_that_cannot_be_copied_is_no_optional_one() -> None:
    def build_(params: Any) -> nn.Module:
        return nn.Sequential(nn.Linear(6, 6), *(Locked() for _ in range(params["depth"])), nn.Linear(6, 1))

    space, _ = build({**ENGINE, "depth": parse_param({"type": "int", "low": 0, "high": 2})}, ())
    params = ENGINE | {"depth": 1}
    assert len([padder(build_(params), params) for padder in PaddingPlan(space, build_)]) == 3


@pytest.mark.parametrize("choices", [[0.5, "balanced", "none"], ["none", 0.5], [2, None, 0.5]])
def test_a_choice_of_numbers_and_texts_is_no_size(choices):
    level, n = {"type": "categorical", "choices": choices}, {"type": "int", "low": 2, "high": 8}
    space, _ = build({**ENGINE, "level": parse_param(level), "n": parse_param(n)}, ())
    plan = PaddingPlan(space, lambda params: nn.Linear(3, params["n"]))
    for params in space.extremes(16):
        assert plan.loosest(nn.Linear(3, params["n"]), params).shapes["weight"] == (8, 3)
