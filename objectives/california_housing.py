"""California housing: the median value of a district's houses, in 100,000 dollars, from 8 numbers."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from hpo.objectives.datasets import sklearn_cached
from hpo.objectives.embeddings import (
    EMBEDDING_DEFAULTS,
    EMBEDDING_SPACE,
    EachInput,
    Joined,
    deep,
    embedding_of,
    mean_of_numbers,
    of_members,
)
from hpo.objectives.models import QuantileNormal, WideAndDeep
from sklearn.datasets import fetch_california_housing
from torch import nn
from torchmetrics.regression import MeanSquaredError, R2Score

from hpo.study.blocks import MLP, Standardize, tabular_splits
from hpo.study.objective import Objective


@dataclass(frozen=True)
class Options:
    """`model`: linear; mlp, documented as 8-24-24-1; deep, `n_layers` layers of one width, `n_hidden`, with dropout,
    and with `ensemble` members TabM; wide_and_deep, whose linear output has two layers' output and the raw features.

    `inputs`: two are named wide (features 0-4) and deep (2-7); all models but wide_and_deep join them.
    `auxiliary`: wide_and_deep has a second linear output, on the deep stack alone, with `auxiliary_weight` of the loss.
    `split`: a fifth for test and of the rest for validation, `random_state=0`; or a quarter, `random_state=42`.
    `scaling`: by mean and deviation, or each feature to a normal distribution by its quantiles, as embeddings need it.
    """

    model: Literal["linear", "mlp", "deep", "wide_and_deep"] = "mlp"
    inputs: Literal["one", "two"] = "one"
    auxiliary: bool = False
    split: Literal["fifth", "quarter"] = "fifth"
    scaling: Literal["standard", "quantile"] = "standard"
    embedding: Literal["none", "piecewise", "periodic"] = "none"

    def __post_init__(self):
        if self.auxiliary and self.model != "wide_and_deep":
            raise ValueError("auxiliary is an output of model: wide_and_deep")


ENGINE = {"loss": "mse", "optimizer": "adam", "learning_rate": 1e-3, "weight_decay": 0.0, "batch_size": 64}
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "linear": {},
    "mlp": {"n_hidden1": 24, "n_hidden2": 24},
    "deep": {"n_layers": 3, "n_hidden": 128, "dropout": 0.0, "ensemble": 0},
    "wide_and_deep": {"n_hidden1": 50, "n_hidden2": 40},
}
WIDTHS = {
    "n_hidden1": {"type": "int", "low": 16, "high": 128},
    "n_hidden2": {"type": "int", "low": 16, "high": 128},
}
SPACE: Mapping[str, Mapping[str, Any]] = {
    "linear": {},
    "mlp": WIDTHS,
    "deep": {
        "n_layers": {"type": "int", "low": 1, "high": 5},
        "n_hidden": {"type": "int", "low": 32, "high": 512},
        "dropout": {"type": "float", "low": 0.0, "high": 0.5},
    },
    "wide_and_deep": WIDTHS,
}
INPUTS = {"wide": slice(0, 5), "deep": slice(2, 8)}


class CaliforniaHousing(Objective):
    """20,640 x 8 in three splits, scaled as train is. R2 and RMSE are of the main output."""

    Options = Options

    @property
    def defaults(self):
        auxiliary = {"auxiliary_weight": 0.2} if self.options.auxiliary else {}
        return ENGINE | DEFAULTS[self.options.model] | EMBEDDING_DEFAULTS[self.options.embedding] | auxiliary

    @property
    def space(self):
        space = {"learning_rate": {"type": "float", "low": 3e-4, "high": 1e-2, "log": True}}
        auxiliary = {"auxiliary_weight": {"type": "float", "low": 0.05, "high": 0.5}} if self.options.auxiliary else {}
        return space | SPACE[self.options.model] | EMBEDDING_SPACE[self.options.embedding] | auxiliary

    def data(self):
        bunch = sklearn_cached("california_housing", "cal_housing_py3.pkz", fetch_california_housing)
        share, random_state = (0.2, 0) if self.options.split == "fifth" else (0.25, 42)
        data = tabular_splits(
            bunch.data,
            torch.from_numpy(bunch.target).float().unsqueeze(1),
            test=share,
            valid=share,
            random_state=random_state,
            feature_names=tuple(map(str, bunch.feature_names)),
        )
        return data if self.options.inputs == "one" else _in_two(data)

    def build(self, params, info):
        sizes = [shape[0] for shape in info.inputs.values()]
        if self.options.model == "wide_and_deep":
            embedding, n_in = embedding_of(self.options.embedding, sizes[-1], params)
            widths = n_in, params["n_hidden1"], params["n_hidden2"]
            return WideAndDeep(sizes[0], embedding, widths, auxiliary=self.options.auxiliary)
        embedding, n_in = embedding_of(self.options.embedding, sum(sizes), params)
        if self.options.model == "deep":
            network = deep(n_in, 1, params, mean_of_numbers, embedded=self.options.embedding != "none")
        else:
            network = MLP(n_in, [params[name] for name in DEFAULTS[self.options.model]], 1)
        network = network if self.options.embedding == "none" else nn.Sequential(embedding, network)
        return network if self.options.inputs == "one" else Joined([nn.Identity() for _ in sizes], network)

    def loss(self, outputs, targets, params):
        named = super().loss
        if self.options.auxiliary:
            main, auxiliary = (named(each, targets, params) for each in outputs)
            return (1 - params["auxiliary_weight"]) * main + params["auxiliary_weight"] * auxiliary
        return named(*of_members(outputs, targets), params)

    def metrics(self):
        return {"r2": R2Score(), "rmse": MeanSquaredError(squared=False)}

    def preprocess(self, train):
        scales = [self._scale(features) for features in train.inputs.values()]
        return scales[0] if len(scales) == 1 else EachInput(scales)

    def _scale(self, features):
        if self.options.scaling == "quantile" or self.options.embedding != "none":
            return QuantileNormal(features)
        scale, n = Standardize(features), len(features)
        if self.options.split == "quarter":  # documented with torch's own std
            scale.std *= math.sqrt(n / (n - 1))
        return scale


def _in_two(data):
    splits = {
        name: replace(split, inputs={key: split.inputs["features"][:, part].clone() for key, part in INPUTS.items()})
        for name, split in data.splits.items()
    }
    names = sum((data.feature_names[part] for part in INPUTS.values()), ())
    return replace(data, **splits, feature_names=names)
