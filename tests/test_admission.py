"""Who joins a stack gives there what it gives alone, whatever its loss does with its params."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hpo.stacks.admission import Admission
from hpo.stacks.alone import NotStackable
from hpo.stacks.padding import PaddingPlan, unpadded
from hpo.stacks.pool import Pool
from hpo.stacks.vmap_stack import VmapStack
from hpo.study.space import Space
from hpo.training.batches import Batches
from hpo.training.loop_stack import LoopStack
from hpo.training.stack import Member, Stack, Task
from tests.stacking import CPU, INFO, Built, sines

ENGINE = {"optimizer": "adam", "learning_rate": 0.05, "batch_size": 8}
WEIGHT = {0.1: 3.0, 0.9: 0.2}
Loss = Callable[[Tensor, Any], Tensor]
LOSSES: Mapping[str, Loss] = {
    "is false": lambda loss, level: loss if level is False else level * loss,
    "by its type": lambda loss, level: 3 * loss if isinstance(level, int) else loss,
    "by a table": lambda loss, level: WEIGHT.get(level, 1.0) * loss,
    "none": lambda loss, level: loss if level is None else level * loss,
    "text": lambda loss, level: loss if level == "plain" else level * loss,
}
LEVELS: Mapping[str, Sequence[Any]] = {
    "is false": [0.5, False, 2.0, 0.0, False, 0.5],
    "by its type": [1.0, 1, True, 2.0, 2, 0.0],
    "by a table": [0.5, 0.1, 0.9, 0.5, 0.9, 0.1],
    "none": [0.5, None, 2.0, None, 0.5, 2.0],
    "text": ["plain", 0.5, "plain", 2.0, 0.5, 2.0],
}


class Levelled(Built):
    def __init__(self, by: Loss) -> None:
        super().__init__(lambda params: nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 1)))
        self.by = by

    def loss(self, outputs: Tensor, targets: Tensor, params: Any) -> Tensor:
        return self.by(F.mse_loss(outputs, targets), params["level"])


def members(levels: Sequence[Any]) -> list[Member]:
    return [Member(number=n, seed=n, params=ENGINE | {"level": level}) for n, level in enumerate(levels)]


def trained(stack: Stack, n_epochs: int = 3) -> list[dict[str, Tensor]]:
    feed = Batches(sines(24), CPU)
    for _ in range(n_epochs):
        stack.epoch(feed, torch.arange(24), lambda: False)
    return [stack.state(member) for member in stack.members]


@pytest.mark.parametrize("first", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in (1, 2))])
@pytest.mark.parametrize("how", LOSSES)
def test_whatever_a_loss_makes_of_a_choice_each_member_is_trained_as_alone(how: str, first: int) -> None:
    """Also where the first one to join hides what the loss does by other values."""
    levels = [*LEVELS[how][first:], *LEVELS[how][:first]]
    task = Task(objective=Levelled(LOSSES[how]), info=INFO, device=CPU, n_rows=24, epochs=3)
    pool = Pool(task, 8, sines(8), PaddingPlan(Space(fixed=ENGINE, dimensions=()), task.network, "none"))
    pool.join(members(levels))
    while pool.free < 8:
        for stack in pool.active:
            got = dict(zip([m.number for m in stack.members], trained(stack), strict=True))
            for member in list(stack.members):
                alone = LoopStack(task)
                alone.join(members(levels)[member.number])
                (expected,) = trained(alone)
                for name, tensor in got[member.number].items():
                    torch.testing.assert_close(tensor, expected[name], rtol=1e-7, atol=1e-9)
                stack.leave(member)
        pool.join([])


def test_each_number_for_the_loss_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    looked, real = [], Admission._numbers
    monkeypatch.setattr(Admission, "_numbers", lambda self, each: looked.append(real(self, each)) or looked[-1])
    task = Task(objective=Levelled(lambda loss, level: level * loss), info=INFO, device=CPU, n_rows=24, epochs=3)
    stack = VmapStack(task, 4, sines(8), "eager", unpadded)
    for member in members([0.5, 2.0, 0.5, 2.0]):
        stack.join(member)
    assert looked == [(0.5,), (2.0,), (0.5,), (2.0,)]
    assert len(stack._admission._stepped) == 2


class Counting(nn.Module):
    """It counts its steps in a buffer that is not persistent, and scales by another that is never changed."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 1)
        self.register_buffer("n", torch.zeros(()), persistent=False)
        self.register_buffer("scale", torch.full((2,), 3.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.n = self.n + 1
        return self.layer(x) * self.scale[0] + self.n


@pytest.mark.parametrize("after", ["loop", "stack"])
@pytest.mark.parametrize("before", ["loop", "stack"])
def test_a_buffer_that_is_not_persistent_is_kept_where_a_member_leaves_a_stack(before: str, after: str) -> None:
    task = Task(objective=Built(lambda params: Counting()), info=INFO, device=CPU, n_rows=24, epochs=3)

    def new(kind: str) -> Stack:
        return LoopStack(task) if kind == "loop" else VmapStack(task, 2, sines(8))

    first, (member,) = new(before), members([0.0])
    first.join(member)
    (state,) = trained(first)
    assert state.keys() == first.keep(member)().keys() == Counting().state_dict().keys()
    assert first.module(member).n == 9
    member.resume = first.checkpoint(member)
    second = new(after)
    second.join(member)
    assert second.module(member).n == 9
    assert second.module(member).scale.tolist() == [3.0, 3.0]
    trained(second, 1)
    assert second.module(member).n == 12
    del member.resume["model"]["n"], member.resume["model"]["scale"]  # as stacks of earlier versions kept it
    third = new(after)
    third.join(member)
    assert third.module(member).n == 0


class Extra(nn.Linear):
    def get_extra_state(self) -> Tensor:
        return torch.ones(1)

    def set_extra_state(self, state: Tensor) -> None:
        pass


def test_what_is_in_a_state_dict_and_no_tensor_of_the_network_is_no_reason_to_fail() -> None:
    task = Task(objective=Built(lambda params: Extra(6, 1)), info=INFO, device=CPU, n_rows=24, epochs=3)
    stack, (member,) = VmapStack(task, 2, sines(8)), members([0.0])
    with pytest.raises(NotStackable, match="its state_dict has what is neither a weight nor a buffer"):
        stack.join(member)
