"""Iris: three kinds of flower from four lengths; scikit-learn's Perceptron, one against the rest."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from sklearn.datasets import load_iris
from sklearn.linear_model import Perceptron
from sklearn.model_selection import train_test_split
from torch import nn
from torchmetrics.classification import MulticlassAccuracy

from hpo.study.blocks import Standardize, split_by_rows
from hpo.study.objective import Objective

N_VALID = 22
"""A fifth of the 112 rows that are not for the test."""


@dataclass(frozen=True)
class Options:
    """`fit`: epochs is `partial_fit`, an epoch at a time, so that a trial can be pruned; whole is one `fit`.

    The documented figures are those of `fit`, which scikit-learn ends by itself, each class in an epoch of its own;
    they come out when the defaults are fitted to train + validation. It reports once: a study of it has `epochs: 1`.
    """

    fit: Literal["epochs", "whole"] = "epochs"


class Iris(Objective):
    """150 x 4; `train_test_split(random_state=0)`, and the last fifth of its 112 rows for validation; standardised.

    Two flowers have the same measurements, and one of them is in train, the other in validation.
    """

    Options = Options
    defaults = {
        "penalty": "none",
        "alpha": 1e-4,
        "l1_ratio": 0.15,
        "eta0": 1.0,
        "fit_intercept": True,
        "random_state": 0,  # the order of rows: a perceptron's weights begin at zero
    }
    space = {
        "penalty": {"type": "categorical", "choices": ["none", "l2", "l1", "elasticnet"]},
        "alpha": {
            "type": "float",
            "low": 1e-6,
            "high": 1e-2,
            "log": True,
            "when": {"penalty": ["l2", "l1", "elasticnet"]},
        },
        "l1_ratio": {"type": "float", "low": 0.0, "high": 1.0, "when": {"penalty": "elasticnet"}},
        # the learning rate: without a penalty it scales all weights, and changes no prediction
        "eta0": {
            "type": "float",
            "low": 1e-2,
            "high": 10.0,
            "log": True,
            "when": {"penalty": ["l2", "l1", "elasticnet"]},
        },
        "fit_intercept": {"type": "categorical", "choices": [True, False]},
    }

    def data(self):
        iris = load_iris()
        rows, test = train_test_split(np.arange(len(iris.data)), random_state=0)
        return split_by_rows(
            {"features": torch.from_numpy(iris.data).float()},
            torch.from_numpy(iris.target).long(),
            (rows[:-N_VALID], rows[-N_VALID:], test),  # train + validation are in the documented order again
            feature_names=tuple(iris.feature_names),
            class_names=tuple(map(str, iris.target_names)),
        )

    def train(self, params, report):
        given = {**self.defaults, **params}
        given["penalty"] = None if given["penalty"] == "none" else given["penalty"]
        x, classes = report.train.inputs["features"].cpu().numpy(), report.train.targets.cpu().numpy()
        if self.options.fit == "whole":
            network = _linear(Perceptron(**given).fit(x, classes))
            report(self._measured(network, report))
            return network
        given["random_state"] = np.random.RandomState(given["random_state"])  # a number gives each epoch the same order
        perceptron = Perceptron(**given)
        for _ in range(report.epochs):
            network = _linear(perceptron.partial_fit(x, classes, classes=np.unique(classes)))
            if not report(self._measured(network, report)):
                break
        return network

    def _measured(self, network, report):
        values = {}
        for beginning, split in (("train_", report.train), ("", report.valid)):
            outputs = network(split.inputs["features"].cpu())
            values |= {
                beginning + n: float(metric(outputs, split.targets.cpu())) for n, metric in self.metrics().items()
            }
        return values

    def metrics(self):
        return {"accuracy": MulticlassAccuracy(3, average="micro")}

    def preprocess(self, train):
        return Standardize(train.inputs["features"])


def _linear(perceptron: Perceptron) -> nn.Linear:
    """Return the perceptron as a layer, (B, 4) -> scores (B, 3): the largest is the class's; no probabilities."""
    layer = nn.Linear(*perceptron.coef_.T.shape).requires_grad_(False)
    layer.weight.copy_(torch.from_numpy(perceptron.coef_))
    layer.bias.copy_(torch.from_numpy(perceptron.intercept_))
    return layer
