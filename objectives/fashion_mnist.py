"""Fashion-MNIST: ten kinds of clothing from images of 28 x 28 pixels; an MLP 784-300-100-10."""

from dataclasses import dataclass
from typing import Literal

from hpo.objectives.datasets import torchvision_splits
from hpo.objectives.models import ScalePixels
from torch import nn
from torchmetrics.classification import MulticlassAccuracy
from torchvision.datasets import FashionMNIST as TorchvisionFashionMNIST

from hpo.study.blocks import MLP
from hpo.study.objective import Objective

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
    """`model` is the documented network. `widths`: each hidden layer has its own, or both have `n_hidden`."""

    model: Literal["mlp"] = "mlp"
    widths: Literal["separate", "same"] = "separate"


class FashionMNIST(Objective):
    """55,000 / 5,000 / 10,000 images (`random_split` with seed 42), pixels scaled to [0, 1]; logits inside."""

    Options = Options

    @property
    def defaults(self):
        same = self.options.widths == "same"
        return {
            "loss": "cross_entropy",
            "optimizer": "sgd",
            "learning_rate": 0.05,
            "batch_size": 32,
            **({"n_hidden": 100} if same else {"n_hidden1": 300, "n_hidden2": 100}),
            "dropout": 0.0,
            "label_smoothing": 0.0,
            "class_weights": "none",
        }

    @property
    def space(self):
        same = {"n_hidden": {"type": "int", "low": 20, "high": 300}}
        separate = {
            "n_hidden1": {"type": "int", "low": 100, "high": 400, "step": 50},
            "n_hidden2": {"type": "int", "low": 50, "high": 200, "step": 25},
        }
        return {
            "learning_rate": {"type": "float", "low": 1e-3, "high": 0.3, "log": True},
            **(same if self.options.widths == "same" else separate),
            "label_smoothing": {"type": "float", "low": 0.0, "high": 0.2, "step": 0.05},
        }

    def data(self):
        return torchvision_splits(TorchvisionFashionMNIST, class_names=CLASSES)

    def build(self, params, info):
        names = ("n_hidden", "n_hidden") if self.options.widths == "same" else ("n_hidden1", "n_hidden2")
        return MLP(info.n_features, [params[name] for name in names], info.n_classes, dropout=params["dropout"])

    def metrics(self):
        return {"accuracy": MulticlassAccuracy(len(CLASSES), average="micro")}

    def preprocess(self, train):
        return ScalePixels()

    def head(self):
        return nn.Softmax(dim=-1)
