"""Epochs of many steps in one CUDA graph, on stand-ins: what is kept, drawn, resized and stopped between them."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from hpo.errors import Interrupted
from hpo.stacks import candidate, recording
from hpo.stacks.padding import unpadded
from hpo.stacks.vmap_stack import VmapStack
from hpo.training.batches import Batches
from hpo.training.loop import order
from hpo.training.stack import Stack
from tests.graphs import Capture, Graph, graphs  # noqa: F401  # a fixture
from tests.stacking import CPU, sines
from tests.test_recording import BATCH_SIZE, MANY_ROWS, NETWORKS, K, members, stack, task

Graphs = type[Capture]


class Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 0.1 * torch.randn_like(x) if self.training else x


def noisy(params: Any) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), Noise(), nn.Tanh(), nn.Linear(5, 1))


def joined(made: VmapStack, n: int = K) -> VmapStack:
    for member in members(n):
        made.join(member)
    return made


def test_what_is_kept_is_the_state_before_the_next_recorded_epoch(graphs: Graphs) -> None:  # noqa: F811
    made, batches = joined(stack(NETWORKS["mlp"])), Batches(sines(MANY_ROWS), CPU)
    made.epoch(batches, order(MANY_ROWS, 7, 0), lambda: False)
    before = [made.state(member) for member in made.members]
    kept = [made.keep(member) for member in made.members]
    made.epoch(batches, order(MANY_ROWS, 7, 1), lambda: False)
    for then, each in zip(before, kept, strict=True):
        got = each()
        assert all(torch.equal(got[name], then[name]) for name in then)


def test_after_a_change_of_size_an_epoch_is_recorded_on_the_new_state(graphs: Graphs) -> None:  # noqa: F811
    made = joined(stack(NETWORKS["mlp"]), 2)
    plain = joined(stack(NETWORKS["mlp"], execution="eager"), 2)
    batches = Batches(sines(MANY_ROWS), CPU)
    for number, capacity in enumerate((K, 2, K)):
        made.resize(capacity)
        for _ in range(2):
            rows = order(MANY_ROWS, 7, number)
            losses = made.epoch(batches, rows, lambda: False)
            assert losses == pytest.approx(Stack.epoch(plain, batches, rows, lambda: False), abs=1e-12)


def test_recording_draws_no_number_of_a_layer_that_draws(graphs: Graphs) -> None:  # noqa: F811
    made, batches = joined(stack(noisy)), Batches(sines(MANY_ROWS), CPU)
    run, state = recording.in_place(made._opened.eager), made._slots.state
    rows = torch.arange(8 * BATCH_SIZE).view(8, BATCH_SIZE)
    torch.manual_seed(5)
    drawn = torch.rand(1)
    for record in (
        lambda: recording.recorded(run, state, *batches.pick(rows[0]), 1e-9),
        lambda: recording.recorded_epoch(run, state, batches, rows, 8, 1e-9),
    ):
        torch.manual_seed(5)
        record()  # it is compared with the steps, on the same numbers
        assert torch.equal(torch.rand(1), drawn)


def never() -> bool:
    return False


def test_a_stop_is_heard_between_the_graphs_of_an_epoch(graphs: Graphs) -> None:  # noqa: F811
    n, asked = 40 * BATCH_SIZE, list[int]()
    made, batches = joined(stack(NETWORKS["mlp"])), Batches(sines(n), CPU)
    made.epoch(batches, order(n, 7, 0), never)
    many = Graph.made[1]
    before = many.n_replays
    made.epoch(batches, order(n, 7, 1), never)
    assert many.n_replays == before + 2
    with pytest.raises(Interrupted):
        made.epoch(batches, order(n, 7, 2), lambda: asked.append(1) or len(asked) > 1)  # type: ignore[func-returns-value]
    assert many.n_replays == before + 3


def test_many_steps_are_not_those_of_a_state_in_other_tensors(graphs: Graphs) -> None:  # noqa: F811
    made, batches = joined(stack(NETWORKS["mlp"])), Batches(sines(MANY_ROWS), CPU)
    made.epoch(batches, order(MANY_ROWS, 7, 0), never)
    equal = torch.arange(8 * BATCH_SIZE).view(8, BATCH_SIZE)
    state = made._slots.state
    assert made._opened.epoch(state, batches, equal, "graph") is not None
    assert made._opened.epoch(tree_map(torch.clone, state), batches, equal, "graph") is None


@pytest.mark.parametrize(
    ("version", "fails"),
    [("2.11.0+cu130", True), ("2.9.1", True), ("2.12.0", False), ("2.14.0.dev20261128+cpu", False), ("3.0.0", False)],
)
def test_torch_before_2_12_records_nothing_after_a_capture_that_failed(
    monkeypatch: pytest.MonkeyPatch, version: str, fails: bool
) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    assert recording._fails_ever_after() is fails


def test_where_steps_are_recorded_a_stack_needs_memory_for_the_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    (member,) = members(1)
    each = candidate.candidate(task(NETWORKS["mlp"]), member, unpadded, sines(8))
    plain = each.bytes_in_a_stack()
    monkeypatch.setattr(candidate, "records", lambda device: True)
    weights = 8 * (6 * 5 + 5 + 5 + 1)
    states = 3 * weights  # the weights, and two moments of Adam's
    assert each.bytes_in_a_stack() - plain == 4 * states
