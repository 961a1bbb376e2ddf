"""Stacks: the contract that every one of them keeps, held against plain loops of torch.optim written here."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchmetrics.regression import MeanSquaredError

from hpo.stacks.alone import NotStackable
from hpo.stacks.vmap_stack import VmapStack
from hpo.stacks.vmap_step import VmapStep
from hpo.study.data import DataInfo, Split
from hpo.training import stacked_optim
from hpo.training.batches import Batches
from hpo.training.loop import order
from hpo.training.loop_stack import LoopStack
from hpo.training.memory import is_out_of_memory
from hpo.training.stack import Member, Task
from tests.stacking import CPU, Built, Toy

INFO = DataInfo(inputs={"x": (3,), "z": (2,)}, input_dtypes={"x": "float64", "z": "float64"})
TOLERANCE = 1e-12
FULL = "out of memory on cpu: CUDA out of memory. Tried to allocate 2.00 GiB"
N_ROWS, BATCH_SIZE, N_EPOCHS = 40, 16, 4

OPTIMIZERS = {
    "sgd": (
        {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 0.01},
        lambda weights, lr: torch.optim.SGD(weights, lr=lr, momentum=0.9, weight_decay=0.01),
    ),
    "nesterov": (
        {"optimizer": "sgd", "momentum": 0.8, "nesterov": True},
        lambda weights, lr: torch.optim.SGD(weights, lr=lr, momentum=0.8, nesterov=True),
    ),
    "adam": (
        {"optimizer": "adam", "beta1": 0.8, "weight_decay": 0.01},
        lambda weights, lr: torch.optim.Adam(weights, lr=lr, betas=(0.8, 0.999), weight_decay=0.01),
    ),
    "adamw": (
        {"optimizer": "adamw", "weight_decay": 0.1},
        lambda weights, lr: torch.optim.AdamW(weights, lr=lr, weight_decay=0.1),
    ),
    "rmsprop": (
        {"optimizer": "rmsprop", "alpha": 0.9, "momentum": 0.5},
        lambda weights, lr: torch.optim.RMSprop(weights, lr=lr, alpha=0.9, momentum=0.5),
    ),
}


class Network(nn.Module):
    """Two inputs, a hidden layer and batch normalisation, in double precision.

    No bias before the normalisation: its gradient is rounding alone, which Adam would blow up.
    """

    def __init__(self):
        super().__init__()
        self.hidden, self.norm, self.output = nn.Linear(5, 6, bias=False), nn.BatchNorm1d(6), nn.Linear(6, 1)
        self.double()

    def forward(self, x, z):
        return self.output(torch.tanh(self.norm(self.hidden(torch.cat([x, z], 1)))))


class Regression(Toy):
    """Its `kind` says where a member runs out of memory: in `build`, `step`, or `evaluate`.

    `full` is where all of them do, whatever their params say.
    """

    full: str | None = None

    def build(self, params, info):
        self._strike(params, "build")
        return Network()

    def loss(self, outputs, targets, params):
        self._strike(params, "step" if outputs.requires_grad else "evaluate")
        return super().loss(outputs, targets, params)

    def metrics(self):
        return {"rmse": MeanSquaredError(squared=False).set_dtype(torch.float64)}

    def _strike(self, params, where):
        if where in (params.get("kind"), self.full):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nand a second line")
        if params.get("kind") == f"bug in {where}":
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")


STACKS = {"loop": LoopStack, "vmap": lambda task, capacity: VmapStack(task, capacity, split(n=8))}


@pytest.fixture(params=STACKS)
def make(request):
    """Return a function that makes a stack; one more entry of STACKS holds another implementation to the contract."""
    return lambda capacity=4, **keys: STACKS[request.param](task(**keys), capacity)


def task(**keys):
    return Task(objective=Regression(), info=INFO, device=CPU, n_rows=N_ROWS, epochs=N_EPOCHS, **keys)


def split(seed=0, n=N_ROWS):
    generator = torch.Generator().manual_seed(seed)
    x, z = (torch.randn(n, width, generator=generator, dtype=torch.float64) for width in (3, 2))
    return Split(inputs={"x": x, "z": z}, targets=(x.sum(1, keepdim=True) * z[:, :1]).sin())


def member(number, learning_rate=0.01, optimizer="adam", **params):
    base = {"learning_rate": learning_rate, "batch_size": BATCH_SIZE}
    return Member(number=number, seed=100 + number, params=base | OPTIMIZERS[optimizer][0] | params)


def run(stack, rounds):
    """Train the stack's members for these rounds; return the losses of each step."""
    data = Batches(split(), CPU)
    return [
        stack.step(inputs, targets) for r in rounds for inputs, targets in data.epoch(BATCH_SIZE, order(N_ROWS, 7, r))
    ]


