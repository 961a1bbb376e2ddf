"""Whether a row's predictions are its own: of some networks they depend on the rows that are given with it.

A forward that takes a mean over the batch, or a BatchNorm without running statistics, gives in evaluation mode other
predictions of a row alone than of the same row among others: metrics over a split say little of it in use.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_SINGLE = 3
_RELATIVE, _OF_LARGEST = 1e-3, 1e-4
"""What rounding may come to: float32 adds up in another order for another number of rows."""


def apart(predictions: Callable[..., Tensor], inputs: Sequence[Tensor]) -> float:
    """Return by how much `predictions` of single rows of `inputs` differ from those of the same rows together.

    0: by rounding only, or it is not known, since those of the same rows differ from call to call. Raises whatever
    `predictions` does of a row alone, and ValueError where these have another shape.
    """
    n = len(inputs[0])
    with torch.no_grad(), torch.random.fork_rng(devices=()):
        together = predictions(*inputs)
        places = range(min(_SINGLE, n))
        alone = [predictions(*(x[i : i + 1] for x in inputs)) for i in places] if n > 1 else []
        for each in alone:
            if each.shape != (one := together[:1]).shape:
                raise ValueError(
                    f"of one row its predictions have the shape {tuple(each.shape)}, not {tuple(one.shape)}"
                )
        found = _difference(torch.cat(alone), together[: len(alone)], together) if alone else 0.0
        return found if found and not _difference(predictions(*inputs), together, together) else 0.0


def _difference(one: Tensor, other: Tensor, of: Tensor) -> float:
    """Return the largest difference, 0 where it is rounding; the largest of `of` says how much that may be."""
    one, other = one.double(), other.double()
    scale = float(of.double().nan_to_num(posinf=0.0, neginf=0.0).abs().max())
    if torch.isclose(one, other, rtol=_RELATIVE, atol=_OF_LARGEST * scale, equal_nan=True).all():
        return 0.0
    difference = (one - other).abs().max()
    return float(difference) if torch.isfinite(difference) else float("inf")


def note(found: float) -> str:
    """Return what it means that predictions of single rows differ by so much."""
    return (
        f"predictions of a row depend on which rows are given with it: of a row alone they differ by up to {found:.3g} "
        "from those of the same row among others, so that the metrics, measured on many rows at once, do not hold for "
        "a few"
    )
