"""One's own table without code: a CSV or parquet file, and which of its columns is to be predicted from the others."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from hpo.objectives.embeddings import (
    EMBEDDING_DEFAULTS,
    EMBEDDING_SPACE,
    Categories,
    EachInput,
    Joined,
    deep,
    embedding_of,
    mean_of_classes,
    mean_of_numbers,
    mean_of_odds,
    of_members,
)
from hpo.objectives.models import QuantileNormal
from hpo.objectives.tables import Table, TableOptions, table_of
from torch import Tensor, nn
from torchmetrics.classification import BinaryAUROC, MulticlassAccuracy
from torchmetrics.regression import MeanSquaredError, R2Score

from hpo.study.blocks import LogitAccuracy
from hpo.study.objective import Objective

LOSS = {"regression": "mse", "binary": "bce", "multiclass": "cross_entropy"}
ROWS_OF_A_TRIAL = 400_000
"""So many rows a default trial sees, over all its epochs: 10 to 20 seconds on a core, measured."""
ROWS_OF_ONE = 5000
"""From so many rows on the model is one network: training five takes long, and they differ less."""
ROWS_OF_A_BIN, FEW_ROWS = 20, 960
MEAN = {"regression": mean_of_numbers, "binary": mean_of_odds, "multiclass": mean_of_classes}


@dataclass(frozen=True)
class Options(TableOptions):
    """Those of the table, and the `embedding` of its numbers."""

    embedding: Literal["none", "piecewise", "periodic"] = "piecewise"


class Tabular(Objective):
    """Inputs are `numeric` (N, F), NaN where missing, and `categorical` (N, C) codes, as `hpo.objectives.tables.encode`
    makes them; an MLP of Dense layers over embeddings, with `ensemble` members TabM."""

    Options = Options
    defaults_first = True

    @cached_property
    def table(self) -> Table:
        return table_of(self.options)

    @property
    def defaults(self):
        n_rows = len(self.table.data.train)
        of_classes = {} if self.table.task == "regression" else {"label_smoothing": 0.0, "class_weights": "none"}
        return {
            "loss": LOSS[self.table.task],
            "optimizer": "adamw",
            "learning_rate": 2e-3,
            "weight_decay": 1e-2,
            "schedule": "cosine",
            "batch_size": _batch_size(n_rows),
            "n_layers": 2,
            "n_hidden": 128,
            "dropout": 0.1,
            "batch_norm": False,
            "ensemble": 8,
            "d_category": 8,
            **of_classes,
            **_embedding_defaults(self.options.embedding, n_rows),
        }

    @property
    def space(self):
        return {
            "learning_rate": {"type": "float", "low": 3e-4, "high": 1e-2, "log": True},
            "weight_decay": {"type": "float", "low": 1e-4, "high": 1e-1, "log": True, "or": 0},
            "n_layers": {"type": "int", "low": 1, "high": 4},
            "n_hidden": {"type": "int", "low": 32, "high": 256},
            "dropout": {"type": "float", "low": 0.0, "high": 0.5},
            "batch_norm": {"type": "categorical", "choices": [False, True]},
            "ensemble": {"type": "categorical", "choices": [0, 8]},
            **EMBEDDING_SPACE[self.options.embedding],
        }

    @property
    def pace(self):
        """Seconds a trial on a core or two: as many epochs as make ROWS_OF_A_TRIAL rows. Of few rows, several networks.

        The patience is long, so that most trials see the schedule's low learning rates: the refit stops at the best
        epoch, and at a high rate that is a lucky one of few validation rows.
        """
        n_rows = len(self.table.data.train)
        epochs = min(max(round(ROWS_OF_A_TRIAL / n_rows), 6), 60)
        return {"epochs": epochs, "patience": max(4, epochs // 2), "ensemble": 5 if n_rows < ROWS_OF_ONE else 1}

    def data(self):
        return self.table.data

    def build(self, params, info):
        embeddings, n_in, embedded = [], 0, self.options.embedding != "none"
        if "numeric" in info.inputs:
            embedding, n = embedding_of(self.options.embedding, info.inputs["numeric"][0], params)
            embeddings.append(embedding)
            n_in += n
        if sizes := self.table.category_sizes:
            embeddings.append(Categories(sizes, params["d_category"]))
            n_in += len(sizes) * params["d_category"]
        n_out = info.n_classes if self.table.task == "multiclass" else 1
        return Joined(embeddings, deep(n_in, n_out, params, MEAN[self.table.task], embedded=embedded))

    def loss(self, outputs, targets, params):
        return super().loss(*of_members(outputs, targets), params)

    def metrics(self):
        if self.table.task == "regression":
            return {"r2": R2Score(), "rmse": RMSE(self.table.std)}
        if self.table.task == "binary":
            # the first chooses: of few validation rows accuracy is the same for many trials, and best for a lucky one
            return {"auroc": BinaryAUROC(), "accuracy": LogitAccuracy()}
        n_classes = len(self.table.data.class_names)
        return {
            "accuracy": MulticlassAccuracy(n_classes, average="micro"),
            "balanced_accuracy": MulticlassAccuracy(n_classes, average="macro"),
        }

    def preprocess(self, train):
        modules = []
        if "numeric" in train.inputs:
            numbers = train.inputs["numeric"][:: max(1, len(train) // 1_000_000)]  # quantiles need no more rows
            filled = FillMissing(numbers)
            # the outermost of few rows would lie at 5.2 deviations, the next below 3: it gets the middle of its rank
            normal = QuantileNormal(filled(numbers), least=0.5 / len(numbers))
            modules.append(nn.Sequential(filled, normal))
        if sizes := self.table.category_sizes:
            modules.append(KnownCodes(sizes))
        return EachInput(modules)

    def head(self):
        if self.table.task == "regression":
            return Unit(self.table.mean, self.table.std)
        return nn.Sigmoid() if self.table.task == "binary" else nn.Softmax(dim=-1)

    def about(self):
        """What `hpo.objectives.tables.encode` needs to make the inputs of another table, and what was left out here."""
        table = self.table
        return {
            "target": self.options.target,
            "task": table.task,
            "columns": list(table.columns),
            "dropped": dict(table.dropped),
            "rows_without_target": table.n_without_target,
            "notices": list(table.data.notices),
        }


def _embedding_defaults(kind: str, n_rows: int) -> dict[str, Any]:
    """Return the embedding's params for so many rows: of few, fewer bins (20 rows in each) and half the width.

    On three tables of 240 rows that was better by 1% in the mean, 6% on the noisiest. From 960 rows on all is as given.
    """
    params = dict(EMBEDDING_DEFAULTS[kind])
    if "n_bins" in params:
        params["n_bins"] = min(max(n_rows // ROWS_OF_A_BIN, 8), params["n_bins"])
    if "d_embedding" in params and n_rows < FEW_ROWS:
        params["d_embedding"] //= 2
    return params


def _batch_size(n_rows: int) -> int:
    """Return the batch size for so many rows: 32 to 1,024, for 50 steps an epoch, or of many rows for 400."""
    rows = n_rows / 50 if n_rows < 12_800 else max(256, n_rows / 400)
    return 2 ** min(max(round(math.log2(rows)), 5), 10)


class RMSE(MeanSquaredError):
    """The root mean squared error of standardised values, in the target's own unit."""

    def __init__(self, std: float) -> None:
        super().__init__(squared=False)
        self.std = std

    def compute(self) -> Tensor:
        return self.std * super().compute()


class Unit(nn.Module):
    """From a standardised target to its own unit: x * std + mean."""

    def __init__(self, mean: float, std: float) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean))
        self.register_buffer("std", torch.tensor(std))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.std + self.mean


class FillMissing(nn.Module):
    """NaN to the median of its feature in `train` (N, F): (B, F) -> (B, F)."""

    def __init__(self, train: Tensor) -> None:
        super().__init__()
        self.register_buffer("median", train.nanmedian(0).values.nan_to_num(0.0))

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(torch.isnan(x), self.median, x)


class KnownCodes(nn.Module):
    """Codes that no category of its column has to 0, unknown: (B, C) -> (B, C)."""

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__()
        self.register_buffer("sizes", torch.tensor(sizes))

    def forward(self, codes: Tensor) -> Tensor:
        return torch.where((codes >= 0) & (codes < self.sizes), codes, 0)
