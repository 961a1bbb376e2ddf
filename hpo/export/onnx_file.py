"""A model as an ONNX file, with what ONNX has no operation for written in operations that it has."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

# fmt: off
_CENTRE = (
    (3.387132872796366608e0, 1.3314166789178437745e2, 1.9715909503065514427e3, 1.3731693765509461125e4,
     4.5921953931549871457e4, 6.7265770927008700853e4, 3.3430575583588128105e4, 2.5090809287301226727e3),
    (1.0, 4.2313330701600911252e1, 6.871870074920579083e2, 5.3941960214247511077e3,
     2.1213794301586595867e4, 3.930789580009271061e4, 2.8729085735721942674e4, 5.226495278852854561e3),
)
_NEAR = (
    (1.42343711074968357734e0, 4.6303378461565452959e0, 5.7694972214606914055e0, 3.64784832476320460504e0,
     1.27045825245236838258e0, 2.4178072517745061177e-1, 2.27238449892691845833e-2, 7.7454501427834140764e-4),
    (1.0, 2.05319162663775882187e0, 1.6763848301838038494e0, 6.8976733498510000455e-1,
     1.4810397642748007459e-1, 1.51986665636164571966e-2, 5.475938084995344946e-4, 1.05075007164441684324e-9),
)
_FAR = (
    (6.6579046435011037772e0, 5.4637849111641143699e0, 1.7848265399172913358e0, 2.9656057182850489123e-1,
     2.6532189526576123093e-2, 1.24266094738807843860e-3, 2.71155556874348757815e-5, 2.01033439929228813265e-7),
    (1.0, 5.9983220655588793769e-1, 1.3692988092273580531e-1, 1.48753612908506148525e-2,
     7.868691311456132591e-4, 1.8463183175100546818e-5, 1.4215117583164458887e-7, 2.04426310338993978564e-15),
)
"""Wichura, "Algorithm AS 241: The Percentage Points of the Normal Distribution" (1988): numerators, denominators."""
# fmt: on


def write_onnx(program: ExportedProgram, example: tuple[Tensor, ...], names: Sequence[str], path: Path) -> None:
    """Write `program` with inputs of these names and one output, `prediction`."""
    plain = program.run_decompositions(_IN_OTHERS)
    onnx: Any = torch.onnx.export(
        plain, example, dynamo=True, verbose=False, input_names=names, output_names=["prediction"]
    )
    onnx.save(path, external_data=False)


def searchsorted(rising: Tensor, values: Tensor, *, right: bool = False, side: str | None = None, **_: Any) -> Tensor:
    """As `torch.searchsorted`, by comparing each of `values` (..., B) with all of `rising` (..., N): (..., B)."""
    each, value = rising.unsqueeze(-2), values.unsqueeze(-1)
    return (each <= value if right or side == "right" else each < value).sum(-1)


def ndtri(share: Tensor) -> Tensor:
    """As `torch.special.ndtri`, to float64's last digits: a probability's quantile of the standard normal."""
    p = share.double()
    q = p - 0.5
    centre = q * _ratio(_CENTRE, 0.180625 - q * q)
    r = torch.sqrt(-torch.log(torch.minimum(p, 1 - p)))
    tail = torch.where(r <= 5, _ratio(_NEAR, r - 1.6), _ratio(_FAR, r - 5))
    tail = torch.where(torch.isinf(r), r, tail)
    return torch.where(q.abs() <= 0.425, centre, torch.where(q < 0, -tail, tail)).to(share.dtype)


def _ratio(polynomials: tuple[Sequence[float], Sequence[float]], x: Tensor) -> Tensor:
    above, below = (torch.full_like(x, coefficients[-1]) for coefficients in polynomials)
    for over, under in zip(polynomials[0][-2::-1], polynomials[1][-2::-1], strict=True):
        above, below = above * x + over, below * x + under
    return above / below


_IN_OTHERS: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.searchsorted.Tensor: searchsorted,
    torch.ops.aten.special_ndtri.default: ndtri,
}
