"""How many trials at once: the fastest of what was measured, and nothing measured where that would not pay."""

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import nn

from hpo.errors import Interrupted
from hpo.runner.prepare import prepare
from hpo.runner.progress import NoProgress
from hpo.runner.worker import work
from hpo.search.opening import open_search
from hpo.search.schema import STACK
from hpo.stacks import draws, sizing
from hpo.stacks.alone import NotStackable
from hpo.stacks.candidate import candidate
from hpo.stacks.cost import SIZES
from hpo.stacks.padding import Padder, PaddingPlan
from hpo.stacks.pool import Pool
from hpo.stacks.recording import EpochReplay
from hpo.stacks.sizing import Sizing, StackSize
from hpo.stacks.vmap_stack import VmapStack
from hpo.study.data import Split
from hpo.study.space import build as build_space
from hpo.study.spec import UNBOUNDED, parse_param
from hpo.tracking.base import MemoryTracker
from hpo.training.batches import Batches
from hpo.training.stack import Task
from tests.graphs import Capture, graphs  # noqa: F401  # a fixture
from tests.logged import recorded
from tests.searches import StopWhen
from tests.stacking import CPU, INFO, Toy

ROWS = Split(inputs={"x": torch.randn(40, 4)}, targets=torch.zeros(40, 1))


class Line(Toy):
    """A hidden layer, if any, and a line."""

    def build(self, params, info):
        kinds = {"none": nn.Identity(), "layer": nn.Dropout(0.0), "function": Masked(), "noise": Noisy()}
        after = kinds[params.get("dropout", "none")]
        return nn.Sequential(nn.Linear(4, params["width"]), nn.Tanh(), after, nn.Linear(params["width"], 1))

    def loss(self, outputs, targets, params):
        return super().loss(outputs, targets, params) * float(params.get("weight", 1.0))


class Noisy(nn.Module):
    def forward(self, x):
        return x + torch.randn_like(x) if self.training else x


class Masked(nn.Module):
    def forward(self, x):
        return nn.functional.dropout(x, 0.2, self.training)


def sized(n_trials: int = 1000, most: int = 1000, n_draws: int = 16, **params: Any) -> Sizing:
    """Return a Sizing of this many trials of a space with these params beside or in place of the usual ones."""
    entries = {"optimizer": "adam", "learning_rate": 0.01, "batch_size": 8, "width": 8, **params}
    space, faults = build_space({name: parse_param(entry) for name, entry in entries.items()}, ())
    assert not faults
    task = Task(objective=Line(), info=INFO, device=CPU, n_rows=40, epochs=2)
    batches = Batches(ROWS, CPU)
    plans = {
        g: PaddingPlan(space, lambda params: task.objective.build(params, task.info), g) for g in ("fine", "coarse")
    }
    return Sizing(
        task=task,
        batches=batches,
        example=batches.head(8),
        plan_of=plans.__getitem__,
        draws=space.draw(min(n_draws, n_trials), 0),
        n_trials=n_trials,
        most=most,
    )


