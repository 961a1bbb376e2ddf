"""The params that a loss is given where trials are stacked: dicts that see what is read of them and what is written.

What reads a dict in C without asking its methods (`dict(params)`, `{**params}`, `f(**params)`) asks them where
`__iter__` is not dict's own; `json.dumps` asks for `items`, and `repr` and `==` have methods too. So whatever way the
loss reads, it is seen, and to `isinstance` it is a dict, as alone. `__slots__`: a dict has no `vars` either.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from torch import Tensor

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
