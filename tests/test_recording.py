"""Steps replayed from CUDA graphs, without a GPU: the real CudaReplay on stand-ins for torch.cuda's graphs.

Shapes: K slots, B rows.
"""

import gc
import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from hpo.errors import Interrupted
from hpo.runner import confirm, refit
from hpo.stacks import recording, vmap_step
from hpo.stacks.admission import Admission
from hpo.stacks.alone import NotStackable
from hpo.stacks.graph import CompiledStep
from hpo.stacks.graph import Graph as StepGraph
from hpo.stacks.recording import CudaReplay, EpochReplay, Run
from hpo.stacks.state import StackState
from hpo.stacks.vmap_stack import VmapStack
from hpo.stacks.vmap_step import Execution
from hpo.study.data import Split
from hpo.training.batches import Batches
from hpo.training.loop import order, train
from hpo.training.loop_stack import LoopStack
from hpo.training.memory import is_out_of_memory
from hpo.training.stack import Member, SingleStack, Stack, Task
from tests.cli import invoke, summary
from tests.graphs import Capture, CUDAGraph, Graph, NoWaiting, graphs  # noqa: F401  # a fixture
from tests.stacking import (
    CPU,
    INFO,
    Built,
    asking,
    assert_same_curves,
    assert_same_weights,
    one_by_one,
    sines,
    trained,
)

N_ROWS, BATCH_SIZE, N_EPOCHS, K = 28, 8, 3, 4  # the last batch has 4 rows
REPLAYED = "captured, replayed from a CUDA graph"


def conv(params: Any) -> nn.Module:
    biased = params.get("biased", False)  # its gradient would be rounding only, since BatchNorm takes the mean off
    layers = nn.Conv1d(1, 3, 3, bias=biased), nn.BatchNorm1d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 1)
    return nn.Sequential(nn.Unflatten(1, (1, 6)), *layers)


NETWORKS: dict[str, Callable[[Any], nn.Module]] = {
    "mlp": lambda params: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1)),
    "conv_batchnorm": conv,
    "layernorm": lambda params: nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.ReLU(), nn.Linear(5, 1)),
}


def dropout(params: Any) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 40), nn.Dropout(params["rate"]), nn.Linear(40, 1))


def task(build: Callable[[Any], nn.Module]) -> Task:
    return Task(objective=Built(build), info=INFO, device=CPU, n_rows=N_ROWS, epochs=N_EPOCHS)


def stack(build: Callable[[Any], nn.Module], capacity: int = K, execution: Execution = "graph") -> VmapStack:
    return VmapStack(task(build), capacity, sines(8), execution)


def members(n: int = K, **params: Any) -> list[Member]:
    base = {"optimizer": "adam", "batch_size": BATCH_SIZE} | params
    return [Member(number=i, seed=i, params=base | {"learning_rate": 0.004 * (i + 1)}) for i in range(n)]


def one_step(made: VmapStack) -> tuple[Tensor, list[Tensor]]:
    """Do one step; return the losses and all that it has changed."""
    rows = sines(BATCH_SIZE, 5)
    losses = made.step([rows.inputs["x"]], rows.targets)
    return losses, [x.clone() for x in tree_leaves(made._slots.state.trained)]


def assert_trained_as_alone(made: VmapStack, build: Callable[[Any], nn.Module], **params: Any) -> None:
    """Train members in `made`, one of which leaves early, and a fifth that takes its slot; compare with each alone."""
    got, expected, stops = members(K + 1, **params), members(K + 1, **params), {1: 1}
    weights = trained(made, got, sines(N_ROWS), sines(20, 1), epochs=N_EPOCHS, stops=stops)
    alone = LoopStack(task(build), K)
    expected_weights = trained(alone, expected, sines(N_ROWS), sines(20, 1), epochs=N_EPOCHS, stops=stops)
    assert_same_curves(got, expected)
    assert_same_weights(weights, expected_weights, range(K + 1))


@pytest.mark.parametrize(
    ("network", "optimizer"),
    [
        ("conv_batchnorm", "adam"),
        ("mlp", "sgd"),
        *(pytest.param(name, "adam", marks=pytest.mark.slow) for name in ("mlp", "layernorm")),
        *(pytest.param("mlp", name, marks=pytest.mark.slow) for name in ("adamw", "rmsprop", "adagrad")),
    ],
)
def test_what_is_replayed_trains_as_each_alone(graphs: type[Capture], network: str, optimizer: str) -> None:  # noqa: F811
    made = stack(NETWORKS[network])
    momentum = {"momentum": 0.9} if optimizer == "sgd" else {}
    assert_trained_as_alone(made, NETWORKS[network], optimizer=optimizer, weight_decay=0.01, **momentum)
    assert made.path == REPLAYED
    assert len(Graph.made) == 3  # one of each batch size, one of the evaluation
    assert min(graph.n_replays for graph in Graph.made) == 2 + N_EPOCHS + 1  # two to compare, one an epoch


