"""Wisconsin breast cancer: malignant or benign from 30 measurements; an MLP 30-24-24-1."""

from dataclasses import dataclass
from typing import Literal

import torch
from sklearn.datasets import load_breast_cancer
from torch import nn
from torchmetrics.classification import BinaryAUROC

from hpo.study.blocks import MLP, LogitAccuracy, Standardize, tabular_splits
from hpo.study.objective import Objective


@dataclass(frozen=True)
class Options:
    """`model` is the documented network."""

    model: Literal["mlp"] = "mlp"


class BreastCancer(Objective):
    """569 x 30; 20% test with `random_state=0`, a fifth of the rest for validation; standardised on train."""

    Options = Options
    defaults = {
        "loss": "bce",
        "optimizer": "adam",
        "learning_rate": 1e-3,
        "weight_decay": 0.0,
        "batch_size": 64,
        "n_hidden": 24,
        "label_smoothing": 0.0,
        "class_weights": "none",
    }
    space = {
        "learning_rate": {"type": "float", "low": 3e-4, "high": 5e-3, "log": True},
        "weight_decay": {"type": "float", "low": 1e-6, "high": 1e-1, "log": True, "or": 0},
        "n_hidden": {"type": "int", "low": 8, "high": 64},
    }

    def data(self):
        bunch = load_breast_cancer()
        targets = torch.from_numpy(bunch.target).float().unsqueeze(1)
        return tabular_splits(
            bunch.data,
            targets,
            test=0.2,
            valid=0.2,
            random_state=0,
            stratify=True,
            feature_names=tuple(map(str, bunch.feature_names)),
            class_names=tuple(map(str, bunch.target_names)),
        )

    def build(self, params, info):
        return MLP(info.n_features, [params["n_hidden"]] * 2, 1)

    def metrics(self):
        return {"accuracy": LogitAccuracy(), "auroc": BinaryAUROC()}

    def preprocess(self, train):
        return Standardize(train.inputs["features"])

    def head(self):
        return nn.Sigmoid()
