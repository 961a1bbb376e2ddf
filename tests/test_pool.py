"""The pool: members divided into stacks by kind, each as it is alone, and never more of them than there is room for."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.regression import MeanSquaredError

from hpo.stacks.padding import PaddingPlan
from hpo.stacks.pool import WORTH_STACKING, Pool
from hpo.stacks.returning import Returning
from hpo.stacks.tensor_modules import RateDropout, tensor_dropout
from hpo.stacks.vmap_stack import VmapStack
from hpo.study.space import build as build_space
from hpo.study.spec import parse_param
from hpo.training.batches import Batches
from hpo.training.loop import train
from hpo.training.loop_stack import LoopStack
from hpo.training.stack import Member, SingleStack, Stack, Stacks, Task
from tests.stacking import CPU, INFO, Toy, assert_same_curves, one_by_one, sines, trained

N_ROWS, N_EPOCHS = 40, 3
SPACE = {
    "optimizer": "adam",
    "learning_rate": 0.01,
    "batch_size": 12,
    "kind": "mlp",
    "loss": "key",
    "scale": 1.0,
    "width": {"type": "int", "low": 4, "high": 40},
}


class Last(nn.Module):
    """The last output of an LSTM: torch.func has no rule for it."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.output = nn.LSTM(1, 3, batch_first=True), nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.lstm(x.unsqueeze(-1))[0][:, -1])


def local() -> nn.Module:
    """A network whose class is made anew for each."""

    class Local(nn.Sequential):
        pass

    return Local(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 1))


def mlp(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(6, width), nn.Sigmoid(), nn.BatchNorm1d(width), nn.Linear(width, 1))


def plain(width: int) -> nn.Module:
    """Return a network whose step is traced for any number of slots: BatchNorm's is not."""
    return nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 1))


def heads(width: int) -> nn.Module:
    if width % 6:
        raise ValueError(f"{width} does not divide into six heads")
    return mlp(width)


LOSSES: dict[str, Callable[[Any], Any]] = {
    "key": lambda params: params["scale"],
    "get": lambda params: params.get("scale", 2.0),
    "namespace": lambda params: SimpleNamespace(**params).scale,
    "items": lambda params: dict(params.items())["scale"],
    "copy": lambda params: (params | {"more": 1})["scale"],
    "not there": lambda params: params.get("no such", 2.0),
    "number": lambda params: float(params["scale"]),
    "set by default": lambda params: params.setdefault("no such", 2.0) * params.setdefault("scale", 3.0),
    "json": lambda params: len(json.dumps(params, sort_keys=True, default=str)) * 0 + params["scale"],
}
WRITES: dict[str, Callable[[Any], Any]] = {
    "pop": lambda params: params.pop("scale", 2.0),
    "count": lambda params: (params.update(n=params.get("n", 0) + 1), 0.9 ** params["n"])[1],
}


class Small(Toy):
    """A small regression in double precision; `loss` says in which way the loss reads its params."""

    def build(self, params, info):
        made = {
            "mlp": mlp,
            "plain": plain,
            "heads": heads,
            "lstm": lambda width: Last(),
            "local": lambda width: local(),
        }
        return made[params["kind"]](params["width"]).double()

    def loss(self, outputs, targets, params):
        return F.mse_loss(outputs, targets) * (LOSSES | WRITES)[params["loss"]](params)


TASK = Task(objective=Small(), info=INFO, device=CPU, n_rows=N_ROWS, epochs=N_EPOCHS)


def pool(capacity: int, **params: Any) -> Pool:
    """Return a pool whose space has these params beside or in place of SPACE's."""
    space, faults = build_space({name: parse_param(entry) for name, entry in {**SPACE, **params}.items()}, ())
    assert not faults
    plan = PaddingPlan(space, lambda params: TASK.objective.build(params, TASK.info))
    return Pool(TASK, capacity, sines(8), plan)


def members(*several: dict[str, Any]) -> list[Member]:
    base = {**SPACE, "width": 8}
    return [
        Member(number=n, seed=n, params={**base, "learning_rate": 0.002 * (n + 1), **params})
        for n, params in enumerate(several)
    ]


