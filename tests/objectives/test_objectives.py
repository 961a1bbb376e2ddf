"""One contract for every objective in `objectives/`, with each value of each of its options that can be listed."""

import dataclasses
import functools
import importlib
import typing
from pathlib import Path

import pytest
import torch
from torch import nn

from hpo import catalog, optim
from hpo.bundle import TOLERANCE, Model, export
from hpo.data import Split, data_home
from hpo.feed import Feed
from hpo.objective import load
from hpo.space import build
from hpo.spec import parse_param
from hpo.stack import LoopStack, Member, One, Task
from hpo.training import train

FILES = {
    "california_housing": "sklearn/cal_housing_py3.pkz",
    "fashion_mnist": "torchvision/FashionMNIST/raw/train-images-idx3-ubyte",
}
"""What an objective needs below the data home; those not named here come with scikit-learn."""
CPU = torch.device("cpu")


def _options(name):
    """Return every choice of every option that is a Literal, the others left at their defaults."""
    module = importlib.import_module(f"objectives.{name}")
    options = getattr(module, "Options", None)
    hints = typing.get_type_hints(options) if options else {}
    choices = [
        {key: value}
        for key, hint in hints.items()
        for value in typing.get_args(hint)
        if typing.get_origin(hint) is typing.Literal
    ]
    return choices or [{}]


def _cases():
    for name in catalog.names():
        missing = name in FILES and not (data_home() / FILES[name]).exists()
        marks = [pytest.mark.skipif(missing, reason=f"there is no {data_home() / FILES.get(name, '')}")]
        for options in _options(name):
            label = "-".join([name, *map(str, options.values())])
            yield pytest.param((name, tuple(options.items())), marks=marks, id=label)


@dataclasses.dataclass(eq=False)
class Case:
    """One objective with its options, its data, and its default space."""

    name: str
    options: dict

    def make(self):
        objective, faults = load(self.name, self.options, Path())
        assert not faults
        return objective

    @functools.cached_property
    def objective(self):
        return self.make()

    @functools.cached_property
    def data(self):
        return self.objective.data().checked(self.name)

    @functools.cached_property
    def preprocess(self):
        return self.objective.preprocess(self.data.train)

    @functools.cached_property
    def corners(self):
        """The ends of the default space, and the defaults alone."""
        fixed = {**optim.DEFAULTS, **self.objective.defaults}
        space, faults = build(fixed | {n: parse_param(dict(e)) for n, e in self.objective.space.items()}, ())
        assert not faults
        return [*space.corners(), fixed]

    def some(self, n=64, split="train"):
        """Return `n` rows of a split as they come."""
        rows = self.data.splits[split]
        return Split(inputs={name: x[:n] for name, x in rows.inputs.items()}, targets=rows.targets[:n])

    def network(self, params):
        torch.manual_seed(0)
        return self.objective.build(params, self.data.info)


@functools.cache
def _case(name, options):
    return Case(name, dict(options))


@pytest.fixture(params=_cases())
def case(request):
    return _case(*request.param)


def test_there_are_objectives_and_breast_cancer_needs_nothing_from_outside():
    assert {"breast_cancer", *FILES} <= set(catalog.names())
    assert "breast_cancer" not in FILES
    assert all(catalog.names().values()), "each module's docstring says what it is"


def test_data_and_splits_are_the_same_at_every_call(case):
    torch.manual_seed(1)
    first = case.make().data().fingerprint()
    torch.manual_seed(2)
    assert case.make().data().fingerprint() == first == case.data.fingerprint()


def test_no_row_is_in_two_splits(case):
    def rows(split):
        columns = [x.reshape(len(split), -1).numpy() for x in (*split.inputs.values(), split.targets)]
        return {b"".join(part.tobytes() for part in row) for row in zip(*columns, strict=True)}

    train_rows, valid_rows, test_rows = (rows(split) for split in case.data.splits.values())
    assert not train_rows & valid_rows
    assert not train_rows & test_rows
    assert not valid_rows & test_rows


def test_every_split_looks_the_same(case):
    splits = list(case.data.splits.values())
    shapes = [{n: (x.shape[1:], x.dtype) for n, x in {**s.inputs, "targets": s.targets}.items()} for s in splits]
    assert shapes[0] == shapes[1] == shapes[2]
    assert all(len(split) >= 50 for split in splits)


def test_preprocessing_and_head_have_no_parameters_and_learn_nothing_in_use(case):
    assert not list(case.preprocess.parameters())
    assert not list(case.objective.head().parameters())
    state = {name: x.clone() for name, x in case.preprocess.state_dict().items()}
    case.data.test.through(case.preprocess)
    assert all(torch.equal(x, state[name]) for name, x in case.preprocess.state_dict().items())


def test_every_corner_of_the_default_space_builds_trains_and_predicts(case):
    rows = case.some()
    prepared = rows.through(case.preprocess)
    for params in case.corners:
        network = case.network(params).train()
        outputs = network(*prepared.inputs.values())
        loss = case.objective.loss(outputs, prepared.targets, params)
        assert loss.ndim == 0
        assert torch.isfinite(loss)
        loss.backward()
        for name, weight in network.named_parameters():
            assert weight.grad is not None, f"{name} has no gradient with {params}"
            assert weight.grad.abs().sum() > 0, f"{name} has a gradient of zero with {params}"
        optim.make(params, network.parameters()).step()


def test_a_seed_decides_the_weights(case):
    params = case.corners[-1]
    first, again = (case.network(params).state_dict() for _ in range(2))
    assert all(torch.equal(x, again[name]) for name, x in first.items())


def test_every_metric_takes_the_outputs_and_says_its_direction(case):
    rows = case.some(200, "valid").through(case.preprocess)
    params = case.corners[-1]
    with torch.no_grad():
        outputs = case.network(params).eval()(*rows.inputs.values())
    metrics = case.objective.metrics()
    assert metrics
    for metric in metrics.values():
        assert isinstance(metric.higher_is_better, bool)
        metric.update(outputs, rows.targets)
        assert torch.isfinite(metric.compute())


def test_it_learns_something(case):
    rows = case.some(512).through(case.preprocess)
    params = case.corners[-1] | {"batch_size": 32}
    member = Member(number=0, seed=0, params=params)
    task = Task(objective=case.objective, info=case.data.info, device=CPU, n_rows=len(rows), epochs=5)
    queue = [member]
    train(
        One(LoopStack(task)),
        Feed(rows, CPU),
        None,
        epochs=5,
        seed=0,
        ask=lambda n: [queue.pop()] if queue and n else [],
        report=lambda stack, member, metrics: True,
    )
    losses = [metrics["train_loss"] for metrics in member.history]
    assert member.fault is None
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.9 * losses[0]


def test_it_is_exported_with_parity_and_takes_raw_inputs(case, tmp_path):
    params, held_out = case.corners[-1], case.some(300, "test")
    model = Model(
        preprocess=case.preprocess,
        network=case.network(params),
        head=case.objective.head(),
        params=params,
        info=case.data.info,
        about={"study": case.name},
    )
    about = export(model, held_out, tmp_path / "bundle")
    assert max(result["max_difference"] for result in about["parity"].values()) <= TOLERANCE
    predictor: nn.Module = torch.jit.load(tmp_path / "bundle/model.torchscript.pt")
    with torch.no_grad():
        predictions = predictor(*held_out.inputs.values())
        outputs = model.network.eval()(*held_out.through(case.preprocess).inputs.values())
        torch.testing.assert_close(predictions, case.objective.head()(outputs), atol=TOLERANCE, rtol=0)
    assert len(predictions) == len(held_out)
    assert torch.isfinite(predictions).all()
