"""A network copied, whatever its forward or its hooks have left in it."""

from copy import deepcopy
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

T = TypeVar("T", bound=nn.Module)


def copied(module: T) -> T:
    """Return a copy of `module` with weights of its own.

    torch copies no tensor that has been computed with a gradient, as `torch.nn.utils.weight_norm` leaves the weight
    that it makes before each forward, and a forward what it keeps for the loss. Of those the copy has the numbers.
    """
    held = [value for part in module.modules() for value in tree_leaves(vars(part)) if isinstance(value, Tensor)]
    known: dict[int, Any] = {id(value): value.detach().clone() for value in held if not value.is_leaf}
    return deepcopy(module, known)