class Clock:
    """Stands for the measuring: a trial alone takes `alone` seconds, in a stack of K one takes alone / gains[K].

    To begin a stack takes `to_begin` seconds.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, gains: Any, alone: float = 100.0, to_begin: float = 0) -> None:
        self.asked: list[tuple[str, int]] = []
        self.groups: list[int] = []

        def stacked(given: Sizing, group: Any, padder: Padder, capacity: int, shared: float) -> Any:
            padding = "fine" if padder is given.plan_of("fine").loosest else "coarse"
            self.asked.append((padding, capacity))
            self.groups.append(len(group))
            gain = gains.get(padding, gains).get(capacity)
            return None if gain is None else (to_begin, len(group) * alone / gain)

        monkeypatch.setattr(Sizing, "_seconds_alone", lambda given, member: alone)
        monkeypatch.setattr(Sizing, "_seconds_stacked", stacked)


def test_why_drawn_trials_share_no_stack_is_said() -> None:
    given = sized(n_trials=2, weight={"type": "float", "low": 1.0, "high": 2.0})
    (group,) = given._groups("fine")[0].values()
    with pytest.raises(NotStackable, match="the loss reads the param 'weight' as a number, so only trials with the"):
        given._seconds_stacked(group, given.plan_of("fine").loosest, 2, 1.0)


def test_networks_that_are_padded_can_be_tried_at_one_size_after_another() -> None:
    """To see what padding does their weights are moved, in the stack that is tried first."""
    given = sized(width={"type": "int", "low": 5, "high": 13}, learning_rate=RATE)
    group = max(given._groups("fine")[0].values(), key=len)
    assert group[0].is_padded
    for capacity in (16, 32):
        assert given._seconds_stacked(group, given.plan_of("fine").loosest, capacity, 1.0) is not None


RATE = {"type": "float", "low": 1e-3, "high": 1e-1}


@pytest.mark.parametrize(
    ("params", "n_tried"),
    [
        ({"learning_rate": RATE}, 1),
        ({"learning_rate": RATE, "width": {"type": "int", "low": 3, "high": 4}}, 2),
        ({"learning_rate": RATE, "weight": {"type": "float", "low": 1.0, "high": 2.0}}, 16),
        ({"learning_rate": RATE, "batch_size": {"type": "categorical", "choices": [4, 8]}}, 2),
        ({"learning_rate": RATE, "optimizer": {"type": "categorical", "choices": ["adam", "sgd"]}}, 2),
    ],
    ids=["what nobody reads", "what the network reads", "what the loss reads", "rows of a batch", "a name"],
)
def test_of_drawn_trials_those_are_tried_that_differ_in_what_is_read(monkeypatch, params, n_tried) -> None:
    tried = []
    monkeypatch.setattr(draws, "candidate", lambda *args: tried.append(args[1]) or candidate(*args))
    groups, reasons = sized(**params)._groups("fine")
    assert (len(tried), reasons) == (n_tried, [])
    several = [each.member for group in groups.values() for each in group]
    assert len({member.params["learning_rate"] for member in several}) == 16, "each has its own params"


def test_what_cannot_be_stacked_is_tried_twice_for_one_reason_only_once(monkeypatch) -> None:
    tried = []
    monkeypatch.setattr(draws, "candidate", lambda *args: tried.append(args[1]) or candidate(*args))
    groups, reasons = sized(learning_rate=RATE, optimizer="rprop")._groups("fine")
    assert (groups, len(reasons), len(set(reasons))) == ({}, 16, 1)
    assert "has no stacked form" in reasons[0]
    assert len(tried) == 17


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Clock]:
    return lambda gains, **more: Clock(monkeypatch, gains, **more)


@pytest.mark.parametrize(
    ("gains", "capacity", "last", "why"),
    [
        ({1: 0.9, 4: 3, 16: 8, 64: 4}, 16, 64, "16 trials at once: 8.0 times as fast as one after the other (meas"),
        ({1: 1.1, 4: 4, 16: 9, 64: 40, 256: 90}, 256, 256, "256 trials at once: 90.0 times as fast"),
        ({1: 0.5, 4: 0.9, 16: 0.8, 64: 0.8}, 1, 64, "one trial at a time: no stack is faster (measured)"),
        ({1: 1.9, 4: 1.0, 16: 2.0, 64: 2.1, 256: 9}, 64, 64, "64 trials at once: 2.1 times"),  # 5% more: that is all
        ({1: 1.9, 4: 3.0, 16: 2.1, 64: 2}, 4, 64, "4 trials at once: 3.0 times"),
        ({1: 3.0, 4: 2.0, 16: 2.1, 64: 2}, 1, 64, "one trial at a time, compiled: 3.0 times"),
        ({1: 9.0, 4: 3.0, 16: 4.1, 64: 3}, 16, 64, "16 trials at once: 4.1 times"),  # a single one is not so fast
        ({1: 1.0, 4: 2.0, 16: None, 64: 9}, 4, 16, "4 trials at once: 2.0 times"),  # no memory
        ({1: None}, 1, 16, "one trial at a time: no stack is faster (measured)"),
    ],
)
def test_the_fastest_size_is_chosen(clock, gains: Any, capacity: int, last: int, why: str) -> None:
    measuring = clock(gains)
    choice = sized().choose()
    assert (choice.capacity, choice.threads) == (capacity, None)
    assert choice.stacked == (capacity > 1 or "compiled" in choice.why)
    assert choice.why.startswith(why)
    assert max(size for _, size in measuring.asked) == last


def test_padding_all_to_the_largest_is_chosen_where_that_is_faster(clock) -> None:
    clock({"fine": {1: 1, 4: 1.5, 16: 1.5}, "coarse": {1: 1, 4: 2, 16: 5, 64: 4}})
    choice = sized(width={"type": "int", "low": 4, "high": 200}).choose()
    assert (choice.capacity, choice.padding) == (16, "coarse")
    assert choice.why == (
        "16 trials at once, all padded to the largest: 5.0 times as fast as one after the other (measured)"
    )


def test_of_k_trials_so_many_share_a_stack_as_are_of_one_kind(clock) -> None:
    """What a stack gains is measured at the size that it will have, not at that of all trials at once."""
    same = clock({1: 1, 4: 2, 16: 4, 64: 8, 256: 9})
    sized().choose()
    assert same.groups == [16, 64, 256]  # padded to the largest they would be the same
    mixed = clock({1: 1, 4: 2, 16: 4, 64: 8, 256: 9})
    sized(n_draws=64, optimizer={"type": "categorical", "choices": ["adam", "sgd"]}).choose()
    fine = [n for n, (padding, _) in zip(mixed.groups, mixed.asked, strict=True) if padding == "fine"]
    assert fine == pytest.approx([8, 32, 128], rel=0.1)


def test_what_it_takes_to_begin_a_stack_of_each_kind_is_counted(clock) -> None:
    """A thousand trials take 100,000 s alone and 25,000 s in stacks, of which there are four, one a batch size."""
    several = {"type": "categorical", "choices": [4, 8, 12, 16]}
    clock({1: 1.0, 16: 4.0}, to_begin=200.0)
    assert sized(batch_size=several, most=16).choose().why.startswith("16 trials at once: 3.9 times as fast")
    clock({1: 1.0, 16: 4.0}, to_begin=20_000.0)
    assert not sized(batch_size=several, most=16).choose().stacked


def test_a_short_study_is_not_measured(clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizing, "_SHARE", 1e9)  # however slow the machine is at the moment
    measuring = clock({}, alone=0.019)
    assert sized().choose() == StackSize(why="one trial at a time: all of it takes about 19 s")
    assert measuring.asked == []
    assert clock({1: 1, 4: 2}, alone=0.021).asked == []
    assert sized().choose().capacity == 4


def test_a_network_that_cannot_be_stacked_says_why(clock) -> None:
    clock({1: 9, 4: 9})
    choice = sized(optimizer="adadelta").choose()
    assert choice == StackSize(
        why="one trial at a time: optimizer adadelta has no stacked form; sgd, adam, adamw, rmsprop, adagrad have"
    )


@pytest.mark.parametrize(("most", "capacity"), [(1, 1), (15, 4), (16, 16), (100, 64)])
def test_no_stack_is_larger_than_the_sampler_allows(clock, most: int, capacity: int) -> None:
    measuring = clock({1: 1.0, 4: 4.0, 16: 16.0, 64: 64.0, 256: 256.0})
    assert sized(most=most).choose().capacity == capacity
    assert max(size for _, size in measuring.asked) <= most


def room(given: Sizing) -> int:
    return given._room_for(given._groups("coarse")[0])


def test_no_stack_is_larger_than_the_memory_allows(clock, monkeypatch: pytest.MonkeyPatch) -> None:
    clock({1: 1.0, 4: 4.0, 16: 16.0, 64: 64.0, 256: 256.0})
    given = sized()
    monkeypatch.setattr(sizing, "free_bytes", lambda device: 100_000_000)
    several = room(given)
    monkeypatch.setattr(sizing, "free_bytes", lambda device: 100_000_000 * 17 // several)
    assert room(given) in (16, 17)
    assert given.choose().capacity == 16
    monkeypatch.setattr(sizing, "free_bytes", lambda device: 1)
    assert room(given) == 1
    assert room(sized(optimizer="adadelta")) == 1


@pytest.mark.parametrize("dropout", ["none", "layer", "function", "noise"])
def test_one_at_a_time_is_compiled_only_where_that_draws_no_other_numbers(
    dropout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trial's curve must not follow from how many trials there are."""
    monkeypatch.setattr(Sizing, "_seconds_alone", lambda given, member: 0.001)  # on a busy machine a step is "large"
    given = sized(n_trials=10_000, dropout={"type": "categorical", "choices": [dropout]})
    assert given.given(1).stacked == (dropout == "none")
    assert not sized(n_trials=2).given(1).stacked
    assert given.given(4).stacked


