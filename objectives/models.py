"""The documented networks, with the documented module names, and the layers that carry data's own numbers."""

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchvision.models import get_model
from torchvision.transforms import v2

from hpo.errors import InputError, did_you_mean
from hpo.study.blocks import MLP, Standardize  # noqa: F401 (version 0.1 had them here)


class Perceptron(nn.Module):
    """The perceptron with a step: (B, F) -> (B, 1), 1 where `x @ w + b > 0` and else 0. Nothing has a gradient."""

    def __init__(self, weights: Sequence[float], bias: float) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.tensor(weights, dtype=torch.float32), requires_grad=False)
        self.bias = nn.Parameter(torch.tensor(bias, dtype=torch.float32), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.weights + self.bias > 0).to(x.dtype).unsqueeze(1)


class TwoPerceptrons(nn.Module):
    """One perceptron on the inputs and the other's output: (B, F) -> (B, 1). `second` has F + 1 weights."""

    def __init__(self, first: Perceptron, second: Perceptron) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.cat([x, self.first(x)], dim=1))


class ReLUPlusTanh(nn.Module):
    """relu(x) + tanh(x)."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x) + torch.tanh(x)


class BinaryClassifier(nn.Sequential):
    """linear0, relu0, linear1, relu1, ..., linearN: (B, layer_dims[0]) -> logits (B, layer_dims[-1]).

    The documented sigmoid after the last layer is in the objective's `head`. `activation` tanh has tanh0, tanh1, ... in
    place of relu0, relu1, ...; relu_tanh has relu_tanh0, which adds the two, and then relu1, ...
    """

    def __init__(self, layer_dims: Sequence[int], activation: Literal["relu", "tanh", "relu_tanh"] = "relu") -> None:
        super().__init__()
        last = len(layer_dims) - 2
        for i, (before, after) in enumerate(itertools.pairwise(layer_dims)):
            self.add_module(f"linear{i}", nn.Linear(before, after))
            kind = "relu" if activation == "relu_tanh" and i > 0 else activation
            if i < last:
                self.add_module(f"{kind}{i}", {"relu": nn.ReLU, "tanh": nn.Tanh, "relu_tanh": ReLUPlusTanh}[kind]())


class WideAndDeep(nn.Module):
    """A deep stack's output, and beside it the wide input as it is, into one linear unit: (B, W), (B, D) -> (B, 1).

    One input (B, W) is both. With `auxiliary`, a second output (B, 1) is linear in the deep stack's output alone.
    """

    def __init__(self, n_wide: int, embedding: nn.Module, widths: tuple[int, int, int], *, auxiliary: bool) -> None:
        super().__init__()
        n_in, n_hidden1, n_hidden2 = widths
        self.embedding = embedding
        self.hidden1 = nn.Linear(n_in, n_hidden1)
        self.hidden2 = nn.Linear(n_hidden1, n_hidden2)
        self.output = nn.Linear(n_wide + n_hidden2, 1)
        self.auxiliary = nn.Linear(n_hidden2, 1) if auxiliary else None

    def forward(self, wide: Tensor, deep: Tensor | None = None) -> Any:
        hidden = self.embedding(wide if deep is None else deep)
        hidden = torch.relu(self.hidden2(torch.relu(self.hidden1(hidden))))
        main = self.output(torch.cat([wide, hidden], 1))
        return main if self.auxiliary is None else (main, self.auxiliary(hidden))


class SmallConvNet(nn.Module):
    """Three blocks of convolution, BatchNorm, ReLU and pooling, the mean over places, a linear layer.

    (B, 3, H, W) -> (B, n_out), H and W from 8 on; the blocks have 1, 2 and 4 times `n_channels` channels.
    """

    def __init__(self, n_channels: int, n_out: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.Sequential()
        channels = [3, n_channels, 2 * n_channels, 4 * n_channels]
        for i, (before, after) in enumerate(itertools.pairwise(channels), start=1):
            self.layers.add_module(f"conv{i}", nn.Conv2d(before, after, 3, padding=1, bias=False))
            self.layers.add_module(f"norm{i}", nn.BatchNorm2d(after))
            self.layers.add_module(f"relu{i}", nn.ReLU())
            self.layers.add_module(f"pool{i}", nn.MaxPool2d(2))
        self.layers.add_module("mean", nn.AdaptiveAvgPool2d(1))
        self.layers.add_module("flatten", nn.Flatten())
        self.layers.add_module("dropout", nn.Dropout(dropout))
        self.layers.add_module("output", nn.Linear(channels[-1], n_out))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def torchvision_classifier(name: str, n_classes: int, size: int) -> nn.Module:
    """Return the torchvision classifier of that name, untrained: (B, 3, size, size) -> logits (B, n_classes)."""
    arguments: dict[str, Any] = {"num_classes": n_classes}
    if name in ("googlenet", "inception_v3"):
        arguments |= {"aux_logits": False, "init_weights": True}
    if name.startswith("vit_"):
        arguments["image_size"] = size
    if name.startswith("maxvit_"):
        arguments["input_size"] = (size, size)
    return get_model(name, weights=None, **arguments)


def read_state(file: Path) -> dict[str, Tensor]:
    """Return the state_dict in `file`, or that of the network in a bundle's model.pt. Raises InputError."""
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        state = state.get("model_state_dict", state)
        return {
            re.sub(r"^(network\.)+", "", name): tensor
            for name, tensor in state.items()
            if not name.startswith(("preprocess.", "head.", "network.normalize."))
        }
    except Exception as error:  # files, zip, pickle: each fails in a way of its own
        cause = f"{type(error).__name__}: {error}".splitlines()[0]
        raise InputError(f"{file} holds no state_dict that loads with weights_only=True ({cause})") from error