def alone(member, optimizer, rounds):
    """Train `member` as anybody would with torch alone; return its weights and buffers, and its losses."""
    torch.manual_seed(member.seed)
    network, data, losses = Network(), split(), []
    optimizer = OPTIMIZERS[optimizer][1](network.parameters(), member.params["learning_rate"])
    for r in rounds:
        rows = order(N_ROWS, 7, r)
        for start in range(0, N_ROWS, BATCH_SIZE):
            batch = rows[start : start + BATCH_SIZE]
            optimizer.zero_grad()
            loss = F.mse_loss(network(data.inputs["x"][batch], data.inputs["z"][batch]), data.targets[batch])
            loss.backward()
            if "max_grad_norm" in member.params:
                nn.utils.clip_grad_norm_(network.parameters(), member.params["max_grad_norm"])
            optimizer.step()
            losses.append(loss.item())
    return network.state_dict(), losses


def assert_same(state, expected):
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            state[name], tensor, rtol=TOLERANCE, atol=TOLERANCE, msg=lambda text, name=name: f"{name}: {text}"
        )


class TestContract:
    @pytest.mark.parametrize("optimizer", OPTIMIZERS)
    def test_each_member_learns_what_it_would_alone(self, make, optimizer):
        stack, members = make(), [member(0, 0.01, optimizer), member(1, 0.05, optimizer)]
        for each in members:
            stack.join(each)
        losses = torch.stack(run(stack, range(N_EPOCHS)))
        assert losses.shape == (N_EPOCHS * 3, 2)
        assert not losses.requires_grad
        for k, each in enumerate(members):
            weights, expected = alone(each, optimizer, range(N_EPOCHS))
            assert_same(stack.state(each), weights)
            assert losses[:, k].tolist() == pytest.approx(expected, rel=1e-10)
        assert not torch.equal(stack.state(members[0])["output.weight"], stack.state(members[1])["output.weight"])

    def test_each_members_gradients_are_clipped_to_a_norm_of_its_own(self, make):
        stack, norms = make(), (0.05, 0.5, 0)
        members = [member(n, 0.05, "sgd", max_grad_norm=norm) for n, norm in enumerate(norms)]
        for each in members:
            stack.join(each)
        run(stack, range(2))
        for each in members[:2]:
            assert_same(stack.state(each), alone(each, "sgd", range(2))[0])
        assert_same(stack.state(members[2]), alone(member(2, 0.05, "sgd"), "sgd", range(2))[0])  # 0: no clipping

    def test_who_joins_and_who_leaves_changes_nobody_else(self, make):
        stack, (first, second, third) = make(), [member(n, 0.01 * (n + 1)) for n in range(3)]
        stack.join(first)
        stack.join(second)
        run(stack, [0])
        stack.leave(first)
        run(stack, [1])
        stack.join(third)
        run(stack, [2, 3])
        assert set(stack.members) == {second, third}
        assert_same(stack.state(second), alone(second, "adam", [0, 1, 2, 3])[0])
        assert_same(stack.state(third), alone(third, "adam", [2, 3])[0])

    def test_evaluation_in_between_changes_nothing(self, make):
        stack, each = make(), member(0)
        stack.join(each)
        for r in range(3):
            run(stack, [r])
            stack.evaluate(Batches(split(1), CPU))
        assert_same(stack.state(each), alone(each, "adam", range(3))[0])

    def test_metrics_are_of_the_whole_set_in_evaluation_mode(self, make, monkeypatch):
        in_chunks = Batches.chunks
        monkeypatch.setattr(Batches, "chunks", lambda batches, size: in_chunks(batches, 7))
        stack, members, valid = make(), [member(0), member(1)], split(1)
        for each in members:
            stack.join(each)
        run(stack, [0, 1])
        for each, result in zip(members, stack.evaluate(Batches(valid, CPU)), strict=True):
            network = Network()
            network.load_state_dict(stack.state(each))
            with torch.no_grad():
                error = (network.eval()(*valid.inputs.values()) - valid.targets).square()
            of_batches = torch.stack([part.mean().sqrt() for part in error.split(7)]).mean().item()
            assert set(result) == {"loss", "rmse"}
            assert result["loss"] == pytest.approx(error.mean().item(), rel=1e-9)
            assert result["rmse"] == pytest.approx(math.sqrt(error.mean().item()), rel=1e-9)
            assert result["rmse"] != pytest.approx(of_batches, rel=1e-4)

    @pytest.mark.parametrize("first", [0, 1])
    def test_out_of_memory_in_building_is_one_members_fault_and_touches_no_other(self, make, first):
        stack, members = make(), [member(0), member(1), member(2)]
        members[first] = greedy = member(first, kind="build")
        for each in members:
            stack.join(each)
        losses = torch.stack(run(stack, [0, 1]))
        results = stack.evaluate(Batches(split(1), CPU))
        assert greedy.fault == FULL
        assert list(stack.members) == members
        others = [each for each in members if each is not greedy]
        assert [bool(result) for result in results] == [each is not greedy for each in members]
        for losses_of, each in zip(losses.T, members, strict=True):
            assert torch.isnan(losses_of).all() if each is greedy else torch.isfinite(losses_of).all()
        for each in others:
            assert each.fault is None
            assert_same(stack.state(each), alone(each, "adam", [0, 1])[0])
        stack.leave(greedy)
        assert list(stack.members) == others
        assert [bool(result) for result in stack.evaluate(Batches(split(1), CPU))] == [True, True]
        stack.join(late := member(3))
        run(stack, [2])
        assert_same(stack.state(late), alone(late, "adam", [2])[0])

    def test_members_that_all_run_out_of_memory_in_building_are_no_error(self, make):
        stack, members = make(), [member(n, kind="build") for n in range(2)]
        for each in members:
            stack.join(each)
        assert torch.isnan(run(stack, [0])[-1]).tolist() == [True, True]
        assert stack.evaluate(Batches(split(1), CPU)) == [{}, {}]
        assert [each.fault for each in members] == [FULL, FULL]

    @pytest.mark.parametrize("where", ["build", "step", "evaluate"])
    def test_any_other_error_is_a_bug_and_raised(self, make, where):
        """A stack that calls the loss under torch.func cannot tell a bug from what torch.func has no rule for."""
        stack, broken = make(), member(0, kind=f"bug in {where}")
        with pytest.raises((RuntimeError, NotStackable), match="shapes cannot be multiplied"):  # noqa: PT012
            stack.join(broken)
            run(stack, [0])
            stack.evaluate(Batches(split(1), CPU))
        assert broken.fault is None

    def test_a_state_is_a_copy_and_a_module_is_not(self, make):
        stack, each = make(), member(0)
        stack.join(each)
        before = stack.state(each)
        run(stack, [0])
        assert not torch.equal(before["output.weight"], stack.state(each)["output.weight"])
        assert torch.equal(stack.module(each).state_dict()["output.weight"], stack.state(each)["output.weight"])

    def test_it_takes_no_more_than_its_capacity(self, make):
        stack, first = make(capacity=1), member(0)
        stack.join(first)
        with pytest.raises(AssertionError):
            stack.join(member(1))
        assert list(stack.members) == [first]
        run(stack, [0])
        assert_same(stack.state(first), alone(first, "adam", [0])[0])


