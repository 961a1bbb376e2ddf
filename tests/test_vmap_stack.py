"""VmapStack against LoopStack, the reference, over the architectures that must stack: float64, equal to 1e-9."""

import logging
import math
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map
from torchmetrics.regression import MeanSquaredError

from hpo.stacks import vmap_step
from hpo.stacks.alone import NotStackable
from hpo.stacks.graph import CompiledStep, Graph
from hpo.stacks.padding import Padder, unpadded
from hpo.stacks.recording import in_place
from hpo.stacks.structure import common_structure
from hpo.stacks.tensor_modules import RateDropout, masks_of_a_step
from hpo.stacks.vmap_stack import VmapStack
from hpo.stacks.vmap_step import Execution, has_compiler
from hpo.study.data import Split
from hpo.study.losses import cross_entropy
from hpo.study.objective import Objective
from hpo.training import schedules, stacked_optim
from hpo.training.loop_stack import LoopStack
from hpo.training.stack import Member, Stack, Task
from tests.stacking import CPU, INFO, Toy, assert_same_curves, assert_same_weights, trained

needs_compiler = pytest.mark.skipif(
    not has_compiler(CPU), reason="torch compiles for a CPU with a C++ compiler, and there is no `c++` on the PATH"
)
N_ROWS, BATCH_SIZE, N_EPOCHS = 40, 12, 3  # 40 = 3 * 12 + 4: the last batch is smaller


class Wide(nn.Module):
    """Wide and deep: two inputs, the deep one's hidden layer beside the wide one in the last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.deep, self.output = nn.Linear(8, 5), nn.Linear(8 + 5, 1)

    def forward(self, wide: Tensor, deep: Tensor) -> Tensor:
        return self.output(torch.cat([wide, torch.relu(self.deep(deep))], 1))


class Sequence_(nn.Module):
    """The last output of an LSTM over the features: torch.func has no rule for it."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.output = nn.LSTM(1, 4, batch_first=True), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.lstm(x.unsqueeze(-1))[0][:, -1])


class Branch(nn.Module):
    """Its forward branches on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 1), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) if x.sum() > 0 else self.b(x)


class Scaled(nn.Module):
    """Holds a plain number of its own: members with another one must not share a stack."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor, self.output = factor, nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * self.output(x)


def mlp(params: Any) -> nn.Module:
    return nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 1))


ARCHITECTURES: dict[str, Callable[[Any], nn.Module]] = {
    "two_layers": lambda p: nn.Sequential(nn.Linear(8, 3), nn.Tanh(), nn.Linear(3, 1)),
    "mlp": mlp,
    "wide_and_deep": lambda p: Wide(),
    "conv_batchnorm": lambda p: nn.Sequential(
        nn.Unflatten(1, (1, 8)),
        nn.Conv1d(1, 3, 3, bias=False),
        nn.BatchNorm1d(3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(18, 1),
    ),
    "layernorm": lambda p: nn.Sequential(nn.Linear(8, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 1)),
    "dropout_0": lambda p: nn.Sequential(nn.Linear(8, 6), nn.Dropout(0.0), nn.ReLU(), nn.Linear(6, 1)),
    "lstm": lambda p: Sequence_(),
    "branch": lambda p: Branch(),
    "scaled": lambda p: Scaled(p["factor"]),
    "dropout": lambda p: nn.Sequential(nn.Linear(8, 64), nn.Dropout(p["rate"]), nn.Linear(64, 1)),
}
STACKS = ("mlp", "wide_and_deep", "conv_batchnorm", "layernorm", "dropout_0")


class Regression(Toy):
    """Any of the architectures on one small regression, in double precision."""

    def build(self, params, info):
        return ARCHITECTURES[params["architecture"]](params).double()

    def metrics(self):
        return {"rmse": MeanSquaredError(squared=False).set_dtype(torch.float64)}


def split(architecture: str, n_rows: int = N_ROWS, seed: int = 0) -> Split:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n_rows, 8, generator=generator, dtype=torch.float64)
    inputs = {"wide": x, "deep": x.flip(1)} if architecture == "wide_and_deep" else {"x": x}
    return Split(inputs=inputs, targets=x.sum(1, keepdim=True) + x[:, :1] ** 2)


