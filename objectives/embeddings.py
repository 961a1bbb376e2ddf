"""Networks for tables: embeddings of numbers and categories, layers, and TabM's ensemble in one network.

Gorishniy et al., "On Embeddings for Numerical Features in Tabular Deep Learning" (NeurIPS 2022), and "TabM: Advancing
Tabular Deep Learning with Parameter-Efficient Ensembling" (ICLR 2025). Each number is to be of a standard normal
distribution (`hpo.objectives.models.QuantileNormal`): so the bins are that distribution's quantiles, whatever the data.

Shapes: B rows, F features, I numbers in a feature's encoding, D in its embedding, K members, H hidden units, C outputs.
All is laid out so that members of a stack may differ in I, D and H: a smaller one lies in the corner of a larger one.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

EMBEDDING_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "none": {},
    "piecewise": {"n_bins": 48, "d_embedding": 16},
    "periodic": {"n_frequencies": 24, "frequency_scale": 0.1, "d_embedding": 16},
}
"""The params of each embedding of numbers, for an objective's `defaults`."""
EMBEDDING_SPACE: Mapping[str, Mapping[str, Any]] = {
    "none": {},
    "piecewise": {
        "n_bins": {"type": "int", "low": 8, "high": 64},
        "d_embedding": {"type": "int", "low": 8, "high": 32, "step": 4},
    },
    "periodic": {
        "n_frequencies": {"type": "int", "low": 8, "high": 64},
        "frequency_scale": {"type": "float", "low": 0.01, "high": 1.0, "log": True},
        "d_embedding": {"type": "int", "low": 8, "high": 32, "step": 4},
    },
}
"""What there is to search of them, for an objective's `space`."""


