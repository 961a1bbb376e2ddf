"""California housing: the median value of a district's houses, in 100,000 dollars, from 8 numbers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from sklearn.datasets import fetch_california_housing
from torchmetrics.regression import MeanSquaredError, R2Score

from hpo.objective import Objective
from objectives.datasets import sklearn_cached, tabular_splits
from objectives.models import MLP, QuantileNormal, Standardize


@dataclass(frozen=True)
class Options:
    """`model`: mlp is the documented 8-24-24-1; deep has `n_layers` layers of one width, `n_hidden`, with dropout.

    `scaling`: by mean and deviation as documented, or each feature to a normal distribution by its quantiles.
    """

    model: Literal["mlp", "deep"] = "mlp"
    scaling: Literal["standard", "quantile"] = "standard"


ENGINE = {"loss": "mse", "optimizer": "adam", "learning_rate": 1e-3, "weight_decay": 0.0, "batch_size": 64}
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "mlp": {"n_hidden1": 24, "n_hidden2": 24},
    "deep": {"n_layers": 3, "n_hidden": 128, "dropout": 0.0},
}
SPACE: Mapping[str, Mapping[str, Any]] = {
    "mlp": {
        "n_hidden1": {"type": "int", "low": 16, "high": 128},
        "n_hidden2": {"type": "int", "low": 16, "high": 128},
    },
    "deep": {
        "n_layers": {"type": "int", "low": 1, "high": 5},
        "n_hidden": {"type": "int", "low": 32, "high": 512},
        "dropout": {"type": "float", "low": 0.0, "high": 0.5},
    },
}


class CaliforniaHousing(Objective):
    """20,640 x 8; 20% test with `random_state=0`, a fifth of the rest for validation; scaled as train is."""

    Options = Options

    @property
    def defaults(self):
        return ENGINE | DEFAULTS[self.options.model]

    @property
    def space(self):
        return {"learning_rate": {"type": "float", "low": 3e-4, "high": 1e-2, "log": True}} | SPACE[self.options.model]

    def data(self):
        bunch = sklearn_cached("california_housing", "cal_housing_py3.pkz", fetch_california_housing)
        targets = torch.from_numpy(bunch.target).float().unsqueeze(1)
        return tabular_splits(
            bunch.data,
            targets,
            test=0.2,
            valid=0.2,
            random_state=0,
            feature_names=tuple(map(str, bunch.feature_names)),
        )

    def build(self, params, info):
        if self.options.model == "mlp":
            return MLP(info.n_features, [params["n_hidden1"], params["n_hidden2"]], 1)
        return MLP(info.n_features, [params["n_hidden"]] * params["n_layers"], 1, dropout=params["dropout"])

    def metrics(self):
        return {"r2": R2Score(), "rmse": MeanSquaredError(squared=False)}

    def preprocess(self, train):
        features = train.inputs["features"]
        return Standardize(features) if self.options.scaling == "standard" else QuantileNormal(features)
