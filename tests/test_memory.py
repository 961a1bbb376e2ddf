"""Memory that is not there: a network too large for it is refused before it is made, and fails alone."""

import gc
import weakref
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
from torch import nn

from hpo.runner.prepare import prepare
from hpo.stacks.alone import NotStackable
from hpo.stacks.candidate import candidates
from hpo.stacks.draws import looked_at
from hpo.stacks.padding import PaddingPlan
from hpo.study.space import build as build_space
from hpo.study.spec import parse_param
from hpo.training import memory
from hpo.training.memory import Within, free_all, free_bytes, is_out_of_memory, n_bytes
from tests.cli import invoke, refused, summary

CPU = torch.device("cpu")
HUGE = '''
"""A network whose width is beyond all memory at the upper end of its space."""

import torch
from torch import nn
from torch.nn import functional as F
from torchmetrics.regression import R2Score

from hpo.study.data import Data, Split
from hpo.study.objective import Objective


class Huge(Objective):
    defaults = {"optimizer": "sgd", "learning_rate": 0.01, "batch_size": 16, "width": 16, "kind": "linear"}
    space = {"width": {"type": "int", "low": 16, "high": 1_000_000, "log": True}}

    def data(self):
        x = torch.randn(96, 4, generator=torch.Generator().manual_seed(0))
        parts = [slice(0, 32), slice(32, 64), slice(64, 96)]
        return Data(*(), **{n: Split(inputs={"x": x[p]}, targets=x[p].sum(1, keepdim=True))
                            for n, p in zip(("train", "valid", "test"), parts)})

    def build(self, params, info):
        width = params["width"] if params["width"] < 1000 else 1_000_000
        if params["kind"] == "python" and width > 1000:
            raise MemoryError
        if params["kind"] == "torch" and width > 1000:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: not enough memory: you tried")
        return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, width), nn.Linear(width, 1))

    def loss(self, outputs, targets, params):
        return F.mse_loss(outputs, targets)

    def metrics(self):
        return {"r2": R2Score()}
'''
TEXT = "objective: huge.py\ntrials: 8\nepochs: 2\nsampler: random\npruner: none\nseed: 1\n"
START = "start_with: [{width: 1000000}, {width: 20}, {width: 30}]\n"


@pytest.fixture
def huge(study):
    Path("huge.py").write_text(HUGE)
    return study


@pytest.mark.parametrize(
    ("stack", "kind"),
    [
        pytest.param(stack, kind, marks=() if kind == by_default else pytest.mark.slow)
        for stack, by_default in (("4", "linear"), ("1", "torch"), ("auto", "python"))
        for kind in ("linear", "python", "torch")
    ],
)
def test_a_configuration_that_memory_has_no_room_for_fails_alone(huge, stack, kind):
    space = f"params: {{kind: {kind}, width: {{type: int, low: 16, high: 1000000, log: true}}}}\n"
    output = invoke("run", huge(f"{TEXT}{START}{space}stack: {stack}\n"), "--json")
    trials = summary(output)["trials"]
    assert trials["failed"] >= 1
    assert trials["complete"] >= 2
    assert trials["complete"] + trials["failed"] == 8
    assert "out of memory on cpu: " in output
    assert "from now on" not in output  # stacks are not made smaller for it, nor others begun again


def test_small_ones_are_stacked_beside_the_one_that_is_too_large(huge, monkeypatch):
    from hpo.stacks.vmap_stack import VmapStack

    sizes, real = [], VmapStack.step

    def step(self, inputs, targets):
        sizes.append(len(self.members))
        return real(self, inputs, targets)

    monkeypatch.setattr(VmapStack, "step", step)
    path = huge(
        f"{TEXT}start_with: [{', '.join(f'{{width: {w}}}' for w in (999999, 20, 22, 24, 26, 28, 30, 31))}]\nstack: 8\n"
    )
    assert summary(invoke("run", path, "--json"))["trials"] == {
        "complete": 7,
        "failed": 1,
        "pruned": 0,
        "running": 0,
        "paused": 0,
        "waiting": 0,
    }
    assert max(sizes) == 7


def test_check_says_which_corners_are_too_large_and_refuses_a_space_that_is_so_as_a_whole(huge):
    output = invoke("check", huge(TEXT))
    assert "build with width=1000000 failed: MemoryError: it asks for 4,000.0 GB at once, and " in output
    assert "such trials will be ended, the others will be trained" in output
    assert "nothing is wrong" in output
    path = huge(f"{TEXT}params: {{width: {{type: int, low: 2000, high: 3000}}}}\n")
    for command in ("check", "run"):
        assert (
            "no extreme configuration of the space can be trained; objective huge.py: build with width=2000"
            in refused(command, path)
        )


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Linear(10**6, 10**6),
        lambda: torch.zeros(10**12),
        lambda: torch.full((10**9, 10**9), 1.0),
        lambda: torch.randn(10**18, 10**18),
        lambda: torch.zeros(3).new_empty(10**12),
        lambda: nn.Embedding(10**10, 100),
    ],
)
def test_what_is_too_large_is_not_made(make):
    with pytest.raises(MemoryError, match=r"it asks for .* GB at once, and .* are free"), Within():
        make()


def test_what_is_small_or_takes_no_memory_is_made():
    with Within():
        assert n_bytes(nn.Linear(3, 4)) == 4 * 16
        assert torch.empty(10**12, device="meta").shape == (10**12,)
        assert torch.zeros(3).expand(10**9, 3).shape == (10**9, 3)
        assert torch.rand(()).ndim == 0
    with pytest.raises(MemoryError, match=r"^0.0 MB are more than the 0.0 MB that it may take$"), Within(most=100):
        nn.Linear(3, 7)


