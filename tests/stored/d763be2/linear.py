
"""A line through 300 points: the smallest whole objective."""

import os
import time

import torch
from torch import nn
from torch.nn import functional as F
from torchmetrics.regression import R2Score

from hpo.data import Data, Split
from hpo.objective import Objective


class Linear(Objective):
    defaults = {"kind": "good", "learning_rate": 0.05, "batch_size": 50}
    space = {"learning_rate": {"type": "float", "low": 1e-3, "high": 1e-1, "log": True}}

    def data(self):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(300, 4, generator=generator)
        y = x.sum(1, keepdim=True)
        if os.environ.get("LINEAR_DATA") == "nan":
            x[7, 2] = float("nan")
        if os.environ.get("LINEAR_DATA") == "other":
            y = y + 1
        parts = [slice(0, 200), slice(200, 250), slice(250, 300)]
        train, valid, test = (Split(inputs={"features": x[p]}, targets=y[p]) for p in parts)
        return Data(train=train, valid=valid, test=test)

    def build(self, params, info):
        return nn.Linear(info.n_features, 1)

    def loss(self, outputs, targets, params):
        time.sleep(float(os.environ.get("LINEAR_SECONDS", "0")))
        if os.environ.get("LINEAR_BUG") and outputs.requires_grad and len(targets) == 50:
            raise KeyError("a bug")
        loss = F.mse_loss(outputs, targets)
        if params["kind"] == "nan" and outputs.requires_grad and len(targets) == 50:
            return loss * float("nan")
        if params["kind"] == "oom" and outputs.requires_grad and len(targets) == 50:
            torch.empty(10**14)
        return loss

    def metrics(self):
        return {"r2": R2Score()}