def members(architecture: str, n: int = 4, **params: Any) -> list[Member]:
    base = {"architecture": architecture, "optimizer": "adam", "batch_size": BATCH_SIZE}
    return [Member(number=i, seed=i, params=base | {"learning_rate": 0.003 * (i + 1)} | params) for i in range(n)]


def task(objective: Objective | None = None, **keys: Any) -> Task:
    return Task(objective=objective or Regression(), info=INFO, device=CPU, n_rows=N_ROWS, epochs=N_EPOCHS, **keys)


def stack(architecture: str, capacity: int = 4, execution: Execution = "eager", padder: Padder = unpadded) -> VmapStack:
    return VmapStack(task(), capacity, split(architecture, 8), execution, padder)


def loop(capacity: int = 1, objective: Objective | None = None) -> LoopStack:
    return LoopStack(task(objective), capacity)


def fit(
    stack: Stack, everyone: Sequence[Member], architecture: str, stops: dict[int, int] | None = None
) -> dict[int, dict[str, Tensor]]:
    """Train `everyone`, each member up to `stops[number]` epochs; return the last weights by number."""
    rows, valid = split(architecture), split(architecture, 30, seed=1)
    return trained(stack, everyone, rows, valid, epochs=N_EPOCHS, stops=stops)


def assert_equal(got: Sequence[Member], expected: Sequence[Member], got_weights: dict, expected_weights: dict) -> None:
    assert_same_curves(got, expected)
    assert_same_weights(got_weights, expected_weights, [member.number for member in got])


@pytest.mark.parametrize(
    ("optimizer", "execution", "architecture"),
    [
        pytest.param(optimizer, execution, architecture, marks=marks)
        for optimizer, execution, marks in [
            ("adam", "graph", ()),
            ("sgd", "eager", ()),
            ("adam", "eager", pytest.mark.slow),
            ("sgd", "graph", pytest.mark.slow),
        ]
        for architecture in STACKS
    ],
)
def test_members_have_the_curves_they_would_have_alone(architecture: str, execution: Execution, optimizer: str) -> None:
    params = {"momentum": 0.9, "weight_decay": 0.01} if optimizer == "sgd" else {"weight_decay": 0.01}
    got, expected = (members(architecture, optimizer=optimizer, **params) for _ in range(2))
    got_weights = fit(stack(architecture, execution=execution), got, architecture)
    alone = {}
    for member in expected:
        alone |= fit(loop(), [member], architecture)
    assert_equal(got, expected, got_weights, alone)


def count_compiled(monkeypatch: pytest.MonkeyPatch) -> list[Graph]:
    """Return a list to which each graph is added that is compiled from now on."""
    compiled, real = [], Graph.compiled

    def compile_it(self: Graph, *batch: Any) -> Any:
        compiled.append(self)
        return real(self, *batch)

    monkeypatch.setattr(Graph, "compiled", compile_it)
    return compiled