@pytest.mark.parametrize("where", ["step", "evaluate"])
def test_in_a_loop_out_of_memory_later_is_one_members_fault_too(where):
    stack, (first, greedy, last) = LoopStack(task(), 3), [member(0), member(1, kind=where), member(2)]
    for each in (first, greedy, last):
        stack.join(each)
    losses = run(stack, [0, 1])[-1]
    results = stack.evaluate(Batches(split(1), CPU))
    assert greedy.fault == FULL
    assert [bool(result) for result in results] == [True, False, True]
    assert torch.isfinite(losses).tolist() == [True, where == "evaluate", True]
    for each in (first, last):
        assert each.fault is None
        assert_same(stack.state(each), alone(each, "adam", [0, 1])[0])


def test_a_vmapped_step_that_runs_out_of_memory_is_raised_and_changes_no_member():
    """What one member's step needs all need: so it is nobody's fault, and they may train in smaller stacks."""
    given, members = task(), [member(0), member(1)]
    stack = VmapStack(given, 2, split(n=8))
    for each in members:
        stack.join(each)
    run(stack, [0])
    real = stacked_optim.step

    def full(*arguments):
        real(*arguments)  # the very last of what a step does
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stacked_optim, "step", full)
        with pytest.raises(torch.OutOfMemoryError):
            run(stack, [1])
    given.objective.full = "evaluate"
    with pytest.raises(torch.OutOfMemoryError):
        stack.evaluate(Batches(split(1), CPU))
    given.objective.full = None
    run(stack, [1])
    for each in members:
        assert each.fault is None
        assert_same(stack.state(each), alone(each, "adam", [0, 1])[0])


