"""Objectives as newcomers write them, each wrong in one place: a line that says what came and what is wanted."""

import warnings
from pathlib import Path

import pytest

from tests.cli import invoke, refused
from tests.conftest import FRESH, run_hpo

GOOD = '''
"""Three classes of points."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torchmetrics import Metric
from torchmetrics.classification import BinaryAccuracy, MulticlassAccuracy

from hpo.study.data import Data, Split
from hpo.study.objective import Objective


class Anything(Metric):
    higher_is_better = True

    def update(self, outputs, targets):
        pass

    def compute(self):
        return torch.zeros(())


class Points(Objective):
    defaults = {"learning_rate": 0.1, "batch_size": 8, "width": 8}
    space = {"width": {"type": "int", "low": 4, "high": 16}}

    def data(self):
        def split(seed):
            x = torch.randn(40, 4, generator=torch.Generator().manual_seed(seed))
            y = torch.arange(40) % 3
            y[:8] = y[:8] % 2
            return Split(inputs={"x": x}, targets=y)

        return Data(train=split(0), valid=split(1), test=split(2), class_names=("a", "b", "c"))

    def build(self, params, info):
        return nn.Sequential(nn.Linear(4, params["width"]), nn.ReLU(), nn.Linear(params["width"], 3))

    def loss(self, outputs, targets, params):
        return F.cross_entropy(outputs, targets)

    def metrics(self):
        return {"accuracy": MulticlassAccuracy(3)}
'''
DATA = 'return Data(train=split(0), valid=split(1), test=split(2), class_names=("a", "b", "c"))'
SPLIT = 'return Split(inputs={"x": x}, targets=y)'
BUILD = 'return nn.Sequential(nn.Linear(4, params["width"]), nn.ReLU(), nn.Linear(params["width"], 3))'
LOSS = "return F.cross_entropy(outputs, targets)"
METRICS = 'return {"accuracy": MulticlassAccuracy(3)}'
SPACE = 'space = {"width": {"type": "int", "low": 4, "high": 16}}'
DEFAULTS = 'defaults = {"learning_rate": 0.1, "batch_size": 8, "width": 8}'
ONE = "return nn.Linear(4, 1)"
REGRESSION = {'"x": x}, targets=y)': '"x": x}, targets=x.sum(1))', ', class_names=("a", "b", "c")': "", BUILD: ONE}
FORWARD = """
        class Net(nn.Linear):
            def forward(self, x):
                y = super().forward(x)
                return {}

        return Net(4, 3)
"""
STATEFUL = """
        class Net(nn.Linear):
            def get_extra_state(self):
                return {"step": 1}

            def set_extra_state(self, state):
                pass

        return nn.Sequential(nn.Linear(4, 4), Net(4, 3))
"""
WRONG = {
    "numpy": (
        {SPLIT: "return Split(inputs={'x': x.numpy()}, targets=y.numpy())"},
        "in its train split, x must be a torch.Tensor, but is a numpy.ndarray; use torch.from_numpy",
    ),
    "numpy targets": (
        {SPLIT: 'return Split(inputs={"x": x}, targets=y.numpy())'},
        "in its train split, targets must be a torch.Tensor, but is a numpy.ndarray",
    ),
    "lists": (
        {SPLIT: 'return Split(inputs={"x": x.tolist()}, targets=y)'},
        "in its train split, x must be a torch.Tensor, but is a list; use torch.tensor",
    ),
    "no targets": (
        {SPLIT: 'return Split(inputs={"x": x}, targets=None)'},
        "in its train split, targets must be a torch.Tensor, but is None",
    ),
    "inputs are a tensor": (
        {SPLIT: "return Split(inputs=x, targets=y)"},
        'in its train split, inputs must be a mapping of names to tensors, {"features": x}, but is a',
    ),
    "no inputs": (
        {SPLIT: "return Split(inputs={}, targets=y)"},
        "in its train split, inputs must be a mapping of names",
    ),
    "a tuple for a split": (
        {'return Split(inputs={"x": x}, targets=y)': "return x, y"},
        "its train split must be hpo.study.data.Split(inputs=..., targets=...), but is a tuple",
    ),
    "a tuple for data": (
        {DATA: "return split(0), split(1), split(2)"},
        "data must return hpo.study.data.Data, but got a tuple",
    ),
    "no data": ({DATA: "split(0)"}, "data must return hpo.study.data.Data, but got None"),
    "one target": (
        {SPLIT: 'return Split(inputs={"x": x}, targets=y.sum())'},
        "in its train split, targets must have a row for each example, but it is one number",
    ),
    "too few targets": (
        {SPLIT: 'return Split(inputs={"x": x}, targets=y[:30])'},
        "in its train split, x has 40 rows, but targets has 30",
    ),
    "an empty split": (
        {"valid=split(1)": "valid=Split(inputs={'x': torch.zeros(0, 4)}, targets=torch.zeros(0).long())"},
        "its valid split is empty",
    ),
    "a split of other names": (
        {"valid=split(1)": "valid=Split(inputs={'z': split(1).inputs['x']}, targets=split(1).targets)"},
        "in its valid split, the inputs are ['z'], but in train they are ['x']",
    ),
    "a split of another width": (
        {"valid=split(1)": "valid=Split(inputs={'x': torch.zeros(40, 5)}, targets=split(1).targets)"},
        "in its valid split, a row of x is (5,) float32, but in train it is (4,) float32",
    ),
    "nan": (
        {"y = torch": "x[3] = float('nan'); y = torch"},
        "x holds NaN or infinity in 1 of 40 rows (the first: row 3)",
    ),
    "classes from 1": (
        {"% 3": "% 3 + 1", "y[:8] = y[:8] % 2": ""},
        "in its train split, targets go from 1 to 3, but class_names has 3 names: they are 0 to 2",
    ),
    "a class below 0": ({"y[:8] = y[:8] % 2": "y[20] = -1"}, "targets go from -1 to 2, but class_names has 3 names"),
    "a class that the first rows do not have": (
        {", 3))": ", 2))", "MulticlassAccuracy(3)": "MulticlassAccuracy(2)"},
        "loss failed: IndexError: Target 2 is out of bounds. (",
        "; given outputs (8, 2) float32, targets (8,) int64 from 0 to 2",
    ),
    "a class in the test split only": (
        {', class_names=("a", "b", "c")': "", "y = torch.arange(40) % 3": "y = torch.arange(40) % 3 + (seed == 2)"},
        "loss failed: IndexError: Target 3 is out of bounds. (",
        "targets (8,) int64 from 0 to 3",
    ),
    "a metric of fewer classes": (
        {METRICS: 'return {"accuracy": MulticlassAccuracy(2)}'},
        "metric accuracy failed: ",
        "; given outputs (8, 3) float32, targets (8,) int64 from 0 to ",
    ),
    "a metric of another task": (
        {METRICS: 'return {"accuracy": BinaryAccuracy()}'},
        "metric accuracy failed: ",
        "; given outputs (8, 3) float32, targets (8,) int64",
    ),
    "a metric of a vector": (
        {METRICS: 'return {"accuracy": MulticlassAccuracy(3, average=None)}'},
        "metric accuracy must give one number, but gives a tensor of shape (3,); have it take an average",
    ),
    "a list of metrics": (
        {METRICS: "return [MulticlassAccuracy(3)]"},
        "objective: metrics must return a mapping of names to TorchMetrics objects, but returned a list",
    ),
    "no metrics": (
        {METRICS: "pass"},
        "metrics must return a mapping of names to TorchMetrics objects, but returned None",
    ),
    "a metric's class": (
        {METRICS: 'return {"accuracy": MulticlassAccuracy}'},
        "must be TorchMetrics objects, but accuracy is <class",
    ),
    "metrics that fail": (
        {METRICS: 'return {"accuracy": MulticlassAccuracy(self.n)}'},
        "metrics failed: AttributeError: 'Points' object has no attribute 'n' (",
    ),
    "a metric named loss": (
        {METRICS: 'return {"loss": MulticlassAccuracy(3)}'},
        "metrics must not name one of them loss",
    ),
    "a typo in a range": (
        {SPACE: 'space = {"width": {"type": "flaot", "low": 4, "high": 16}}'},
        "objective: its space: width: type must be float, int or categorical, but got 'flaot'; did you mean",
    ),
    "a typo in a key": (
        {SPACE: 'space = {"width": {"type": "int", "lo": 4, "high": 16}}'},
        'its space: width.lo: unknown key; did you mean "low"?',
    ),
    "bounds in the wrong order": (
        {SPACE: 'space = {"width": {"type": "int", "low": 40, "high": 16}}'},
        "its space: width: low < high must hold, but got low=40 and high=16",
    ),
    "a range as a list": ({SPACE: 'space = {"width": [4, 16]}'}, "its space: width: must be one value"),
    "a space with a fixed value": (
        {SPACE: 'space = {"width": 4}'},
        'its space: width must be a range, {"type": "float"',
    ),
    "a space that is a list": ({SPACE: 'space = ["width"]'}, "its space must be a mapping of names, but is a list"),
    "a typo in a name": (
        {SPACE: 'space = {"widht": {"type": "int", "low": 4, "high": 16}}'},
        "its space: neither its defaults nor the engine has 'widht'; did you mean \"width\"?",
    ),
    "defaults that are a list": (
        {DEFAULTS: 'defaults = ["width"]'},
        "its defaults must be a mapping of names, but is a list",
    ),
    "a range in the defaults": (
        {DEFAULTS: 'defaults = {"width": {"type": "int", "low": 4, "high": 8}}'},
        "its default width must be a number, a text, true, false or null (ranges belong into its space)",
    ),
    "a param that defaults has not": (
        {BUILD: 'return nn.Linear(4, params["n_out"])'},
        "failed: KeyError: 'n_out' (",
        "; there is no param 'n_out': if it is to be one, add it to the objective's `defaults`",
    ),
    "a param that only the loss reads": (
        {LOSS: 'return params["factor"] * F.cross_entropy(outputs, targets)'},
        "there is no param 'factor': if it is to be one, add it to the objective's `defaults`",
    ),
    "build gives nothing": ({BUILD: "nn.Linear(4, 3)"}, "build must return a torch.nn.Module, but returned None"),
    "build gives a class": (
        {BUILD: "return nn.Linear"},
        "build must return a torch.nn.Module, but returned the class Linear: make one, Linear(...)",
    ),
    "build gives a list": (
        {BUILD: "return [nn.Linear(4, 3)]"},
        "build must return a torch.nn.Module, but returned a list",
    ),
    "build takes no info": (
        {"build(self, params, info)": "build(self, params)"},
        "Points.build must take params, info, but takes (params): too many positional arguments",
    ),
    "nothing to train": ({BUILD: "return nn.Flatten()"}, "failed: ValueError: optimizer got an empty parameter list"),
    "a wrong input width": (
        {BUILD: "return nn.Linear(5, 3)"},
        "forward failed: RuntimeError: mat1 and mat2 shapes",
        "; given x (8, 4) float32",
    ),
    "integers as inputs": (
        {SPLIT: 'return Split(inputs={"x": (9 * x).long()}, targets=y)'},
        "forward failed: RuntimeError: ",
        "; given x (8, 4) int64; networks compute in float32: give x as .float()",
    ),
    "doubles as inputs": (
        {SPLIT: 'return Split(inputs={"x": x.double()}, targets=y)'},
        "forward failed: RuntimeError: ",
        "; given x (8, 4) float64; networks compute in float32: give x as .float()",
    ),
    "a forward of two inputs": (
        {SPLIT: 'return Split(inputs={"x": x, "z": x}, targets=y)'},
        "forward failed: TypeError: ",
        "; given x (8, 4) float32, z (8, 4) float32",
    ),
    "a state that is no tensor": (
        {BUILD: STATEFUL.strip()},
        "all that a network keeps must be tensors, which checkpoints and bundles are made of, but get_extra_state of ",
        "1 (Net) gives a dict; keep numbers in buffers (register_buffer), and have no get_extra_state",
    ),
    "a forward without return": (
        {BUILD: FORWARD.format("None").strip()},
        "forward must return a tensor, or a tuple of tensors, but returned None",
    ),
    "a forward of a tensor and nothing": (
        {BUILD: FORWARD.format("y, None").strip()},
        "forward must return a tensor, or a tuple of tensors, but returned None in a tuple",
    ),
    "a forward of a mean": (
        {BUILD: FORWARD.format("y.mean()").strip()},
        "with a row for each of the 8 rows that it is given, but returned () float32",
    ),
    "a forward that drops rows": ({BUILD: FORWARD.format("y[1:]").strip()}, "but returned (7, 3) float32"),
    "a loss that is a float": (
        {LOSS: "return F.cross_entropy(outputs, targets).item()"},
        "loss must return one number",
        "but got ",
    ),
    "a loss of nothing": ({LOSS: "F.cross_entropy(outputs, targets)"}, "loss must return one number", "but got None"),
    "a loss of rows": (
        {LOSS: 'return F.cross_entropy(outputs, targets, reduction="none")'},
        "but got a tensor of shape (8,); take its mean",
    ),
    "classes for bce": (
        {LOSS: "return F.binary_cross_entropy_with_logits(outputs[:, 0], targets)"},
        "loss failed: RuntimeError: ",
        "targets (8,) int64 from 0 to 1; networks compute in float32: give targets as .float()",
    ),
    "all pairs": (
        {**REGRESSION, LOSS: "return F.mse_loss(outputs, targets)"},
        "loss compares each row's output with every row's target: outputs (8, 1) float32 and targets (8,) float32 are "
        "broadcast to (8, 8); give both one shape",
    ),
    "all pairs by hand": (
        {**REGRESSION, LOSS: "return ((outputs - targets) ** 2).mean()"},
        "loss compares each row's output with every row's target",
    ),
    "bce of 1 and 2": (
        {
            **REGRESSION,
            LOSS: "return super().loss(outputs, targets, params)",
            '"width": 8}': '"width": 8, "loss": "bce"}',
            "x.sum(1)": "(x[:, :1] > 0).float() + 1",
            METRICS: 'return {"any": Anything()}',
            "MulticlassAccuracy\n": "MulticlassAccuracy\n",
        },
        "bce takes targets from 0 to 1, but they go from 1 to 2",
    ),
    "options that are no dataclass": (
        {"    defaults =": "    Options = dict\n    defaults ="},
        "Points.Options must be a dataclass, but is <class 'dict'>",
    ),
    "no preprocessing": (
        {"    def metrics": "    def preprocess(self, train):\n        pass\n\n    def metrics"},
        "preprocess must return a torch.nn.Module, but returned None",
    ),
    "preprocessing with weights": (
        {"    def metrics": "    def preprocess(self, train):\n        return nn.Linear(4, 4)\n\n    def metrics"},
        "preprocess must return a module that needs no training, but got the parameters weight, bias; have build",
    ),
    "a head with weights": (
        {"    def metrics": "    def head(self):\n        return nn.Linear(3, 3)\n\n    def metrics"},
        "head must return a module that needs no training, but got the parameters weight, bias; have build",
    ),
    "no defaults": ({DEFAULTS: "defaults = None"}, "its defaults must be a mapping of names, but is a NoneType"),
    "no head": (
        {"    def metrics": "    def head(self):\n        pass\n\n    def metrics"},
        "head must return a torch.nn.Module, but returned None",
    ),
}