@needs_compiler
def test_a_small_compiled_step_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fast one of those below: two layers, two members."""
    compiled = count_compiled(monkeypatch)
    got, expected = (members("two_layers", 2, optimizer="sgd") for _ in range(2))
    made = stack("two_layers", 2, "compiled")
    got_weights = fit(made, got, "two_layers")
    assert len(compiled) == 1  # the epoch's last, smaller batch has the same one
    assert made.is_compiled(2)
    assert made.path == "compiled"
    assert_equal(got, expected, got_weights, fit(loop(2), expected, "two_layers"))


@needs_compiler
def test_compiled_dropout_draws_the_same_masks() -> None:
    """Their numbers wrap around, and of one number for each member Inductor makes products with a rounded factor."""
    dropout, keys, steps = RateDropout(0.4).train(), torch.arange(3) * 2**60 + 11, torch.arange(3) * 2**40 + 5
    x = torch.ones(3, 6, 21)

    def dropped(x: Tensor, key: Tensor, step: Tensor) -> Tensor:
        with masks_of_a_step():
            return functional_call(dropout, {"key": key, "step": step}, (x,))

    captured = make_fx(vmap(dropped))(x, keys, steps)
    expected = vmap(dropped)(x, keys, steps)
    assert 0.3 < (expected == 0).double().mean() < 0.5
    torch.testing.assert_close(torch.compile(captured)(x, keys, steps), expected)


@needs_compiler
def test_a_step_is_compiled_once_for_all_numbers_of_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stack loses members and slots, and wins some: its losses are those of one that is not compiled."""
    compiled = count_compiled(monkeypatch)
    made, reference = stack("two_layers", 5, "compiled"), stack("two_layers", 5)
    everyone = members("two_layers", 8)
    for member in everyone[:5]:
        made.join(member)
        reference.join(member)
    rows = split("two_layers")
    x, y = list(rows.inputs.values()), rows.targets
    for leaving, joining in ((0, 0), (2, 0), (1, 0), (0, 3)):
        for each in (made, reference):
            for member in list(each.members)[:leaving]:
                each.leave(member)
            each.resize(len(each.members) + joining)
            for member in everyone[5 : 5 + joining]:
                each.join(member)
        for n in (BATCH_SIZE, 5):
            expected = reference.step([x[0][:n]], y[:n])
            torch.testing.assert_close(made.step([x[0][:n]], y[:n]), expected, rtol=0, atol=1e-12)
        assert made.path == "compiled"
    assert made.capacity == len(made.members) == 5
    assert len(compiled) == 1
    assert made.is_compiled(7)
    assert not made.is_compiled(1)  # one slot is broadcast


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("optimizer", stacked_optim.STATE)
def test_what_is_compiled_once_is_the_step_of_every_size(optimizer: str) -> None:
    made = stack("mlp", 4, "compiled")
    for member in members("mlp", 4, optimizer=optimizer, schedule="cosine", max_grad_norm=0.5, weight_decay=0.01):
        made.join(member)
    rows = split("mlp")
    x, y = rows.inputs["x"], rows.targets
    made.step([x[:BATCH_SIZE]], y[:BATCH_SIZE])
    (compiled,) = made._opened._compiled.values()
    for slots in ([3, 1], [0, 0, 2], [*range(4)] * 4, [*range(4)] * 17):
        state = tree_map(lambda rows, slots=slots: rows[slots].clone(), made._slots.state)
        for n in (2, 5, BATCH_SIZE, N_ROWS):
            assert compiled.fits(len(slots), n)
            got, expected = (run(state, [x[:n]], y[:n]) for run in (compiled, made._opened.eager))
            for one, other in zip(tree_leaves(got), tree_leaves(expected), strict=True):
                torch.testing.assert_close(one, other, rtol=0, atol=1e-9)
    assert compiled._n_forms == 1


@pytest.mark.parametrize(
    ("optimizer", "schedule", "clips"),
    [
        pytest.param(optimizer, schedule, clips, marks=() if (i - j) % 5 == 0 and k == i % 2 else pytest.mark.slow)
        for i, optimizer in enumerate(stacked_optim.STATE)
        for j, schedule in enumerate([None, *schedules.NAMES])
        for k, clips in enumerate([{}, {"max_grad_norm": 0.5}])
    ],
)
def test_a_step_is_traced_once_for_all_sizes(optimizer: str, schedule: str | None, clips: dict[str, float]) -> None:
    """Nothing of ours asks for the number of slots or of rows: a condition on it would be kept in the graph."""
    params = {"optimizer": optimizer, **clips, **({} if schedule is None else {"schedule": schedule})}
    made = stack("mlp", 3, "graph")
    for member in members("mlp", 3, **params):
        made.join(member)
    (graph,) = made._opened._graphs  # of the rows that a stack is tried on
    assert all(graph.fits(*sizes) for sizes in ((2, 2), (3, BATCH_SIZE), (64, 64), (100, 7)))
    assert not graph.fits(1, 5)
    assert not graph.fits(5, 1)


