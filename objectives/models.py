"""The documented networks, with the documented module names, and the layers that carry data's own numbers."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class MLP(nn.Module):
    """Flatten, then `hidden` layers of linear and ReLU, then one linear layer: (B, ...) -> (B, n_out).

    The layers are named hidden1, hidden2, ... and output; with a `dropout` rate, one follows each ReLU.
    """

    def __init__(self, n_in: int, hidden: Sequence[int], n_out: int, dropout: float | None = None) -> None:
        super().__init__()
        widths = [n_in, *hidden]
        self.layers = nn.Sequential(nn.Flatten())
        for index, (before, after) in enumerate(itertools.pairwise(widths), start=1):
            self.layers.add_module(f"hidden{index}", nn.Linear(before, after))
            self.layers.add_module(f"relu{index}", nn.ReLU())
            if dropout is not None:
                self.layers.add_module(f"dropout{index}", nn.Dropout(dropout))
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


class QuantileNormal(nn.Module):
    """Each feature to the normal distribution's value of its rank in `train`: (B, F) -> (B, F), outliers and all.

    As scikit-learn's QuantileTransformer(output_distribution="normal"): between two of the quantiles it is linear, and
    a value that many rows share gets the middle of its ranks. The quantiles of `train` (N, F) are kept as buffers.
    """

    def __init__(self, train: Tensor, rows_per_quantile: int = 30) -> None:
        super().__init__()
        n = min(max(len(train) // rows_per_quantile, 10), 1000)
        ranks = torch.linspace(0, 1, n, dtype=torch.float64)
        quantiles = torch.stack([torch.quantile(column, ranks) for column in train.double().T])
        self.register_buffer("quantiles", quantiles.to(train.dtype))  # (F, n), rising
        self.register_buffer("falling", -quantiles.flip(1).to(train.dtype))

    def forward(self, x: Tensor) -> Tensor:
        columns = x.T.contiguous()
        share = (self._share(columns, self.quantiles) + 1 - self._share(-columns, self.falling)) / 2
        return torch.special.ndtri(share.clamp(1e-7, 1 - 1e-7)).T.contiguous()

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