def written(changes: dict[str, str]) -> str:
    text = GOOD
    for old, new in changes.items():
        assert old in text, old
        text = text.replace(old, new)
    return text


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_a_wrong_objective_is_one_line_that_says_what_came(study, wrong):
    changes, *said = wrong
    Path("odd.py").write_text(written(changes))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's and torchmetrics' own, which a run prints
        message = refused("check", study("objective: odd.py"))
    assert message.count("\n") <= 1
    assert all(text in message for text in said), message


SLOW_FROM_OUTSIDE = [pytest.param(name, marks=pytest.mark.slow) for name in ("numpy", "a list of metrics", "all pairs")]


@pytest.mark.parametrize("name", ["a typo in a range", *SLOW_FROM_OUTSIDE])
def test_from_outside_it_is_one_line_and_status_2(study, name):
    changes, *said = WRONG[name]
    Path("odd.py").write_text(written(changes))
    path = study("objective: odd.py")
    done = run_hpo("run", path, **FRESH)
    assert done.returncode == 2
    assert name in ("numpy", "all pairs") or done.stdout == f"study: {path}, 3 trials; importing PyTorch\n"
    assert len(done.stderr.splitlines()) == 1
    assert said[0] in done.stderr


RIGHT = {
    "as it is": {},
    "an output squeezed by the loss": {**REGRESSION, LOSS: "return F.mse_loss(outputs.squeeze(1), targets)"},
    "targets that are all alike": {
        **REGRESSION,
        "x.sum(1)": "0 * x.sum(1)",
        LOSS: "return ((outputs.squeeze(1) - targets) ** 2).mean()",
    },
    "a loss that reads no targets": {LOSS: "return outputs.square().mean()"},
    "an ignored class": {
        ', class_names=("a", "b", "c")': "",
        "y[:8] = y[:8] % 2": "y[20] = -100",
        METRICS: 'return {"any": Anything()}',
    },
    "a dict of outputs": {
        BUILD: FORWARD.format('{"y": y, "z": y}').strip(),
        LOSS: 'return F.cross_entropy(outputs["y"], targets)',
    },
    "a class inside of build": {BUILD: FORWARD.format("y * 1.0").strip()},
}


def test_a_network_that_torchscript_cannot_hold_is_said_before_the_first_trial(study):
    network = """
        class Sign(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return x.sign()

            @staticmethod
            def backward(ctx, gradient):
                return gradient

        class Net(nn.Linear):
            def forward(self, x):
                return Sign.apply(super().forward(x))

        return Net(4, 3)
    """
    Path("odd.py").write_text(written({BUILD: network.strip()}))
    why = "its network (Net) cannot be exported: the model cannot be exported (Could not export Python function call"
    assert why in " ".join(invoke("check", study("objective: odd.py\nmetric: loss")).split())


@pytest.mark.parametrize("changes", RIGHT.values(), ids=RIGHT)
def test_what_is_right_is_let_through(study, changes):
    metric = {METRICS: 'return {"any": Anything()}'}
    Path("odd.py").write_text(written({**changes, **metric}))
    assert "nothing is wrong" in invoke("check", study("objective: odd.py\nmetric: loss"))