def test_what_a_loss_keeps_for_itself_is_no_stand_in_after_tracing() -> None:
    @cache
    def weights(n: int) -> Tensor:
        return torch.linspace(1, 2, n, dtype=torch.float64)

    class Weighted(Regression):
        def loss(self, outputs, targets, params):
            return ((outputs - targets) ** 2).mean() * weights(8)[3]

    made = VmapStack(task(Weighted()), 2, split("mlp", 8), "graph")
    for member in members("mlp", 2):
        made.join(member)
    weights.cache_clear()
    rows = split("mlp", 8)
    graph = Graph(made._opened.eager, made._slots.state, [rows.inputs["x"]], rows.targets, any_size=True)
    assert graph.is_general
    assert type(weights(8)) is Tensor


def test_a_loss_that_asks_for_the_number_of_rows_is_traced_for_each() -> None:
    class Rows(Regression):
        def loss(self, outputs, targets, params):
            return super().loss(outputs, targets, params) * (2 if len(targets) > 10 else 1)

    def losses(execution: Execution) -> list[Tensor]:
        made = VmapStack(task(Rows()), 2, split("mlp", 8), execution)
        for member in members("mlp", 2):
            made.join(member)
        rows = split("mlp")
        return [made.step([rows.inputs["x"][:n]], rows.targets[:n]) for n in (16, 5, 16)]

    torch.testing.assert_close(losses("graph"), losses("eager"), rtol=0, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", STACKS)
def test_the_compiled_step_is_the_same(architecture: str) -> None:
    got, expected = members(architecture), members(architecture)
    got_weights = fit(stack(architecture, execution="compiled"), got, architecture)
    assert_equal(got, expected, got_weights, fit(loop(4), expected, architecture))


def test_a_slot_that_is_left_is_taken_by_the_next_member() -> None:
    """Two slots for five members, the second of which leaves after one epoch: rounds are shared, members are not."""
    stops = {1: 1, 3: 2}
    got, expected = members("mlp", 5), members("mlp", 5)
    got_weights = fit(stack("mlp", 2), got, "mlp", stops)
    assert_equal(got, expected, got_weights, fit(loop(2), expected, "mlp", stops))


def test_nan_in_one_member_touches_no_other() -> None:
    got, expected = members("mlp"), members("mlp")
    got[1] = Member(number=1, seed=1, params=got[1].params | {"learning_rate": 1e200, "optimizer": "adam"})
    got_weights = fit(stack("mlp"), got, "mlp")
    weights = fit(loop(4), expected, "mlp")
    assert not math.isfinite(got[1].history[-1]["train_loss"])
    del got[1], expected[1]
    assert_equal(got, expected, got_weights, weights)


@pytest.mark.parametrize(
    ("architecture", "reason"),
    [
        ("lstm", "torch.func cannot batch it"),
        ("branch", "torch.func cannot batch it"),
    ],
)
def test_what_cannot_be_stacked_says_why(architecture: str, reason: str) -> None:
    made = stack(architecture, execution="graph")
    with pytest.raises(NotStackable, match=reason):
        made.join(members(architecture)[0])
    assert made.members == []


def test_what_cannot_be_evaluated_in_a_stack_is_not_traced_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vmap_step, "Graph", lambda *what, **more: pytest.fail("it was traced"))  # which takes seconds
    with pytest.raises(NotStackable, match="cannot batch it"):
        stack("lstm", execution="graph").join(members("lstm")[0])


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_states_tensors_are_in_the_order_in_which_they_were_traced(optimizer: str) -> None:
    made = stack("conv_batchnorm")
    made.join(members("conv_batchnorm", optimizer=optimizer, max_grad_norm=1.0)[0])
    state = made._slots.state
    leaves, trained = state.leaves(), tree_leaves(state.trained)
    assert all(own is of_torch for own, of_torch in zip(leaves, tree_leaves(state), strict=True))
    again = state.trained.filled(iter([x + 1 for x in trained]))
    assert all(torch.equal(new, x + 1) for new, x in zip(tree_leaves(again), trained, strict=True))


