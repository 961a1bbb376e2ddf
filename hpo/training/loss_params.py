"""The params that a loss is given where trials are stacked: dicts that see what is read of them and what is written.

What reads a dict in C without asking its methods (`dict(params)`, `{**params}`, `f(**params)`) asks them where
`__iter__` is not dict's own; `json.dumps` asks for `items`, and `repr` and `==` have methods too. So whatever way the
loss reads, it is seen, and to `isinstance` it is a dict, as alone. `__slots__`: a dict has no `vars` either.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from hpo.study.objective import Params
from hpo.training.faults import TrialError, TrialFault
from hpo.training.kinds import PLAIN

_NONE = object()


class _Watched(dict[str, Any]):
    """A dict that calls `_read` with each name that is read, `_write` with each that is set or deleted."""

    __slots__ = ("_own",)

    def __init__(self, params: Mapping[str, Any]) -> None:
        super().__init__(dict(params))
        self._own: set[str] = set()  # what the loss itself has written

    def _read(self, name: str) -> None:
        raise NotImplementedError

    def _write(self, name: str, value: Any) -> None:
        """`value`: what the name has from now on; _NONE where it is deleted."""
        self._own.add(name)

    def _looked_up(self, name: Any) -> Any:
        if name not in self._own:
            self._read(name)
        return name

    def _whole(self) -> dict[str, Any]:
        return {self._looked_up(name): dict.__getitem__(self, name) for name in dict.keys(self)}

    def __getitem__(self, name: str) -> Any:
        return super().__getitem__(self._looked_up(name))

    def __contains__(self, name: object) -> bool:
        return super().__contains__(self._looked_up(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._whole())

    def __reversed__(self) -> Iterator[str]:
        return reversed(self._whole())

    def __len__(self) -> int:
        return len(self._whole())

    def __bool__(self) -> bool:  # each trial has params: nothing is learned of them
        return super().__len__() > 0

    def __repr__(self) -> str:
        return repr(self._whole())

    def __eq__(self, other: object) -> bool:
        return self._whole() == other

    def __ne__(self, other: object) -> bool:
        return self._whole() != other

    def __or__(self, other: Any) -> Any:
        return self._whole() | other

    def __ror__(self, other: Any) -> Any:
        return other | self._whole()

    def __reduce_ex__(self, protocol: Any) -> Any:  # of `copy`, `deepcopy` and `pickle`
        return dict, (self._whole(),)

    def copy(self) -> dict[str, Any]:
        return self._whole()

    def get(self, name: str, default: Any = None) -> Any:
        return super().get(self._looked_up(name), default)

    def keys(self) -> Any:
        return self._whole().keys()

    def values(self) -> Any:
        return self._whole().values()

    def items(self) -> Any:
        return self._whole().items()

    def __setitem__(self, name: str, value: Any) -> None:
        self._write(name, value)
        super().__setitem__(name, value)

    def __delitem__(self, name: str) -> None:
        if name in self:
            self._write(name, _NONE)
        super().__delitem__(name)

    def setdefault(self, name: str, default: Any = None) -> Any:
        if name not in self:
            self[name] = default
        return self[name]

    def pop(self, name: str, *default: Any) -> Any:
        if name in self:
            self._write(name, _NONE)
        return super().pop(name, *default)

    def popitem(self) -> tuple[str, Any]:
        for name in reversed(self):
            return name, self.pop(name)
        raise KeyError("popitem(): dictionary is empty")

    def clear(self) -> None:
        for name in self:
            del self[name]

    def update(self, *others: Any, **more: Any) -> None:
        for name, value in dict(*others, **more).items():
            self[name] = value

    def __ior__(self, other: Any) -> Any:
        self.update(other)
        return self


class RecordingParams(_Watched):
    """A copy of one trial's params that records which of them are read, as `names`, while its loss is tried.

    What the loss writes is there in the next call, as in those of a trial alone. In a stack it is not: that is the same
    where each call writes what the first has, and `changes` says that it is not so.
    """

    __slots__ = ("changes", "names")

    def __init__(self, params: Params) -> None:
        super().__init__(params)
        self.names: set[str] = set()
        self.changes = False

    def _read(self, name: str) -> None:
        self.names.add(name)

    def _write(self, name: str, value: Any) -> None:
        is_there, before = dict.__contains__(self, name), dict.get(self, name)
        same = type(value) is type(before) and repr(value) == repr(before) if is_there else isinstance(value, PLAIN)
        self.changes |= not same
        super()._write(name, value)


class SharedParams(_Watched):
    """The params that the loss of all members of a stack is called with: those of the `first`, one of the members.

    That is right although the other members' params differ. A param that the loss reads is either a plain float, which
    `numbers` hold with a value for each member, or the same for all members of a stack: otherwise they would not share
    one. Of all other params (the learning rate, say) the loss reads none, so it does not matter whose they are.

    `reads` are those that it was seen to read, on a few rows. Where it reads another one on other rows, TrialError is
    raised, whatever way a dict is read: that param would be one member's. Each call is given params of its own, so that
    what it writes is in no other.
    """

    __slots__ = ("_reads",)

    def __init__(self, first: Params, numbers: Mapping[str, Tensor], reads: Collection[str]) -> None:
        super().__init__({**first, **numbers})
        self._reads = reads

    def _read(self, name: str) -> None:
        if name not in self._reads:
            said = f"the loss reads the param {name!r} on some rows only, so trials with other values share no stack"
            raise TrialError(TrialFault(state="FAIL", text=said))


class PythonsNumbers(TorchFunctionMode):
    """Within this the `numbers`, tensors without dimensions, decide on the type of a result as Python's numbers do.

    A float times a tensor of bool or int64 is of torch's default type, and times float32 it is float32, whatever the
    number; a float64 tensor in its place would make float64 of them, which alone is rounded. What is computed of such
    numbers only is one of them too.
    """

    def __init__(self, numbers: Collection[Tensor]) -> None:
        super().__init__()
        self._numbers = {id(each): each for each in numbers}  # held, so that no id is given twice

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        found = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        others = [each for each in found if id(each) not in self._numbers]
        if len(others) == len(found):
            return func(*args, **kwargs)
        if not others:
            result = func(*args, **kwargs)
            if isinstance(result, Tensor) and result.ndim == 0:
                self._numbers[id(result)] = result
            return result
        floats = {each.dtype for each in others if each.is_floating_point() or each.is_complex()}
        if (floats or {torch.get_default_dtype()}) == {torch.float32}:
            args, kwargs = tree_map(self._in_single, (args, kwargs))
        return func(*args, **kwargs)

    def _in_single(self, x: Any) -> Any:
        return x.float() if id(x) in self._numbers and x.dtype == torch.float64 else x


def as_pythons(numbers: Mapping[str, Tensor]) -> AbstractContextManager[Any]:
    """Return the context in which a loss is called that is given these `numbers` as tensors."""
    doubles = [each for each in numbers.values() if each.dtype == torch.float64]
    return PythonsNumbers(doubles) if doubles else nullcontext()
