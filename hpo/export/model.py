"""A trained model, and the module that is exported of it: raw inputs in, predictions out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from inspect import Parameter, Signature
from keyword import iskeyword
from typing import Any

import torch
from torch import Tensor, nn

from hpo.export.copying import copied
from hpo.study.data import DataInfo, prediction
from hpo.study.losses import Link


@dataclass(frozen=True, kw_only=True)
class Model:
    """A trained model, and what a bundle says of it. `params` are all that it was built from."""

    preprocess: nn.Module
    network: nn.Module
    head: nn.Module
    params: Mapping[str, Any]
    info: DataInfo
    about: Mapping[str, Any]
    """study, objective, options, trial, epochs, seed, metrics, data_fingerprint: plain values."""
    link: Link = ""
    """What makes probabilities of the network's predictions, where its loss takes them as logits."""

    def predictor(self) -> nn.Module:
        """Return raw inputs -> predictions, in evaluation mode, as a module of its own on the CPU."""
        parts = [copied(part).cpu().eval() for part in (self.preprocess, self.network, self.head)]
        names = ("preprocess", "network", "head")
        several = len(self.info.inputs) > 1 or self._gives_several(parts)
        module = Named(list(self.info.inputs), *parts) if several else nn.Sequential()
        if isinstance(module, nn.Sequential):
            for name, part in zip(names, parts, strict=True):
                module.add_module(name, part)
        return module.cpu().eval().requires_grad_(False)

    def _gives_several(self, parts: Sequence[nn.Module]) -> bool:
        """Whether the network gives several outputs, the first of which is the prediction."""
        dtype = getattr(torch, next(iter(self.info.input_dtypes.values())))
        with torch.no_grad():
            x = torch.zeros(2, *next(iter(self.info.inputs.values())), dtype=dtype)
            return not isinstance(parts[1](parts[0](x)), Tensor)


class Named(nn.Module):
    """preprocess, network and head for several inputs or outputs; traced: TorchScript cannot script `*inputs`.

    What is traced takes its inputs by their names too, as far as Python allows them.
    """

    def __init__(self, names: Sequence[str], preprocess: nn.Module, network: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.preprocess, self.network, self.head = preprocess, network, head

        def forward(*inputs: Tensor) -> Tensor:
            prepared = inputs if isinstance(preprocess, nn.Identity) else preprocess(*inputs)
            prepared = (prepared,) if isinstance(prepared, Tensor) else prepared
            predicted: Tensor = head(prediction(network(*prepared)))
            return predicted

        plain = [n if n.isidentifier() and not iskeyword(n) else f"input{place}" for place, n in enumerate(names)]
        parameters = [Parameter(name, Parameter.POSITIONAL_OR_KEYWORD) for name in plain]
        forward.__signature__ = Signature(parameters)  # type: ignore[attr-defined]  # the tracer reads names here
        self.forward = forward
