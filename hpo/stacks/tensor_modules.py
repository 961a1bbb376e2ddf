"""Modules that hold in a buffer what other modules hold in their code: so members that differ in it share a stack."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn


class RateDropout(nn.Module):
    """nn.Dropout with its rate in a buffer."""

    rate: Tensor

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.register_buffer("rate", torch.tensor(float(rate)))

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        keep = 1 - self.rate
        # rate 1 keeps nothing, and nothing over nothing is no number
        return torch.where(torch.rand_like(x) < keep, x / keep.clamp(min=1e-7), torch.zeros_like(x))


class SelectOne(nn.Module):
    """One of several modules that have no weights (activations, say); which one is in a buffer."""

    chosen: Tensor

    def __init__(self, options: Sequence[nn.Module], chosen: int) -> None:
        super().__init__()
        self.options = nn.ModuleList(options)
        self.register_buffer("chosen", torch.tensor(chosen))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.options[0](x)
        for index, option in enumerate(self.options[1:], start=1):
            out = torch.where(self.chosen == index, option(x), out)
        return out


class Gated(nn.Sequential):
    """A sequence of which the modules from `first` to `last` may be left out; how many are used is in a buffer."""

    used: Tensor

    def __init__(self, modules: Mapping[str, nn.Module], first: int, last: int, used: int) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        self.first, self.last = first, last
        self.register_buffer("used", torch.tensor(used))

    def forward(self, x: Tensor) -> Tensor:
        for index, module in enumerate(self):
            y = module(x)
            if self.first <= index < self.last:
                if y.shape != x.shape:
                    raise ValueError(f"a layer that may be left out changes the shape {tuple(x.shape)}")
                y = torch.where(self.used > index - self.first, y, x)
            x = y
        return x


CONTROLS = {RateDropout: "rate", SelectOne: "chosen", Gated: "used"}
"""The buffers that the common structure adds to a network: no part of its own state."""


def is_control(module: nn.Module, name: str) -> bool:
    path, _, last = name.rpartition(".")
    return CONTROLS.get(type(module.get_submodule(path))) == last


def tensor_dropout(module: nn.Module) -> nn.Module:
    """Return `module` with each nn.Dropout in it replaced by a RateDropout; the module given is changed."""
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Dropout:
                setattr(parent, name, RateDropout(child.p))
    return RateDropout(module.p) if type(module) is nn.Dropout else module