def test_a_gpu_is_not_asked_how_long_a_step_takes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    given = sized()
    monkeypatch.setattr(Sizing, "_seconds_alone", lambda given, member: 100.0)
    assert given._has_large_steps()
    assert not replace(given, task=replace(given.task, device=torch.device("cuda")))._has_large_steps()


def test_on_a_gpu_sizes_are_tried_up_to_4096() -> None:
    assert SIZES["cuda"] == (*SIZES["cpu"], 1024, 4096)


@pytest.mark.parametrize(("device", "worth"), [("cuda", True), ("cpu", False)])
def test_a_trial_without_others_of_its_kind_is_stacked_on_a_gpu(device: str, worth: bool) -> None:
    pool = MagicMock(_task=MagicMock(device=torch.device(device)))
    pool._steps_left.return_value = 1
    stack = MagicMock(members=[])
    stack.is_compiled.return_value = False
    assert Pool._worth_stacking(pool, stack, [MagicMock()]) is worth


def test_measuring_takes_no_more_than_its_share_of_the_study(clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizing, "_SHARE", 0.0)
    measuring = clock({1: 1.0, 4: 4.0})
    assert not sized().choose().stacked
    assert measuring.asked == []


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let everything be measured in earnest, however short it is."""
    monkeypatch.setattr(sizing, "SHORT_SECONDS", 0.0)
    monkeypatch.setattr(sizing, "_SHARE", 1e9)
    monkeypatch.setattr(sizing, "SIZES", {"cpu": (1, 4)})


@pytest.mark.parametrize("schedule", ["constant", pytest.param("one_cycle", marks=pytest.mark.slow)])
def test_what_is_measured_in_earnest_gives_a_choice(measured, schedule: str) -> None:
    """A study of fewer steps than the measuring does is no fault, whatever its learning rate does."""
    choice = sized(n_trials=8, schedule=schedule).choose()
    assert choice.capacity in (1, 4)
    assert choice.why.endswith("(measured)")


def test_no_memory_for_a_stack_is_no_fault_and_any_other_error_is(measured, monkeypatch: pytest.MonkeyPatch) -> None:
    def strike(error: Exception) -> None:
        def step(self: VmapStack, inputs: Any, targets: Any) -> Any:
            raise error

        monkeypatch.setattr(VmapStack, "step", step)

    strike(torch.OutOfMemoryError("CUDA out of memory"))
    assert sized().choose() == StackSize(why="one trial at a time: no stack is faster (measured)")
    strike(RuntimeError("shapes"))
    with pytest.raises(RuntimeError, match="shapes"):
        sized().choose()


def test_where_many_steps_are_one_graph_a_stack_is_timed_by_epochs(
    graphs: type[Capture],  # noqa: F811
    measured: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One by one each waits for Python, which no step of an epoch does."""
    monkeypatch.setattr(sizing, "SIZES", {"cpu": (4,)})
    monkeypatch.setattr(sizing, "_PADDINGS", ("fine",))
    n_steps, real = list[int](), EpochReplay.__call__

    def called(replay: EpochReplay) -> None:
        n_steps.append(replay.n_steps)
        real(replay)

    monkeypatch.setattr(EpochReplay, "__call__", called)
    given = sized(n_trials=4)
    given = replace(given, batches=Batches(Split(inputs={"x": torch.randn(320, 4)}, targets=torch.zeros(320, 1)), CPU))
    assert given.choose().why.endswith("(measured)")
    assert set(n_steps) == {16}
    assert len(n_steps) > 8


