"""Learning curves for `benchmarks/pruning.py`: random configurations of five tasks, each trained to its end.

    python benchmarks/curves.py [--only TASK ...]

Writes `benchmarks/curves/TASK.json` (`hard/TASK.json` of one on which halving fails): `space` (the study file's
params), `configurations` (params by name), `curves` (the metric on validation after each epoch), `maximize`. A task is
a study as it is committed, with wider ranges and, where that takes long, a part of its training rows; `digits` is
scikit-learn's. All of it takes an hour on one CPU core. Data comes from HPO_DATA_HOME.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from hpo.objectives.california_housing import CaliforniaHousing
from hpo.objectives.covertype import Covertype
from hpo.objectives.fashion_mnist import FashionMNIST
from sklearn.datasets import load_digits
from torch import nn
from torchmetrics.classification import MulticlassAccuracy

import hpo

FOLDER = Path(__file__).parent / "curves"
CONFIGURATIONS = 384
"""Of a task; of those that take long, 128."""


def _fewer(data: hpo.Data, n_train: int, n_valid: int) -> hpo.Data:
    """Return the first rows of the splits, which are in random order."""

    def first(split: hpo.Split, n: int) -> hpo.Split:
        return hpo.Split(inputs={name: x[:n] for name, x in split.inputs.items()}, targets=split.targets[:n])

    return hpo.Data(
        train=first(data.train, n_train),
        valid=first(data.valid, n_valid),
        test=first(data.test, n_valid),
        class_names=data.class_names,
    )


class SomeFashion(FashionMNIST):
    def data(self) -> hpo.Data:
        return _fewer(super().data(), 6000, 2000)


class SomeCovertype(Covertype):
    def data(self) -> hpo.Data:
        return _fewer(super().data(), 20000, 10000)


class Digits(hpo.Objective):
    """1,797 images of 8 x 8 pixels; two hidden layers with dropout."""

    defaults = {"loss": "cross_entropy", "n_hidden": 64, "dropout": 0.0}

    def data(self) -> hpo.Data:
        images, labels = load_digits(return_X_y=True)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(42))
        x, y = torch.tensor(images, dtype=torch.float32)[order] / 16, torch.tensor(labels)[order]
        rows = {"train": slice(1000), "valid": slice(1000, 1400), "test": slice(1400, None)}
        splits = {name: hpo.Split(inputs={"x": x[part]}, targets=y[part]) for name, part in rows.items()}
        return hpo.Data(**splits, class_names=tuple(str(digit) for digit in range(10)))

    def build(self, params: Mapping[str, Any], info: hpo.DataInfo) -> nn.Module:
        width, dropout = params["n_hidden"], params["dropout"]
        layers = [nn.Linear(64, width), nn.ReLU(), nn.Dropout(dropout), nn.Linear(width, width), nn.ReLU()]
        return nn.Sequential(*layers, nn.Dropout(dropout), nn.Linear(width, 10))

    def metrics(self) -> dict[str, Any]:
        return {"accuracy": MulticlassAccuracy(10, average="micro")}


LEARNING_RATE = {"type": "float", "low": 1e-4, "high": 1e-1, "log": True}
TASKS = {
    "california": {
        "objective": CaliforniaHousing,
        "options": {"model": "deep"},
        "metric": "rmse",
        "epochs": 50,
        "params": {
            "optimizer": "adam",
            "batch_size": 64,
            "learning_rate": LEARNING_RATE,
            "weight_decay": {"type": "float", "low": 1e-6, "high": 1e-1, "log": True},
            "n_hidden": {"type": "int", "low": 4, "high": 64, "log": True},
        },
    },
    "fashion": {
        "objective": SomeFashion,
        "configurations": 128,
        "metric": "accuracy",
        "epochs": 40,
        "params": {
            "optimizer": "sgd",
            "batch_size": 64,
            "learning_rate": {"type": "float", "low": 1e-3, "high": 1.0, "log": True},
            "momentum": {"type": "float", "low": 0.0, "high": 0.95},
            "n_hidden1": {"type": "int", "low": 16, "high": 128, "step": 16},
            "n_hidden2": {"type": "int", "low": 16, "high": 64, "step": 16},
            "label_smoothing": {"type": "float", "low": 0.0, "high": 0.2},
        },
    },
    "covertype": {
        "objective": SomeCovertype,
        "configurations": 128,
        "metric": "accuracy",
        "epochs": 40,
        "params": {
            "optimizer": "adam",
            "batch_size": 256,
            "learning_rate": LEARNING_RATE,
            "weight_decay": {"type": "float", "low": 1e-7, "high": 1e-2, "log": True},
            "n_hidden": {"type": "int", "low": 8, "high": 128, "log": True},
            "n_layers": {"type": "int", "low": 1, "high": 3},
        },
    },
    "digits": {
        "objective": Digits,
        "metric": "loss",
        "epochs": 40,
        "params": {
            "optimizer": "adamw",
            "batch_size": 64,
            "learning_rate": LEARNING_RATE,
            "weight_decay": {"type": "float", "low": 1e-4, "high": 1.0, "log": True},
            "n_hidden": {"type": "int", "low": 8, "high": 128, "log": True},
            "dropout": {"type": "float", "low": 0.0, "high": 0.7},
        },
    },
    "wide": {  # of which the best start slowly: steps near those that diverge, and outliers in what is not scaled
        "folder": FOLDER / "hard",
        "objective": CaliforniaHousing,
        "options": {"model": "wide_and_deep"},
        "metric": "rmse",
        "epochs": 40,
        "params": {
            "optimizer": "sgd",
            "batch_size": 128,
            "learning_rate": {"type": "float", "low": 1e-5, "high": 0.1, "log": True},
            "momentum": {"type": "float", "low": 0.0, "high": 0.95},
            "weight_decay": {"type": "float", "low": 1e-6, "high": 1e-1, "log": True},
            "n_hidden1": {"type": "int", "low": 4, "high": 64, "log": True},
        },
    },
}


def make(task: str) -> None:
    """Train a task's configurations and write their curves."""
    given = dict(TASKS[task])
    n, folder_of_curves = given.pop("configurations", CONFIGURATIONS), given.pop("folder", FOLDER)
    objective, started = given.pop("objective"), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        study = hpo.run(
            objective,
            name=task,
            trials=n,
            sampler="random",
            pruner="none",
            stack=64,
            storage=f"sqlite:///{folder}/optuna.db",
            tracking="off",
            output=folder,
            device="cpu",
            **given,
        )
        curves, configurations = [], []
        for trial in study.to_optuna().trials:
            if len(trial.intermediate_values) == given["epochs"]:
                curves.append([round(value, 5) for _, value in sorted(trial.intermediate_values.items())])
                configurations.append(trial.params)
        content = {
            "space": given["params"],
            "maximize": study.maximize,
            "configurations": configurations,
            "curves": curves,
        }
    folder_of_curves.mkdir(exist_ok=True)
    (folder_of_curves / f"{task}.json").write_text(json.dumps(content, separators=(",", ":")) + "\n")
    print(f"{task}: {len(curves)} curves of {given['epochs']} epochs in {time.monotonic() - started:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=TASKS, default=list(TASKS))
    options = parser.parse_args()
    for task in options.only:
        make(task)


if __name__ == "__main__":
    main()
