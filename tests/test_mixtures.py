"""Whatever the members of a study differ in, in its stacks each has the curve and the weights that it has alone."""

from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy

from hpo.stacks.padding import PaddingPlan
from hpo.stacks.pool import Pool
from hpo.study.data import Split
from hpo.study.losses import cross_entropy
from hpo.study.objective import Objective
from hpo.study.space import build
from hpo.study.spec import parse_param
from hpo.training.loop_stack import LoopStack
from hpo.training.stack import Member, SingleStack, Stacks, Task
from tests.stacking import CPU, INFO, Toy, assert_same_curves, assert_same_weights, trained

N_EPOCHS = 3
ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh, "silu": nn.SiLU}
BASE = {
    "optimizer": "adam",
    "batch_size": 12,
    "learning_rate": 3e-3,
    "weight_decay": 0.0,
    "depth": 2,
    "width": 8,
    "activation": "relu",
    "rate": 0.0,
    "smoothing": 0.0,
    "auxiliary": 0.0,
    "balance": 0.0,
}


class Towers(nn.Module):
    """Two named inputs, numbers and a category; an embedding, a tower of some depth, logits and an auxiliary output."""

    def __init__(self, params: Any) -> None:
        super().__init__()
        width = params["width"]
        self.embedding = nn.Embedding(5, 3)
        # no bias before BatchNorm: its gradient is nothing but rounding, which some optimizers scale up
        layers: list[nn.Module] = [nn.Linear(4 + 3, width, bias=False), nn.BatchNorm1d(width)]
        for _ in range(params["depth"]):
            layers += [nn.Linear(width, width), ACTIVATIONS[params["activation"]](), nn.Dropout(params["rate"])]
        self.tower = nn.Sequential(*layers)
        self.norm = nn.LayerNorm(4)
        self.output, self.auxiliary = nn.Linear(4 + width, 3), nn.Linear(width, 1)

    def forward(self, numbers: Tensor, category: Tensor) -> tuple[Tensor, Tensor]:
        deep = self.tower(torch.cat([numbers, self.embedding(category)], 1))
        return self.output(torch.cat([self.norm(numbers), deep], 1)), self.auxiliary(deep)


class Mixed(Toy):
    """Three classes, class weights, label smoothing, and an auxiliary output with a weight of its own."""

    double = True

    def build(self, params, info):
        return Towers(params).double() if self.double else Towers(params)

    def loss(self, outputs, targets, params):
        logits, auxiliary = outputs
        counts = torch.bincount(torch.arange(12) % 3, minlength=3).to(logits) + torch.tensor([0.0, 2.0, 5.0]).to(logits)
        weights = (counts / counts.sum()) ** -params["balance"]
        main = cross_entropy(logits, targets, label_smoothing=params["smoothing"], class_weights=weights)
        return main + params["auxiliary"] * F.mse_loss(auxiliary[:, 0], targets.to(auxiliary.dtype))

    def metrics(self):
        return {"accuracy": MulticlassAccuracy(3, average="micro")}


class Single(Mixed):
    """The same in single precision."""

    double = False


def split(seed: int, n_rows: int = 40, dtype: torch.dtype = torch.float64) -> Split:
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(n_rows, 4, generator=generator, dtype=dtype)
    category = torch.randint(5, (n_rows,), generator=generator)
    targets = (numbers.sum(1) > 0).long() + (category > 2).long()
    return Split(inputs={"numbers": numbers, "category": category}, targets=targets)


def fit(stacks: Stacks, members: list[Member], stops: dict[int, int], **more: Any) -> dict[int, Any]:
    """Train `members`, each up to `stops[number]` epochs; return the last weights by number."""
    return trained(stacks, members, split(0, **more), split(1, 30, **more), epochs=N_EPOCHS, stops=stops)


def members(drawn: list[dict[str, Any]]) -> list[Member]:
    return [Member(number=i, seed=i, params=BASE | params) for i, params in enumerate(drawn)]


def task(objective: Objective) -> Task:
    return Task(objective=objective, info=INFO, device=CPU, n_rows=40, epochs=N_EPOCHS)


SPACE, _ = build(
    {name: value for name, value in BASE.items() if name not in ("depth", "width", "activation")}
    | {
        "depth": parse_param({"type": "int", "low": 0, "high": 4}),
        "width": parse_param({"type": "int", "low": 4, "high": 40}),
        "activation": parse_param({"type": "categorical", "choices": list(ACTIVATIONS)}),
    },
    (),
)


