"""Your own images: a folder of them, and a CSV of file name and label; any torchvision classifier, or a small one."""

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torchvision
from hpo.objectives.datasets import images_of_csv
from hpo.objectives.models import (
    Augmented,
    NormalizePixels,
    SmallConvNet,
    load_state,
    read_state,
    torchvision_classifier,
    transforms_by_name,
)
from torch import nn
from torchmetrics.classification import MulticlassAccuracy
from torchvision.models import list_models

from hpo.errors import did_you_mean
from hpo.study.objective import Objective


@dataclass(frozen=True)
class Options:
    """What is learned from: `file`, the CSV; paths are those from the study's folder.

    `images`: the images' folder; else the CSV's, or `images` in it. `file_column`, `label_column`: else the first two.
    `label_transform`: class names by label, for labels to be renamed or merged. `model`: small, or any classifier of
    torchvision.models. `weights`: a state_dict, or a bundle's model.pt; a last layer of another shape is not loaded.
    Images are resized to `size` x `size`. `transforms`: those of torchvision.transforms.v2 by name, with arguments
    (`[{RandomHorizontalFlip: {p: 0.3}}, RandomErasing]`), for training only; each image has its own draws.
    """

    file: Path
    images: Path | None = None
    file_column: str | None = None
    label_column: str | None = None
    label_transform: dict[str | int, str] = field(default_factory=dict)
    model: str = "small"
    weights: Path | None = None
    size: int = 64
    transforms: tuple[str | dict[str, dict[str, Any]], ...] = ()

    def __post_init__(self) -> None:
        """Raises ValueError."""
        known = ["small", *list_models(module=torchvision.models)]
        if self.model not in known:
            hint = did_you_mean(self.model, known)
            raise ValueError(f"model: must be small or of torchvision.models, but got {self.model!r}{hint}")
        if self.size < 8:
            raise ValueError(f"size: must be at least 8, but got {self.size}")
        transforms_by_name(self.transforms, self.size)


class ImageCsv(Objective):
    """A fifth of each class for the test, a fifth of the rest for validation; pixels scaled as ImageNet's are."""

    Options = Options

    @property
    def defaults(self):
        small = self.options.model == "small"
        return {
            "loss": "cross_entropy",
            "optimizer": "adamw",
            "learning_rate": 1e-3 if small else 1e-4,
            "weight_decay": 1e-2,
            "batch_size": 32,
            "label_smoothing": 0.0,
            "class_weights": "none",
            **({"n_channels": 16, "dropout": 0.0} if small else {}),
        }

    @property
    def space(self):
        small = {
            "n_channels": {"type": "int", "low": 8, "high": 32, "step": 8},
            "dropout": {"type": "float", "low": 0.0, "high": 0.5},
        }
        rate = self.defaults["learning_rate"]
        return {
            "learning_rate": {"type": "float", "low": rate / 10, "high": rate * 10, "log": True},
            **(small if self.options.model == "small" else {}),
        }

    def data(self):
        o = self.options
        classes = {str(label): name for label, name in o.label_transform.items()}  # YAML reads 0 as a number
        return images_of_csv(
            o.file, o.images, columns=(o.file_column, o.label_column), label_transform=classes, size=o.size
        )

    def build(self, params, info):
        if self.options.model == "small":
            network = SmallConvNet(params["n_channels"], info.n_classes, params["dropout"])
        else:
            network = torchvision_classifier(self.options.model, info.n_classes, self.options.size)
        if self.options.weights is not None:
            load_state(network, self._state, self.options.weights)
        return Augmented(network, self._transforms, self._normalize()) if self._transforms else network

    @functools.cached_property
    def _state(self):
        return read_state(self.options.weights)

    @functools.cached_property
    def _transforms(self):
        return transforms_by_name(self.options.transforms, self.options.size)

    def _normalize(self):
        return NormalizePixels(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])

    def metrics(self):
        return {"accuracy": MulticlassAccuracy(average="micro")}

    def preprocess(self, train):
        return self._normalize()

    def head(self):
        return nn.Softmax(dim=-1)

    def about(self):
        size = self.options.size
        return {"pixels": f"RGB, 0 to 255, channels first, upright, resized to {size} x {size} (Pillow's BILINEAR)"}