def load_state(network: nn.Module, state: Mapping[str, Tensor], file: Path) -> None:
    """Load `state`, which came from `file`, all but a last layer of another shape. Raises InputError.

    Auxiliary classifiers, which `torchvision_classifier` leaves away, are left away.
    """
    state = {name: tensor for name, tensor in state.items() if not name.startswith(("aux1.", "aux2.", "AuxLogits."))}
    own = network.state_dict()
    last = list(own)[-1].rpartition(".")[0]
    other = [name for name, tensor in own.items() if name in state and state[name].shape != tensor.shape]
    wrong = [
        *(f"{name} is missing" for name in own if name not in state),
        *(f"{name} is unknown" for name in state if name not in own),
        *(
            f"{name} is {tuple(state[name].shape)}, not {tuple(own[name].shape)}"
            for name in other
            if name.rpartition(".")[0] != last
        ),
    ]
    if wrong:
        raise InputError(f"{file} does not fit the network in {len(wrong)} of its tensors: {', '.join(wrong[:3])}")
    network.load_state_dict({**state, **{name: own[name] for name in other}})


def transforms_by_name(
    entries: Sequence[str | Mapping[str, Mapping[str, Any]]], size: int
) -> list[Callable[[Tensor], Tensor]]:
    """Return transforms of torchvision.transforms.v2, each tried on an image (3, size, size). Raises ValueError.

    An entry is a name, or a mapping of one name to its arguments.
    """
    known = {name: cls for name, cls in vars(v2).items() if isinstance(cls, type) and issubclass(cls, v2.Transform)}
    made: list[Callable[[Tensor], Tensor]] = []
    for entry in entries:
        named = {entry: {}} if isinstance(entry, str) else entry
        if len(named) != 1:
            raise ValueError(f"transforms: an entry must have one name, but got {entry}")
        [(name, arguments)] = named.items()
        if name not in known:
            hint = did_you_mean(name, known)
            raise ValueError(f"transforms: must be of torchvision.transforms.v2, but got {name!r}{hint}")
        try:
            made.append(known[name](**arguments))
            with torch.random.fork_rng(devices=[]):  # they are made with a trial's network, whose numbers are its own
                shape = made[-1](torch.zeros(3, size, size)).shape
        except Exception as error:  # torchvision's transforms: each refuses in a way of its own
            raise ValueError(f"transforms: must take an image, but got {entry}: {error}") from error
        if shape != (3, size, size):
            raise ValueError(f"transforms: must keep an image's size, but got {entry}: it becomes {tuple(shape)}")
    return made