def pool(objective: Objective, capacity: int, padding: str = "fine", dtype: torch.dtype = torch.float64) -> Pool:
    plan = PaddingPlan(SPACE, lambda params: objective.build(params, INFO), padding)
    return Pool(task(objective), capacity, split(0, 8, dtype), plan)


MEMBER = st.fixed_dictionaries(
    {
        "depth": st.integers(0, 4),
        "width": st.sampled_from([4, 7, 16, 20, 40]),
        "activation": st.sampled_from(list(ACTIVATIONS)),
        "learning_rate": st.floats(1e-4, 1e-2),
        "weight_decay": st.sampled_from([0.0, 1e-2]),
        "smoothing": st.floats(0, 0.3),
        "auxiliary": st.floats(0, 1),
        "balance": st.floats(0, 1),
        "schedule": st.sampled_from(["constant", "cosine", "one_cycle", "step"]),
        "schedule_step_size": st.integers(1, 2),
        "max_grad_norm": st.sampled_from([0.0, 0.1, 1.0]),
        "optimizer": st.sampled_from(["adam", "sgd", "adamw", "rmsprop", "adagrad"]),
        "batch_size": st.sampled_from([12, 13]),
    },
    optional={"momentum": st.floats(0, 0.9), "nesterov": st.just(False), "beta1": st.floats(0.5, 0.95)},
)


def check(drawn: list[dict[str, Any]], same: bool, padding: str) -> None:
    if same:  # all of one kind of optimizer and batch size, so that they share stacks
        drawn = [params | {"optimizer": drawn[0]["optimizer"], "batch_size": 12} for params in drawn]
    got, expected = members(drawn), members(drawn)
    weights, alone = fit(pool(Mixed(), len(drawn), padding), got, {}), {}
    for other in expected:
        alone |= fit(SingleStack(LoopStack(task(Mixed()))), [other], {})
    assert_same_curves(got, expected)
    assert_same_weights(weights, alone, range(len(drawn)))


MIXTURE = {
    "drawn": st.lists(MEMBER, min_size=3, max_size=6),
    "same": st.booleans(),
    "padding": st.sampled_from(["fine", "coarse"]),
}
TELLING = settings(deadline=None, derandomize=True, phases=[Phase.generate])  # to shrink takes minutes


@pytest.mark.slow
@settings(TELLING, max_examples=2)
@given(**MIXTURE)
def test_any_mixture_of_members_is_what_each_is_alone(drawn: list[dict[str, Any]], same: bool, padding: str) -> None:
    check(drawn, same, padding)


@pytest.mark.slow
@pytest.mark.timeout(900)
@settings(TELLING, max_examples=40)
@given(**MIXTURE)
def test_many_mixtures(drawn: list[dict[str, Any]], same: bool, padding: str) -> None:
    check(drawn, same, padding)


KINDS = [{"depth": d, "width": w, "activation": a} for d, w, a in [(0, 7, "relu"), (1, 20, "tanh"), (4, 40, "silu")]]


def test_depth_activation_and_width_share_one_stack() -> None:
    made = pool(Mixed(), 9, "coarse")
    made.join(members(KINDS * 3))
    assert len(made.active) == 1
    assert made.active[0].capacity == 9


def test_members_that_join_and_leave_midway_have_the_curves_of_a_loop_of_the_same_slots() -> None:
    """With the others' coming and going a member sees other rounds' data order; the reference is a loop of slots."""
    stops = {1: 1, 3: 2, 5: 1}
    drawn = [KINDS[i % 3] | {"learning_rate": 1e-3 * (i + 1)} for i in range(6)]
    got, expected = members(drawn), members(drawn)
    weights = fit(pool(Mixed(), 3, "coarse"), got, stops)
    reference = fit(SingleStack(LoopStack(task(Mixed()), 3)), expected, stops)
    assert [m.joined for m in got] == [m.joined for m in expected]
    assert max(m.joined for m in got) > 0
    assert_same_curves(got, expected)
    assert_same_weights(weights, reference, range(len(drawn)))


def test_single_precision_is_within_a_thousandth_over_five_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.test_mixtures.N_EPOCHS", 5)
    drawn = [KINDS[i % 3] | {"smoothing": 0.05 * i, "schedule": "cosine"} for i in range(6)]
    got, expected = members(drawn), members(drawn)
    fit(pool(Single(), 6, dtype=torch.float32), got, {}, dtype=torch.float32)
    for one, other in zip(got, expected, strict=True):
        fit(SingleStack(LoopStack(task(Single()))), [other], {}, dtype=torch.float32)
        assert len(one.history) == len(other.history) == 5
        for epoch, reference in zip(one.history, other.history, strict=True):
            assert epoch == pytest.approx(reference, abs=1e-3)
