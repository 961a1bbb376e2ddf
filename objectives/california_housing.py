"""California housing: the median value of a district's houses, in 100,000 dollars, from 8 numbers; an MLP 8-24-24-1."""

from dataclasses import dataclass
from typing import Literal

import torch
from sklearn.datasets import fetch_california_housing
from torch.nn import functional as F
from torchmetrics.regression import MeanSquaredError, R2Score

from hpo.objective import Objective
from objectives.datasets import sklearn_cached, tabular_splits
from objectives.models import MLP, Standardize


@dataclass(frozen=True)
class Options:
    """`model` is the documented network."""

    model: Literal["mlp"] = "mlp"


class CaliforniaHousing(Objective):
    """20,640 x 8; 20% test with `random_state=0`, a fifth of the rest for validation; standardised on train."""

    Options = Options
    defaults = {
        "optimizer": "adam",
        "learning_rate": 1e-3,
        "weight_decay": 0.0,
        "batch_size": 64,
        "n_hidden1": 24,
        "n_hidden2": 24,
    }
    space = {
        "learning_rate": {"type": "float", "low": 3e-4, "high": 1e-2, "log": True},
        "n_hidden1": {"type": "int", "low": 16, "high": 128},
        "n_hidden2": {"type": "int", "low": 16, "high": 128},
    }

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
        return MLP(info.n_features, [params["n_hidden1"], params["n_hidden2"]], 1)

    def loss(self, outputs, targets, params):
        return F.mse_loss(outputs, targets)

    def metrics(self):
        return {"r2": R2Score(), "rmse": MeanSquaredError(squared=False)}

    def preprocess(self, train):
        return Standardize(train.inputs["features"])
