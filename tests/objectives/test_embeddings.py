"""Embeddings and TabM against what their papers say, written out slowly; and in stacks whose members differ in size."""

import math

import pytest
import torch
from hpo.objectives.embeddings import (
    Categories,
    EachInput,
    Joined,
    MemberLinear,
    PerFeature,
    Periodic,
    Piecewise,
    TabM,
    deep,
    embedding_of,
    mean_of_classes,
    mean_of_numbers,
    mean_of_odds,
    of_members,
)
from torch import nn
from torch.nn import functional as F
from torchmetrics.regression import MeanSquaredError

from hpo.stacks.padding import PaddingPlan
from hpo.stacks.pool import Pool
from hpo.study.data import DataInfo, Split
from hpo.study.objective import Objective
from hpo.study.space import build
from hpo.study.spec import parse_param
from hpo.training.batches import Batches
from hpo.training.loop import train
from hpo.training.loop_stack import LoopStack
from hpo.training.stack import Member, SingleStack, Task

CPU = torch.device("cpu")
DEEP = {"n_layers": 2, "n_hidden": 6, "dropout": 0.0, "ensemble": 0}


def members_of(n_members=3, n_out=2, **more):
    more = {"embedded": False} | more
    return TabM(n_members, 4, [5, 6], n_out, more.pop("mean", mean_of_numbers), **more).eval()


def test_a_feature_has_a_linear_layer_of_its_own():
    layer, x = PerFeature(3, 4, 5), torch.randn(7, 3, 4)
    out = layer(x).unflatten(1, (5, 3))
    for f in range(3):
        torch.testing.assert_close(out[:, :, f], F.relu(x[:, f] @ layer.weight[f] + layer.bias[:, f]))


@pytest.mark.parametrize("n_bins", [2, 5, 48])
def test_piecewise_numbers_are_0_below_a_bin_and_1_above_it_and_go_on_beyond_the_ends(n_bins):
    embedding = Piecewise(1, n_bins, 4)
    shares = [min(max(k / n_bins, 0.001), 0.999) for k in range(n_bins + 1)]
    edges = [torch.special.ndtri(torch.tensor(s, dtype=torch.float64)).item() for s in shares]
    encoded = []
    embedding.linear.register_forward_pre_hook(lambda module, inputs: encoded.append(inputs[0]))
    xs = [-5.0, -3.2, -1.0, 0.0, 0.3, 2.9, 4.4]
    embedding(torch.tensor(xs).unsqueeze(1))
    for x, row in zip(xs, encoded[0][:, 0], strict=True):
        for k, number in enumerate(row.tolist()):
            expected = (x - edges[k]) / (edges[k + 1] - edges[k])
            if k > 0:
                expected = max(expected, 0.0)
            if k < n_bins - 1:
                expected = min(expected, 1.0)
            assert number == pytest.approx(expected, abs=1e-5)


def test_periodic_numbers_are_cosines_and_sines_of_the_frequencies():
    embedding, x = Periodic(2, 3, 0.5, 4), torch.randn(6, 2)
    angles = 2 * math.pi * embedding.frequencies * x.unsqueeze(-1)
    weight = embedding.linear.weight
    expected = torch.einsum("bfi,fid->bdf", angles.cos(), weight[:, 0::2])
    expected = expected + torch.einsum("bfi,fid->bdf", angles.sin(), weight[:, 1::2]) + embedding.linear.bias
    torch.testing.assert_close(embedding(x), F.relu(expected).flatten(1))


def test_each_column_of_categories_has_rows_of_its_own_and_the_unknown_begins_as_zero():
    table = Categories([3, 2], 4)
    assert table.table.weight.shape == (5, 4)
    assert not table(torch.zeros(6, 2, dtype=torch.long)).any()
    out = table(torch.tensor([[1, 1], [2, 0]])).unflatten(1, (4, 2))
    torch.testing.assert_close(out[0], torch.stack([table.table.weight[1], table.table.weight[4]], 1))
    torch.testing.assert_close(out[1, :, 0], table.table.weight[2])


def test_members_share_a_weight_that_their_adapters_scale():
    layer = MemberLinear(3, 4, 5)
    with torch.no_grad():
        for adapter in (layer.r, layer.s):
            adapter.normal_()
    x = torch.randn(7, 3, 4)
    for k in range(3):
        alone = F.linear(x[:, k], layer.s[k, :, None] * layer.weight * layer.r[k], layer.bias[k])
        torch.testing.assert_close(layer(x)[:, k], alone)


@pytest.mark.parametrize("batch_norm", [False, True])
def test_the_ensemble_is_its_members_each_alone(batch_norm):
    ensemble, x = members_of(batch_norm=batch_norm), torch.randn(7, 4)
    mean, outputs = ensemble(x)
    assert mean.shape == (7, 2)
    assert outputs.shape == (7, 3, 2)
    torch.testing.assert_close(mean, outputs.mean(1))
    for k in range(3):
        hidden = x
        for block in ensemble.hidden:
            layer = block.linear
            hidden = F.linear(hidden * layer.r[k], layer.weight) * layer.s[k] + layer.bias[k]
            if batch_norm:  # as it is before training: of mean 0 and variance 1
                hidden = hidden / math.sqrt(1 + block.norm.eps)
            hidden = hidden.relu()
        torch.testing.assert_close(outputs[:, k], hidden @ ensemble.weight[k] + ensemble.bias[k])