def test_a_gradient_of_rounding_only_does_not_make_a_replay_differ(graphs: type[Capture]) -> None:  # noqa: F811
    """Adam makes a whole step of it: two forms of a step are compared with a large epsilon."""
    made = stack(conv)
    for member in members(biased=True):
        made.join(member)
    one_step(made)
    assert made.path == REPLAYED


def test_a_schedule_and_clipping_are_recorded(graphs: type[Capture]) -> None:  # noqa: F811
    made = stack(NETWORKS["mlp"])
    assert_trained_as_alone(made, NETWORKS["mlp"], schedule="one_cycle", max_grad_norm=0.5)
    assert made.path == REPLAYED


def test_other_threads_may_allocate_while_it_is_captured_and_graphs_share_memory(
    graphs: type[Capture],  # noqa: F811
) -> None:
    assert_trained_as_alone(stack(NETWORKS["mlp"]), NETWORKS["mlp"])
    stream = recording._capture_stream(CPU)
    assert stream is not recording._side_stream(CPU)  # or cuBLAS's workspace would be in no graph's memory
    assert graphs.arguments == [
        {"pool": pool, "stream": stream, "capture_error_mode": "thread_local"} for pool in (None, 0, 0)
    ]


@pytest.fixture
def no_collecting(graphs: type[Capture]) -> Iterator[None]:  # noqa: F811
    """Within it Python does not look for objects that hold each other."""
    first = stack(NETWORKS["mlp"])  # torch imports more at a first trace, and its imports keep the frames of callers
    for member in members():
        first.join(member)
    del first
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def test_a_stack_that_is_let_go_of_takes_its_memory_along(
    graphs: type[Capture],  # noqa: F811
    no_collecting: None,
) -> None:
    made, batches = stack(NETWORKS["mlp"]), Batches(sines(MANY_ROWS), CPU)
    for member in members():
        made.join(member)
    made.epoch(batches, order(MANY_ROWS, 7, 0), lambda: False)
    assert made.path == REPLAYED
    held = [weakref.ref(x) for x in (made._opened, *tree_leaves(made._slots.state))]
    assert sum(CUDAGraph.use.values()) == 3
    del made
    assert not sum(CUDAGraph.use.values())
    assert not [each for each in held if each() is not None]


def test_no_stack_of_the_search_is_left_at_the_refit(
    graphs: type[Capture],  # noqa: F811
    study: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    no_collecting: None,
) -> None:
    stacks, left, real_init, real = weakref.WeakSet[VmapStack](), [], VmapStack.__init__, refit._refit

    def init(self: VmapStack, *arguments: Any) -> None:
        stacks.add(self)
        real_init(self, *arguments)

    def again(*arguments: Any) -> nn.Module:
        left.append((len(stacks), sum(CUDAGraph.use.values())))
        return real(*arguments)

    monkeypatch.setattr(VmapStack, "__init__", init)
    monkeypatch.setattr(refit, "_refit", again)
    params = "params: {learning_rate: {type: float, low: 0.001, high: 0.1, log: true}}\n"
    said = invoke("run", study(f"trials: 4\nepochs: 2\nstack: 4\nsampler: random\n{params}"), "--json")
    assert f"stacks run {REPLAYED}" in said
    assert left == [(0, 0)] * 2  # that of the default configuration comes second


@pytest.mark.parametrize("version", ["2.11.0", "2.12.0"])
def test_steps_are_recorded_after_all_graphs_before_are_gone(
    graphs: type[Capture],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    version: str,
) -> None:
    """The memory that graphs shared is then refused: what is recorded next has memory of its own."""
    monkeypatch.setattr(torch, "__version__", version)
    made = stack(NETWORKS["mlp"])
    for member in members(2):
        made.join(member)
    for capacity in (K, 2, K):
        made.resize(capacity)
        one_step(made)
        assert made.path == REPLAYED
    assert [each["pool"] for each in graphs.arguments] == [None] * 3
    assert [*CUDAGraph.use.values()] == [0, 0, 1]


