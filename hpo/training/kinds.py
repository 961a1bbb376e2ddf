"""What a class, a function or a value is, so that two of them can be told to be the same though they are two objects.

A class that is written inside of `build` is another object each time; members of a stack run the code of one of them.
So kinds are equal only where nothing that the code may read differs: its bytecode, constants, defaults, what it closes
over, the globals that it names. Plain values and small tensors are compared by value, torch's own and what cannot be
looked into by identity, so that what is not known to be the same is not taken for it.
"""

import dis
import functools
import itertools
import random
import sys
import types
import weakref
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, type(Ellipsis))
"""What is the same if it reads the same."""
NOT_READ = frozenset({"__init__", "__dict__", "__weakref__", "__doc__", "__firstlineno__", "__static_attributes__"}) | {
    *("__annotations__", "__annotate__", "__annotate_func__", "__annotations_cache__"),
    *("__dataclass_fields__", "__dataclass_params__"),
}
"""Of a class: what its instances have behind them, or never read."""
HOOKS = frozenset({"_forward_hooks", "_forward_pre_hooks"})
NOT_STATE = frozenset(vars(nn.Module())) - HOOKS
"""Of a module: what its names, its tensors and whether it trains say already."""
_READ = (list, tuple, dict, set, deque, Tensor, np.ndarray)
"""Of an object that is itself only: what it may count or collect in."""
_MANY, _DEEP = 1_000, 8
"""So many objects that hold others are looked into, and objects within objects so deep."""
_LIBRARIES = frozenset({"torch", "numpy", *sys.stdlib_module_names}) - {"__main__"}
KNOWN = _LIBRARIES.union(
    ("scipy", "pandas", "sklearn", "torchvision", "torchmetrics", "PIL", "optuna", "mlflow", "hpo"),
    ("lightning", "pytorch_lightning"),
)
"""Libraries whose objects cache: what they hold is no state."""
_RANDOM = (random.Random, torch.Generator, np.random.Generator, np.random.RandomState)
_CHANGING = (itertools.count, functools.partial, *_RANDOM)
"""Of libraries' objects those that are something else after each call."""
_SMALL = 10_000
"""So many numbers, or elements of a list, are compared one by one."""


class _Same:
    """Equal to itself only. It keeps nothing alive that can be watched: what is gone is equal to nothing."""

    def __init__(self, value: Any) -> None:
        self._hash = id(value)
        self._get: Callable[[], Any]
        try:
            self._get = weakref.ref(value)
        except TypeError:
            self._get = lambda: value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self._get() is not None and self._get() is other._get()

    def __hash__(self) -> int:
        return self._hash


