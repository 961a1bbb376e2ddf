"""Covertype: which of seven kinds of forest grows on 30 x 30 metres of Colorado, from 54 cartographic features."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from hpo.objectives.datasets import rows_of_splits, sklearn_cached
from hpo.objectives.embeddings import (
    EMBEDDING_DEFAULTS,
    EMBEDDING_SPACE,
    deep,
    embedding_of,
    mean_of_classes,
    of_members,
)
from hpo.objectives.models import QuantileNormal
from sklearn.datasets import fetch_covtype
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from hpo.study.blocks import split_by_rows
from hpo.study.objective import Objective

N_NUMBERS = 10
"""The first columns are lengths and angles; the other 44 say by 0 or 1 which wilderness area and which soil it is."""
CLASSES = ("Spruce/Fir", "Lodgepole Pine", "Ponderosa Pine", "Cottonwood/Willow", "Aspen", "Douglas-fir", "Krummholz")


@dataclass(frozen=True)
class Options:
    """`embedding` is that of the ten numbers; see `hpo.objectives.embeddings`."""

    embedding: Literal["none", "piecewise", "periodic"] = "none"


class Covertype(Objective):
    """371,847 / 92,963 / 116,202 rows, each class in equal shares; `n_layers` Dense layers, each `n_hidden` wide."""

    Options = Options

    @property
    def defaults(self):
        return {
            "loss": "cross_entropy",
            "optimizer": "adamw",
            "learning_rate": 1e-3,
            "weight_decay": 0.0,
            "batch_size": 512,
            "n_layers": 2,
            "n_hidden": 256,
            "dropout": 0.0,
            "ensemble": 0,
            "label_smoothing": 0.0,
            "class_weights": "none",
        } | EMBEDDING_DEFAULTS[self.options.embedding]

    @property
    def space(self):
        return {
            "learning_rate": {"type": "float", "low": 3e-4, "high": 1e-2, "log": True},
            "batch_size": {"type": "categorical", "choices": [256, 512, 1024]},
            "n_layers": {"type": "int", "low": 1, "high": 4},
            "n_hidden": {"type": "int", "low": 64, "high": 512},
            "dropout": {"type": "float", "low": 0.0, "high": 0.5},
        } | EMBEDDING_SPACE[self.options.embedding]

    def data(self):
        bunch = sklearn_cached("covertype", "covertype/samples_py3", fetch_covtype)
        classes = bunch.target.astype(np.int64) - 1
        return split_by_rows(
            {"features": torch.from_numpy(bunch.data.astype(np.float32))},
            torch.from_numpy(classes),
            rows_of_splits(classes, test=0.2, valid=0.16, seed=0),
            feature_names=tuple(map(str, bunch.feature_names)),
            class_names=CLASSES,
        )

    def build(self, params, info):
        embedding, n_numbers = embedding_of(self.options.embedding, N_NUMBERS, params)
        n_in = n_numbers + info.n_features - N_NUMBERS
        network = deep(n_in, info.n_classes, params, mean_of_classes, embedded=self.options.embedding != "none")
        return network if self.options.embedding == "none" else nn.Sequential(OfNumbers(embedding), network)

    def loss(self, outputs, targets, params):
        return super().loss(*of_members(outputs, targets), params)

    def metrics(self):
        return {
            "accuracy": MulticlassAccuracy(len(CLASSES), average="micro"),
            "balanced_accuracy": MulticlassAccuracy(len(CLASSES), average="macro"),
        }

    def preprocess(self, train):
        return OfNumbers(QuantileNormal(train.inputs["features"][:, :N_NUMBERS]))

    def head(self):
        return nn.Softmax(dim=-1)


class OfNumbers(nn.Module):
    """`module` of the first ten columns, then the others as they are: (B, 54) -> (B, ...)."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.module(x[:, :N_NUMBERS]), x[:, N_NUMBERS:]], 1)