def test_each_gpu_has_its_own_stream_and_memory_for_recording(graphs: type[Capture]) -> None:  # noqa: F811
    x = torch.zeros(2)
    devices = [torch.device("cuda", i) for i in (0, 1, 0, 1)]
    kept = [recording._captured(lambda: None, lambda: x.add_(1), device) for device in devices]
    assert [each["stream"].device for each in graphs.arguments] == devices
    assert [each["pool"] for each in graphs.arguments] == [None, None, 0, 1]
    assert len({each["stream"] for each in graphs.arguments}) == len(kept) / 2


@pytest.mark.parametrize("fault", ["pool", "step"])
def test_a_capture_that_fails_leaves_the_thread_on_its_stream(
    graphs: type[Capture],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    fault: str,
) -> None:
    if fault == "pool":
        monkeypatch.setattr(CUDAGraph, "capture_begin", lambda self, pool: pytest.fail("it cannot begin"))
    else:
        monkeypatch.setattr(graphs, "fails", "CUDA error: operation not permitted when stream is capturing")
    made, here = stack(NETWORKS["mlp"]), torch.cuda.current_stream()
    for member in members():
        made.join(member)
    with pytest.raises(pytest.fail.Exception) if fault == "pool" else nullcontext():
        one_step(made)
    assert torch.cuda.current_stream() is here
    assert fault == "pool" or str(made.path).endswith("RuntimeError: " + graphs.fails)


def test_dropout_draws_new_masks_at_each_replay(graphs: type[Capture]) -> None:  # noqa: F811
    made = stack(dropout, 2)
    for member in members(2, rate=0.5, learning_rate=0.0):
        made.join(member)
    x = torch.ones(BATCH_SIZE, 6, dtype=torch.float64)
    y = torch.zeros(BATCH_SIZE, 1, dtype=torch.float64)
    torch.manual_seed(3)
    losses = torch.stack([made.step([x], y) for _ in range(8)])
    assert made.path == REPLAYED
    assert len(losses.unique()) == losses.numel()
    again = stack(dropout, 2)
    for member in members(2, rate=0.5, learning_rate=0.0):
        again.join(member)
    torch.manual_seed(3)
    torch.testing.assert_close(torch.stack([again.step([x], y) for _ in range(8)]), losses)


def test_recording_changes_nothing_of_the_state_nor_of_the_random_numbers(graphs: type[Capture]) -> None:  # noqa: F811
    made = stack(dropout, 2)
    for member in members(2, rate=0.5):
        made.join(member)
    state = made._slots.state
    before = [x.clone() for x in tree_leaves(state)]
    run: Run = recording.in_place(made._opened.eager)
    torch.manual_seed(5)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    replay = recording.recorded(run, state, [torch.ones(4, 6).double()], torch.ones(4, 1).double(), 1e-9)
    assert replay.state is state
    assert all(torch.equal(now, then) for now, then in zip(tree_leaves(state), before, strict=True))
    assert torch.equal(torch.rand(1), drawn)


class Copies(TorchDispatchMode):
    """Counts what is copied into existing tensors."""

    n = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.n += func._schema.name == "aten::copy_"
        return func(*args, **(kwargs or {}))