def test_a_network_that_fits_but_cannot_be_trained_fails_before_it_is(huge, monkeypatch):
    monkeypatch.setattr("hpo.training.loop_stack._LARGE", 1)
    monkeypatch.setattr("hpo.training.loop_stack.free_bytes", lambda device: 200_000)
    path = huge(f"{TEXT}start_with: [{{width: 900}}, {{width: 20}}]\ntrials: 2\nstack: 1\n".replace("trials: 8\n", ""))
    output = invoke("run", path, "--json")
    assert "out of memory on cpu: to train its 3.3 MB takes 6.5 MB more, and 0.2 MB are free" in output
    assert summary(output)["trials"]["complete"] == 1


def test_those_are_looked_at_that_may_be_held_at_once(monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1_000_000)
    monkeypatch.setattr("hpo.stacks.draws.free_bytes", lambda device: 1_000_000)
    build = lambda params: nn.Linear(1, params["n"], bias=False)  # noqa: E731
    sizes = lambda *several: looked_at([{"n": n} for n in several], build)  # noqa: E731
    assert sizes(1000, 2000, 3000) == ([{"n": 1000}, {"n": 2000}, {"n": 3000}], 0)
    assert sizes(1000, 30_000, 3000) == ([{"n": 1000}, {"n": 3000}], 1)
    assert sizes(20_000, 20_000, 20_000) == ([{"n": 20_000}, {"n": 20_000}], 0)
    assert sizes(10**12, 10**13) == ([], 2)


@pytest.mark.parametrize(
    "entry", [{"type": "int", "low": 16, "high": 10**6}, {"type": "categorical", "choices": [32, 10**6, 64]}]
)
def test_the_common_structure_of_a_space_that_is_too_large_is_that_of_its_smaller_networks(entry):
    space, faults = build_space({"width": parse_param(entry)}, ())
    assert not faults
    built = []

    def build(params):
        built.append(params["width"])
        return nn.Sequential(nn.Linear(4, params["width"]), nn.Tanh(), nn.Linear(params["width"], params["width"]))

    plan = PaddingPlan(space, build)
    one, other = (plan.loosest(build(p), p) for p in ({"width": 33}, {"width": 40}))
    padded = {"int": (64, 4), "categorical": (33, 4)}[entry["type"]]  # choices are no widths to round up
    assert one.shapes["0.weight"] == padded
    assert (one.signature == other.signature) == (entry["type"] == "int")


def test_memory_that_holds_copies_of_files_is_free(tmp_path, monkeypatch):
    for name, text in {"max": "1000000", "now": "900000", "stat": "anon 5\ninactive_file 400000\n"}.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(memory, "_CGROUPS", [tuple(str(tmp_path / name) for name in ("max", "now", "stat"))])
    assert free_bytes(CPU) == 500_000
    (tmp_path / "max").write_text("max")
    assert free_bytes(CPU) > 500_000


def test_every_way_to_say_that_there_is_no_memory_is_understood():
    for call in (lambda: torch.empty(2**60), lambda: torch.empty(2**40, 2**40), lambda: bytearray(2**60)):
        with pytest.raises((RuntimeError, MemoryError)) as caught:
            call()
        assert is_out_of_memory(caught.value), caught.value


@pytest.mark.parametrize(
    ("device", "error", "alone"),
    [
        ("cuda", torch.OutOfMemoryError("CUDA out of memory"), False),
        ("cuda", torch.AcceleratorError("CUDA error: out of memory"), False),
        ("cuda", RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), False),
        ("mps", RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB)"), False),
        ("cuda", MemoryError("it asks for 4,000.0 GB at once, and 9.0 GB are free"), True),
        ("cuda", RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), True),
        ("cpu", RuntimeError("DefaultCPUAllocator: not enough memory: you tried"), True),
        ("cpu", RuntimeError("out of memory"), True),
        ("cpu", RuntimeError("shapes"), False),
    ],
)
def test_a_full_gpu_is_no_reason_to_train_one_network_alone(monkeypatch, device, error, alone):
    def fails(*args):
        raise error

    monkeypatch.setattr("hpo.stacks.candidate.candidate", fails)
    task, member = MagicMock(device=torch.device(device)), MagicMock()
    with pytest.raises(NotStackable if alone else type(error)):
        next(candidates(task, member, [MagicMock()], MagicMock()))


def test_a_plan_of_it_is_made(huge):
    assert prepare(huge(TEXT)).space.corners()[1]["width"] == 1_000_000


def test_what_torch_holds_of_a_gpu_and_nobody_uses_is_free(monkeypatch):
    cuda = torch.device("cuda:1")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 80_000) if device == cuda else (0, 0))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 700)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 300)
    assert free_bytes(cuda) == 1400


def test_what_is_in_a_circle_is_given_back(monkeypatch):
    emptied = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(held()))

    class Graph:
        pass

    graph = Graph()
    graph.itself, held = graph, weakref.ref(graph)
    gc.disable()
    try:
        del graph
        assert held() is not None
        free_all(torch.device("cuda:0"))
    finally:
        gc.enable()
    assert emptied == [None]  # collected first, so that torch has it to give back


def test_a_cache_that_cannot_be_emptied_ends_no_study(monkeypatch):
    def fails():
        raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED")

    monkeypatch.setattr(torch.cuda, "empty_cache", fails)
    free_all(torch.device("cuda:0"))
