"""Several networks as one: the mean of their predictions, given as a network's outputs are."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from hpo.errors import InputError
from hpo.export.copying import copied
from hpo.study.data import prediction

_LEAST = 1e-12


@dataclass(frozen=True)
class Link:
    """What takes a network's outputs to what is averaged: `softmax` along `dim`, `sigmoid`, or `none`."""

    kind: str
    dim: int = 1


def link_of(head: nn.Module, n_classes: int, by_loss: str = "") -> Link:
    """Return what takes a network's outputs to the probabilities or numbers whose mean is meant.

    It is the head, or where that is the identity, `by_loss`: what the loss does with them, if it takes logits. What
    takes outputs to numbers linearly (a scale, a unit) needs nothing: the mean of outputs is that of numbers. Raises
    InputError where no outputs are known that a head takes to the mean of probabilities.
    """
    if isinstance(head, nn.Softmax | nn.LogSoftmax):
        return Link("softmax", 1 if head.dim is None else head.dim)
    if isinstance(head, nn.Sigmoid):
        return Link("sigmoid")
    if n_classes > 1 and not isinstance(head, nn.Identity):
        raise InputError(
            f"ensemble: no outputs are known that a {type(head).__name__} takes to a mean of probabilities; let the "
            "objective's head be Softmax or Sigmoid, or leave `ensemble` out"
        )
    return Link(by_loss or "none")


class Ensemble(nn.Module):
    """Networks of one structure, whose outputs are such that their loss, metrics and head give those of the mean.

    Of probabilities the outputs are logarithms (softmax) or logits (sigmoid), which the head takes back to the mean. Of
    a network's several outputs the first is the prediction; of the others the mean is given as it is.
    """

    def __init__(self, networks: Sequence[nn.Module], link: Link) -> None:
        super().__init__()
        self.networks = nn.ModuleList(copied(network) for network in networks)
        self._link = link

    def forward(self, *inputs: Tensor) -> Any:
        outputs = [network(*inputs) for network in self.networks]
        if isinstance(outputs[0], Tensor):
            return self._mean(outputs)
        leaves, form = tree_flatten(tree_map(lambda *each: torch.stack(each).float().mean(0), *outputs))
        return tree_unflatten([self._mean([prediction(each) for each in outputs]), *leaves[1:]], form)

    def _mean(self, several: Sequence[Tensor]) -> Tensor:
        if self._link.kind == "softmax":
            shares = [each.float().softmax(self._link.dim) for each in several]
            return torch.stack(shares).mean(0).clamp(min=_LEAST).log()
        outputs = torch.stack(list(several)).float()
        if self._link.kind == "sigmoid":
            rate, other = outputs.sigmoid().mean(0), (-outputs).sigmoid().mean(0)
            return rate.clamp(min=_LEAST).log() - other.clamp(min=_LEAST).log()
        return outputs.mean(0)
