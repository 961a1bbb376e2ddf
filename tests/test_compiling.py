"""When a stack's steps are compiled: once that pays, by what was measured, and by one process at a time."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hpo.stacks import cost
from hpo.stacks.compiling import TIMED_STEPS, Decision
from hpo.stacks.cost import compile_pays
from hpo.stacks.vmap_step import VmapStep
from hpo.training.batches import Batches
from hpo.training.loop import order
from hpo.training.stack import Stack
from tests.graphs import Capture, graphs  # noqa: F401  # a fixture
from tests.stacking import CPU, sines
from tests.test_recording import MANY_ROWS, NETWORKS, REPLAYED, members, stack

CUDA = torch.device("cuda", 0)


def test_a_step_of_many_operations_takes_the_longer_to_compile():
    assert compile_pays(10_000, CPU, 1.5e-3, n_operations=276)
    assert not compile_pays(10_000, CPU, 1.5e-3, n_operations=959)
    assert compile_pays(100_000, CPU, 1.5e-3, n_operations=959)


def captured(code: str = "code", n_operations: int = 1) -> Callable[[], tuple[str, int]]:
    return lambda: (code, n_operations)


def test_one_process_compiles_a_step_and_the_others_train_on_meanwhile(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    one, other, third = (Decision(CPU) for _ in range(3))
    for each in (one, other, third):
        assert not each.expect(1e6, 4, captured())
    assert [one.after(0.01, captured()) for _ in range(TIMED_STEPS)] == [False] * (TIMED_STEPS - 1) + [True]
    assert not any(other.after(0.01, captured()) for _ in range(3 * TIMED_STEPS))
    assert any(third.after(0.01, captured("other code")) for _ in range(TIMED_STEPS))
    one.done()
    assert [other.after(0.01, captured()) for _ in range(TIMED_STEPS)][-1]
    assert not any(other.after(0.01, captured()) for _ in range(3 * TIMED_STEPS)), "it was decided"


@pytest.mark.parametrize(("left", "compiles"), [(1000.0, True), (30.0, False)])
def test_what_takes_much_of_the_time_that_is_left_is_not_compiled(tmp_path: Path, monkeypatch, left, compiles) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    one = Decision(CPU)
    one.left = lambda: left
    one.expect(1e6, 4, captured())
    assert any(one.after(0.01, captured()) for _ in range(TIMED_STEPS)) == compiles
    one.done()
    assert one.expect(1e9, 1, captured()), "a single trial's result must not follow from the clock"


def test_where_no_lock_can_be_made_each_process_compiles(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "file"))
    one = Decision(CPU)
    one.expect(1e6, 4, captured())
    assert [one.after(0.01, captured()) for _ in range(TIMED_STEPS)][-1]


@pytest.fixture
def unmeasured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No other process is seen to compile."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


def test_where_steps_are_recorded_epochs_are_timed_but_for_those_that_record(unmeasured: None) -> None:
    one, slots = Decision(CUDA), 64
    assert not one.expect(200_000, slots, captured())
    assert not one.after_epoch(90.0, 1000, (slots, False), captured()), "it was recorded meanwhile"
    assert one.after_epoch(0.5, 1000, (slots, False), captured()), "25 s are half of 198,000 steps of 0.5 ms"
    one.done()
    assert not one.after_epoch(60.0, 1000, (slots, True), captured()), "it was compiled meanwhile"
    assert cost._saved == {}
    assert not one.after_epoch(0.1, 1000, (slots, True), captured())
    assert cost._saved[CUDA] == pytest.approx([0.8])
    assert not one.after_epoch(0.2, 1000, (slots, True), captured())
    assert len(cost._saved[CUDA]) == 1


@pytest.mark.parametrize(("n_steps", "seconds", "pays"), [(90_000, 0.5, False), (90_000, 0.6, True), (9_000, 5, False)])
def test_what_a_step_takes_on_this_device_decides(unmeasured: None, n_steps: int, seconds: float, pays: bool) -> None:
    one = Decision(CUDA)
    one.expect(n_steps + 2000, 64, captured())
    one.after_epoch(seconds, 1000, (64, False), captured())
    assert one.after_epoch(seconds, 1000, (64, False), captured()) is pays
    assert not one.after_epoch(seconds, 1000, (64, False), captured()), "a peer compiles it, or it is decided"


def test_what_compiling_took_and_saved_in_this_process_decides_of_the_next_stack(unmeasured: None) -> None:
    def decided(n_steps: int = 202_000) -> bool:
        one = Decision(CUDA)
        one.expect(n_steps, 64, captured())
        one.after_epoch(0.5, 1000, (64, False), captured())
        pays = one.after_epoch(0.5, 1000, (64, False), captured())
        one.done()
        return pays

    assert decided()
    cost.note_compiled(CUDA, 60.0, 100)
    assert not decided()
    cost.note_saved(CUDA, 1e-3, 0.3e-3)
    assert decided()
    cost.note_compiled(CUDA, 2.0, 100)  # found in a cache
    assert not decided(170_000)
    cost.note_saved(CUDA, 1e-3, 0.9e-3)
    assert not decided()
    assert compile_pays(100_000, CUDA), "counted, it does not follow from the clock"
    assert not compile_pays(99_000, CUDA)
    other = torch.device("cuda", 1)
    assert compile_pays(202_000, other, 0.5e-3)


def test_a_step_of_many_operations_is_no_measure_of_a_usual_one(unmeasured: None) -> None:
    cost.note_compiled(CUDA, 90.0, 900)
    assert compile_pays(50_000, CUDA, 0.5e-3, 100)
    assert not compile_pays(30_000, CUDA, 0.5e-3, 100)


def test_a_step_that_was_timed_is_compiled_at_once_for_the_next_trials(unmeasured: None) -> None:
    one = Decision(CUDA)
    one.expect(20_000, 64, captured())
    one.after_epoch(0.5, 1000, (64, False), captured())
    assert not one.after_epoch(0.5, 1000, (64, False), captured())
    assert not one.expect(20_000, 64, captured())
    assert not one.expect(200_000, 32, captured()), "of so many slots none was timed"
    assert one.expect(200_000, 64, captured())
    again = one.expect(200_000, 64, captured())
    assert again, "what was decided before, and not done, takes no turn from itself"


@pytest.mark.parametrize(("left", "pays"), [(1000.0, True), (100.0, False)])
def test_where_steps_are_recorded_what_takes_much_of_the_time_left_is_not_compiled(
    unmeasured: None, left: float, pays: bool
) -> None:
    one = Decision(CUDA)
    one.left = lambda: left
    one.expect(1e9, 64, captured())
    one.after_epoch(0.5, 1000, (64, False), captured())
    assert one.after_epoch(0.5, 1000, (64, False), captured()) is pays


def test_a_stack_whose_steps_are_recorded_is_compiled_after_the_epoch_that_was_timed(
    graphs: type[Capture],  # noqa: F811
    unmeasured: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An epoch is the same whichever form its steps have, and nothing waits for a turn that was taken."""
    monkeypatch.setattr(VmapStep, "_compile", lambda self, graph, *batch: graph)
    made, plain = stack(NETWORKS["mlp"]), stack(NETWORKS["mlp"], execution="eager")
    batches, paths = Batches(sines(MANY_ROWS), CPU), []
    for each in (made, plain):
        for member in members():
            each.join(member)
    made.expect(1e9)
    for number in range(5):
        rows = order(MANY_ROWS, 7, number)
        losses = made.epoch(batches, rows, lambda: False)
        assert losses == pytest.approx(Stack.epoch(plain, batches, rows, lambda: False), abs=1e-12)
        paths.append(made.path)
    compiled = REPLAYED.replace("captured", "compiled")
    assert paths == [REPLAYED, None, compiled, compiled, compiled]  # None: it is compiled at the next step
    assert made.compiling._turn is None
    assert len(cost._saved[CPU]) == 1
    made.resize(2 * made.capacity)
    made.expect(1e9)
    made.epoch(batches, order(MANY_ROWS, 7, 0), lambda: False)
    assert made.path == REPLAYED


def test_how_long_compiling_took_is_noted_where_steps_are_recorded(
    graphs: type[Capture],  # noqa: F811
    unmeasured: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("hpo.stacks.vmap_step.CompiledStep", Uncompiled)
    made = stack(NETWORKS["mlp"], execution="compiled")
    for member in members():
        made.join(member)
    made.epoch(Batches(sines(MANY_ROWS), CPU), order(MANY_ROWS, 7, 0), lambda: False)
    assert made.path == REPLAYED.replace("captured", "compiled")
    (seconds,) = cost._compiled[CPU]
    assert seconds > 0


class Uncompiled:
    """As CompiledStep, of a graph that is run as it is."""

    def __init__(self, graph: object, *batch: object) -> None:
        self._graph = graph

    def fits(self, n_slots: int, n_rows: int) -> bool:
        return False

    def __call__(self, *batch: object) -> object:
        return self._graph(*batch)