def test_what_torch_cannot_trace_it_does_not_print(caplog: pytest.LogCaptureFixture) -> None:
    made = stack("mlp")
    made.join(members("mlp")[0])

    def run(state: Any, inputs: Any, targets: Any) -> Any:
        return torch.bmm(inputs[0].expand(2, -1, 3), torch.ones(2, 4, 3))  # 3 and 4: a padded LSTM has such

    caplog.set_level(logging.WARNING)
    with pytest.raises(RuntimeError, match="batch2"):
        Graph(run, made._slots.state, [torch.ones(1, 6, 1)], torch.ones(1), any_size=True)
    assert "Traceback" not in caplog.text


def test_an_optimizer_without_a_stacked_form_says_so() -> None:
    with pytest.raises(
        NotStackable, match="optimizer adadelta has no stacked form; sgd, adam, adamw, rmsprop, adagrad have"
    ):
        stack("mlp").join(members("mlp", optimizer="adadelta")[0])
    with pytest.raises(NotStackable, match="Nesterov momentum requires a momentum"):  # which it is told alone too
        stack("mlp").join(members("mlp", optimizer="sgd", nesterov=True, momentum=0.0)[0])
    with pytest.raises(NotStackable, match="adam with amsgrad has no stacked form"):
        stack("mlp").join(members("mlp", amsgrad=True)[0])
    made = stack("mlp")
    made.join(members("mlp", amsgrad=False)[0])
    assert len(made.members) == 1


@pytest.mark.parametrize(
    "other",
    [{"optimizer": "sgd"}, {"batch_size": 5}, {"architecture": "dropout_0"}, {"architecture": "scaled", "factor": 3.0}],
)
def test_a_member_of_another_structure_is_refused(other: dict[str, Any]) -> None:
    made = stack("scaled")
    first, second = members("scaled", 2, factor=2.0)
    made.join(first)
    stranger = Member(number=9, seed=9, params=second.params | other)
    with pytest.raises(NotStackable, match="its structure is not that of the stack"):
        made.join(stranger)
    made.join(second)
    assert made.members == [first, second]


def test_members_with_dropout_rates_of_their_own() -> None:
    """In distribution: over many draws the mean output is that without dropout, the share of zeros is the rate."""
    rates = [0.0, 0.25, 0.5]
    made = stack("dropout", 3)
    for member, rate in zip(members("dropout", 3), rates, strict=True):
        made.join(Member(number=member.number, seed=0, params=member.params | {"rate": rate}))
    torch.manual_seed(0)
    for rate in rates:
        dropout = RateDropout(rate)
        x = torch.ones(200_000, dtype=torch.float64)
        out = dropout(x)
        assert out.mean().item() == pytest.approx(1.0, abs=0.01)
        assert (out == 0).double().mean().item() == pytest.approx(rate, abs=0.01)
        assert dropout.eval()(x).equal(x)
    assert set(made.state(made.members[1])) == {"0.weight", "0.bias", "2.weight", "2.bias"}


WIDTHS = (20, 24, 57, 130, 300)


def wide(params: Any) -> nn.Module:
    """Two hidden layers of any width; sigmoid(0) is not 0, so what is padded would leak if it were not masked."""
    a, b = params["widths"]
    return nn.Sequential(nn.Linear(8, a), nn.Sigmoid(), nn.BatchNorm1d(a), nn.Linear(a, b), nn.Tanh(), nn.Linear(b, 1))


ARCHITECTURES["wide"] = wide
SLOW_OPTIMIZERS = [pytest.param(name, marks=pytest.mark.slow) for name in ("adamw", "rmsprop", "adagrad")]


