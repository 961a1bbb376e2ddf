"""Fashion-MNIST: ten kinds of clothing from images of 28 x 28 pixels; an MLP 784-300-100-10."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torchmetrics.classification import MulticlassAccuracy
from torchvision.datasets import FashionMNIST as TorchvisionFashionMNIST

from hpo.data import Data, Split
from hpo.objective import Objective
from objectives.datasets import torchvision_arrays
from objectives.models import MLP, ScalePixels

CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)


@dataclass(frozen=True)
class Options:
    """`model` is the documented network."""

    model: Literal["mlp"] = "mlp"


class FashionMNIST(Objective):
    """55,000 / 5,000 / 10,000 images (`random_split` with seed 42), pixels scaled to [0, 1]; logits inside."""

    Options = Options
    defaults = {
        "loss": "cross_entropy",
        "optimizer": "sgd",
        "learning_rate": 0.05,
        "batch_size": 32,
        "n_hidden1": 300,
        "n_hidden2": 100,
        "label_smoothing": 0.0,
        "class_weights": "none",
    }
    space = {
        "learning_rate": {"type": "float", "low": 1e-3, "high": 0.3, "log": True},
        "n_hidden1": {"type": "int", "low": 100, "high": 400, "step": 50},
        "n_hidden2": {"type": "int", "low": 50, "high": 200, "step": 25},
        "label_smoothing": {"type": "float", "low": 0.0, "high": 0.2, "step": 0.05},
    }

    def data(self):
        images, classes = torchvision_arrays("FashionMNIST", TorchvisionFashionMNIST, train=True)
        test_images, test_classes = torchvision_arrays("FashionMNIST", TorchvisionFashionMNIST, train=False)
        rows = torch.randperm(len(images), generator=torch.Generator().manual_seed(42))  # as random_split draws them
        train, valid = rows[:55_000], rows[55_000:]
        return Data(
            train=Split(inputs={"pixels": images[train]}, targets=classes[train]),
            valid=Split(inputs={"pixels": images[valid]}, targets=classes[valid]),
            test=Split(inputs={"pixels": test_images}, targets=test_classes),
            class_names=CLASSES,
        )

    def build(self, params, info):
        return MLP(info.n_features, [params["n_hidden1"], params["n_hidden2"]], info.n_classes)

    def metrics(self):
        return {"accuracy": MulticlassAccuracy(len(CLASSES), average="micro")}

    def preprocess(self, train):
        return ScalePixels()

    def head(self):
        return nn.Softmax(dim=-1)
