"""Networks in which padding shows for some weights only: in stacks they are refused, or what they are alone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hpo.stacks.padding import PaddingPlan
from hpo.stacks.pool import Pool
from hpo.study.data import Split
from hpo.study.space import build as build_space
from hpo.study.spec import parse_param
from hpo.training.loop_stack import LoopStack
from hpo.training.stack import Member, Task
from tests.stacking import CPU, INFO, Built, assert_same_curves, sines, trained

SPACE = {
    "optimizer": "adam",
    "learning_rate": 0.1,
    "batch_size": 20,
    "width": {"type": "int", "low": 5, "high": 16},
}


class Reduced(nn.Module):
    """A layer of some width, reduced to one number by a function that may see the zeros beside it."""

    def __init__(self, width: int, reduce: Callable[[Tensor], Tensor], bias: bool = True) -> None:
        super().__init__()
        self.linear, self.reduce = nn.Linear(6, width, bias=bias), reduce

    def forward(self, x: Tensor) -> Tensor:
        return self.reduce(self.linear(x))


class Experts(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(6, width), nn.Linear(6, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(x).gather(1, self.gate(x).argmax(1, keepdim=True))


class Grouped(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.one = nn.Conv1d(2, width // 2 * 2, 3, padding=1, groups=2)
        self.two = nn.Conv1d(width // 2 * 2, 2, 1, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(F.relu(self.one(x.view(-1, 2, 3)))).sum((1, 2)).unsqueeze(1)


def winners(z: Tensor) -> Tensor:
    return torch.where(z >= z.topk(3).values[:, -1:], z, 0.0).sum(1, keepdim=True)


REDUCTIONS: dict[str, Callable[[int], nn.Module]] = {
    "largest": lambda w: Reduced(w, lambda z: z.amax(1, keepdim=True)),
    "largest, no bias": lambda w: Reduced(w, lambda z: z.amax(1, keepdim=True), bias=False),
    "smallest": lambda w: Reduced(w, lambda z: z.amin(1, keepdim=True)),
    "top": lambda w: Reduced(w, lambda z: z.topk(4).values.sum(1, keepdim=True)),
    "winners": lambda w: Reduced(w, winners),
    "exponentials": lambda w: Reduced(w, lambda z: torch.logsumexp(z, 1, keepdim=True)),
    "above the smallest": lambda w: Reduced(w, lambda z: (z - z.amin(1, keepdim=True)).sum(1, keepdim=True)),
    "experts": Experts,
    "groups": Grouped,
}


def below(n: int, seed: int = 0) -> Split:
    rows = sines(n, seed)
    return Split(inputs=rows.inputs, targets=rows.targets - 4.0)


UP = ("smallest", "above the smallest", "groups")
"""Those that see the zeros as the outputs rise; by default, each is moved the one way."""
KEPT = ("winners", "groups", "experts", "exponentials", "top", "smallest")
"""Those that are tried by default; the others reduce as one of these."""


@pytest.mark.parametrize(
    ("name", "sign"),
    [
        pytest.param(
            name,
            sign,
            id=f"{name}-{way}",
            marks=() if name in KEPT and (way == "up") == (name in UP) else pytest.mark.slow,
        )
        for name in REDUCTIONS
        for sign, way in ((1.0, "down"), (-1.0, "up"))
    ],
)
def test_padding_that_shows_only_for_other_weights_is_seen(name: str, sign: float) -> None:
    task = Task(
        objective=Built(lambda params: REDUCTIONS[name](params["width"])), info=INFO, device=CPU, n_rows=40, epochs=6
    )
    space, faults = build_space({key: parse_param(entry) for key, entry in SPACE.items()}, ())
    assert not faults
    plan = PaddingPlan(space, lambda params: task.objective.build(params, task.info))
    rows, valid = (Split(inputs=each.inputs, targets=sign * each.targets) for each in (below(40), below(20, seed=1)))

    def members() -> list[Member]:
        some = [dict(SPACE, width=width) for width in (5, 6, 7, 9, 12, 16)]
        return [Member(number=i, seed=i, params=params) for i, params in enumerate(some)]

    got, expected = members(), members()
    trained(Pool(task, 6, below(8), plan), got, rows, valid, epochs=6)
    for member in expected:
        trained(LoopStack(task), [member], rows, valid, epochs=6)
    by_number: Callable[[Any], int] = lambda member: member.number  # noqa: E731
    assert_same_curves(sorted(got, key=by_number), expected, abs=1e-8)