@pytest.mark.parametrize("optimizer", ["adam", "sgd", *SLOW_OPTIMIZERS])
def test_members_of_widths_20_to_300_share_a_stack(optimizer: str) -> None:
    """A narrow network in a wide one's corner has the curve it has alone; here all are padded to the widest."""
    structure = common_structure([wide({"widths": (20, 20)}), wide({"widths": (300, 300)})])
    shapes = structure.shapes_of(wide({"widths": (300, 300)}))

    def everyone() -> list[Member]:
        base = members("wide", len(WIDTHS), optimizer=optimizer, weight_decay=0.01)
        pairs = zip(WIDTHS, reversed(WIDTHS), strict=True)
        return [
            Member(number=m.number, seed=m.seed, params=m.params | {"widths": pair, "learning_rate": 1e-3})
            for m, pair in zip(base, pairs, strict=True)
        ]

    got, expected = everyone(), everyone()
    made = stack("wide", len(WIDTHS), padder=lambda module, params: structure.pad(module, shapes))
    got_weights = fit(made, got, "wide")
    weights = fit(loop(len(WIDTHS)), expected, "wide")
    assert_equal(got, expected, got_weights, weights)


class Classes(Regression):
    """Three classes, with a label smoothing that `loss` takes as a tensor, or (`plain`) as a number only."""

    def __init__(self, plain: bool) -> None:
        super().__init__()
        self.plain = plain

    def build(self, params, info):
        return nn.Linear(8, 3).double()

    def loss(self, outputs, targets, params):
        classes = (targets[:, 0] > 0).long() + (targets[:, 0] > 2).long()
        smoothing = params["smoothing"]
        return (
            F.cross_entropy(outputs, classes, label_smoothing=smoothing)
            if self.plain
            else cross_entropy(outputs, classes, smoothing)
        )

    def metrics(self):
        return {}


def test_members_with_label_smoothings_of_their_own() -> None:
    def everyone() -> list[Member]:
        return [
            Member(number=m.number, seed=m.seed, params=m.params | {"smoothing": 0.1 * m.number})
            for m in members("mlp", 3)
        ]

    got, expected = everyone(), everyone()
    got_weights = fit(VmapStack(task(Classes(False)), 3, split("mlp", 8)), got, "mlp")
    weights = {}
    for member in expected:  # alone, and with torch's own cross-entropy
        weights |= fit(loop(objective=Classes(True)), [member], "mlp")
    assert_equal(got, expected, got_weights, weights)


def test_a_loss_that_takes_numbers_only_divides_members_by_them() -> None:
    made = VmapStack(task(Classes(True)), 3, split("mlp", 8))
    base = members("mlp", 1)[0].params
    made.join(Member(number=0, seed=0, params=base | {"smoothing": 0.1}))
    made.join(Member(number=1, seed=1, params=base | {"smoothing": 0.1}))
    with pytest.raises(NotStackable, match="its structure is not that of the stack"):
        made.join(Member(number=2, seed=2, params=base | {"smoothing": 0.2}))


@pytest.mark.parametrize("execution", ["eager", "graph"])
def test_what_is_kept_is_of_the_moment_it_was_kept_whoever_joins_or_leaves(execution: Execution) -> None:
    made, rows = stack("conv_batchnorm", execution=execution), split("conv_batchnorm", BATCH_SIZE)
    first, second, third, last = members("conv_batchnorm")
    batch = [rows.inputs["x"]], rows.targets
    for member in (first, second, third):
        made.join(member)
    made.step(*batch)
    expected = {member: made.state(member) for member in (first, second)}
    kept = {member: made.keep(member) for member in (first, second)}
    made.leave(third)
    made.join(last)  # takes its slot
    made.step(*batch)
    expected[second] = made.state(second)
    kept[second] = made.keep(second)  # a better one
    made.resize(8)
    made.step(*batch)
    for member, weights in expected.items():
        got = kept[member]()
        assert got.keys() == weights.keys()
        assert all(torch.equal(got[name], weights[name]) for name in weights)
        assert not torch.equal(got["5.weight"], made.state(member)["5.weight"])


