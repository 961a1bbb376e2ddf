"""An evaluation for which memory has no room is done with fewer rows at once, and gives the same.

Shapes: K slots, B rows.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hpo.stacks.rows import mixes_rows
from hpo.stacks.vmap_stack import VmapStack
from hpo.stacks.vmap_step import VmapStep
from hpo.study.data import Split
from hpo.training import evaluation
from hpo.training.batches import Batches
from hpo.training.evaluation import outputs_of
from hpo.training.stack import Member, Task
from tests.stacking import CPU, INFO, Built, sines

N_ROWS, BATCH_SIZE, K = 1000, 8, 4
FULL = "CUDA out of memory. Tried to allocate 2.00 GiB"


def build(params: Any) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1))


@pytest.fixture
def task() -> Task:
    return Task(objective=Built(build), info=INFO, device=CPU, n_rows=N_ROWS, epochs=1)


@pytest.fixture
def made(task: Task) -> VmapStack:
    stack = VmapStack(task, K, sines(8))
    for i in range(K - 1):
        params = {"optimizer": "adam", "batch_size": BATCH_SIZE, "learning_rate": 0.01}
        stack.join(Member(number=i, seed=i, params=params))
    return stack


class Room:
    """Of a device's memory: for how many rows of all members there is some, and how many were asked for."""

    most: float = 1e9

    def __init__(self) -> None:
        self.asked: list[int] = []

    def take(self, n_rows: int, n_members: int = 1) -> None:
        self.asked.append(n_rows)
        if n_rows * n_members > self.most:
            raise torch.OutOfMemoryError(FULL)


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> Iterator[Room]:
    own, real = Room(), VmapStep.forward

    def forward(self: VmapStep, state: Any, inputs: Any) -> Any:
        own.take(len(inputs[0]), len(state.t))
        return real(self, state, inputs)

    monkeypatch.setattr(VmapStep, "forward", forward)
    return own