@pytest.mark.parametrize("first", [True, False])
def test_a_vmapped_stack_that_has_no_memory_for_its_slots_takes_nobody(monkeypatch, first):
    """At the first member, that gives the stack its shapes; or at a later one, which is tried beside the others.

    After the first, members of any structure may still join.
    """
    stack, (one, other) = VmapStack(task(), 2, split(n=8)), [member(0), member(1)]
    if not first:
        stack.join(one)
    monkeypatch.setattr(VmapStep, "forward", lambda *arguments: torch.empty(10**14))
    with pytest.raises(RuntimeError, match=r"allocate memory|not enough memory"):
        stack.join(other)
    monkeypatch.undo()
    assert list(stack.members) == ([] if first else [one])
    optimizer = "sgd" if first else "adam"
    stack.join(member(2, optimizer=optimizer))
    run(stack, [0])
    for each in stack.members:
        assert_same(stack.state(each), alone(each, optimizer, [0])[0])


class Plain(Regression):
    """The same in single precision; its loss says in which precision it was given the outputs."""

    def build(self, params, info):
        return nn.Linear(3, 1)

    def loss(self, outputs, targets, params):
        assert outputs.dtype == torch.float32
        return F.mse_loss(outputs, targets)

    def metrics(self):
        return {"rmse": MeanSquaredError(squared=False)}


@pytest.mark.parametrize("kind", [LoopStack, lambda task, capacity: VmapStack(task, capacity, single(8))])
def test_bf16_rounds_what_networks_compute_and_nothing_else(kind):
    losses, results = {}, {}
    for precision in ("float32", "bf16"):
        stack, each = kind(replace(task(precision=precision), objective=Plain()), 2), member(0)
        stack.join(each)
        losses[precision] = stack.step(list(single().inputs.values()), single().targets)
        assert all(weight.dtype == torch.float32 for weight in stack.state(each).values())
        (results[precision],) = stack.evaluate(Batches(single(), CPU))
    assert losses["bf16"].dtype == torch.float32
    assert losses["bf16"].item() != losses["float32"].item()
    assert losses["bf16"].item() == pytest.approx(losses["float32"].item(), rel=2e-2)
    assert results["bf16"] == pytest.approx(results["float32"], rel=2e-2)


