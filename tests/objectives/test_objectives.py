"""One contract for every objective in `objectives/`, with each value of each of its options that can be listed.

What an objective is exempt from stands in a table below, with the reason.
"""

import dataclasses
import functools
import importlib
import subprocess
import typing
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hpo.objectives.models import QuantileNormal
from PIL import Image
from torch import nn

from hpo.export import parity
from hpo.export.bundle import export
from hpo.export.formats import ALWAYS, FILE_OF
from hpo.export.model import Model
from hpo.export.parity import TOLERANCE
from hpo.stacks.alone import NotStackable
from hpo.stacks.vmap_stack import VmapStack
from hpo.study import catalog
from hpo.study.data import Split, data_home, prediction
from hpo.study.loading import load
from hpo.study.objective import Objective
from hpo.study.space import build
from hpo.study.spec import parse_param
from hpo.training import optim
from hpo.training.batches import Batches
from hpo.training.loop import train
from hpo.training.loop_stack import LoopStack
from hpo.training.stack import Member, SingleStack, Task

FILES = {
    "california_housing": "sklearn/cal_housing_py3.pkz",
    "covertype": "sklearn/covertype/samples_py3",
    "fashion_mnist": "torchvision/FashionMNIST/raw/train-images-idx3-ubyte",
    "mnist": "torchvision/MNIST/raw/train-images-idx3-ubyte",
}
"""What an objective needs below the data home; those not named here come with scikit-learn, or are made up."""
MORE_OPTIONS = {
    "california_housing": [
        {"model": "wide_and_deep", "inputs": "two", "auxiliary": True},
        {"model": "deep", "embedding": "piecewise"},
    ],
    "synthetic_binary": [{"data": "moons", "activation": "tanh"}, {"data": "circles", "activation": "relu_tanh"}],
    "image_csv": [{}, {"transforms": ["RandomHorizontalFlip"]}, {"model": "shufflenet_v2_x0_5", "size": 32}],
}
"""Options that are tried beside each choice of each Literal."""
OWN_OPTIONS = {
    "tabular": [
        {"target": "price", "task": "regression", "missing": "impute"},
        {"target": "sold", "task": "binary", "missing": "impute", "embedding": "none"},
        {"target": "kind", "task": "multiclass", "drop": ["age"], "embedding": "periodic"},
    ],
}
"""Options that are tried in place of them, since each choice needs others."""
FEW_ROWS = {
    "iris": "there are 150 flowers",
    "logic_gates": "a truth table has four rows",
    **{f"synthetic_binary-{each}": "blobs are 100 points" for each in ("blobs", "relu", "tanh", "relu_tanh")},
    "image_csv": "its images are made up here, few of them",
}
"""Whose splits may have less than 50 rows."""
SHARED_ROWS = {
    "iris": (1, "two flowers have the same measurements"),
    "logic_gates": (4, "the truth table is train, validation and test"),
}
"""How many rows of a split may be found in another one."""
NO_PART = {
    "california_housing-wide_and_deep-two-True": lambda name, params: (
        name.startswith("auxiliary.") and params["auxiliary_weight"] == 0
    ),
}
"""Which weights have no part in the loss, and so no gradient, with which params."""
UNSTACKED = {
    "image_csv-RandomHorizontalFlip": r"torch\.func cannot batch it",  # each image's flip is a branch on a random draw
}
"""Why networks cannot be trained in one stack."""
CPU = torch.device("cpu")


def write_images(folder):
    """Write 120 images, the light ones right and the dark ones left of the middle; return the options they need."""
    generator = torch.Generator().manual_seed(0)
    lines = ["image,label"]
    for i in range(120):
        pixels = torch.randint(0, 100, (20, 24, 3), generator=generator, dtype=torch.uint8)
        pixels[:, 12 * (i % 2) :][:, :12] += 100
        Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
        lines.append(f"{i}.png,{'left' if i % 2 == 0 else 'right'}")
    (folder / "labels.csv").write_text("\n".join(lines))
    return {"file": folder / "labels.csv", "size": 16}


def write_table(folder):
    """Write 300 rows of numbers, some of them missing, and of text; return the options they need."""
    generator = torch.Generator().manual_seed(0)
    lines = ["size,age,color,price,sold,kind"]
    for i, (size, age) in enumerate(torch.randn(300, 2, generator=generator).tolist()):
        price, kind = size - 2 * (i % 3), ("low", "middle", "high")[(size > -0.5) + (size > 0.5)]
        color = ("red", "green", "blue")[i % 3]
        lines.append(f"{size},{age if i % 10 else ''},{color},{price},{'yes' if size > 0 else 'no'},{kind}")
    (folder / "table.csv").write_text("\n".join(lines))
    return {"file": folder / "table.csv"}