def fit(
    stacks: Stacks,
    everyone: Sequence[Member],
    stops: dict[int, int] | None = None,
    seen: Callable[[Stack, Member], None] = lambda stack, member: None,
) -> None:
    """Train `everyone`, each up to `stops[number]` epochs; `seen` is called with every epoch of every member."""
    trained(
        stacks,
        everyone,
        sines(N_ROWS),
        sines(20, 1),
        epochs=N_EPOCHS,
        stops=stops,
        seen=lambda stack, member, metrics: seen(stack, member),
    )


def alone(*several: dict[str, Any]) -> list[Member]:
    """Return the members, each trained in a loop of its own."""
    everyone = members(*several)
    for member in everyone:
        fit(SingleStack(LoopStack(TASK)), [member])
    return everyone


def test_members_of_several_kinds_are_trained_side_by_side_each_as_alone() -> None:
    several = [
        {"optimizer": optimizer, "batch_size": batch_size, "width": width}
        for optimizer, batch_size in (("adam", 12), ("sgd", 12), ("adam", 7))
        for width in (5, 9, 16, 30)
    ]
    kinds: dict[Stack, list[dict[str, Any]]] = {}
    got = members(*several)
    fit(pool(12), got, seen=lambda stack, member: kinds.setdefault(stack, []).append(member.params))
    assert_same_curves(got, alone(*several))
    together = [{(p["optimizer"], p["batch_size"]) for p in each} for each in kinds.values()]
    assert all(len(kind) == 1 for stack, kind in zip(kinds, together, strict=True) if isinstance(stack, VmapStack))
    stacked = [p["width"] for stack, each in kinds.items() if isinstance(stack, VmapStack) for p in each]
    assert sorted(stacked) == sorted([5, 9, 16] * 3 * N_EPOCHS)  # of those up to 32 there are too few


def test_fewer_than_are_worth_a_stack_train_alone_one_at_a_time() -> None:
    made, few = pool(8), members(*[{}] * (WORTH_STACKING - 1))
    made.join(few)
    (stack,) = made.active
    assert isinstance(stack, LoopStack)
    assert stack.members == few[:1]  # the other waits, and has its place
    assert made.free == 8 - len(few)
    fit(made, [])
    assert_same_curves(few, alone(*[{}] * len(few)))


def test_few_of_a_kind_join_a_stack_of_their_kind_that_is_there() -> None:
    made, everyone = pool(8), members(*[{}] * (WORTH_STACKING + 1))
    made.join(everyone[:-1])
    made.join(everyone[-1:])
    (stack,) = made.active
    assert stack.members == everyone
    assert stack.capacity == 4


@pytest.mark.parametrize(
    ("params", "reason"),
    [
        ({"optimizer": "adadelta"}, "optimizer adadelta has no stacked form; sgd, adam, adamw, rmsprop, adagrad have"),
        ({"kind": "lstm"}, "torch.func cannot batch it ("),
    ],
)
def test_what_cannot_be_stacked_says_why_and_is_trained_one_at_a_time(
    params: dict[str, Any], reason: str, said: list[str]
) -> None:
    several, stacks = [params, params, {}, params, {}, {}], set()
    got = members(*several)
    fit(pool(6, **params), got, seen=lambda stack, member: stacks.add((type(stack), member.params == {})))
    assert {text.partition(": ")[0] for text in said} <= {
        f"trials like trial {n} are trained one at a time" for n in (0, 1, 3)
    }
    (why,) = {text.partition(": ")[2] for text in said}
    assert why.startswith(reason)
    assert {kind for kind, _ in stacks} == {LoopStack, VmapStack}
    assert_same_curves(got, alone(*several))


def test_a_stack_is_as_large_as_its_members_need() -> None:
    """Eight begin, seven leave, one more joins; then there is none, then three. A loop of slots has the same rounds."""
    stops = dict.fromkeys(range(1, 8), 1)
    got, expected, sizes = members(*[{}] * 9), members(*[{}] * 9), []
    made = pool(8)
    fit(made, got, stops, lambda stack, member: sizes.append(stack.capacity))
    fit(SingleStack(LoopStack(TASK, 8)), expected, stops)
    assert_same_curves(got, expected)
    assert [m.joined for m in got] == [m.joined for m in expected] == [0] * 8 + [1]
    assert sizes == [8] * 8 + [2] * (len(sizes) - 8)

    late, sizes = members(*[{}] * 3), []
    fit(made, late, seen=lambda stack, member: sizes.append(stack.capacity))
    assert set(sizes) == {4}
    assert_same_curves(late, alone(*[{}] * 3))


