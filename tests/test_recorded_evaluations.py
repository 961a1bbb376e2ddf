"""An evaluation's forward pass in one CUDA graph, on stand-ins: the same outputs, whatever happens between epochs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from hpo.stacks import recording
from hpo.stacks.recording import ForwardReplay
from hpo.stacks.vmap_stack import VmapStack
from hpo.training.batches import Batches
from tests.graphs import Capture, Graph, NoWaiting, graphs  # noqa: F401  # a fixture
from tests.stacking import CPU, sines
from tests.test_recording import NETWORKS, REPLAYED, K, members, one_step, stack

Graphs = type[Capture]
N_VALIDATED, ROWS_AT_ONCE = 20, 8  # two pieces of 8 rows, one of 4


@pytest.fixture(autouse=True)
def pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(VmapStack, "_rows_at_once", lambda self: (ROWS_AT_ONCE, 2))


def pair(build: Callable[[Any], nn.Module], n: int = K) -> tuple[VmapStack, VmapStack]:
    """Return a stack that is recorded, and one that is not, of the same members."""
    made, plain = stack(build), stack(build, execution="eager")
    for each in (made, plain):
        for member in members(n):
            each.join(member)
    return made, plain


def assert_equal_evaluations(made: VmapStack, plain: VmapStack) -> None:
    validation = Batches(sines(N_VALIDATED, 1), CPU)
    got, expected = made.evaluate(validation), plain.evaluate(validation)
    assert [each["loss"] for each in got] == pytest.approx([each["loss"] for each in expected], rel=1e-12)
    assert all(each["loss"] > 0 for each in expected)


def forwards(made: VmapStack) -> list[ForwardReplay | str]:
    return list(made._opened._forwards.values())


@pytest.mark.parametrize("network", ["mlp", "conv_batchnorm", pytest.param("layernorm", marks=pytest.mark.slow)])
def test_evaluations_are_replayed_after_each_change_of_the_members(graphs: Graphs, network: str) -> None:  # noqa: F811
    made, plain = pair(NETWORKS[network], K - 1)

    def both(change: Callable[[VmapStack], Any]) -> None:
        for each in (made, plain):
            change(each)
        assert_equal_evaluations(made, plain)

    both(one_step)
    both(one_step)
    _, full, rest = Graph.made  # one for the steps, one for each size of a piece
    compared = full.n_replays, rest.n_replays
    both(one_step)
    assert (full.n_replays, rest.n_replays) == (compared[0] + 2, compared[1] + 1)
    both(lambda each: each.join(members(K)[-1]))
    both(one_step)
    both(lambda each: each.leave(each.members[1]))
    both(one_step)
    assert len(Graph.made) == 3
    both(lambda each: each.resize(8))  # into new tensors, in which nothing is recorded before the next step
    assert not forwards(made)
    both(one_step)
    assert len(Graph.made) == 6
    assert made.path == REPLAYED


def test_recording_an_evaluation_changes_nothing_of_the_state_nor_of_the_random_numbers(
    graphs: Graphs,  # noqa: F811
) -> None:
    made, plain = pair(NETWORKS["conv_batchnorm"])
    for each in (made, plain):
        one_step(each)
    before = tree_map(torch.clone, made._slots.state)
    torch.manual_seed(5)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert_equal_evaluations(made, plain)
    assert torch.equal(torch.rand(1), drawn)
    assert tree_map(torch.equal, made._slots.state, before) == tree_map(lambda x: True, before)


def test_an_evaluation_reads_its_results_and_waits_for_nothing_else(graphs: Graphs) -> None:  # noqa: F811
    made, _ = pair(NETWORKS["mlp"])
    one_step(made)
    validation = Batches(sines(N_VALIDATED, 1), CPU)
    made.evaluate(validation)
    with NoWaiting(lists=1):  # of the losses; the objective has no metric
        made.evaluate(validation)


class ReadsInEvaluation(nn.Module):
    """Makes a tensor of numbers in evaluation, which waits for a GPU."""

    def forward(self, x: Tensor) -> Tensor:
        return x if self.training else x * torch.tensor([2.0] * 6, dtype=x.dtype)


def test_an_evaluation_that_waits_is_done_as_it_is_and_said(graphs: Graphs) -> None:  # noqa: F811
    def build(params: Any) -> nn.Module:
        return nn.Sequential(ReadsInEvaluation(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1))

    made, plain = pair(build)
    for _ in range(2):
        for each in (made, plain):
            one_step(each)
        assert_equal_evaluations(made, plain)
    why = "RuntimeError: called a synchronizing CUDA operation"
    assert made.path == f"{REPLAYED}; evaluated as it is: {why}"
    assert not recording._given_up
    assert len(graphs.arguments) == 1  # the step


def broken(how: str) -> Callable[[ForwardReplay, Any], Any]:
    """Return a ForwardReplay.__call__ with a fault."""

    def call(self: ForwardReplay, inputs: Any) -> Any:
        if how != "inputs":
            self._inputs[0].copy_(inputs[0])
        stale = tree_map(torch.clone, self._outputs)
        if how != "empty":
            self._graph.replay()
        return stale if how == "outputs" else tree_map(torch.clone, self._outputs)

    return call


@pytest.mark.parametrize("fault", ["inputs", "outputs", "empty"])
def test_a_replay_that_is_not_the_forward_pass_is_found_and_not_used(
    graphs: Graphs,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    fault: str,
) -> None:
    monkeypatch.setattr(ForwardReplay, "__call__", broken(fault))
    made, plain = pair(NETWORKS["mlp"])
    for each in (made, plain):
        one_step(each)
    assert_equal_evaluations(made, plain)
    assert forwards(made) == ["replayed it differs"] * 2
    assert made.path == f"{REPLAYED}; evaluated as it is: replayed it differs"


def test_memory_that_runs_out_while_an_evaluation_is_recorded_makes_its_pieces_smaller(
    graphs: Graphs,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real, tried = ForwardReplay.__init__, list[int]()

    def init(self: ForwardReplay, run: Any, state: Any, inputs: Any) -> None:
        tried.append(len(inputs[0]))
        if len(inputs[0]) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        real(self, run, state, inputs)

    monkeypatch.setattr(ForwardReplay, "__init__", init)
    made, plain = pair(NETWORKS["mlp"])
    for each in (made, plain):
        one_step(each)
    assert_equal_evaluations(made, plain)
    assert tried == [8, 4]
    assert made._most_rows == 4 * K
    assert made.path == REPLAYED
