"""What is padded to a common structure has in a stack the outputs and names that it has alone; else it is refused."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from hpo.stacks.alone import NotStackable
from hpo.stacks.structure import PaddedModule, common_structure
from hpo.stacks.tensor_modules import Gated, RateDropout, SelectOne, masks_of_a_step, with_masks_of
from hpo.stacks.vmap_stack import VmapStack
from hpo.stacks.vmap_step import Execution
from hpo.study.blocks import MLP
from hpo.study.data import Split
from hpo.training.batches import Batches
from hpo.training.loop_stack import LoopStack
from hpo.training.stack import Member, Stack, Task
from tests.stacking import CPU, INFO, Built

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "sigmoid": nn.Sigmoid,  # not 0 at 0: what is padded would leak if it were not masked
    "leaky": lambda: nn.LeakyReLU(0.2),
    "leakier": lambda: nn.LeakyReLU(0.4),
}
HIGHEST = {"depth": 3, "width": 20, "activation": "relu", "rate": 0.5}
EXTREMES = [
    HIGHEST,
    {"depth": 0, "width": 4, "activation": "leaky", "rate": 0.0},
    HIGHEST | {"depth": 0},
    HIGHEST | {"width": 4},
    *(HIGHEST | {"activation": name} for name in ACTIVATIONS),
]


def numbered(params: Any) -> nn.Module:
    """Layers by number: the last one's number says how many there are."""
    layers: list[nn.Module] = [nn.Linear(5, params["width"]), nn.BatchNorm1d(params["width"])]
    for _ in range(params["depth"]):
        hidden = nn.Linear(params["width"], params["width"])
        layers += [hidden, ACTIVATIONS[params["activation"]](), nn.Dropout(params["rate"])]
    return nn.Sequential(*layers, nn.Linear(params["width"], 1))


def named(params: Any) -> nn.Module:
    """Layers by name, inside of another module: hidden1, relu1, dropout1, ..., output."""
    return MLP(5, [params["width"]] * (params["depth"] + 1), 1, dropout=params["rate"])


