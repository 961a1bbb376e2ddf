"""The documented networks, with the documented module names, and the layers that carry data's own numbers."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class MLP(nn.Module):
    """Flatten, then `hidden` layers of linear and ReLU, then one linear layer: (B, ...) -> (B, n_out).

    The layers are named hidden1, hidden2, ... and output.
    """

    def __init__(self, n_in: int, hidden: Sequence[int], n_out: int) -> None:
        super().__init__()
        widths = [n_in, *hidden]
        self.layers = nn.Sequential(nn.Flatten())
        for index, (before, after) in enumerate(itertools.pairwise(widths), start=1):
            self.layers.add_module(f"hidden{index}", nn.Linear(before, after))
            self.layers.add_module(f"relu{index}", nn.ReLU())
        self.layers.add_module("output", nn.Linear(widths[-1], n_out))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Standardize(nn.Module):
    """(x - mean) / std by feature: (B, F) -> (B, F). Mean and deviation of `train` (N, F) are kept as buffers."""

    def __init__(self, train: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", train.double().mean(0).to(train.dtype))
        std = train.double().std(0, correction=0)
        self.register_buffer("std", torch.where(std > 0, std, 1.0).to(train.dtype))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


class ScalePixels(nn.Module):
    """Pixels 0 to 255, of any type, to 0 to 1: (B, ...) -> (B, ...) in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(255.0))

    def forward(self, x: Tensor) -> Tensor:
        return x.to(self.scale.dtype) / self.scale
