"""What a step does with tensors that a stack would not do as a network alone does: seen while it is tried alone."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves


class Trying(TorchFunctionMode):
    """Notes what makes numbers of a tensor's without torch's knowing: a graph would keep those of one batch.

    And what asks how large a tensor is that a mask has picked: alone a weight that this leaves out of the loss has no
    gradient, and stays as it is, in a stack it has one of zeros. And has functional dropout keep a half of every
    number, in place of every number or none, so that what is tried in two ways can be compared.

    A tensor that is made of no other one (`torch.eye(n)`), and what is made of such, is the same in each step.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lists = self.drops = self.counts = False
        self.draws = self.draws_itself = False
        """Whether it draws random numbers but for dropout, and whether from a seed or generator of its own."""
        self._seed = torch.initial_seed()
        self._picked: dict[int, Tensor] = {}
        """Tensors whose sizes follow from the data, by their ids."""
        self._elsewhere: set[int] = set()
        """Those of which not only the first dimension does."""
        self._constant: dict[int, Tensor] = {}
        self._reads = False
        """Whether Python has numbers of the data: what is made after that may follow from them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, _name_of(func)
        self.lists |= func in _READING and not self._are_constant(args)
        self.drops |= func in _DROPOUT
        if func in _DROPOUT:
            given = inspect.signature(F.dropout).bind(*args, **kwargs).arguments
            return 0.5 * given["input"] if given.get("training", True) else given["input"]
        self.draws |= name in _DRAWING
        if name in _DRAWING:
            self.draws_itself |= kwargs.get("generator") is not None or torch.initial_seed() != self._seed
        of_picked = any(id(each) in self._picked for each in tree_leaves((args, kwargs)))
        self.counts |= of_picked and (func in _SIZES or name in _COUNTING)
        picks = not self._are_constant(_picked_by(name, args, kwargs))
        is_constant = self._is_constant(name, args, kwargs)
        results = func(*args, **kwargs)
        if (of_picked and not self._is_sized_by_others(func, args, kwargs)) or picks:
            found = [each for each in _sized(name, results, kwargs) if isinstance(each, Tensor) and each.ndim]
            self._picked |= {id(each): each for each in found}
            if _picks_elsewhere(func, args) or any(id(each) in self._elsewhere for each in tree_leaves((args, kwargs))):
                self._elsewhere |= {id(each) for each in found}
        if is_constant:
            self._constant |= {id(each): each for each in tree_leaves(results) if isinstance(each, Tensor)}
        return results

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]  # torch does not annotate it
        self.draws_itself |= torch.initial_seed() != self._seed

    def _is_constant(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        """Whether what a function gives is the same in each step. Notes what is no longer so after it."""
        of_constants = self._are_constant((args, kwargs))
        self._reads |= name in _GIVING_NUMBERS and not of_constants
        is_constant = not self._reads and (name in _FILLED or (of_constants and name not in _DRAWING | _UNKNOWN))
        if self._reads or (
            not is_constant and any(id(each) in self._constant for each in _written(name, args, kwargs))
        ):
            self._constant.clear()  # what is written into may be a view of others
        return is_constant

    def _are_constant(self, given: Any) -> bool:
        return all(id(each) in self._constant for each in tree_leaves(given) if isinstance(each, Tensor))

    def _is_sized_by_others(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        """Whether the result of what was picked has no row of each of that: what it is put into has them, or none."""
        name, first = _name_of(func), args[0] if args else None
        if name.startswith(_INTO):
            return id(first) not in self._picked
        dims = kwargs.get("dim", args[1] if len(args) > 1 else None)
        if name not in _REDUCING or not isinstance(first, Tensor) or id(first) in self._elsewhere:
            return False
        dims = dims if isinstance(dims, tuple | list) else (dims,)
        return any(type(dim) is int and dim in (0, -first.ndim) for dim in dims)


_DROPOUT = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d)
"""They have the same arguments."""
_READING = (Tensor.tolist, Tensor.numpy, Tensor.__array__)
_SIZES = (Tensor.shape.__get__, Tensor.nbytes.__get__)  # type: ignore[attr-defined]
_COUNTING = {
    *("__len__", "size", "numel", "unbind", "split", "split_with_sizes", "chunk", "tensor_split"),
    *("hsplit", "vsplit", "dsplit", "stride", "untyped_storage", "storage", "_nnz"),
}
"""`unbind` is what a loop over a tensor calls."""
_OF_ALL_ARGUMENTS = {"nonzero", "argwhere", "unique", "unique_consecutive", "bincount", "to_sparse", "one_hot"}
_OF_THE_SECOND = {"masked_select": "mask", "tensor_split": "tensor_indices_or_sections", "repeat_interleave": "repeats"}
_REDUCING = {
    *("sum", "mean", "std", "var", "amax", "amin", "prod", "logsumexp", "norm", "max", "min", "median", "argmax"),
    *("argmin", "any", "all", "nansum", "nanmean", "nanmedian", "var_mean", "std_mean", "count_nonzero"),
}
_MOVING = {
    *("transpose", "t", "permute", "movedim", "moveaxis", "swapaxes", "swapdims", "unsqueeze", "view", "reshape"),
    *("unflatten", "stack", "expand", "repeat", "tile", "einsum", "outer", "bmm", "meshgrid"),
}
_MOVED = (Tensor.T.__get__, Tensor.mT.__get__, Tensor.H.__get__, Tensor.mH.__get__)  # type: ignore[attr-defined]
_INTO = ("index_add", "index_copy", "index_fill", "index_put", "index_reduce", "masked_scatter", "scatter")
_DRAWING = {
    *(
        "rand",
        "rand_like",
        "randn",
        "randn_like",
        "randint",
        "randint_like",
        "randperm",
        "random_",
        "normal",
        "normal_",
    ),
    *("bernoulli", "bernoulli_", "multinomial", "poisson", "binomial", "uniform_", "exponential_", "cauchy_"),
    *("geometric_", "log_normal_"),
}
_UNKNOWN = {
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"),
    *("rrelu", "alpha_dropout", "feature_alpha_dropout", "gumbel_softmax"),
}
"""What holds whatever was there, or may draw."""
_FILLED = {"zeros_like", "ones_like", "new_zeros", "new_ones"}
_GIVING_NUMBERS = {
    *("item", "tolist", "numpy", "__array__", "__bool__", "__int__", "__float__", "__index__", "__complex__"),
    *("__contains__", "equal", "allclose", "is_nonzero", "__format__", "__repr__"),
}


def _picked_by(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Return the tensors in the arguments from whose numbers it follows how large the result is."""
    deciding: Any = ()
    if name == "__getitem__":
        masks = [each for each in tree_leaves(args[1:]) if isinstance(each, Tensor)]
        deciding = [each for each in masks if each.dtype in (torch.bool, torch.uint8)]
    elif name == "bincount":
        deciding = () if kwargs.get("minlength") or len(args) > 2 else (args, kwargs)
    elif name == "one_hot":
        deciding = (args, kwargs) if kwargs.get("num_classes", args[1] if len(args) > 1 else -1) == -1 else ()
    elif name == "_pack_padded_sequence":
        deciding = args[1:]
    elif name == "where":
        deciding = (args, kwargs) if len(args) + len(kwargs) == 1 else ()
    elif name in _OF_THE_SECOND:
        second = kwargs.get(_OF_THE_SECOND[name], args[1] if len(args) > 1 else None)
        counts = name == "repeat_interleave" and second is None  # alone they are the repeats
        deciding = () if kwargs.get("output_size") is not None else (args, kwargs) if counts else second
    elif name in _OF_ALL_ARGUMENTS:
        deciding = args, kwargs
    return [each for each in tree_leaves(deciding) if isinstance(each, Tensor)]


def _picks_elsewhere(func: Any, args: Sequence[Any]) -> bool:
    """Whether what is picked is in another dimension than the first: `x[:, mask]`, `x[mask].T`."""
    name = _name_of(func)
    if name == "__getitem__":
        return isinstance(args[1], tuple) and bool(args[1]) and not isinstance(args[1][0], Tensor)
    return name in _MOVING or func in _MOVED


def _sized(name: str, results: Any, kwargs: Mapping[str, Any]) -> list[Any]:
    """Return those of some results whose sizes follow from the data: where each number is found has its size."""
    if name.startswith("unique") and kwargs.get("return_inverse") and isinstance(results, tuple):
        return [results[0], *results[2:]]
    return tree_leaves(results)


def _written(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """Return what a function writes into."""
    in_place = name in ("__setitem__", "set_") or name.startswith("__i") or (name.endswith("_") and name[-2:] != "__")
    return [*args[:1], *tree_leaves(kwargs.get("out"))] if in_place else tree_leaves(kwargs.get("out"))


def _name_of(func: Any) -> str:
    return str(getattr(func, "__name__", ""))