class Residual(nn.Module):
    """Two towers, one of them added to what it gets; an embedding of the first layer's outputs in between."""

    def __init__(self, params: Any) -> None:
        super().__init__()
        self.first = nn.Linear(5, params["width"])
        self.tower, self.head = numbered(params)[2:-1], nn.Sequential(nn.Linear(params["width"], 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        return self.head(x + self.tower(x))


BUILDERS = {"numbered": numbered, "named": named, "residual": Residual}


class Output(Built):
    """The loss of one row is its output, so that `evaluate` gives it."""

    def loss(self, outputs, targets, params):
        return (outputs * targets).mean()


def rows(n: int, seed: int = 0) -> Split:
    x = torch.randn(n, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return Split(inputs={"x": x}, targets=torch.ones(n, 1, dtype=torch.float64))


def task(build: Callable[[Any], nn.Module]) -> Task:
    return Task(objective=Output(build), info=INFO, device=CPU, n_rows=12, epochs=2)


def stack(
    build: Callable[[Any], nn.Module],
    capacity: int = 3,
    extremes: Sequence[Any] = EXTREMES,
    execution: Execution = "eager",
) -> VmapStack:
    """Return a stack of the common structure of these extremes, the first of which is the largest."""
    structure = common_structure([build(params).double() for params in extremes])
    shapes = structure.shapes_of(build(extremes[0]).double())
    return VmapStack(task(build), capacity, rows(8), execution, lambda module, params: structure.pad(module, shapes))


def members(several: Sequence[Any]) -> list[Member]:
    engine = {"optimizer": "sgd", "learning_rate": 0.1, "momentum": 0.5, "batch_size": 6}
    return [Member(number=n, seed=n, params=engine | params) for n, params in enumerate(several)]


def outputs(made: Stack, n: int = 4) -> list[list[float]]:
    """Return what each member's network gives for `n` rows that it has not seen, in evaluation mode."""
    data = rows(n, seed=9)
    both = [Batches(Split(inputs={"x": data.inputs["x"][i : i + 1]}, targets=data.targets[:1]), CPU) for i in range(n)]
    results = [made.evaluate(feed) for feed in both]
    return [[result[k]["loss"] for result in results] for k in range(len(made.members))]


@torch.no_grad()
def plain_outputs(network: nn.Module, n: int = 4) -> list[float]:
    return network.eval()(rows(n, seed=9).inputs["x"])[:, 0].tolist()


PARAMS = st.fixed_dictionaries(
    {
        "depth": st.integers(0, 3),
        "width": st.integers(4, 20),
        "activation": st.sampled_from(list(ACTIVATIONS)),
        "rate": st.floats(0, 1),
    }
)


@settings(max_examples=10, deadline=None, phases=[Phase.explicit, Phase.generate])  # to shrink takes half a minute
@given(build=st.sampled_from(list(BUILDERS.values())), several=st.lists(PARAMS, min_size=1, max_size=3))
def test_any_mixture_has_the_outputs_and_the_names_of_the_plain_networks(build: Any, several: list[Any]) -> None:
    """Of depths, widths, activations and rates; before a step, and after some, where all of them have moved."""
    made, everyone = stack(build, capacity=len(several)), members(several)
    for member in everyone:
        made.join(member)
    plain = [task(build).build(member) for member in everyone]
    for network, got in zip(plain, outputs(made), strict=True):
        assert got == pytest.approx(plain_outputs(network), abs=1e-9)
    for seed in range(3):
        batch = rows(6, seed=seed)
        made.step(list(batch.inputs.values()), batch.targets)
    for network, member, got in zip(plain, everyone, outputs(made), strict=True):
        before, state = network.state_dict(), made.state(member)
        assert {name: x.shape for name, x in state.items()} == {name: x.shape for name, x in before.items()}
        assert any(not torch.equal(x, before[name]) for name, x in state.items())
        network.load_state_dict(state, strict=True)
        assert got == pytest.approx(plain_outputs(network), abs=1e-9)
        assert plain_outputs(made.module(member)) == plain_outputs(network)


@pytest.mark.parametrize(
    "build",
    [pytest.param(build, id=id, marks=() if id == "residual" else pytest.mark.slow) for id, build in BUILDERS.items()],
)
def test_each_extreme_fits_its_own_frame(build: Any) -> None:
    made = stack(build, capacity=len(EXTREMES), execution="graph")
    for member in members(EXTREMES):
        made.join(member)
    for params, member, got in zip(EXTREMES, made.members, outputs(made), strict=True):
        assert got == pytest.approx(plain_outputs(task(build).build(member)), abs=1e-9), params


def test_names_say_where_a_network_stands_in_its_frame() -> None:
    structure = common_structure([numbered(params) for params in EXTREMES])
    names = structure.pad(numbered(HIGHEST | {"depth": 1})).names
    assert names["2.weight"] == "2.weight"  # the first of three hidden layers
    assert names["5.weight"] == "11.weight"  # the last layer
    assert set(names) == set(numbered(HIGHEST | {"depth": 1}).state_dict())


def test_without_a_frame_only_dropout_rates_may_differ() -> None:
    made = VmapStack(task(named), 3, rows(8))
    same, other_rate, other_width = members([HIGHEST, HIGHEST | {"rate": 0.1}, HIGHEST | {"width": 8}])
    made.join(same)
    made.join(other_rate)
    with pytest.raises(NotStackable, match="its structure is not that of the stack"):
        made.join(other_width)


def layers(*parts: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6), *parts, nn.Linear(6, 1))


class Mean(nn.Module):
    """Subtracts the mean over the width, of which what is padded would be a part. Its last layer may begin at 0."""

    def __init__(self, width: int, zeros: bool = False) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, width), nn.Linear(width, 1)
        if zeros:
            nn.init.zeros_(self.last.weight)
            nn.init.zeros_(self.last.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.sigmoid(self.first(x))
        return self.last(x - x.mean(1, keepdim=True))


def softmax(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(5, width), nn.Softmax(1), nn.Linear(width, 1))


def norm(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(5, width), nn.LayerNorm(width), nn.ReLU(), nn.Linear(width, 1))


def shared(depth: int) -> nn.Module:
    """One activation for all layers, which a list of a module's children names only once."""
    activation = nn.Tanh()
    return layers(*(part for _ in range(depth) for part in (nn.Linear(6, 6), activation)))


Build = Callable[[], nn.Module]
UNFIT: dict[str, tuple[Build, Build]] = {
    "an optional layer changes the shape": (lambda: layers(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 6)), layers),
    "layers are left out in two places": (
        lambda: layers(nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 6), nn.LayerNorm(6)),
        lambda: layers(nn.ReLU()),
    ),
    "another kind of layer": (lambda: layers(nn.BatchNorm1d(6)), lambda: layers(nn.LayerNorm(6))),
    "a normalization of varied width": (lambda: norm(20), lambda: norm(6)),
    "a softmax over what is padded": (lambda: softmax(20), lambda: softmax(6)),
    "a mean over what is padded": (lambda: Mean(20), lambda: Mean(6)),
    "a mean over what is padded, before a layer of zeros": (lambda: Mean(20, True), lambda: Mean(6, True)),
    "an activation that is used twice": (lambda: shared(3), lambda: shared(1)),
    "activations in place": (
        lambda: layers(nn.Linear(6, 6), nn.ReLU(True), nn.Linear(6, 6), nn.ReLU(True)),
        lambda: layers(nn.Linear(6, 6), nn.Tanh()),
    ),
    "a number in no tensor": (lambda: layers(nn.Softplus(1.0)), lambda: layers(nn.Softplus(3.0), nn.ELU())),
    "a pooling": (
        lambda: nn.Sequential(nn.Unflatten(1, (1, 5)), nn.MaxPool1d(2), nn.Flatten(), nn.Linear(2, 1)),
        lambda: nn.Sequential(nn.Unflatten(1, (1, 5)), nn.MaxPool1d(3), nn.Flatten(), nn.Linear(1, 1)),
    ),
}