@needs_compiler
@pytest.mark.parametrize(
    "writes",
    [pytest.param(False, id="new tensors"), pytest.param(True, id="in place", marks=pytest.mark.slow)],
)
def test_a_step_is_compiled_for_its_tensors_and_again_for_others(writes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a graph that is replayed has it: what is changed in place is changed in the very tensors that were given."""
    made = stack("two_layers", 2)
    for member in members("two_layers", 2, optimizer="adam"):
        made.join(member)
    eager, state = made._opened.eager, made._slots.state
    batches = [
        (torch.randn(16, 8).double(), torch.randn(16, 1).double()),
        (torch.randn(8, 16).double().T, torch.randn(16, 1).double()),
    ]
    batches.append((torch.randn(5, 8).double(), torch.randn(5, 1).double()))
    first = (state, [batches[0][0]], batches[0][1])
    graph = Graph(in_place(eager) if writes else eager, *first, any_size=not writes)
    step = CompiledStep(graph, *first)
    for x, y in batches:
        expected = eager(tree_map(torch.clone, state), [x], y)
        given = tree_map(torch.clone, state)
        got = step(given, [x], y)
        for one, other in zip(tree_leaves(got), tree_leaves(expected), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
        changed = [not torch.equal(a, b) for a, b in zip(tree_leaves(given), tree_leaves(state), strict=True)]
        assert any(changed) == writes
        assert not writes or all(a is b for a, b in zip(tree_leaves(got[0]), tree_leaves(given.trained), strict=True))
    assert step._n_forms == 3
    monkeypatch.setattr("hpo.stacks.graph._MOST_FORMS", 3)
    x, y = torch.randn(8, 7).double().T, torch.randn(7, 1).double()  # other strides and sizes
    expected = eager(tree_map(torch.clone, state), [x], y)
    for one, other in zip(tree_leaves(step(state, [x], y)), tree_leaves(expected), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert step._n_forms == 3


@needs_compiler
def test_a_compiled_step_is_found_in_inductors_cache_with_what_it_assumes_of_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is traced for it again. Inductor keeps what it assumes of the numbers that a graph is given, and of none
    that is only the size of a tensor: the numbers of slots and rows are arguments."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    made = stack("two_layers", 4)
    for member in members("two_layers", 4, optimizer="adam"):
        made.join(member)
    batch = (made._slots.state, [torch.randn(16, 8).double()], torch.randn(16, 1).double())
    hits = []
    for _ in range(2):
        graph = Graph(made._opened.eager, *batch, any_size=True)
        given = [node.meta["val"] for node in graph.module.graph.find_nodes(op="placeholder")]
        assert [int(each) for each in given if isinstance(each, torch.SymInt)] == [4, 16]
        CompiledStep(graph, *batch)
        hits.append(torch._dynamo.utils.counters["aot_autograd"]["autograd_cache_hit"])
    assert hits[1] == hits[0] + 1


@pytest.mark.parametrize("execution", ["eager", "graph"])
def test_a_member_with_dropout_is_the_same_whatever_is_trained_beside_it(execution: Execution) -> None:
    """Alone in a stack of one, and in a larger one, after another member has left it and one has joined."""
    rows = list(zip(torch.randn(6, 8, 8, dtype=torch.float64), torch.randn(6, 8, 1, dtype=torch.float64), strict=True))

    def after_steps(numbers: Sequence[int], capacity: int) -> dict[str, Tensor]:
        made = stack("dropout", capacity, execution)
        of = {n: Member(number=n, seed=n, params=members("dropout", 1)[0].params | {"rate": 0.3}) for n in numbers}
        for n in numbers[:-1]:
            made.join(of[n])
        made.join(of[numbers[-1]])
        for step, (x, y) in enumerate(rows):
            if step == 3 and len(numbers) > 1:
                made.leave(of[numbers[0]])
            made.step([x], y)
        return made.state(of[7])

    alone, beside = after_steps([7], 1), after_steps([4, 7, 9], 3)
    for name, tensor in alone.items():
        torch.testing.assert_close(beside[name], tensor)