TEXT = "trials: 6\nepochs: 2\nsampler: random\npruner: none\nstack: auto\n"


def run(study: Callable[..., Any], text: str = TEXT, **more: Any) -> tuple[list[str], Any, list[float]]:
    """Run a study; return what was said, what it remembers of its stacks, and its trials' values."""
    plan = prepare(study(text))
    search = open_search(plan.spec, plan.space, plan.metric, maximize=plan.maximize)
    try:
        with recorded() as said:
            work(plan, plan.load_data(), search, MemoryTracker(), NoProgress(), **more)
        return said, search.attrs.get(STACK), [trial.value for trial in search.study.get_trials()]
    finally:
        search.close()


def test_a_run_says_and_remembers_what_it_has_chosen(study, measured) -> None:
    said, remembered, values = run(study)
    assert remembered["choice"]["why"].endswith("(measured)")
    measuring = "stack: measuring how many trials to train at once"
    assert said == [measuring, f"stack: {remembered['choice']['why']}"]
    alone, nothing, expected = run(study, TEXT.replace("auto", "1") + "name: alone\n")
    assert (alone, nothing) == ([], None)
    assert values == pytest.approx(expected, abs=1e-6)


def test_a_short_run_is_not_measured_and_says_so(study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Sizing, "_seconds_stacked", None)
    said, remembered, _ = run(study)
    assert remembered["choice"] == asdict(StackSize(why="one trial at a time: all of it takes about 0 s"))
    assert said == [f"stack: {remembered['choice']['why']}"]


