"""Schedules against torch.optim.lr_scheduler, stepped after every batch; and that both stacks follow them."""

import math

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from hpo.stacks.vmap_stack import VmapStack
from hpo.study.data import Split
from hpo.training import schedules
from hpo.training.loop_stack import LoopStack
from hpo.training.stack import Member, Task
from tests.stacking import CPU, INFO, Toy

LENGTHS = [(1, 1), (1, 2), (3, 1), (1, 7), (4, 5), (13, 11), (40, 20)]
"""Steps per epoch, and epochs."""
CASES = {
    "constant": {},
    "cosine": {},
    "one_cycle": {},
    "one_cycle early": {"schedule_pct_start": 0.15},
    "one_cycle late": {"schedule_pct_start": 0.95},
    "step": {},
    "step fast": {"schedule_step_size": 1, "schedule_gamma": 0.5},
    "step up": {"schedule_step_size": 3, "schedule_gamma": 1.5},
}


def params(case: str) -> dict:
    return {"schedule": case.split()[0], **CASES[case]}


def torchs(params: dict, optimizer: torch.optim.Optimizer, steps_per_epoch: int, epochs: int):
    """Return the class of torch that the docstring of `hpo.training.schedules` names."""
    n_steps = steps_per_epoch * epochs
    if params["schedule"] == "constant":
        return lr_scheduler.ConstantLR(optimizer, factor=1.0)
    if params["schedule"] == "cosine":
        return lr_scheduler.CosineAnnealingLR(optimizer, T_max=n_steps)
    if params["schedule"] == "one_cycle":
        share = params.get("schedule_pct_start", 0.3)
        return lr_scheduler.OneCycleLR(optimizer, 1.0, n_steps, pct_start=share, cycle_momentum=False)
    size = params.get("schedule_step_size", 10) * steps_per_epoch
    return lr_scheduler.StepLR(optimizer, step_size=size, gamma=params.get("schedule_gamma", 0.1))


def rates(params: dict, steps_per_epoch: int, epochs: int) -> list[float]:
    """Return the learning rate of each step under torch's class, from a learning rate of 1."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler, seen = torchs(params, optimizer, steps_per_epoch, epochs), []
    for step in range(steps_per_epoch * epochs):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if step + 1 < steps_per_epoch * epochs:
            scheduler.step()
    return seen


@pytest.mark.parametrize("length", LENGTHS, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_a_table_is_torchs_schedule_stepped_after_every_batch(case: str, length: tuple[int, int]) -> None:
    assert schedules.table(params(case), *length) == pytest.approx(rates(params(case), *length), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("length", [(1, 1), (2, 1), (3, 1), (5, 2)], ids=str)
@pytest.mark.parametrize("name", schedules.NAMES)
@pytest.mark.parametrize("share", [1e-6, 0.1, 1 / 3, 0.5, 0.999])
def test_factors_are_finite_however_few_steps_there_are(name: str, share: float, length: tuple[int, int]) -> None:
    """Also where torch's own class divides by zero: a rise that ends with the first step."""
    table = schedules.table({"schedule": name, "schedule_pct_start": share}, *length)
    assert len(table) == math.prod(length)
    assert all(0 <= factor <= 1 for factor in table)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_members_at_steps_of_their_own_have_schedules_of_their_own(dtype: torch.dtype) -> None:
    steps_per_epoch, epochs = 4, 6
    everyone = [params(case) for case in CASES]
    each = [schedules.hyperparameters(member) for member in everyone]
    hyper = {name: torch.tensor([h[name] for h in each], dtype=dtype) for name in each[0]}
    tables = [schedules.table(member, steps_per_epoch, epochs) for member in everyone]
    for first in range(steps_per_epoch * epochs):
        i = (first + torch.arange(len(everyone), dtype=dtype)) % (steps_per_epoch * epochs)
        got = schedules.factor(hyper, i, steps_per_epoch, epochs)
        expected = [table[int(at)] for table, at in zip(tables, i, strict=True)]
        assert got.dtype == dtype
        assert got.tolist() == pytest.approx(expected, rel=1e-4 if dtype == torch.float32 else 1e-12, abs=1e-6)


class Slope(Toy):
    """One weight with a gradient of 1: under SGD, what a step takes from it is the learning rate."""

    def build(self, params, info):
        return nn.Linear(1, 1, bias=False).double()

    def loss(self, outputs, targets, params):
        return outputs.mean()


STEPS, EPOCHS = 3, 4
ROWS = Split(inputs={"x": torch.ones(2, 1, dtype=torch.float64)}, targets=torch.zeros(2, 1))


def made(stack: str, capacity: int):
    task = Task(objective=Slope(), info=INFO, device=CPU, n_rows=2 * STEPS, epochs=EPOCHS)
    return LoopStack(task, capacity) if stack == "loop" else VmapStack(task, capacity, ROWS, stack)


def member(number: int, case: str) -> Member:
    engine = {"optimizer": "sgd", "learning_rate": 0.1 * (number + 1), "batch_size": 2}
    return Member(number=number, seed=number, params=engine | params(case))


def taken(stack, members: list[Member], n_steps: int) -> list[list[float]]:
    """Train for so many steps; return what each took from each member's weight."""
    seen = []
    for _ in range(n_steps):
        before = [stack.state(each)["weight"].item() for each in members]
        stack.step([ROWS.inputs["x"]], ROWS.targets)
        seen.append([b - stack.state(each)["weight"].item() for b, each in zip(before, members, strict=True)])
    return [list(column) for column in zip(*seen, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("steps", [1, 7, 8, 63])
def test_a_part_of_an_epoch_ends_at_the_same_step_in_single_precision(dtype: torch.dtype, steps: int) -> None:
    i = torch.arange(8 * steps, dtype=dtype)
    for tenths in range(1, 21):
        params = {"schedule": "step", "schedule_step_size": tenths / 10, "schedule_gamma": 0.5}
        hyper = {name: torch.tensor(x, dtype=dtype) for name, x in schedules.hyperparameters(params).items()}
        ended = [10 * n // (tenths * steps) for n in range(8 * steps)]
        assert schedules.factor(hyper, i, steps, 8).tolist() == [0.5**n for n in ended]


@pytest.mark.parametrize("stack", ["loop", "eager", "graph"])
def test_a_members_learning_rate_follows_its_schedule(stack: str) -> None:
    filled, members = made(stack, len(CASES)), [member(n, case) for n, case in enumerate(CASES)]
    for each in members:
        filled.join(each)
    for each, case, column in zip(members, CASES, taken(filled, members, STEPS * EPOCHS), strict=True):
        expected = [each.params["learning_rate"] * rate for rate in rates(params(case), STEPS, EPOCHS)]
        assert column == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("stack", ["loop", "eager", "graph"])
def test_who_takes_a_slot_later_begins_its_schedule_then(stack: str) -> None:
    filled, (first, second, third) = made(stack, 2), [member(n, "one_cycle") for n in range(3)]
    filled.join(first)
    filled.join(second)
    taken(filled, [first, second], 5)
    filled.leave(first)
    filled.join(third)
    late = dict(zip((second, third), taken(filled, [second, third], 4), strict=True))
    expected = rates(params("one_cycle"), STEPS, EPOCHS)
    assert late[third] == pytest.approx([third.params["learning_rate"] * rate for rate in expected[:4]])
    assert late[second] == pytest.approx([second.params["learning_rate"] * rate for rate in expected[5:9]])