@pytest.mark.parametrize("networks", UNFIT.values(), ids=UNFIT)
@pytest.mark.parametrize("first", [0, 1], ids=["largest first", "smallest first"])
def test_what_does_not_fit_is_refused_and_never_another_network(networks: tuple[Build, Build], first: int) -> None:
    """Those that join have, before and after some steps, the outputs that they have alone."""

    def build(params: Any) -> nn.Module:
        return networks[params["which"]]()

    made, joined = stack(build, 2, [{"which": 0}, {"which": 1}]), []
    for member in members([{"which": first}, {"which": 1 - first}]):
        with contextlib.suppress(NotStackable):
            made.join(member)
            joined.append(member)
    alone = LoopStack(task(build), 2)
    for member in joined:
        alone.join(member)
    for seed in range(4 if joined else 0):
        assert torch.tensor(outputs(made)).allclose(torch.tensor(outputs(alone)), rtol=0, atol=1e-9)
        batch = rows(6, seed=seed)
        for each in (made, alone):
            each.step(list(batch.inputs.values()), batch.targets)


class Tied(nn.Module):
    """One weight under two names, and a buffer that is no part of its state."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode, self.output = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 1)
        self.decode.weight = self.encode.weight
        self.register_buffer("scale", torch.tensor(2.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(torch.tanh(self.decode(torch.tanh(self.encode(x))))) * self.scale


def test_a_tied_weight_and_a_buffer_that_is_not_kept_come_back_as_the_network_has_them() -> None:
    made = VmapStack(task(lambda params: Tied()), 2, rows(8))
    (member,) = members([{}])
    made.join(member)
    assert outputs(made)[0] == pytest.approx(plain_outputs(task(lambda params: Tied()).build(member)), abs=1e-9)
    network = task(lambda params: Tied()).build(member)
    assert made.state(member).keys() == network.state_dict().keys()
    network.load_state_dict(made.state(member), strict=True)


def test_a_gated_sequence_is_the_shorter_sequence() -> None:
    torch.manual_seed(0)
    parts = [nn.Linear(5, 6), *(nn.Linear(6, 6) for _ in range(3)), nn.Linear(6, 1)]
    x = torch.randn(7, 5)
    for used in range(4):
        gated = Gated({str(n): part for n, part in enumerate(parts)}, 1, 4, used)
        assert torch.equal(gated(x), nn.Sequential(parts[0], *parts[1 : 1 + used], parts[4])(x))


def test_a_choice_is_what_is_chosen_and_members_choose_for_themselves() -> None:
    options, x = [nn.ReLU(), nn.Tanh(), nn.Identity()], torch.randn(4, 5)
    choice = SelectOne(options, 0)
    call = lambda chosen: torch.func.functional_call(choice, {"chosen": chosen}, (x,))  # noqa: E731
    for got, option in zip(torch.func.vmap(call)(torch.tensor([0, 1, 2])), options, strict=True):
        assert torch.equal(got, option(x))


@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
def test_a_rate_of_dropout_is_a_tensor(rate: float) -> None:
    torch.manual_seed(0)
    x = torch.ones(100_000, requires_grad=True)
    out = RateDropout(rate)(x)
    assert out.eq(0).double().mean().item() == pytest.approx(rate, abs=0.01)
    out.sum().backward()
    assert torch.isfinite(x.grad).all()
    assert out.sum().item() == pytest.approx(0 if rate == 1 else 100_000, rel=0.01)


def test_dropout_that_no_network_of_the_study_does_draws_nothing() -> None:
    never = [each | {"rate": 0.0} for each in EXTREMES]
    structure = common_structure([numbered(params) for params in never])
    shapes = structure.shapes_of(numbered(never[0]))

    def padded(**params: Any) -> PaddedModule:
        return structure.pad(numbered(never[0] | params), shapes)

    deep, shallow, dropping = padded(), padded(depth=1), padded(rate=0.3)
    assert deep.signature == shallow.signature != dropping.signature
    x = torch.randn(6, 20)
    for each, idle in ((deep, True), (shallow, True), (dropping, False)):
        dropouts = [layer for layer in each.module.modules() if isinstance(layer, RateDropout)]
        assert len(dropouts) == 3
        with masks_of_a_step():
            assert all((layer.train()(x) is x) == idle for layer in dropouts)
    several = members([never[0], never[1], never[3]])
    made, alone = stack(numbered, 3, never, "graph"), LoopStack(task(lambda params: numbered(params).double()), 3)
    for member in several:
        made.join(member)
        alone.join(replace(member))
    data = rows(6, seed=2)
    for _ in range(3):
        losses = [each.step(list(data.inputs.values()), data.targets) for each in (made, alone)]
        torch.testing.assert_close(*losses, rtol=1e-12, atol=1e-12)


def _drawn(
    seed: int, step: int, shape: tuple[int, ...], rate: float = 0.5, index: int = 0, calls: int = 1
) -> torch.Tensor:
    dropout = with_masks_of(RateDropout(rate, index), seed)
    dropout.get_buffer("step").fill_(step)
    with masks_of_a_step():
        out = [dropout(torch.ones(shape)) for _ in range(calls)]
    return out[-1] > 0


def test_the_masks_of_dropout_are_a_members_own() -> None:
    mask = _drawn(3, 5, (64, 32))
    assert torch.equal(mask, _drawn(3, 5, (64, 32)))
    assert torch.equal(mask, _drawn(3, 5, (80, 40))[:64, :32])  # padded further, and in a larger batch
    others = [_drawn(4, 5, (64, 32)), _drawn(3, 6, (64, 32)), _drawn(3, 5, (64, 32), index=1)]
    others += [_drawn(3, 5, (64, 32), calls=2)]  # one module that is used twice
    for other in others:
        assert 0.4 < (mask == other).double().mean() < 0.6


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.3, 1 / 3, 0.5, 0.9, 1 - 2**-24, 1.0])
def test_the_masks_of_dropout_are_drawn_without_float64_which_apples_gpus_lack(rate: float) -> None:
    class Refusing(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dtype == torch.float64:
                raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
            return out

    dropout = with_masks_of(RateDropout(rate), 3)
    dropout.get_buffer("step").fill_(2**20 + 7)
    x = torch.ones(500, 40)
    with masks_of_a_step(), Refusing():
        several = [dropout(x) > 0 for _ in range(2)]
    below = ((1 - dropout.rate).double() * 2**32).long()
    for call, kept in enumerate(several):  # as stored studies have them
        assert torch.equal(kept, _drawn_in_int64(dropout, x, call) < below)


def _drawn_in_int64(dropout: RateDropout, x: Tensor, call: int) -> Tensor:
    """Return 32 bits for each element of `x`, by Mueller's integer hash as it is written."""

    def rounds(number: Tensor) -> Tensor:
        number = number & 0xFFFFFFFF
        for _ in range(2):
            number = (((number >> 16) ^ number) * 73244475) & 0xFFFFFFFF
        return number

    def mixed(number: Tensor) -> Tensor:
        return (rounds(number) >> 16) ^ rounds(number)

    number = mixed(mixed(dropout.key + dropout.step * 1640531527) + call * 1097514319)
    rows = mixed(number + torch.arange(x.shape[0]) * 668265263)
    return rounds(rows[:, None] + torch.arange(x.shape[1]) * 374761393)


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_the_masks_of_dropout_are_as_if_drawn(rate: float) -> None:
    """Means, and products of neighbours, over rows, columns, steps, members and corners of rectangles are what
    independent draws have, within 5 standard deviations."""
    kept = torch.stack([_drawn(seed, step, (48, 40), rate) for seed in range(6) for step in range(12)]).double()
    keep, spread = 1 - rate, rate * (1 - rate)
    if spread == 0:
        assert kept.eq(keep).all()
        return
    off = (kept - keep) / spread**0.5
    pairs = [off[:, 1:] * off[:, :-1], off[:, :, 1:] * off[:, :, :-1], off[1:] * off[:-1], off[12:] * off[:-12]]
    corners = [off[:, 1:, 1:] * off[:, 1:, :-1] * off[:, :-1, 1:] * off[:, :-1, :-1]]
    corners += [off[:, :24, :20] * off[:, :24, 20:] * off[:, 24:, :20] * off[:, 24:, 20:]]
    for each in (off, *pairs, *corners):
        assert abs(each.mean().item()) * each.numel() ** 0.5 < 5 * each.std().item()