WRITES = {"image_csv": write_images, "tabular": write_table}
"""Who needs data of one's own: it is written into a folder."""


def _class(name):
    module = importlib.import_module(f"hpo.objectives.{name}")
    return next(
        c
        for c in vars(module).values()
        if isinstance(c, type) and c.__module__ == module.__name__ and issubclass(c, Objective)
    )


def _options(name):
    """Return every choice of every option that is a Literal, the others left at their defaults, and what is above."""
    if name in OWN_OPTIONS:
        return OWN_OPTIONS[name]
    hints = typing.get_type_hints(_class(name).Options)
    choices = [
        {key: value}
        for key, hint in hints.items()
        for value in typing.get_args(hint)
        if typing.get_origin(hint) is typing.Literal
    ]
    return [*choices, *MORE_OPTIONS.get(name, [])] or [{}]


def _cases(own=(False, True)):
    """Return the objectives that have their own `train`, those that have none, or all."""
    for name in catalog.names():
        missing = name in FILES and not (data_home() / FILES[name]).exists()
        marks = [pytest.mark.skipif(missing, reason=f"there is no {data_home() / FILES.get(name, '')}")]
        if (_class(name).train is not None) in own:
            alike = []
            for options in _options(name):
                given = {field.name: field.default for field in dataclasses.fields(_class(name).Options)} | options
                again, alike = [pytest.mark.slow] * (given in alike), [*alike, given]  # a default that is spelled out
                values = (v if isinstance(v, list) else [v] for v in options.values())
                label = "-".join([name, *(str(v) for each in values for v in each)])
                yield pytest.param((name, label, options), marks=marks + again, id=label)


class Reports:
    """What an objective's own `train` is given: so many epochs of a case's data, and what it reported of them."""

    def __init__(self, case, epochs):
        self.train, self.valid = (case.data.splits[name].through(case.preprocess) for name in ("train", "valid"))
        self.epochs, self.seed, self.metrics = epochs, 0, []

    def __call__(self, metrics):
        self.metrics.append(dict(metrics))
        return len(self.metrics) < self.epochs


@dataclasses.dataclass(eq=False)
class Case:
    """One objective with its options, its data, and its default space."""

    name: str
    label: str
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
        data = self.objective.data().checked(self.name)
        self.objective.info = data.info
        return data

    @functools.cached_property
    def preprocess(self):
        return self.objective.preprocess(self.data.train)

    @functools.cached_property
    def corners(self):
        """The ends of the default space, and the defaults alone."""
        engine = optim.DEFAULTS if self.objective.train is None else {}
        fixed = {**engine, **self.objective.defaults}
        space, faults = build(fixed | {n: parse_param(dict(e)) for n, e in self.objective.space.items()}, ())
        assert not faults
        return [*space.corners(), fixed]

    def some(self, n=64, split="train"):
        """Return `n` rows of a split as they come."""
        rows = self.data.splits[split]
        return Split(inputs={name: x[:n] for name, x in rows.inputs.items()}, targets=rows.targets[:n])

    def network(self, params):
        torch.manual_seed(0)
        if self.objective.train is not None:
            return self.objective.train(params, Reports(self, epochs=2))
        return self.objective.build(params, self.data.info)

    def task(self, n_rows, epochs):
        return Task(objective=self.objective, info=self.data.info, device=CPU, n_rows=n_rows, epochs=epochs)


@pytest.fixture(scope="session")
def make_case(tmp_path_factory):
    """Return a function that gives the case of a name and options, the same at every call."""

    @functools.cache
    def needed(name):
        return WRITES[name](tmp_path_factory.mktemp(name)) if name in WRITES else {}

    cases = {}

    def make(name, label, options):
        return cases.setdefault(label, Case(name, label, needed(name) | options))

    return make


@pytest.fixture(params=_cases())
def case(request, make_case):
    return make_case(*request.param)


@pytest.fixture(params=_cases(own=[False]))
def built(request, make_case):
    """A case that the engine trains."""
    return make_case(*request.param)


@pytest.fixture(params=_cases(own=[True]))
def own(request, make_case):
    """A case that trains itself."""
    return make_case(*request.param)