def test_a_stack_whose_step_is_for_any_size_shrinks_with_its_members() -> None:
    """Of 20, three leave after an epoch and one more joins, and three leave after two."""
    stops = {n: 1 + n // 3 for n in range(6)}
    got, expected = (members(*[{"kind": "plain"}] * 21) for _ in range(2))
    made, sizes = pool(20, kind="plain"), []
    fit(made, got, stops, lambda stack, member: sizes.append(stack.capacity))
    fit(SingleStack(LoopStack(TASK, 20)), expected, stops)
    assert_same_curves(got, expected)
    assert list(dict.fromkeys(sizes)) == [20, 18, 15, 2]
    (stack,) = made._stacks
    assert len(stack._opened._graphs) == 1


@pytest.mark.parametrize("capacity", [1, 3, 5])
def test_never_more_than_its_capacity_are_in_it(capacity: int) -> None:
    """Whether they are in a stack, alone, or wait to be trained alone."""
    made, running, waiting = pool(capacity, optimizer="adam"), set(), members(*[{}, {"optimizer": "adadelta"}] * 6)
    most = []

    def ask(n: int) -> list[Member]:
        assert 0 <= n == capacity - len(running)
        taken, waiting[:] = waiting[:n], waiting[n:]
        running.update(taken)
        most.append(len(running))
        return taken

    def keeps(stack: Stack, member: Member, metrics: dict[str, float]) -> bool:
        if member.epoch == 1 + member.number % N_EPOCHS:
            running.remove(member)
            return False
        return True

    train(made, Batches(sines(N_ROWS), CPU), None, epochs=N_EPOCHS, seed=0, ask=ask, report=one_by_one(keeps))
    assert not waiting
    assert not running
    assert max(most) == capacity
    assert made.free == capacity


def test_running_out_of_memory_on_the_way_in_is_let_through(monkeypatch: pytest.MonkeyPatch, said: list[str]) -> None:
    def take(self: VmapStack, candidates: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(VmapStack, "take", take)
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        pool(4).join(members({}, {}, {}))
    assert not said


ALIKE = ("get", "items", "copy", "not there", "json")
"""Read as others of them are."""


@pytest.mark.parametrize("way", [pytest.param(way, marks=pytest.mark.slow if way in ALIKE else ()) for way in LOSSES])
def test_members_that_differ_in_what_the_loss_reads_have_losses_of_their_own(way: str) -> None:
    """In whatever way it reads it; a number that it cannot be given as a tensor divides members into stacks."""
    several = [{"loss": way, "scale": scale} for scale in (0.5, 1.0, 2.0)]
    got = members(*several)
    fit(pool(3, loss=way, scale={"type": "float", "low": 0.5, "high": 2.0}), got)
    assert_same_curves(got, alone(*several))


def opened(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that has the number of each member for which a stack is opened, which traces its step."""
    numbers, real = [], VmapStack.open

    def open_(self: VmapStack, first: Any, **given: Any) -> str | None:
        numbers.append(first.member.number)
        return real(self, first, **given)

    monkeypatch.setattr(VmapStack, "open", open_)
    return numbers


def test_no_step_is_traced_for_few_trials_and_what_keeps_them_apart_is_said(
    monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    """Of a loss that takes no tensors that is known once a step was traced; trials with one value share a stack."""
    traced, scale = opened(monkeypatch), {"type": "float", "low": 0.5, "high": 9.0}
    made, all_members = pool(8, loss="number", scale=scale), members(*[{"loss": "number", "scale": 1.0}] * 16)
    for member in all_members[:12]:
        member.params["scale"] += member.number / 8
    fit(made, all_members[:2])
    assert traced == []
    fit(made, all_members[2:12])
    assert traced == [2]
    assert made._stacks == []
    assert said[-1] == (
        "fewer than 3 trials that can share a stack are trained alone: as fast; the loss reads the param 'scale' as a "
        "number, so only trials with the same value share a stack; a loss that takes it as a tensor too, as hpo's own "
        "do, sets no such limit"
    )
    fit(made, all_members[12:])
    assert traced == [2, 12]
    assert_same_curves(all_members, alone(*[dict(member.params) for member in all_members]))


@pytest.mark.parametrize(
    ("differs", "why"),
    [
        ({"batch_size": (12, 10)}, "of the others some have another batch_size, and share no stack with them"),
        ({"optimizer": ("adam", "sgd")}, "of the others some have another optimizer, and share no stack with them"),
        ({"kind": ("plain", "mlp")}, "of the others some have another structure, and share no stack with them"),
        ({"loss": ("key", "get")}, "the loss reads the param 'loss', so only trials with the same value share a stack"),
        ({}, ""),
    ],
)
def test_what_keeps_few_trials_apart_is_said(differs: dict[str, Any], why: str, said: list[str]) -> None:
    several = [{name: values[i % 2] for name, values in differs.items()} for i in range(4 if differs else 2)]
    pool(8, kind=differs.get("kind", ("mlp",))[0]).join(members(*several))
    assert said == [f"fewer than 3 trials that can share a stack are trained alone: as fast{'; ' if why else ''}{why}"]


def test_stacks_that_no_trial_is_in_are_not_kept_without_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpo.stacks.pool._MOST_UNUSED", 1)
    made, kept = pool(3, kind="plain"), []
    for batch_size in (12, 11, 10):
        made.join(members(*[{"kind": "plain", "batch_size": batch_size}] * 3))
        for stack in made.active:
            for member in stack.members:
                stack.leave(member)
        kept.append([stack._opened.params["batch_size"] for stack in made._stacks])
    assert kept == [[12], [12, 11], [11, 10]]


def test_one_dropout_at_several_places_is_in_tensors_at_each() -> None:
    dropout = nn.Dropout(0.3)
    network = tensor_dropout(nn.Sequential(nn.Linear(6, 4), dropout, nn.Linear(4, 4), dropout))
    assert [type(network[i]) for i in (1, 3)] == [RateDropout, RateDropout]
    assert [int(network[i].key) for i in (1, 3)] == [0, 1]


@pytest.mark.parametrize("way", WRITES)
def test_a_loss_that_changes_its_params_is_trained_alone(way: str, said: list[str]) -> None:
    """Alone the next step finds what it has changed: so it may count there, but not in a stack."""
    several = [{"loss": way, "scale": scale} for scale in (0.5, 1.0, 2.0)]
    got = members(*several)
    fit(pool(3, loss=way), got)
    assert {text.partition(": ")[2] for text in said} == {
        "the loss changes its params, which alone the next step finds changed"
    }
    assert_same_curves(got, alone(*several))


class Halving(Small):
    """Its loss changes outputs in place, which metrics then see, alone too."""

    def build(self, params, info):
        return nn.Linear(6, 1).double()

    def loss(self, outputs, targets, params):
        outputs.mul_(0.5)
        return F.mse_loss(outputs, targets)

    def metrics(self):
        return {"mse": MeanSquaredError()}


def test_a_loss_that_changes_outputs_in_place_is_stacked_and_equal(said: list[str]) -> None:
    task = replace(TASK, objective=Halving())
    space, _ = build_space({name: parse_param(entry) for name, entry in SPACE.items() if name != "width"}, ())
    got, expected, stacks = members({}, {}, {}), members({}, {}, {}), set()
    made = Pool(task, 3, sines(8), PaddingPlan(space, task.network))
    fit(made, got, seen=lambda stack, member: stacks.add(type(stack)))
    for member in expected:
        fit(SingleStack(LoopStack(task)), [member])
    assert_same_curves(got, expected, abs=1e-6)  # of a metric in single precision
    assert (stacks, said) == ({VmapStack}, [])


class Strict(nn.Sequential):
    """A network that takes no other weights than those that it begins with, in `first`, which is not trained."""

    def forward(self, x: Tensor) -> Tensor:
        if self.first.any():
            raise RuntimeError("first must be zeros")
        return super().forward(x) + self.first


class Checked(Small):
    first = 0.0

    def build(self, params, info):
        network = Strict(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 1))
        network.first = nn.Parameter(torch.full((1,), self.first), requires_grad=False)
        return network.double()


def test_what_fails_only_where_it_is_tried_for_a_stack_is_trained_alone(said: list[str]) -> None:
    """It is tried with other weights than its own."""
    task = replace(TASK, objective=Checked())
    space, _ = build_space({name: parse_param(entry) for name, entry in SPACE.items() if name != "width"}, ())
    got, expected = members({}, {}, {}), members({}, {}, {})
    fit(Pool(task, 3, sines(8), PaddingPlan(space, task.network)), got)
    assert {text.partition(": ")[2] for text in said} == {
        "trying it for a stack failed (RuntimeError: first must be zeros)"
    }
    for member in expected:
        fit(SingleStack(LoopStack(task)), [member])
    assert_same_curves(got, expected)


def test_what_fails_alone_too_is_raised_as_it_is() -> None:
    objective = Checked()
    objective.first = 1.0
    task = replace(TASK, objective=objective)
    space, _ = build_space({name: parse_param(entry) for name, entry in SPACE.items() if name != "width"}, ())
    with pytest.raises(RuntimeError, match="first must be zeros"):
        fit(Pool(task, 3, sines(8), PaddingPlan(space, task.network)), members({}, {}, {}))


def test_a_width_that_cannot_be_rounded_up_is_no_fault() -> None:
    """Rounding 18 up to 32 asks for a network that is outside of the study's space."""
    several = [{"kind": "heads", "width": width} for width in (18, 24, 30)]
    got = members(*several)
    fit(pool(3, kind="heads", width={"type": "int", "low": 6, "high": 60, "step": 6}), got)
    assert_same_curves(got, alone(*several))


def test_networks_of_a_class_that_is_defined_at_each_call_are_stacked(said: list[str]) -> None:
    made, got = pool(4, kind="local"), members(*[{"kind": "local"}] * 4)
    made.join(got)
    (stack,) = made.active
    assert isinstance(stack, VmapStack)
    assert (stack.members, said) == (got, [])
    fit(made, [])
    assert_same_curves(got, alone(*[{"kind": "local"}] * 4))


def paused(made: Pool, everyone: Sequence[Member]) -> list[Member]:
    """Train `everyone` for an epoch, after which they are to be paused; return them as they are resumed."""
    kept: dict[int, Any] = {}
    for member in everyone:
        member.pause = 1
    fit(made, everyone, dict.fromkeys(range(len(everyone)), 1), lambda s, m: kept.update({m.number: s.checkpoint(m)}))
    return [
        replace(m, pause=None, resume=kept[m.number], history=[*m.history], rounds=[*m.rounds], n_parameters=None)
        for m in everyone
    ]


@pytest.mark.parametrize("kind", ["plain", "mlp"])
def test_a_member_that_returns_is_not_built_again_and_trains_as_alone(kind: str, monkeypatch) -> None:
    built, real = [], Task.drawn
    monkeypatch.setattr(Task, "drawn", lambda task, member: built.append(member.number) or real(task, member))
    made, several = pool(8, kind=kind), [{"kind": kind, "width": width} for width in (5, 6, 7, 8)]
    resumed = paused(made, members(*several))
    assert set(built) == {0, 1, 2, 3}
    del built[:]
    fit(made, resumed)
    assert built == []
    assert [m.n_parameters for m in resumed] == [m.n_parameters for m in alone(*several)]
    assert_same_curves(resumed, alone(*several))


def test_who_returns_otherwise_than_it_left_is_built(monkeypatch) -> None:
    """With other params, from scratch, or when what was kept is too much."""
    built, real = [], Task.drawn
    made = pool(8)
    other, scratch, *_ = paused(made, members(*[{}] * 5))
    other.params["learning_rate"] *= 2
    scratch.resume = None
    monkeypatch.setattr(Task, "drawn", lambda task, member: built.append(member.number) or real(task, member))
    made.join([other, scratch])
    assert sorted(set(built)) == [0, 1]
    one = made._returning._known.size // 5
    assert one > 0
    made._returning = Returning(most=2 * one)
    for stack in made.active:
        for member in [*stack.members]:
            stack.leave(member)
    again = paused(made, members(*[{}] * 5))
    del built[:]
    made.join(again)
    assert sorted(set(built)) == [0, 1, 2]
    assert made._returning._known.size == 0
