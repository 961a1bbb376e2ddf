"""Two classes of made-up points, told apart by a small BinaryClassifier: blobs, moons, or one circle in another."""

from dataclasses import dataclass
from typing import Literal

import torch
from hpo.objectives.models import BinaryClassifier
from sklearn.datasets import make_circles, make_classification, make_moons
from torch import nn
from torchmetrics.classification import BinaryAUROC

from hpo.study.blocks import LogitAccuracy, tabular_splits
from hpo.study.objective import Objective


@dataclass(frozen=True)
class Options:
    """`data`: blobs are 100 x 5, moons and circles 2,000 x 2, which no line separates.

    `activation`: relu_tanh gives the first hidden layer's output to both and adds what they give.
    """

    data: Literal["blobs", "moons", "circles"] = "blobs"
    activation: Literal["relu", "tanh", "relu_tanh"] = "relu"


MAKE = {
    "blobs": lambda: make_classification(n_samples=100, n_features=5, n_classes=2, random_state=42),
    "moons": lambda: make_moons(n_samples=2000, noise=0.1, random_state=42),
    "circles": lambda: make_circles(n_samples=2000, noise=0.1, factor=0.5, random_state=42),
}
LOSS = {"loss": "bce", "label_smoothing": 0.0, "class_weights": "none"}
BLOBS = {"optimizer": "adam", "learning_rate": 1e-3, "batch_size": 4, "n_hidden1": 5, "n_hidden2": 3}
# the batch is all rows there are, also when those of validation are trained on
CURVES = {"optimizer": "sgd", "learning_rate": 0.1, "batch_size": 2000, "n_hidden1": 16, "n_hidden2": 8}


class SyntheticBinary(Objective):
    """20% test with `random_state=0`, a fifth of the rest for validation; two hidden layers, logits inside."""

    Options = Options

    @property
    def defaults(self):
        return LOSS | (BLOBS if self.options.data == "blobs" else CURVES)

    @property
    def space(self):
        rate = self.defaults["learning_rate"]
        return {
            "learning_rate": {"type": "float", "low": rate / 10, "high": rate * 10, "log": True},
            "n_hidden1": {"type": "int", "low": 4, "high": 32},
            "n_hidden2": {"type": "int", "low": 3, "high": 32},
        }

    def data(self):
        points, classes = MAKE[self.options.data]()
        return tabular_splits(
            points,
            torch.from_numpy(classes).float().unsqueeze(1),
            test=0.2,
            valid=0.2,
            random_state=0,
            stratify=True,
            feature_names=tuple(f"x{i}" for i in range(points.shape[1])),
            class_names=("0", "1"),
        )

    def build(self, params, info):
        return BinaryClassifier([info.n_features, params["n_hidden1"], params["n_hidden2"], 1], self.options.activation)

    def metrics(self):
        return {"accuracy": LogitAccuracy(), "auroc": BinaryAUROC()}

    def head(self):
        return nn.Sigmoid()