class PerFeature(nn.Module):
    """A linear layer and ReLU for each feature's own encoding: (B, F, I) -> (B, D*F)."""

    def __init__(self, n_features: int, n_in: int, d_embedding: int) -> None:
        super().__init__()
        bound = n_in**-0.5
        self.weight = nn.Parameter(torch.empty(n_features, n_in, d_embedding).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(d_embedding, n_features).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(torch.einsum("bfi,fid->bdf", x, self.weight) + self.bias).flatten(1)


class Piecewise(nn.Module):
    """Piecewise-linear embedding: (B, F) -> (B, D*F).

    A bin's number is 0 for what lies below it, 1 above it, and rises between; the first and the last bin go on beyond
    the outermost edges, at the normal distribution's 0.1% and 99.9%.
    """

    def __init__(self, n_features: int, n_bins: int, d_embedding: int) -> None:
        super().__init__()
        edges = torch.special.ndtri(torch.linspace(0, 1, n_bins + 1, dtype=torch.float64).clamp(0.001, 0.999))
        self.register_buffer("start", edges[:-1].float())
        self.register_buffer("slope", edges.diff().reciprocal().float())
        low, high = torch.zeros(n_bins), torch.ones(n_bins)
        low[0], high[-1] = -math.inf, math.inf
        self.register_buffer("low", low)
        self.register_buffer("high", high)
        self.linear = PerFeature(n_features, n_bins, d_embedding)

    def forward(self, x: Tensor) -> Tensor:
        risen = (x.unsqueeze(-1) - self.start) * self.slope
        return self.linear(torch.minimum(torch.maximum(risen, self.low), self.high))


class Periodic(nn.Module):
    """Sines and cosines of learned frequencies, drawn from a normal distribution: (B, F) -> (B, D*F)."""

    def __init__(self, n_features: int, n_frequencies: int, frequency_scale: float, d_embedding: int) -> None:
        super().__init__()
        self.frequencies = nn.Parameter(torch.randn(n_features, n_frequencies) * frequency_scale)
        self.linear = PerFeature(n_features, 2 * n_frequencies, d_embedding)

    def forward(self, x: Tensor) -> Tensor:
        angles = 2 * math.pi * self.frequencies * x.unsqueeze(-1)
        return self.linear(torch.stack([angles.cos(), angles.sin()], -1).flatten(-2))


class Categories(nn.Module):
    """One table of embeddings for all columns: codes (B, F) -> (B, D*F).

    `sizes` are each column's number of codes. Code 0 is an unknown or missing value: it begins as zero, and stays so
    where training has none.
    """

    def __init__(self, sizes: Sequence[int], d_embedding: int) -> None:
        super().__init__()
        firsts = [0, *itertools.accumulate(sizes)]
        self.register_buffer("first", torch.tensor(firsts[:-1]))
        self.table = nn.Embedding(firsts[-1], d_embedding)
        with torch.no_grad():
            self.table.weight.uniform_(-(d_embedding**-0.5), d_embedding**-0.5)
            self.table.weight[self.first] = 0

    def forward(self, codes: Tensor) -> Tensor:
        return self.table(codes + self.first).transpose(1, 2).flatten(1)


class MemberLinear(nn.Module):
    """K linear layers that share their weight, BatchEnsemble's: (B, K, H) -> (B, K, C).

    Member k gives s_k * (W (r_k * x)) + b_k. All r and s begin at 1.
    """

    def __init__(self, n_members: int, n_in: int, n_out: int) -> None:
        super().__init__()
        bound = n_in**-0.5
        self.weight = nn.Parameter(torch.empty(n_out, n_in).uniform_(-bound, bound))
        self.r = nn.Parameter(torch.ones(n_members, n_in))
        self.s = nn.Parameter(torch.ones(n_members, n_out))
        self.bias = nn.Parameter(torch.empty(n_members, n_out).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x * self.r, self.weight) * self.s + self.bias


class Dense(nn.Sequential):
    """Linear, BatchNorm where asked for, ReLU, dropout: (B, n_in) -> (B, n_out); of K members (B, K, n_in)."""

    def __init__(self, n_in: int, n_out: int, dropout: float, batch_norm: bool = False, n_members: int = 0) -> None:
        super().__init__()
        self.linear = MemberLinear(n_members, n_in, n_out) if n_members else nn.Linear(n_in, n_out)
        if batch_norm and n_members:  # each member's unit has a mean of its own
            self.flat = nn.Flatten(1)
            self.norm = nn.BatchNorm1d(n_members * n_out)
            self.apart = nn.Unflatten(1, (n_members, n_out))
        elif batch_norm:
            self.norm = nn.BatchNorm1d(n_out)
        self.relu = nn.ReLU()
        self.dropout = nn.Dropout(dropout)


class TabM(nn.Module):
    """An ensemble of K networks that share most of their weights: (B, n_in) -> (B, C), (B, K, C).

    The first output is the mean of the members' own, the second, as `mean` takes it. Each member is to have a loss of
    its own (`of_members`), so that they stay different. They begin so by the first layer's r: random signs, or of a
    normal distribution where what comes in is `embedded`.
    """

    def __init__(
        self,
        n_members: int,
        n_in: int,
        hidden: Sequence[int],
        n_out: int,
        mean: Callable[[Tensor], Tensor],
        *,
        embedded: bool,
        dropout: float = 0.0,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        self.mean = mean
        self.hidden = _hidden(n_in, hidden, dropout, batch_norm, n_members)
        first = self.hidden[0].linear.r
        with torch.no_grad():
            first.copy_(torch.randn_like(first) if embedded else torch.randint_like(first, 2) * 2 - 1)
        bound = hidden[-1] ** -0.5
        self.weight = nn.Parameter(torch.empty(n_members, hidden[-1], n_out).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(n_members, n_out).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        outputs = torch.einsum("bkh,khc->bkc", self.hidden(x.unsqueeze(1)), self.weight) + self.bias
        return self.mean(outputs), outputs


def mean_of_numbers(outputs: Tensor) -> Tensor:
    """Return the mean of the members' outputs: (B, K, C) -> (B, C)."""
    return outputs.mean(1)


def mean_of_odds(logits: Tensor) -> Tensor:
    """Return the logit of the members' mean probability of yes: (B, K, C) -> (B, C)."""
    return F.logsigmoid(logits).logsumexp(1) - F.logsigmoid(-logits).logsumexp(1)


def mean_of_classes(logits: Tensor) -> Tensor:
    """Return the logarithm of the members' mean probabilities of the classes: (B, K, C) -> (B, C)."""
    return logits.log_softmax(-1).logsumexp(1).log_softmax(-1)  # the sum of the chances is K: a trace knows no number K


def of_members(outputs: Any, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return what a loss is to take: of TabM's outputs those of all members, (B*K, C), and their targets, (B*K, ...).

    The mean over them is the mean of the members' own losses. Outputs of a plain network (B, C) are returned as given.
    """
    if isinstance(outputs, Tensor):
        return outputs, targets
    _, members = outputs
    return members.flatten(0, 1), targets.repeat_interleave(members.shape[1], 0)


def deep(
    n_in: int, n_out: int, params: Mapping[str, Any], mean: Callable[[Tensor], Tensor], *, embedded: bool
) -> nn.Module:
    """Return `n_layers` Dense layers, each `n_hidden` wide, and a linear one: (B, n_in) -> (B, n_out).

    With `ensemble`, the number of members, they are a TabM. `params` may say `batch_norm` too.
    """
    hidden, batch_norm = [params["n_hidden"]] * params["n_layers"], params.get("batch_norm", False)
    if n_members := params["ensemble"]:
        dropout = params["dropout"]
        return TabM(n_members, n_in, hidden, n_out, mean, embedded=embedded, dropout=dropout, batch_norm=batch_norm)
    layers = _hidden(n_in, hidden, params["dropout"], batch_norm)
    layers.add_module("output", nn.Linear(hidden[-1], n_out))
    return layers


def _hidden(n_in: int, hidden: Sequence[int], dropout: float, batch_norm: bool, n_members: int = 0) -> nn.Sequential:
    layers = nn.Sequential()
    for index, (before, after) in enumerate(itertools.pairwise([n_in, *hidden]), start=1):
        layers.add_module(f"hidden{index}", Dense(before, after, dropout, batch_norm, n_members))
    return layers


def embedding_of(kind: str, n_features: int, params: Mapping[str, Any]) -> tuple[nn.Module, int]:
    """Return the embedding of that kind for `n_features` numbers (B, F), and how many numbers it gives."""
    if kind == "none":
        return nn.Identity(), n_features
    d_embedding = params["d_embedding"]
    if kind == "piecewise":
        return Piecewise(n_features, params["n_bins"], d_embedding), n_features * d_embedding
    embedding = Periodic(n_features, params["n_frequencies"], params["frequency_scale"], d_embedding)
    return embedding, n_features * d_embedding


class Joined(nn.Module):
    """Several inputs, each through a module of its own, side by side into one network: (B, ...), ... -> what it gives.

    The last one comes first, so that another size of the first leaves its place to the others.
    """

    def __init__(self, each: Sequence[nn.Module], network: nn.Module) -> None:
        super().__init__()
        self.each, self.network = nn.ModuleList(each), network

    def forward(self, *inputs: Tensor) -> Any:
        parts = [module(x) for module, x in zip(self.each, inputs, strict=True)]
        return self.network(torch.cat(parts[::-1], 1))


class EachInput(nn.Module):
    """Several inputs, each through a module of its own: (B, ...), ... -> as many; of one, what its module gives."""

    def __init__(self, each: Sequence[nn.Module]) -> None:
        super().__init__()
        self.each = nn.ModuleList(each)

    def forward(self, *inputs: Tensor) -> Any:
        outputs = tuple(module(x) for module, x in zip(self.each, inputs, strict=True))
        return outputs if len(outputs) > 1 else outputs[0]