def test_a_stack_is_evaluated_with_the_rows_that_memory_has_room_for(made: VmapStack, room: Room) -> None:
    batches = Batches(sines(N_ROWS, 1), CPU)
    expected = made.evaluate(batches)
    room.most = 300 * K
    room.asked.clear()
    assert made.evaluate(batches) == [pytest.approx(each, rel=1e-12) for each in expected]
    assert room.asked == [1000, 500, 250, 250, 250, 250]
    room.asked.clear()
    made.evaluate(batches)  # what was halved once stays so
    assert room.asked == [250] * 4
    room.asked.clear()
    made.leave(made.members[0])
    made.resize(K // 2)
    made.evaluate(batches)  # as many of all members together
    assert room.asked == [500, 500]


def test_memory_without_room_for_one_batch_is_out_of_memory(made: VmapStack, room: Room) -> None:
    room.most = BATCH_SIZE * K - 1
    with pytest.raises(torch.OutOfMemoryError, match=FULL):
        made.evaluate(Batches(sines(N_ROWS, 1), CPU))
    assert room.asked == [1000, 500, 250, 125, 62, 31, 15, 8]


def test_another_error_of_an_evaluation_is_raised_at_once(made: VmapStack, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fails(*arguments: Any) -> None:
        asked.append(1)
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(VmapStep, "forward", fails)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        made.evaluate(Batches(sines(N_ROWS, 1), CPU))
    assert len(asked) == 1


def test_on_a_gpu_an_evaluation_begins_with_rows_that_fit(made: VmapStack, monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_gpu = replace(made._task, device=torch.device("cuda:0"))
    assert made._row_bytes == (5 + 5 + 1) * 8
    assert made._rows_at_once() == (8192 // K, BATCH_SIZE)
    for total, rows in ((80e9, 2**20 // K), (1e6, int(0.1 * 1e6 / 88 / K)), (1e3, BATCH_SIZE)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, total=total: (0, total))
        with monkeypatch.context() as patch:
            patch.setattr(made, "_task", on_a_gpu)
            assert made._rows_at_once() == (rows, BATCH_SIZE)


class Large(nn.Module):
    """A network for which there is room or not."""

    def __init__(self, room: Room) -> None:
        super().__init__()
        self.room, self.inner = room, build({}).double()

    def forward(self, x: Tensor) -> Tensor:
        self.room.take(len(x))
        result: Tensor = self.inner(x)
        return result


def test_a_network_alone_is_evaluated_so_too(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    room, batches = Room(), Batches(sines(N_ROWS, 1), CPU)
    network = Large(room)
    expected = outputs_of(task, network, batches)
    room.most = 260
    room.asked.clear()
    torch.testing.assert_close(outputs_of(task, network, batches), expected)
    assert room.asked == [1000, 500, 250, 250, 250, 250]
    room.most = 10
    with pytest.raises(torch.OutOfMemoryError):
        outputs_of(task, network, batches)
    assert room.asked[-1] == evaluation._FEWEST_ROWS


def by(forward: Callable[[nn.Linear, Tensor], Tensor]) -> nn.Module:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return forward(self.inner, x)

    return Net()


def tokens(n: int) -> Split:
    return Split(inputs={"x": torch.arange(n * 4).view(n, 4) % 5}, targets=torch.zeros(n))


EMBEDDED = nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(12, 1))
EQUAL = Split(inputs={"x": torch.zeros(8, 6)}, targets=torch.zeros(8))


@pytest.mark.parametrize(
    ("network", "rows", "expected"),
    [
        (by(lambda inner, x: inner(x)), sines(8), False),
        (by(lambda inner, x: 1e-7 * inner(x)), sines(8), False),
        (by(lambda inner, x: inner(x.masked_fill(x > 0, torch.nan))), sines(8), False),
        (nn.Sequential(nn.Linear(6, 30), nn.BatchNorm1d(30), nn.ReLU(), nn.Linear(30, 9)), EQUAL, False),
        (EMBEDDED, tokens(8), False),
        (by(lambda inner, x: inner(x - x.mean(0))), sines(8), True),
        (by(lambda inner, x: inner(x) - 1e-7 * x.mean()), sines(8), True),
        (by(lambda inner, x: 1e-7 * inner(x - x.mean(0))), sines(8), True),
        (by(lambda inner, x: inner(x - x.mean(0)) if len(x) > 8 else inner(x)), sines(8), True),
        (by(lambda inner, x: inner(x) if len(x) % 2 else inner(x) + 1), sines(8), True),
        (nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4, track_running_stats=False)), EQUAL, True),
        (nn.Sequential(EMBEDDED, nn.BatchNorm1d(1, track_running_stats=False)), tokens(8), True),
    ],
)
def test_a_network_that_mixes_rows_is_found(task: Task, network: nn.Module, rows: Split, expected: bool) -> None:
    """However little it does so, with how many rows it begins, and though the first rows are all the same."""
    network = network.eval()
    if rows is not EQUAL and rows.inputs["x"].is_floating_point():
        network = network.double()
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    assert mixes_rows(task, network, rows) == expected
    for name, buffer in network.named_buffers():
        assert torch.equal(buffer, before[name])


class Centred(nn.Module):
    """Takes a share of the mean away, which a buffer holds."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.inner = build({})
        self.register_buffer("share", torch.tensor(share))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.inner(x - self.share * x.mean(0))
        return result


def test_a_stack_is_evaluated_as_alone_where_any_of_its_members_mixes_rows(task: Task) -> None:
    mixing = replace(task, objective=Built(lambda params: Centred(params["share"])))
    stack = VmapStack(mixing, K, sines(8))
    for i, share in enumerate((0.0, 0.0, 0.5)):
        assert not i or stack._rows_at_once()[0] == 8192 // K
        params = {"optimizer": "adam", "batch_size": BATCH_SIZE, "learning_rate": 0.01, "share": share}
        stack.join(Member(number=i, seed=i, params=params))
    assert stack._rows_at_once()[0] == 8192