class Augmented(nn.Module):
    """`network` behind random transforms that training sees and nothing else does; each image has its own draws.

    Inputs (B, 3, H, W) come from `normalize`; the transforms are given images from 0 to 1, which they are made for.
    """

    def __init__(
        self, network: nn.Module, transforms: Sequence[Callable[[Tensor], Tensor]], normalize: "NormalizePixels"
    ) -> None:
        super().__init__()
        self.network, self.normalize = network, normalize
        self.transforms = tuple(transforms)  # no submodules: they are no part of the state, nor of what is exported

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            x = self.augmented(x)
        return self.network(x)

    @torch.jit.unused
    def augmented(self, x: Tensor) -> Tensor:
        images = list(self.normalize.undone(x))
        for transform in self.transforms:
            images = [transform(image) for image in images]
        return self.normalize.normalized(torch.stack(images))


class QuantileNormal(nn.Module):
    """Each feature to the normal distribution's value of its rank in `train`: (B, F) -> (B, F), outliers and all.

    As scikit-learn's QuantileTransformer(output_distribution="normal"): between two of the quantiles it is linear, and
    a value that many rows share gets the middle of its ranks. The quantiles of `train` (N, F) are kept as buffers.
    `least` is the smallest rank, as a share, from 0 to 0.5: outermost values and all beyond them have no further one.
    """

    def __init__(self, train: Tensor, rows_per_quantile: int = 30, least: float = 1e-7) -> None:
        super().__init__()
        self.least = least
        n = min(max(len(train) // rows_per_quantile, 10), 1000)
        ranks = torch.linspace(0, 1, n, dtype=torch.float64)
        quantiles = torch.stack([torch.quantile(column, ranks) for column in train.double().T])
        self.register_buffer("quantiles", quantiles.to(train.dtype))  # (F, n), rising
        self.register_buffer("falling", -quantiles.flip(1).to(train.dtype))

    def forward(self, x: Tensor) -> Tensor:
        columns = x.T.contiguous()
        share = (self._share(columns, self.quantiles) + 1 - self._share(-columns, self.falling)) / 2
        return torch.special.ndtri(share.clamp(self.least, 1 - self.least)).T.contiguous()

    def _share(self, columns: Tensor, quantiles: Tensor) -> Tensor:
        """Return the share of rows below each value, (F, B): 0 to 1, linear between two quantiles (F, n)."""
        n = quantiles.shape[1]
        above = torch.searchsorted(quantiles, columns, right=True).clamp(1, n - 1)
        low, high = quantiles.gather(1, above - 1), quantiles.gather(1, above)
        part = torch.where(high > low, (columns - low) / (high - low), torch.ones_like(columns))
        return (above - 1 + part.clamp(0, 1)) / (n - 1)


class ScalePixels(nn.Module):
    """Pixels 0 to 255, of any type, to 0 to 1: (B, ...) -> (B, ...) in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(255.0))

    def forward(self, x: Tensor) -> Tensor:
        return x.to(self.scale.dtype) / self.scale


class NormalizePixels(nn.Module):
    """Pixels 0 to 255, of any type, to 0 to 1 and then by channel to (x - mean) / std: (B, [C,] H, W) in float32."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(255.0))
        self.register_buffer("mean", torch.tensor(mean).reshape(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).reshape(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.normalized(x.to(torch.float32) / self.scale)

    def normalized(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std

    def undone(self, x: Tensor) -> Tensor:
        """Return the pixels, 0 to 1, of which x is `normalized`."""
        return x * self.std + self.mean