class Kinds:
    """Gives the kinds of one network's parts, each looked at once; those of the ids `elsewhere` are looked at there."""

    def __init__(self, elsewhere: Iterable[int] = ()) -> None:
        self._known: dict[int, Hashable] = dict.fromkeys(elsewhere, "looked at elsewhere")
        self._kept: list[Any] = []  # so that no id is given twice
        self._n_holding = self._depth = 0

    def of(self, value: Any) -> Hashable:
        """Return what `value` is."""
        if isinstance(value, PLAIN):
            return type(value).__name__, repr(value)
        if id(value) not in self._known:
            self._kept.append(value)
            self._known[id(value)] = "seen", len(self._known)  # where it holds itself
            try:
                self._known[id(value)] = self._look(value)
            except Exception:  # of the objective's own making, or of a library's: a look stops no trial
                self._known[id(value)] = _Same(value)
        return self._known[id(value)]

    def _look(self, value: Any) -> Hashable:
        if isinstance(value, type):
            return self._class(value)
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, types.CodeType):
            return self._code(value)
        if isinstance(value, nn.Module):
            return self._module(value)
        if isinstance(value, Tensor | np.ndarray):
            return _numbers(value)
        return self._held(value)

    def _held(self, value: Any) -> Hashable:
        """Return the kind of what holds others; of many, as the paths of images are, it is itself only."""
        if isinstance(value, list | tuple | dict | set | deque) and len(value) > _SMALL:
            return _Same(value), len(value)
        if isinstance(value, Mapping):
            return type(value).__name__, tuple((self.of(key), self.of(item)) for key, item in value.items())
        if isinstance(value, list | tuple | deque):
            return type(value).__name__, tuple(map(self.of, value))
        if isinstance(value, set | frozenset):
            return type(value).__name__, frozenset(map(self.of, value))
        if isinstance(value, types.MethodType):
            return "method", self.of(value.__func__), self.of(value.__self__)
        if isinstance(value, functools.partial):
            return "partial", self.of(value.func), self.of(value.args), self.of(value.keywords)
        if isinstance(value, staticmethod | classmethod):
            return type(value).__name__, self.of(value.__func__)
        if isinstance(value, property):
            return "property", self.of(value.fget), self.of(value.fset)
        if isinstance(value, functools.cached_property):
            return "cached_property", self.of(value.func)
        if isinstance(value, types.SimpleNamespace):
            return "namespace", self.of(vars(value))
        if is_dataclass(value):
            return self.of(type(value)), tuple(self.of(getattr(value, each.name)) for each in fields(value))
        return self._counting(value)

    def _counting(self, value: Any) -> Hashable:
        """Return the kind of what may count or draw: where it stands is a part of it."""
        if isinstance(value, itertools.count):
            return "count", repr(value)
        if isinstance(value, random.Random) and not isinstance(value, random.SystemRandom):  # which has no state
            return "random", self.of(value.getstate())
        if isinstance(value, np.random.Generator):
            return "generator", self.of(value.bit_generator.state)
        if isinstance(value, np.random.RandomState):
            return "generator", self.of(value.get_state(legacy=False))
        if isinstance(value, torch.Generator):
            return _Same(value), value.get_state().numpy().tobytes()
        self._n_holding += 1
        self._depth += 1
        try:
            own = _attributes_of(value).items()
            return _Same(value), tuple((key, self.of(each)) for key, each in own if self._is_read(value, each))
        finally:
            self._depth -= 1

    def _is_read(self, holder: Any, value: Any) -> bool:
        """Whether what an object holds is looked at: what it may count in, objects of one's own that may, or draw.

        What a library's object holds besides is often a cache, which is filled without changing anything.
        """
        if isinstance(value, PLAIN) or isinstance(holder, types.ModuleType):
            return isinstance(value, PLAIN)
        if isinstance(value, _READ):
            return True
        is_own = type(value).__module__.partition(".")[0] not in KNOWN or isinstance(value, _CHANGING)
        return is_own and self._depth < _DEEP and self._n_holding < _MANY

    def _class(self, cls: type) -> Hashable:
        """Return what a class is: by what is written in it and above it, up to torch's own."""
        if _is_library(cls):
            return _Same(cls)
        own = {name: value for name, value in vars(cls).items() if name not in NOT_READ}
        bases = tuple(map(self.of, cls.__bases__))
        return cls.__module__, cls.__qualname__, bases, tuple((name, self.of(value)) for name, value in own.items())

    def _function(self, function: types.FunctionType) -> Hashable:
        if _is_library(function):
            return _Same(function)
        names = function.__code__.co_freevars
        cells = zip(names, function.__closure__ or (), strict=True)
        closed = tuple((name, self._cell(function.__code__, name, cell)) for name, cell in cells)
        defaults = self.of(function.__defaults__), self.of(function.__kwdefaults__)
        return self.of(function.__code__), closed, defaults, self._globals(function), self.of(function.__dict__)

    def _cell(self, code: types.CodeType, name: str, cell: types.CellType) -> Hashable:
        """Return what a function closes over: of a dict of which it reads some keys only, what these hold."""
        try:
            value = cell.cell_contents
        except ValueError:  # nothing was put into it
            return "empty"
        keys = _keys_read(code, name) if isinstance(value, Mapping) else None
        if keys is None:
            return self.of(value)
        return tuple((key, self.of(value[key]) if key in value else "absent") for key in sorted(keys))

    def _globals(self, function: types.FunctionType) -> Hashable:
        """Return what the globals hold that a function names: functions of other modules are what they are."""
        found = []
        for name in sorted(_names(function.__code__) & function.__globals__.keys()):
            value = function.__globals__[name]
            foreign = isinstance(value, types.FunctionType | type) and value.__module__ != function.__module__
            found.append((name, _Same(value) if foreign else self.of(value)))
        return tuple(found)

    def _code(self, code: types.CodeType) -> Hashable:
        constants = tuple(map(self.of, code.co_consts))
        shape = code.co_flags, code.co_argcount, code.co_kwonlyargcount, code.co_posonlyargcount
        names = code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars
        return code.co_code, code.co_exceptiontable, constants, shape, names

    def _module(self, module: nn.Module) -> Hashable:
        """Return what a module is that is no part of a network's own: with weights it is itself only."""
        if isinstance(module, torch.jit.ScriptModule):  # which has not all attributes of a module
            return _Same(module)
        if any(True for _ in module.parameters()) or any(True for _ in module.buffers()):
            return _Same(module)
        children = tuple((name, self.of(child)) for name, child in module.named_children())
        return self.of(type(module)), self.attributes(module), children, module.training

    def attributes(self, module: nn.Module, left_out: frozenset[str] = frozenset()) -> Hashable:
        """Return a module's own attributes that are no tensors: what its forward may branch on or compute with."""
        self._known[id(module)] = "the module itself"  # of its own methods that it keeps
        self._kept.append(module)
        own = {key: value for key, value in vars(module).items() if key not in NOT_STATE and key not in left_out}
        hooks = {key: list(own.pop(key).values()) for key in HOOKS if key in own}
        own |= {key: value for key, value in hooks.items() if value}
        return tuple((key, self.of(own[key])) for key in sorted(own))