@pytest.mark.parametrize("text", ["timeout: 0.5\n", ""])
def test_measuring_ends_with_the_studys_time_and_where_it_is_to_stop(study, monkeypatch, text: str) -> None:
    """Each step takes 20 ms."""
    monkeypatch.setenv("LINEAR_SECONDS", "0.02")
    begun, stop = time.monotonic(), (lambda: time.monotonic() - begun > 0.5) if not text else (lambda: False)
    with contextlib.suppress(Interrupted):
        run(study, TEXT.replace("epochs: 2", "epochs: 1000") + text, stop=StopWhen(stop))
    assert time.monotonic() - begun < 6  # to measure all takes 15 s


def test_a_run_trains_in_stacks_of_the_size_that_was_chosen(study, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, real = [], VmapStack.step

    def step(self: VmapStack, inputs: Any, targets: Any) -> Any:
        sizes.append(len(self.members))
        return real(self, inputs, targets)

    monkeypatch.setattr(VmapStack, "step", step)
    monkeypatch.setattr(Sizing, "choose", lambda self: StackSize(capacity=3, stacked=True, why="because"))
    said, remembered, values = run(study)
    assert (said, remembered["choice"]["capacity"], len(values)) == (["stack: because", "stacks run captured"], 3, 6)
    assert set(sizes) == {3}


def test_a_study_that_goes_on_goes_on_as_it_began(study, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = StackSize(capacity=3, stacked=True, padding="coarse", shared=0.5, why="because")
    monkeypatch.setattr(Sizing, "choose", lambda self: chosen)
    first, remembered, _ = run(study)
    monkeypatch.setattr(Sizing, "choose", None)
    again, unchanged, values = run(study, TEXT.replace("trials: 6", "trials: 9"))
    assert unchanged == remembered
    assert remembered["choice"] == asdict(chosen)
    assert (again, len(values)) == (first, 9)


def test_a_size_that_an_earlier_version_stored_is_that_of_this_one() -> None:
    """Version 0.1 called the padding `grain`; what nobody has ever stored is refused, and chosen again."""
    earlier = {"capacity": 3, "stacked": True, "grain": "coarse", "shared": 0.5, "threads": None, "why": "because"}
    size = StackSize(capacity=3, stacked=True, padding="coarse", shared=0.5, why="because")
    assert StackSize.stored(earlier) == StackSize.stored(asdict(size)) == size
    with pytest.raises(TypeError):
        StackSize.stored(earlier | {"depth": 3})


def test_a_study_that_an_earlier_version_sized_is_resumed_as_it_began(study, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = StackSize(capacity=3, stacked=True, padding="coarse", shared=0.5, why="because")
    monkeypatch.setattr(Sizing, "choose", lambda self: chosen)
    monkeypatch.setattr(
        "hpo.runner.worker.asdict",
        lambda size: {"grain" if name == "padding" else name: value for name, value in asdict(size).items()},
    )
    _, remembered, _ = run(study)
    assert remembered["choice"]["grain"] == "coarse"
    monkeypatch.setattr(Sizing, "choose", None)
    again, _, values = run(study, TEXT.replace("trials: 6", "trials: 9"))
    assert (again, len(values)) == (["stack: because", "stacks run captured"], 9)


@pytest.mark.parametrize(("sampler", "most"), [("random", 40), ("tpe", 10), ("gp", 10), ("qmc", 40)])
def test_a_sampler_that_learns_has_some_rounds(study, monkeypatch, sampler: str, most: int) -> None:
    seen = []
    monkeypatch.setattr(Sizing, "choose", lambda self: seen.append(self) or StackSize(why="because"))
    text = TEXT.replace("random", sampler).replace("trials: 6", "trials: 40").replace("epochs: 2", "epochs: 1")
    with pytest.raises(Interrupted):
        run(study, text, stop=StopWhen(lambda: bool(seen)))
    assert [(each.most, each.n_trials, len(each.draws)) for each in seen] == [(most, 40, 40)]


@pytest.mark.parametrize(
    ("rounds", "seconds", "capacity"), [(1, math.inf, 64), (4, 3000, 16), (1, 3000, 64), (4, 340, 1)]
)
def test_in_so_much_time_all_slots_are_trained_several_times(monkeypatch, rounds, seconds, capacity) -> None:
    """A stack of 64 takes 1,000 s, one of 16 takes 640, one of 4 takes 320; alone a trial takes 100."""
    Clock(monkeypatch, {1: 1.0, 4: 1.25, 16: 2.5, 64: 6.4})
    given = replace(sized(n_trials=UNBOUNDED), most=UNBOUNDED, rounds=rounds, seconds=seconds)
    assert given.choose().capacity == capacity
