"""MNIST: ten digits from images of 28 x 28 pixels; an MLP 784-24-24-10."""

from hpo.objectives.datasets import torchvision_splits
from hpo.objectives.models import NormalizePixels
from torch import nn
from torchmetrics.classification import MulticlassAccuracy
from torchvision.datasets import MNIST as TorchvisionMNIST

from hpo.study.blocks import MLP
from hpo.study.objective import Objective


class MNIST(Objective):
    """55,000 / 5,000 / 10,000 images (`random_split` with seed 42), of mean 0 and deviation 1; logits inside."""

    defaults = {
        "loss": "cross_entropy",
        "optimizer": "adam",
        "learning_rate": 1e-3,
        "batch_size": 64,
        "n_hidden1": 24,
        "n_hidden2": 24,
        "dropout": 0.0,
        "label_smoothing": 0.0,
        "class_weights": "none",
    }
    space = {
        "learning_rate": {"type": "float", "low": 3e-4, "high": 3e-3, "log": True},
        "n_hidden1": {"type": "int", "low": 128, "high": 512, "step": 64},
        "n_hidden2": {"type": "int", "low": 64, "high": 512, "step": 64},
        "dropout": {"type": "float", "low": 0.0, "high": 0.5},
    }

    def data(self):
        return torchvision_splits(TorchvisionMNIST, class_names=tuple("0123456789"))

    def build(self, params, info):
        widths = [params["n_hidden1"], params["n_hidden2"]]
        return MLP(info.n_features, widths, info.n_classes, dropout=params["dropout"])

    def metrics(self):
        return {"accuracy": MulticlassAccuracy(10, average="micro")}

    def preprocess(self, train):
        return NormalizePixels(mean=[0.1307], std=[0.3081])

    def head(self):
        return nn.Softmax(dim=-1)