def state_of(value: Any) -> Hashable:
    """Return what an attribute holds now: what is changed in place is something else then."""
    if isinstance(value, PLAIN):
        return repr(value)
    if isinstance(value, Tensor):
        return None if value.is_inference() else value._version
    return Kinds().of(value)


def _attributes_of(value: Any) -> dict[str, Any]:
    """Return what an object has as attributes: its own, in slots too, and of classes that are no library's."""
    found: dict[str, Any] = {}
    for cls in reversed(type(value).__mro__):
        if not _is_library(cls):
            of_class = {key: each for key, each in vars(cls).items() if key not in NOT_READ}
            found |= {key: each for key, each in of_class.items() if isinstance(each, (*PLAIN, *_READ))}
            slots = [key for key, each in of_class.items() if isinstance(each, types.MemberDescriptorType)]
            found |= {key: getattr(value, key) for key in slots if hasattr(value, key)}
    return found | getattr(value, "__dict__", {})


def _is_library(value: Any) -> bool:
    """Whether a class or function is torch's or Python's own: such are there once, and stay as they are.

    A class that a library makes as it goes, for each module whose weight is parametrized, is not found under its name.
    """
    if "<locals>" in value.__qualname__ or str(value.__module__).partition(".")[0] not in _LIBRARIES:
        return False
    if not isinstance(value, type):
        return True
    of_that_name: Any = sys.modules.get(value.__module__)
    for name in value.__qualname__.split("."):
        of_that_name = getattr(of_that_name, name, None)
    return of_that_name is value


def _numbers(value: Tensor | np.ndarray) -> Hashable:
    """Return small constants by value; what is trained, large or elsewhere is itself only."""
    if isinstance(value, Tensor):
        if type(value) is not Tensor or value.requires_grad or value.device.type != "cpu" or value.numel() > _SMALL:
            return _Same(value)
        if torch._C._functorch.is_functorch_wrapped_tensor(value):  # one that a forward has kept: it has no numbers
            return _Same(value)
        return "tensor", tuple(value.shape), value.dtype, repr(value.tolist())
    if value.size > _SMALL or value.dtype == object:
        return _Same(value)
    return "array", value.shape, value.dtype.str, value.tobytes()


def _names(code: types.CodeType) -> set[str]:
    """Return the names that code looks up, functions within it among them."""
    inner = (const for const in code.co_consts if isinstance(const, types.CodeType))
    return set(code.co_names).union(*map(_names, inner))


def _keys_read(code: types.CodeType, name: str) -> set[str] | None:
    """Return the keys that `code` reads of the dict that it closes over as `name`; None where it uses it otherwise."""
    if any(isinstance(const, types.CodeType) and name in const.co_freevars for const in code.co_consts):
        return None
    steps = list(dis.get_instructions(code))
    keys = set()
    for index, step in enumerate(steps):
        if step.argval != name or "DEREF" not in step.opname:
            continue
        after = steps[index + 1 : index + 3]
        reads = [s.opname for s in after] == ["LOAD_CONST", "BINARY_SUBSCR"] and isinstance(after[0].argval, str)
        if step.opname != "LOAD_DEREF" or not reads:
            return None
        keys.add(after[0].argval)
    return keys
