"""Whether a network's outputs of a row depend on the rows that are evaluated with it: a forward that takes their mean.

Then a stack evaluates as many rows at once as its members do alone; else as many as are fast. That costs little, so in
doubt they do depend on each other.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves

from hpo.study.data import Split
from hpo.training.evaluation import in_full, joined
from hpo.training.memory import is_out_of_memory
from hpo.training.stack import Precision, Task

_PARTS = (7, 9, 16)
"""Rows that are evaluated together, and then in these parts: small and larger, even and odd."""
_ROUNDING: Mapping[Precision, float] = {"float32": 1e-4, "tf32": 1e-2, "bf16": 5e-2}
"""What share of the largest output is taken for rounding, but in double precision."""
_ROUNDING_OF_DOUBLE = 1e-10


@torch.no_grad()
def mixes_rows(task: Task, network: nn.Module, example: Split) -> bool:
    """Whether `network`, in evaluation mode, gives other outputs of rows like the example's by how many there are.

    Its buffers are left as they are.
    """
    inputs = [_unlike_each_other(x, sum(_PARTS)) for x in example.inputs.values()]

    def outputs_of(several: list[Tensor]) -> Any:
        buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
        return in_full(functional_call(network, buffers, tuple(several)))

    try:
        with task.autocast():
            whole = outputs_of(inputs)
            split = zip(*(torch.split(x, list(_PARTS)) for x in inputs), strict=True)
            parts = joined([outputs_of(list(part)) for part in split])
        pairs = zip(tree_leaves(parts), tree_leaves(whole), strict=True)
        return not all(_is_rounded(one, other, task.precision) for one, other in pairs)
    except Exception as error:  # it does not take such rows
        if is_out_of_memory(error):
            raise
        return True


def _unlike_each_other(x: Tensor, n: int) -> Tensor:
    """Return `n` rows like those of `x`, these first: data may begin with rows that are all the same.

    Numbers are moved at random; of what may be an index each row has those that some row has there.
    """
    rows = x[torch.arange(n, device=x.device) % len(x)]
    more = rows[len(x) :]
    if x.is_floating_point():
        spread = x.std(correction=0)
        more = more + torch.randn_like(more) * torch.where(spread > 0, spread, 1.0)
    elif x.ndim > 1:
        order = torch.rand(more.shape, device=x.device).argsort(0)
        more = more.gather(0, order)
    return torch.cat([x[:n], more])


def _is_rounded(got: Any, expected: Any, precision: Precision) -> bool:
    """Whether two outputs are the same but for rounding; a number that is none is none in both."""
    if not isinstance(expected, Tensor):
        return bool(got == expected)
    if got.shape != expected.shape or not expected.is_floating_point():
        return torch.equal(got, expected)
    share = _ROUNDING_OF_DOUBLE if expected.dtype == torch.float64 else _ROUNDING[precision]
    finite = expected[expected.isfinite()]
    most = share * float(finite.abs().max()) if finite.numel() else 0.0
    return torch.allclose(got, expected, rtol=0, atol=most, equal_nan=True)