def test_a_step_copies_its_batch_and_nothing_else_also_after_a_change_of_size(
    graphs: type[Capture],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = stack(NETWORKS["mlp"])
    for member in members(2, momentum=0.9, optimizer="sgd"):
        made.join(member)
    monkeypatch.setattr(Graph, "replay", lambda self: None)  # what it copies itself is its own affair
    monkeypatch.setattr("hpo.stacks.recording.difference", lambda *arguments: None)
    x, y = torch.ones(BATCH_SIZE, 6).double(), torch.ones(BATCH_SIZE, 1).double()
    for capacity in (K, 2, K):
        made.resize(capacity)
        for rows in (BATCH_SIZE, 4):
            made.step([x[:rows]], y[:rows])
        for rows in (BATCH_SIZE, 4, BATCH_SIZE):  # each has a graph of its own, on the same state
            with Copies() as copies:
                made.step([x[:rows]], y[:rows])
            assert copies.n == 2
    assert len(made._opened._prepared) == 2  # the tensors of the sizes before are let go of


def leaves_out(which: int) -> Callable[[Run], Run]:
    """Return an `in_place` that does not write one tensor of the state."""

    def in_place(run: Run) -> Run:
        def step(state: StackState, inputs: Any, targets: Tensor) -> Any:
            trained, losses = run(state, inputs, targets)
            pairs = [*zip(tree_leaves(state.trained), tree_leaves(trained), strict=True)]
            for own, new in [*pairs[:which], *pairs[which + 1 :]]:
                own.copy_(new)
            return trained, losses  # as if it had

        return step

    return in_place


def baked(name: str) -> Callable[..., None]:
    """Return a CudaReplay.__init__ after which a part of its state is a copy, so that the graph reads another one."""
    real = CudaReplay.__init__

    def init(self: CudaReplay, run: Run, state: StackState, inputs: Any, targets: Tensor) -> None:
        real(self, run, state, inputs, targets)
        part = {key: x.clone() for key, x in getattr(state, name).items()}
        self._leaves = tree_leaves(state._replace(**{name: part}))

    return init


def broken(how: str) -> Callable[..., Any]:
    """Return a CudaReplay.__call__ with a fault."""

    def call(self: CudaReplay, state: StackState, inputs: Any, targets: Tensor) -> Any:
        for own, now in zip(self._leaves, tree_leaves(state), strict=True):
            own.copy_(now)
        if how != "inputs":
            self._inputs[0].copy_(inputs[0])
        if how != "targets":
            self._targets.copy_(targets)
        stale = self._losses.clone()
        if how != "empty":
            self._graph.replay()
        return self.state.trained, stale if how == "losses" else self._losses.clone()

    return call


class Untraced(StepGraph):
    """A step's graph that is the step itself."""

    depends_on_data = False

    def __init__(self, run: Run, *batch: Any, any_size: bool = False) -> None:
        self.run = run

    def fits(self, n_slots: int, n_rows: int) -> bool:
        return False

    def __call__(self, state: StackState, inputs: Any, targets: Tensor) -> Any:
        return self.run(state, inputs, targets)


N_WRITTEN = 5 + 3 + 10 + 1
"""conv_batchnorm under adam: 5 weights, 3 buffers of BatchNorm, two states a weight, the count of steps."""
ONE_OF_EACH = (0, 5, 8, 13, N_WRITTEN - 1)


@pytest.mark.parametrize(
    "fault",
    [
        *(pytest.param(f"write {i}", marks=() if i in ONE_OF_EACH else pytest.mark.slow) for i in range(N_WRITTEN)),
        *("hyper", "inputs", "targets", "losses", "empty"),
    ],
)
def test_a_replay_that_is_not_the_step_is_found_and_not_used(
    graphs: type[Capture],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    fault: str,
) -> None:
    kind, _, which = fault.partition(" ")
    if kind == "write":
        monkeypatch.setattr(vmap_step, "in_place", leaves_out(int(which)))
        monkeypatch.setattr(vmap_step, "Graph", Untraced)
    elif kind == "hyper":
        monkeypatch.setattr(CudaReplay, "__init__", baked(kind))
    else:
        monkeypatch.setattr(CudaReplay, "__call__", broken(kind))
    made, reference = stack(conv), stack(conv, execution="eager")
    for each in (made, reference):
        for member in members():
            each.join(member)
    for _ in range(2):
        torch.testing.assert_close(one_step(made), one_step(reference), rtol=0, atol=1e-12)
    assert made.path is not None
    assert made.path.startswith("captured; not replayed from a CUDA graph: replayed it differs in the ")


@pytest.mark.parametrize("poisoned", [True, False])
def test_a_capture_that_fails_is_said_and_training_is_the_same(
    graphs: type[Capture],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    poisoned: bool,
) -> None:
    monkeypatch.setattr(graphs, "fails", "CUDA error: operation failed due to a previous error during capture")
    monkeypatch.setattr(recording, "_fails_ever_after", lambda: poisoned)
    build = NETWORKS["mlp"]
    first, second = stack(build), stack(build)
    assert_trained_as_alone(first, build)
    n_tries = len(graphs.arguments)
    assert n_tries == (1 if poisoned else 2)  # one of each batch size, unless the first has spoiled it
    for member in members():
        second.join(member)
    one_step(second)
    assert len(graphs.arguments) == (1 if poisoned else 3)
    why = "RuntimeError: CUDA error: operation failed due to a previous error during capture"
    assert first.path == f"captured; not replayed from a CUDA graph: {why}"
    earlier = f"an earlier one failed in this process: {why}" if poisoned else why
    assert second.path == f"captured; not replayed from a CUDA graph: {earlier}"


def test_memory_that_runs_out_in_a_capture_is_that_and_members_are_as_before(
    graphs: type[Capture],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = stack(conv)
    for member in members():
        made.join(member)
    before = [x.clone() for x in tree_leaves(made._slots.state)]
    monkeypatch.setattr(graphs, "fails", "CUDA error: out of memory")
    with pytest.raises(RuntimeError) as caught:
        made.step([torch.ones(BATCH_SIZE, 6).double()], torch.ones(BATCH_SIZE, 1).double())
    assert is_out_of_memory(caught.value)
    assert all(torch.equal(x, y) for x, y in zip(tree_leaves(made._slots.state), before, strict=True))


def test_a_step_that_cannot_be_compiled_is_replayed_all_the_same_and_said(
    graphs: type[Capture],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Fails(CompiledStep):
        def __init__(self, *arguments: Any) -> None:
            raise ValueError("ptxas was not found\nmore of it")

    monkeypatch.setattr(vmap_step, "CompiledStep", Fails)
    monkeypatch.setattr(vmap_step, "has_compiler", lambda device: True)
    made = stack(conv, execution="compiled")
    for member in members():
        made.join(member)
    one_step(made)
    assert made.path == f"{REPLAYED}; not compiled: ValueError: ptxas was not found"


def test_a_compiled_step_that_gives_something_else_is_not_used(
    graphs: type[Capture],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Wrong(CompiledStep):
        def __init__(self, graph: StepGraph, *arguments: Any) -> None:
            self._graph = graph

        def __call__(self, state: StackState, inputs: Any, targets: Tensor) -> Any:
            with torch.no_grad():
                for x in state.buffers.values():
                    if x.is_floating_point():
                        x.mul_(1.001)
            return self._graph(state, inputs, targets)

    monkeypatch.setattr(vmap_step, "CompiledStep", Wrong)
    monkeypatch.setattr(vmap_step, "has_compiler", lambda device: True)
    made = stack(conv, execution="compiled")
    assert_trained_as_alone(made, conv)
    assert made.path == f"{REPLAYED}; not compiled: ValueError: compiled it differs in the buffers"


def test_without_a_compiler_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vmap_step, "has_compiler", lambda device: False)
    made = stack(NETWORKS["mlp"], execution="compiled")
    assert_trained_as_alone(made, NETWORKS["mlp"])
    assert made.path == "captured; not compiled: ValueError: no C++ compiler was found"


@pytest.mark.parametrize("recorded", [True, False])
def test_no_step_waits_for_the_gpu_nor_does_what_is_between_steps(
    request: pytest.FixtureRequest, recorded: bool
) -> None:
    """Over a whole epoch, with empty slots: a wait costs as long as the GPU is behind, at each of so many steps."""
    if recorded:
        request.getfixturevalue("graphs")
    made = stack(conv)
    for member in members(K - 1):
        made.join(member)
    batches = Batches(sines(N_ROWS), CPU)
    rows = order(N_ROWS, 7, 0)
    for inputs, targets in batches.epoch(BATCH_SIZE, rows):  # recording is once
        made.step(inputs, targets)
    with NoWaiting():
        losses = [made.step(inputs, targets) for inputs, targets in batches.epoch(BATCH_SIZE, rows)]
    assert all(math.isfinite(loss) for each in losses for loss in each.tolist())
    for reads in (lambda x: x.tolist(), lambda x: x[0].item(), lambda x: x[x > 0], lambda x: torch.tensor([1.0])):
        with pytest.raises(RuntimeError, match="would wait for the GPU"), NoWaiting():
            reads(losses[0])


class Pixels(nn.Module):
    """What prepares bytes, batch by batch: within the graph."""

    def forward(self, x: Tensor) -> Tensor:
        return x.to(torch.float64) / 255 - 0.5


class Waiting(Pixels):
    """One that makes a tensor of numbers and looks at them, as torchvision's normalize does of its deviations."""

    def forward(self, x: Tensor) -> Tensor:
        deviations = torch.as_tensor([1.0] * 6, dtype=torch.float64)
        if (deviations == 0).any():
            raise ValueError("a deviation is zero")
        return super().forward(x) / deviations


MANY_ROWS = 11 * BATCH_SIZE + 4
"""8 steps are recorded as one graph; the first of the first epoch and what is left over are done one by one."""


def pixels(n: int) -> Split:
    x = torch.randint(0, 256, (n, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return Split(inputs={"x": x}, targets=Pixels()(x).sum(1, keepdim=True).sin())


@pytest.mark.parametrize(
    ("network", "kind"),
    [
        ("mlp", "bytes"),
        ("conv_batchnorm", "floats"),
        pytest.param("mlp", "floats", marks=pytest.mark.slow),
        pytest.param("conv_batchnorm", "bytes", marks=pytest.mark.slow),
    ],
)
def test_many_steps_at_once_are_an_epoch_as_alone(graphs: type[Capture], network: str, kind: str) -> None:  # noqa: F811
    rows = sines(MANY_ROWS) if kind == "floats" else pixels(MANY_ROWS)
    prepare = None if kind == "floats" else Pixels()
    made, alone = stack(NETWORKS[network]), LoopStack(task(NETWORKS[network]), K)
    got, expected = members(K + 1), members(K + 1)
    for each, everyone in ((made, got), (alone, expected)):
        train(
            SingleStack(each),
            Batches(rows, CPU, prepare),
            None,
            epochs=N_EPOCHS,
            seed=7,
            ask=asking(everyone),
            report=one_by_one(lambda stack, member, metrics: not (member.number == 1 and member.epoch == 1)),
        )
    assert_same_curves(got, expected)
    assert made.path == REPLAYED
    step, many, last = Graph.made
    assert len(many.calls) > 7 * len(step.calls)
    assert many.n_replays == 1 + N_EPOCHS + 1  # one to compare, one an epoch; the fifth member trains an epoch longer
    assert last.n_replays == 2 + N_EPOCHS + 1


def assert_equal_epochs(made: VmapStack, reference: VmapStack, batches: Batches, plain: Batches) -> None:
    """Train the members for two epochs, in `made` on `batches`, in `reference` on `plain` step by step."""
    for each in (made, reference):
        for member in members():
            each.join(member)
    for number in range(2):
        rows = order(MANY_ROWS, 7, number)
        losses = made.epoch(batches, rows, lambda: False)
        assert losses == pytest.approx(Stack.epoch(reference, plain, rows, lambda: False), abs=1e-12)


@pytest.mark.parametrize("poisoned", [True, False])
def test_a_preprocessing_that_waits_is_found_before_it_spoils_a_capture(
    graphs: type[Capture],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    poisoned: bool,
) -> None:
    monkeypatch.setattr(recording, "_fails_ever_after", lambda: poisoned)
    made, reference = stack(NETWORKS["mlp"]), stack(NETWORKS["mlp"], execution="eager")
    batches, plain = (Batches(pixels(MANY_ROWS), CPU, prepare()) for prepare in (Waiting, Pixels))
    assert_equal_epochs(made, reference, batches, plain)
    why = "step by step: RuntimeError: called a synchronizing CUDA operation"
    assert made.path == f"{REPLAYED}; {why}"
    assert not recording._given_up
    assert len(graphs.arguments) == 2  # one step of each batch size
    assert torch.cuda.get_sync_debug_mode() == 0


def test_memory_that_runs_out_before_a_capture_ends_no_later_recording(
    graphs: type[Capture],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not even with torch 2.11: there was no capture yet."""
    monkeypatch.setattr(recording, "_fails_ever_after", lambda: True)
    made = stack(conv)

    def full(state: StackState, inputs: Any, targets: Tensor) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    for member in members():
        made.join(member)
    one_step(made)
    key = (K, BATCH_SIZE, "graph")
    made._opened.forget()
    form = made._opened._forms[key]
    made._opened._forms[key] = form._replace(run=full)
    with pytest.raises(torch.OutOfMemoryError):
        one_step(made)
    made._opened._forms[key] = form
    one_step(made)
    assert made.path == REPLAYED


def noisy(self: Graph) -> None:
    """As `Graph.replay`, of convolutions whose gradients are sums in another order each time."""
    for func, args, kwargs, out in self.calls:
        again = func(*args, **kwargs)
        for own, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
            if isinstance(own, Tensor) and own.data_ptr() != new.data_ptr():
                rounding = 1e-7 * new.abs().max() * torch.randn_like(new) if "convolution_backward" in str(func) else 0
                own.copy_(new + rounding if torch.is_tensor(rounding) else new)


@pytest.mark.parametrize(
    "optimizer", ["adam", *(pytest.param(name, marks=pytest.mark.slow) for name in ("rmsprop", "sgd"))]
)
def test_a_gradient_of_rounding_only_does_not_make_many_steps_differ(
    graphs: type[Capture],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    optimizer: str,
) -> None:
    """That of a bias before BatchNorm: 16 steps are compared as two are, with a large epsilon."""
    monkeypatch.setattr(Graph, "replay", torch.no_grad()(noisy))

    def floats(n: int) -> Split:
        rows = sines(n)
        return Split(inputs={"x": rows.inputs["x"].float()}, targets=rows.targets.float())

    settings = Task(objective=Single(conv), info=INFO, device=CPU, n_rows=MANY_ROWS, epochs=N_EPOCHS)
    made, batches = VmapStack(settings, K, floats(8), "graph"), Batches(floats(MANY_ROWS), CPU)
    for member in members(biased=True, optimizer=optimizer):
        made.join(member)
    made.epoch(batches, order(MANY_ROWS, 7, 0), lambda: False)
    assert made.path == REPLAYED
    rates = made._slots.state.hyper["learning_rate"].tolist()
    assert rates == pytest.approx([member.params["learning_rate"] for member in made.members])


def test_an_epoch_of_many_steps_reads_numbers_once(graphs: type[Capture]) -> None:  # noqa: F811
    made, batches = stack(conv), Batches(sines(MANY_ROWS), CPU)
    for member in members(K - 1):
        made.join(member)
    made.epoch(batches, order(MANY_ROWS, 7, 0), lambda: False)
    for member in made.members:
        made.keep(member)
    made._slots.settle()  # between epochs
    with NoWaiting(lists=1):
        losses = made.epoch(batches, order(MANY_ROWS, 7, 1), lambda: False)
    assert len(losses) == K - 1


def test_a_stop_is_heard_between_two_graphs(graphs: type[Capture]) -> None:  # noqa: F811
    made, batches, asked = stack(conv), Batches(sines(MANY_ROWS), CPU), []
    for member in members():
        made.join(member)
    made.epoch(batches, order(MANY_ROWS, 7, 0), lambda: False)
    many = Graph.made[1]
    before = many.n_replays
    with pytest.raises(Interrupted):
        made.epoch(batches, order(MANY_ROWS, 7, 1), lambda: asked.append(1) or len(asked) > 1)
    assert many.n_replays == before + 1


def stands_still(self: EpochReplay, state: StackState, number: Tensor) -> Tensor:
    losses = REAL_STEP(self, state, number)
    number.sub_(1)
    return losses


def own_order(self: EpochReplay, state: StackState, number: Tensor) -> Tensor:
    """The numbers of the rows are those of the recording."""
    kept, self._order = self._order, torch.arange(self._order.numel()).view_as(self._order)
    try:
        return REAL_STEP(self, state, number)
    finally:
        self._order = kept


def loses_sums(self: EpochReplay, state: StackState, number: Tensor) -> Tensor:
    return REAL_STEP(self, state, number) * 0.99


REAL_STEP = EpochReplay._step


@pytest.mark.parametrize(
    "fault", [stands_still, *(pytest.param(each, marks=pytest.mark.slow) for each in (own_order, loses_sums))]
)
def test_many_steps_that_are_not_the_steps_are_found_and_not_used(
    graphs: type[Capture],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    fault: Callable[..., Tensor],
) -> None:
    monkeypatch.setattr(EpochReplay, "_step", fault)
    made, reference, batches = stack(conv), stack(conv, execution="eager"), Batches(sines(MANY_ROWS), CPU)
    assert_equal_epochs(made, reference, batches, batches)
    assert made.path is not None
    assert made.path.startswith(f"{REPLAYED}; step by step: 8 steps at once differ in the ")


def test_a_whole_study_is_the_same_replayed_its_refit_too(
    request: pytest.FixtureRequest, study: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "trials: 4\nepochs: 3\nstack: 4\nsampler: random\nbaseline: false\n"
    space = "params: {learning_rate: {type: float, low: 0.001, high: 0.1, log: true}}\n"
    plain = summary(invoke("run", study(f"name: plain\n{text}{space}"), "--json"))
    request.getfixturevalue("graphs")
    monkeypatch.setattr("hpo.runner.refit.records", lambda device: True)
    said = invoke("run", study(f"name: replayed\n{text}{space}"), "--json")
    replayed = summary(said)
    assert f"stacks run {REPLAYED}" in said
    assert replayed["best"]["params"] == plain["best"]["params"]
    assert replayed["best"]["value"] == pytest.approx(plain["best"]["value"], rel=1e-5)
    assert replayed["test"] == pytest.approx(plain["test"], rel=1e-5)
    assert len(Graph.made[-1].calls) > 0
    assert Graph.made[-1].n_replays >= 3, "the refit's steps are replayed too"


def test_a_refit_that_cannot_be_stacked_is_trained_alone(study: Callable[..., Path], graphs: type[Capture]) -> None:  # noqa: F811
    path = study("trials: 1\nepochs: 2\nstack: 1\nparams: {optimizer: adadelta}\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hpo.runner.refit.records", lambda device: True)
        assert summary(invoke("run", path, "--json"))["bundle"] is not None


@pytest.mark.parametrize("text", [pytest.param("", marks=pytest.mark.slow), "confirm: {top: 4, seeds: 2}\n"])
def test_how_a_refit_and_a_confirmation_run_is_said_where_the_search_ran_otherwise(
    study: Callable[..., Path],
    graphs: type[Capture],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    text: str,
) -> None:
    monkeypatch.setattr("hpo.runner.refit.records", lambda device: True)
    module, name = (confirm, "_split") if text else (refit, "_refit")
    real = getattr(module, name)

    def fails(*arguments: Any) -> Any:
        monkeypatch.setattr(graphs, "fails", "CUDA error: it is another device's")
        return real(*arguments)

    monkeypatch.setattr(module, name, fails)
    said = invoke("run", study(f"trials: 4\nepochs: 2\nstack: 4\nbaseline: false\n{text}"), "--json")
    assert said.count("stacks run captured; not replayed from a CUDA graph: RuntimeError: ") == 1
    assert said.count(f"stacks run {REPLAYED}\n") == 1
    assert not text or said.index("stacks run captured; ") < said.index("run 1 of 2 done")


def test_a_last_batch_that_is_not_replayed_is_said(
    graphs: type[Capture],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = vmap_step.recorded

    def recorded(run: Run, state: StackState, inputs: Any, targets: Tensor, tolerance: float) -> CudaReplay:
        if len(targets) != BATCH_SIZE:
            raise recording.NotRecorded("it waits")
        return real(run, state, inputs, targets, tolerance)

    monkeypatch.setattr(vmap_step, "recorded", recorded)
    made = stack(NETWORKS["mlp"])
    trained(made, members(), sines(N_ROWS), epochs=1)
    assert made.path == f"{REPLAYED}; batches of 4: captured; not replayed from a CUDA graph: it waits"


class Tf32(Admission):
    """Of a stack that computes as a GPU would with TF32: what it multiplies has 10 bits after the point."""

    def _wrong(self, step: Any, alone: Any, losses: Any = None) -> dict[int, str]:
        state = self._slots.state
        rounded = {name: round_to_10_bits(x) for name, x in state.weights.items()}
        self._slots.state = state._replace(weights=rounded)
        try:
            return super()._wrong(step, alone, losses)
        finally:
            self._slots.state = state


def round_to_10_bits(x: Tensor) -> Tensor:
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp((mantissa * 2**11).round() / 2**11, exponent)


class Single(Built):
    def build(self, params: Any, info: Any) -> nn.Module:
        return super().build(params, info).float()


@pytest.mark.parametrize(("precision", "joins"), [("tf32", True), ("float32", False)])
def test_tf32_is_no_reason_against_a_stack_where_it_is_asked_for(precision: Any, joins: bool) -> None:
    wide = lambda params: nn.Sequential(nn.Linear(6, 300), nn.Tanh(), nn.Linear(300, 1))  # noqa: E731
    objective = Single(wide)
    rows = sines(64)
    example = Split(inputs={"x": 10 * rows.inputs["x"].float()}, targets=rows.targets.float())
    settings = Task(objective=objective, info=INFO, device=CPU, n_rows=64, epochs=1, precision=precision)
    made = VmapStack(settings, 4, example)
    made._admission = Tf32(settings, example, made._slots)
    for member in members():
        with (
            nullcontext() if joins else pytest.raises(NotStackable, match="its outputs in a stack are not those alone")
        ):
            made.join(member)


@pytest.mark.parametrize(
    ("network", "optimizer"),
    [*((name, "adam") for name in (*NETWORKS, "dropout")), *(("mlp", name) for name in ("sgd", "rmsprop", "adagrad"))],
)
def test_a_step_reads_no_number_and_has_no_tensor_of_the_cpu(network: str, optimizer: str) -> None:
    """On `meta` there are no numbers, and a tensor from elsewhere is refused, as on CUDA."""
    build = NETWORKS.get(network, dropout)
    made = stack(build, execution="eager")
    for member in members(optimizer=optimizer, momentum=0.9, rate=0.5, schedule="one_cycle", max_grad_norm=1.0):
        made.join(member)
    rows = sines(BATCH_SIZE)
    away = lambda x: x.to("meta")  # noqa: E731
    state, x, y = tree_map(away, (made._slots.state, rows.inputs["x"], rows.targets))
    trained_state, losses = made._opened.eager(state, [x], y)
    assert {each.device.type for each in (*tree_leaves(trained_state), losses)} == {"meta"}
    assert losses.shape == (K,)