def test_members_begin_different_by_their_first_signs_or_numbers_and_nothing_else():
    signs, numbers = members_of(n_members=64), members_of(n_members=64, embedded=True)
    assert signs.hidden[0].linear.r.unique().tolist() == [-1.0, 1.0]
    assert numbers.hidden[0].linear.r.std().item() == pytest.approx(1, abs=0.2)
    for ensemble in (signs, numbers):
        assert (ensemble.hidden[0].linear.s == 1).all()
        assert (ensemble.hidden[1].linear.r == 1).all()


def test_of_classes_it_is_the_probabilities_whose_mean_is_taken():
    logits = 3 * torch.randn(5, 4, 3)
    torch.testing.assert_close(mean_of_classes(logits).softmax(-1), logits.softmax(-1).mean(1))
    torch.testing.assert_close(mean_of_odds(logits).sigmoid(), logits.sigmoid().mean(1))
    torch.testing.assert_close(mean_of_odds(torch.full((1, 2, 1), 200.0)), torch.tensor([[200.0]]))


def test_each_member_has_a_loss_of_its_own():
    outputs, targets = members_of()(torch.randn(7, 4)), torch.randn(7, 2)
    own = [F.mse_loss(outputs[1][:, k], targets) for k in range(3)]
    torch.testing.assert_close(F.mse_loss(*of_members(outputs, targets)), torch.stack(own).mean())
    classes = torch.randint(2, (7,))
    own = [F.cross_entropy(outputs[1][:, k], classes) for k in range(3)]
    torch.testing.assert_close(F.cross_entropy(*of_members(outputs, classes)), torch.stack(own).mean())
    assert of_members(targets, classes) == (targets, classes)


def test_without_members_it_is_dense_layers():
    network = deep(4, 3, DEEP | {"batch_norm": True, "dropout": 0.5}, mean_of_classes, embedded=False)
    assert [type(m).__name__ for m in network] == ["Dense", "Dense", "Linear"]
    assert [type(m).__name__ for m in network.hidden1] == ["Linear", "BatchNorm1d", "ReLU", "Dropout"]
    assert network(torch.randn(5, 4)).shape == (5, 3)


def test_inputs_are_joined_the_last_one_first():
    x, y = torch.randn(5, 2), torch.randn(5, 3)
    joined = Joined([nn.Identity(), nn.Identity()], nn.Identity())
    torch.testing.assert_close(joined(x, y), torch.cat([y, x], 1))
    each = EachInput([nn.ReLU(), nn.Identity()])
    torch.testing.assert_close(each(x, y)[0], x.relu())
    torch.testing.assert_close(EachInput([nn.ReLU()])(x), x.relu())


class Embedded(Objective):
    """A regression on three numbers, in double precision."""

    kind = "piecewise"
    defaults = {"loss": "mse"}

    def data(self):
        raise AssertionError("a stack is given its data")

    def build(self, params, info):
        embedding, n_in = embedding_of(self.kind, 3, params)
        return nn.Sequential(embedding, deep(n_in, 1, params, mean_of_numbers, embedded=True)).double()

    def loss(self, outputs, targets, params):
        return super().loss(*of_members(outputs, targets), params)

    def metrics(self):
        return {"rmse": MeanSquaredError(squared=False)}


@pytest.mark.parametrize(
    ("ensemble", "kind"),
    [
        (2, "periodic"),
        pytest.param(0, "piecewise", marks=pytest.mark.slow),
        pytest.param(0, "periodic", marks=pytest.mark.slow),
        pytest.param(2, "piecewise", marks=pytest.mark.slow),
    ],
)
def test_members_of_a_stack_differ_in_all_sizes_and_each_is_as_alone(kind, ensemble, said):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 3, generator=generator, dtype=torch.float64)
    split = Split(inputs={"features": x}, targets=x.sin().sum(1, keepdim=True))
    fixed = {"loss": "mse", "optimizer": "adam", "batch_size": 16, "learning_rate": 3e-3, "dropout": 0.0}
    sizes = {"n_bins": (2, 9), "n_frequencies": (2, 9), "d_embedding": (2, 5), "n_hidden": (3, 7), "n_layers": (1, 3)}
    ranges = {name: {"type": "int", "low": low, "high": high} for name, (low, high) in sizes.items()}
    fixed |= {"ensemble": ensemble, "frequency_scale": 0.3}
    space, faults = build(fixed | {name: parse_param(entry) for name, entry in ranges.items()}, ())
    assert not faults
    drawn = [*space.corners(), *space.draw(4, seed=1)]
    objective = type("Kind", (Embedded,), {"kind": kind})()
    task = Task(objective=objective, info=DataInfo(inputs={}, input_dtypes={}), device=CPU, n_rows=40, epochs=2)
    seen = set()
    pool = Pool(
        task,
        len(drawn),
        split,
        PaddingPlan(space, lambda params: objective.build(params, task.info), "coarse"),
    )
    curves = []
    for stacks in (SingleStack(LoopStack(task, len(drawn))), pool):
        members = [Member(number=i, seed=i, params=params) for i, params in enumerate(drawn)]
        queue = list(members)
        batches = Batches(split, CPU)
        train(
            stacks,
            batches,
            batches,
            epochs=2,
            seed=0,
            ask=lambda n, queue=queue: [queue.pop(0) for _ in range(min(n, len(queue)))],
            report=lambda stack, results: seen.add(stack) or results,
        )
        curves.append([member.history for member in members])
    assert not said
    assert len(seen) == 2  # that of plain modules, and one for all members
    for alone, stacked in zip(*curves, strict=True):
        for one, other in zip(alone, stacked, strict=True):
            assert other == pytest.approx(one, rel=1e-9)
