"""Logic gates: the weights of a perceptron with a step that computes AND, OR, NOR or NAND; for XOR, of two."""

from dataclasses import dataclass
from typing import Literal

import torch
from hpo.objectives.models import Perceptron, TwoPerceptrons
from torchmetrics import Metric
from torchmetrics.classification import BinaryAccuracy

from hpo.study.data import Data, Split
from hpo.study.objective import Objective

INPUTS = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
OUTPUTS = {"and": [0, 0, 0, 1], "or": [0, 1, 1, 1], "nor": [1, 0, 0, 0], "nand": [1, 1, 1, 0], "xor": [0, 1, 1, 0]}
WEIGHTS = {
    "and": {"weight1": 1.0, "weight2": 1.0, "bias": -1.0},
    "or": {"weight1": 1.0, "weight2": 1.0, "bias": 0.0},
    "nor": {"weight1": -1.0, "weight2": -1.0, "bias": 1.0},
    "nand": {"weight1": -1.0, "weight2": -1.0, "bias": 2.0},
}
WEIGHTS["xor"] = {f"and_{name}": value for name, value in WEIGHTS["and"].items()} | {
    "weight1": 1.0,
    "weight2": 1.0,
    "weight_and": -2.0,
    "bias": 0.0,
}
"""The documented weights. XOR is x1 + x2 - 2 AND(x1, x2) > 0."""


@dataclass(frozen=True)
class Options:
    """Which gate is to be computed."""

    gate: Literal["and", "or", "nor", "nand", "xor"] = "and"


class Errors(Metric):
    """How many predictions (N, 1), 0 or 1, are not the targets (N, 1)."""

    higher_is_better = False
    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("errors", torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, predictions, targets):
        self.errors += (predictions != targets).sum()

    def compute(self):
        return self.errors


class LogicGates(Objective):
    """The truth table is train, validation and test at once: it has no other rows, and is to be known by heart.

    Nothing is trained: there is no gradient, and the search itself finds the weights.
    """

    Options = Options

    @property
    def defaults(self):
        return WEIGHTS[self.options.gate]

    @property
    def space(self):
        return {name: {"type": "float", "low": -2.0, "high": 2.0, "step": 0.5} for name in self.defaults}

    def data(self):
        targets = torch.tensor(OUTPUTS[self.options.gate], dtype=torch.float32).unsqueeze(1)
        table = Split(inputs={"inputs": INPUTS}, targets=targets)
        return Data(train=table, valid=table, test=table, feature_names=("x1", "x2"), class_names=("0", "1"))

    def train(self, params, report):
        weights = [params["weight1"], params["weight2"]]
        if self.options.gate == "xor":
            first = Perceptron([params["and_weight1"], params["and_weight2"]], params["and_bias"])
            network = TwoPerceptrons(first, Perceptron([*weights, params["weight_and"]], params["bias"]))
        else:
            network = Perceptron(weights, params["bias"])
        outputs = network.to(report.valid.targets.device)(report.valid.inputs["inputs"])
        report(
            {name: float(metric(outputs.cpu(), report.valid.targets.cpu())) for name, metric in self.metrics().items()}
        )
        return network

    def metrics(self):
        return {"errors": Errors(), "accuracy": BinaryAccuracy()}