def single(n=N_ROWS):
    rows = split(n=n)
    return Split(inputs={"x": rows.inputs["x"].float()}, targets=rows.targets.float())


def after(first, error):
    """Return `error` as it is when it was raised while `first` was handled."""
    try:
        try:
            raise first
        except Exception:
            raise error  # noqa: B904  # as torch's context managers do
    except Exception as raised:
        return raised


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("x"), True),
        (MemoryError(), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("not enough memory: you tried to allocate 4 bytes"), True),
        (
            torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
            True,
        ),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"), True),
        (RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`"), True),
        (RuntimeError("cuFFT error: CUFFT_ALLOC_FAILED"), True),
        (RuntimeError("CUDA error: CUSPARSE_STATUS_ALLOC_FAILED when calling `cusparseCreate(handle)`"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB, max allowed: 9.07 GB)"), True),
        (RuntimeError("Caught RuntimeError in pin memory thread for device 0.\n ... CUDA error: out of memory"), True),
        (
            after(torch.OutOfMemoryError("x"), RuntimeError("CUDA error: operation failed due to a previous error")),
            True,
        ),
        (after(RuntimeError("shapes"), RuntimeError("the trial failed")), False),
        (after(torch.OutOfMemoryError("x"), ValueError("too wide")), False),  # who catches it says what it is
        # an assertion on the device, or another driver, are said so too
        (RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"), False),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("shapes"), False),
        (KeyError("not enough memory"), False),
    ],
)
def test_what_out_of_memory_looks_like(error, expected):
    assert is_out_of_memory(error) is expected


class WithoutNorm(Regression):
    """A plain network: batch normalisation sees other batches when gradients are gathered over several."""

    def build(self, params, info):
        module = Network()
        module.norm = nn.Identity()
        return module


@pytest.mark.parametrize("schedule", [{}, {"schedule": "cosine", "max_grad_norm": 0.1}])
@pytest.mark.parametrize(("batch_size", "n"), [(4, 4), (8, 2), (6, 3), (40, 5), (3, 100)])
def test_gathered_gradients_are_those_of_all_rows_at_once(batch_size, n, schedule):
    def states(**params):
        stack = LoopStack(Task(objective=WithoutNorm(), info=INFO, device=CPU, n_rows=N_ROWS, epochs=3))
        each = member(0, **params, **schedule)
        stack.join(each)
        batches = Batches(split(), CPU)
        for epoch in range(3):
            for inputs, targets in batches.epoch(params["batch_size"], order(N_ROWS, 0, epoch)):
                stack.step(inputs, targets)
        return stack.state(each)

    gathered = states(batch_size=batch_size, accumulation_steps=n)
    assert_same(gathered, states(batch_size=min(batch_size * n, N_ROWS)))


def test_gathering_members_are_not_stacked():
    stack = VmapStack(task(), 2, single(8))
    with pytest.raises(NotStackable, match="gathered over several batches"):
        stack.join(member(0, accumulation_steps=2))


class Normed(Plain):
    def build(self, params, info):
        return nn.Sequential(nn.Linear(3, 8), params["norm"](8), nn.ReLU(), nn.Linear(8, 1))


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.LayerNorm])
def test_a_layer_that_fails_in_the_gradient_of_a_stack_trains_alone(norm):
    """Autocast leaves its inputs in two types, for which the gradient of several has no kernel."""
    stack = VmapStack(replace(task(precision="bf16"), objective=Normed()), 2, single(8))
    with pytest.raises(NotStackable, match=r"torch\.func cannot batch it"):
        stack.join(replace(member(0), params=member(0).params | {"norm": norm}))
    assert not stack.members


def test_a_build_that_takes_params_out_has_all_of_them_the_next_time():
    params = {"n": 3}
    task = Task(
        objective=Built(lambda params: nn.Linear(params.pop("n"), 1)), info=INFO, device=CPU, n_rows=12, epochs=2
    )
    assert [task.network(params).in_features for _ in range(2)] == [3, 3]
    assert params == {"n": 3}