@contextmanager
def _double():
    """Have networks built in double precision."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def _exempt(case, table):
    return table.get(case.label, table.get(case.name))


def test_there_are_objectives_and_breast_cancer_needs_nothing_from_outside():
    assert {"breast_cancer", *FILES} <= set(catalog.names())
    assert "breast_cancer" not in FILES
    assert all(catalog.names().values()), "each module's docstring says what it is"


def test_every_exemption_is_of_something_that_there_is():
    labels = {case.values[0][1] for case in _cases()} | set(catalog.names())
    for table in (FILES, MORE_OPTIONS, OWN_OPTIONS, FEW_ROWS, SHARED_ROWS, NO_PART, UNSTACKED, WRITES):
        assert table.keys() <= labels


def test_data_and_splits_are_the_same_at_every_call(case):
    torch.manual_seed(1)
    first = case.data.fingerprint()
    torch.manual_seed(2)
    assert case.make().data().fingerprint() == first


def test_no_row_is_in_two_splits(case):
    def rows(split):
        columns = [x.reshape(len(split), -1).numpy() for x in (*split.inputs.values(), split.targets)]
        return {b"".join(part.tobytes() for part in row) for row in zip(*columns, strict=True)}

    train_rows, valid_rows, test_rows = (rows(split) for split in case.data.splits.values())
    n_shared, _ = _exempt(case, SHARED_ROWS) or (0, "")
    assert len(train_rows & valid_rows) <= n_shared
    assert len(train_rows & test_rows) <= n_shared
    assert len(valid_rows & test_rows) <= n_shared


def test_every_split_looks_the_same(case):
    splits = list(case.data.splits.values())
    shapes = [{n: (x.shape[1:], x.dtype) for n, x in {**s.inputs, "targets": s.targets}.items()} for s in splits]
    assert shapes[0] == shapes[1] == shapes[2]
    assert all(len(split) >= 50 for split in splits) or _exempt(case, FEW_ROWS)


def test_preprocessing_and_head_have_no_parameters_and_learn_nothing_in_use(case):
    assert not list(case.preprocess.parameters())
    assert not list(case.objective.head().parameters())
    state = {name: x.clone() for name, x in case.preprocess.state_dict().items()}
    case.data.test.through(case.preprocess)
    assert all(torch.equal(x, state[name]) for name, x in case.preprocess.state_dict().items())


def test_every_corner_of_the_default_space_builds_trains_and_predicts(built):
    rows = built.some()
    prepared = rows.through(built.preprocess)
    for params in built.corners:
        network = built.network(params).train()
        outputs = network(*prepared.inputs.values())
        loss = built.objective.loss(outputs, prepared.targets, params)
        assert loss.ndim == 0
        assert torch.isfinite(loss)
        loss.backward()
        has_no_part = NO_PART.get(built.label, lambda name, params: False)
        for name, weight in network.named_parameters():
            if has_no_part(name, params):
                continue
            assert weight.grad is not None, f"{name} has no gradient with {params}"
            assert weight.grad.abs().sum() > 0, f"{name} has a gradient of zero with {params}"
        optim.make(params, network.parameters()).step()


def test_every_corner_of_the_default_space_trains_itself_and_ends_when_it_is_told_to(own):
    names = {*own.objective.metrics()}
    for params in own.corners:
        report = Reports(own, epochs=2)
        network = own.objective.train(params, report)
        assert isinstance(network, nn.Module)
        assert 1 <= len(report.metrics) <= 2
        for metrics in report.metrics:
            assert names <= metrics.keys()
            assert all(torch.isfinite(torch.tensor(value)) for value in metrics.values())


def test_a_seed_decides_the_weights(case):
    params = case.corners[-1]
    first, again = (case.network(params).state_dict() for _ in range(2))
    assert all(torch.equal(x, again[name]) for name, x in first.items())


def test_every_metric_takes_the_outputs_and_says_its_direction(case):
    rows = case.some(200, "valid").through(case.preprocess)
    params = case.corners[-1]
    with torch.no_grad():
        outputs = prediction(case.network(params).eval()(*rows.inputs.values()))
    metrics = case.objective.metrics()
    assert metrics
    for metric in metrics.values():
        assert isinstance(metric.higher_is_better, bool)
        metric.update(outputs, rows.targets)
        assert torch.isfinite(metric.compute())


def test_it_learns_something(built):
    """The loss of the defaults falls by a tenth, in whatever part of 100 epochs of a few rows."""
    rows = built.some(512).through(built.preprocess)
    params = built.corners[-1]
    member = Member(number=0, seed=0, params=params | {"batch_size": min(32, params["batch_size"])})
    queue, losses = [member], []

    def report(stack, results):
        losses.append(results[member]["train_loss"])
        return [member] if losses[-1] > 0.9 * losses[0] else []

    train(
        SingleStack(LoopStack(built.task(len(rows), 100))),
        Batches(rows, CPU),
        None,
        epochs=100,
        seed=0,
        ask=lambda n: [queue.pop()] if queue and n else [],
        report=report,
    )
    assert member.fault is None
    assert losses[-1] <= 0.9 * losses[0]


def test_it_learns_something_by_itself(own):
    report = Reports(own, epochs=10)
    own.objective.train(own.corners[-1], report)
    _, counts = own.data.valid.targets.unique(return_counts=True)
    assert max(metrics["accuracy"] for metrics in report.metrics) > counts.max() / counts.sum()


def test_its_networks_are_trained_in_a_stack_as_alone_or_say_why_not(built):
    """Three members of three learning rates; without dropout, whose masks are a stack's own."""
    rows, valid = (_in_double(built.some(48, split).through(built.preprocess)) for split in ("train", "valid"))
    params = built.corners[-1] | {"batch_size": 16}
    params |= {name: 0.0 for name in params if "dropout" in name}
    members = [
        Member(number=n, seed=n, params=params | {"learning_rate": params["learning_rate"] * 2.0**n}) for n in range(3)
    ]
    task = built.task(len(rows), epochs=1)
    stack, alone = VmapStack(task, 3, rows), LoopStack(task, 3)
    with _double():
        if reason := UNSTACKED.get(built.label):
            with pytest.raises(NotStackable, match=reason):
                stack.join(members[0])
            return
        for member in members:
            stack.join(member)
            alone.join(member)
        for inputs, targets in Batches(rows, CPU).epoch(16, torch.arange(len(rows))):
            torch.testing.assert_close(stack.step(inputs, targets), alone.step(inputs, targets))
        for member in members:
            torch.testing.assert_close(stack.state(member), alone.state(member), rtol=1e-6, atol=1e-9)
        for together, expected in zip(*(each.evaluate(Batches(valid, CPU)) for each in (stack, alone)), strict=True):
            assert together == pytest.approx(expected, rel=1e-5, abs=1e-6)


def _in_double(split):
    inputs, targets = split.inputs, split.targets
    return Split(
        inputs={name: x.double() if x.is_floating_point() else x for name, x in inputs.items()},
        targets=targets.double() if targets.is_floating_point() else targets,
    )


def model_of(case, params):
    """Return what is exported of a network of these params."""
    return Model(
        preprocess=case.preprocess,
        network=case.network(params),
        head=case.objective.head(),
        params=params,
        info=case.data.info,
        about={"study": case.name},
    )


def test_it_is_exported_with_parity_and_takes_raw_inputs(case, tmp_path):
    params, held_out = case.corners[-1], case.some(300, "test")
    model = model_of(case, params)
    about = export(model, held_out, tmp_path / "bundle")
    assert max(result["max_difference"] for result in about["parity"].values()) <= TOLERANCE
    predictor: nn.Module = torch.jit.load(tmp_path / "bundle/model.torchscript.pt")
    with torch.no_grad():
        predictions = predictor(*held_out.inputs.values())
        outputs = prediction(model.network.eval()(*held_out.through(case.preprocess).inputs.values()))
        torch.testing.assert_close(predictions, case.objective.head()(outputs), atol=TOLERANCE, rtol=0)
    assert len(predictions) == len(held_out)
    assert torch.isfinite(predictions).all()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pt2", "onnx", "safetensors"])
def test_it_is_exported_in_every_format_and_loaded_where_hpo_cannot_be_imported(case, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(parity, "subprocess", subprocess)  # Python is started, no warm process forked
    if kind == "onnx" and any(isinstance(part, QuantileNormal) for part in case.preprocess.modules()):
        pytest.skip("ONNX has no special.ndtri, which QuantileNormal takes")
    for package in {"onnx": ("onnx", "onnxscript", "onnxruntime"), "safetensors": ("safetensors",)}.get(kind, ()):
        pytest.importorskip(package)
    params = case.corners[-1]
    model = model_of(case, params)
    about = export(model, case.some(300, "test"), tmp_path / "bundle", {**ALWAYS, kind: True}, fresh=True)
    results = {name: result["fresh_process"] for name, result in about["parity"].items() if name != "model.pt"}
    found = {name: result["max_difference"] for name, result in results.items()}
    assert set(found) == {"model.torchscript.pt", FILE_OF[kind]}
    assert max(found.values()) <= max(result["tolerance"] for result in about["parity"].values())
