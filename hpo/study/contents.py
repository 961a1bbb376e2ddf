"""What a value is, as a text that is the same in every process: no address is in it, and no order of a set."""

import dataclasses
import datetime
import dis
import enum
import fractions
import functools
import hashlib
import inspect
import os
import sys
import types
from collections.abc import Iterator
from contextlib import suppress
from decimal import Decimal
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from torch import nn

from hpo.study.sources import closed_over, code_text, codes_of, digest, is_plain

_MOST_BYTES, _MOST_VALUES = 1 << 26, 100_000
_BARE = (type(None), bool, int, float, str)
_READABLE = (
    *(complex, bytes, bytearray, range, type(Ellipsis), datetime.timedelta, Decimal, fractions.Fraction),
    *(torch.dtype, torch.device, np.dtype, np.generic),
)
"""What its `repr` says all of, beside bare values. Dates are none of these: most are when something was made."""
_NAMED = (type, types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType, np.ufunc)
"""What its name says all of: classes, and functions that are not written in Python."""
_TORCHS_OWN = frozenset(vars(nn.Module()))
"""Of a module: hooks, whether it trains, and its parameters, buffers and modules, which are looked at by themselves."""
_Known = dict[int, tuple[Any, str]]


def text_of(value: Any, known: _Known | None = None) -> str:
    """Return a text that says what a value is; of what cannot be looked into its type.

    `known` has the texts of what it is in (their types alone) and of what was looked into, by their ids.
    """
    if is_bare(value):
        return repr(value)
    known = {} if known is None else known
    if id(value) not in known:
        kind = type(value).__qualname__  # its module is `__main__` here, and has a name in a worker
        known[id(value)] = value, kind  # the value, too: another would get its id where it is gone
        with suppress(Exception):  # of its own making
            known[id(value)] = value, _text(value, kind, known)
    return known[id(value)][1]


def is_bare(value: Any, depth: int = 0) -> bool:
    """Whether a value is plain, and so are the lists, tuples and dicts that it is made of: no class of its own."""
    if type(value) in _BARE:
        return True
    if type(value) not in (list, tuple, dict) or len(value) > 1_000 or depth >= 20:
        return False
    return all(is_bare(part, depth + 1) for part in _parts(value) or ())


def set_by(cls: type) -> set[str]:
    """Return the names of the attributes that a class's methods set, but for `__init__`: they may be caches."""
    names = set()
    for each in cls.__mro__:
        for name, value in vars(each).items():
            if isinstance(value, functools.cached_property):
                names.add(name)
            if name != "__init__":
                names |= {stored for function in functions_in(value) for stored in stored_by(function, "STORE_ATTR")}
    return names


def functions_in(value: Any) -> Iterator[types.FunctionType]:
    """Give the functions that an attribute of a class runs."""
    parts = (getattr(value, name, None) for name in ("fget", "fset", "func", "__func__"))
    found = (inspect.unwrap(each) for each in (value, *parts) if isinstance(each, types.FunctionType))
    yield from (each for each in found if isinstance(each, types.FunctionType))


def stored_by(function: types.FunctionType, operation: str) -> set[str]:
    """Return the names that a function sets by that operation of the bytecode."""
    codes = codes_of(function.__code__)
    return {each.argval for code in codes for each in dis.get_instructions(code) if each.opname == operation}


def globals_of(function: types.FunctionType) -> dict[str, Any]:
    """Return the plain values and arrays of its module that a function reads, by name, and does not set itself.

    Of `__name__`, `__file__` and their like Python says where the module is: that is another in a worker of a script.
    So are paths within the module's folder: they are given relative to it. None of what the module's functions set is
    left out: they have not yet.
    """
    read = {name for code in codes_of(function.__code__) for name in code.co_names} & function.__globals__.keys()
    names = {name for name in read if not (name.startswith("__") and name.endswith("__"))}
    found = {name: function.__globals__[name] for name in names - stored_by(function, "STORE_GLOBAL")}
    found = {name: value for name, value in found.items() if _is_constant(value)}
    unset = {name for name, value in found.items() if value is None}
    if unset:
        unset &= _set_in(function.__globals__)
    file = function.__globals__.get("__file__")
    return {f"global {name}": _placed(x, file) for name, x in found.items() if name not in unset}


def _is_constant(value: Any) -> bool:
    """Whether a module's value is to be looked at: a list or a dict may be a cache."""
    if isinstance(value, bool | int | float | str | torch.Tensor | np.ndarray | None):
        return True
    return type(value) in (tuple, frozenset) and all(is_bare(each) for each in value)


def _set_in(names: dict[str, Any]) -> set[str]:
    """Return the names of a module's globals that its functions and methods set."""
    several = [each for each in list(names.values()) if isinstance(each, types.FunctionType | type)]
    parts = [part for each in several for part in (vars(each).values() if isinstance(each, type) else [each])]
    functions = [each for part in parts for each in functions_in(part) if each.__globals__ is names]
    return {name for each in functions for name in stored_by(each, "STORE_GLOBAL")}


def _placed(value: Any, file: Any) -> Any:
    """Return a value of the module in `file`; a path in its folder relative to that, as it is where that was moved."""
    if isinstance(value, str) and isinstance(file, str) and os.path.isabs(value):
        folder = os.path.dirname(os.path.abspath(file))
        if folder == os.path.commonpath([folder, os.path.abspath(value)]):
            return PurePath(os.path.relpath(value, folder))
    return value


def _text(value: Any, kind: str, known: _Known) -> str:
    if isinstance(value, torch.Tensor):
        return f"{kind} {_of_tensor(value)}"
    if isinstance(value, np.ndarray):
        return f"{kind} {value.shape} {value.dtype} {_of_array(value, known)}"
    if isinstance(value, types.FunctionType):
        return _of_function(value, known)
    if isinstance(value, _NAMED):
        return f"{kind} {_name(value)}"
    if isinstance(value, PurePath):
        return f"Path {value.as_posix()}"
    if isinstance(value, _READABLE):
        text = repr(value)
        return kind if " at 0x" in text else f"{kind} {text}"
    parts = _parts(value)
    if parts is None:
        return kind
    return f"{kind} {_of_parts(parts, known, in_order=not isinstance(value, set | frozenset))}"


def _parts(value: Any) -> list[Any] | None:
    """Return what a value is made of; None: it cannot be looked into."""
    if isinstance(value, nn.Module):
        return [*_of_module(value).items()]
    if isinstance(value, enum.Enum):
        return [value.name, value.value]
    if isinstance(value, dict):
        return [part for pair in value.items() for part in pair]
    if isinstance(value, list | tuple | set | frozenset):
        return [*value]
    if isinstance(value, slice):
        return [value.start, value.stop, value.step]
    if isinstance(value, types.MethodType):
        return [value.__func__, value.__self__]
    if isinstance(value, functools.partial):
        return [value.func, value.args, value.keywords]
    if dataclasses.is_dataclass(value):
        return [(each.name, getattr(value, each.name, None)) for each in dataclasses.fields(value)]
    return _of_frame(value)


def _of_parts(parts: list[Any], known: _Known, *, in_order: bool = True) -> str:
    if len(parts) > _MOST_VALUES:
        return str(len(parts))
    texts = [digest(text_of(part, known)) for part in parts]
    return str(texts if in_order else sorted(texts))


def _name(value: Any) -> str:
    """Return the name of a class or a function, with the module of a library's; another's is `__main__` at times."""
    module = getattr(value, "__module__", None) or ""
    name = str(getattr(value, "__qualname__", None) or value.__name__)
    return f"{module}.{name}" if _is_library(module) else name


def _is_library(module: str) -> bool:
    top = module.partition(".")[0]
    if top in ("hpo", *sys.stdlib_module_names):
        return top != "__main__"
    file = getattr(sys.modules.get(module), "__file__", None) or ""
    return not {"site-packages", "dist-packages"}.isdisjoint(Path(file).parts)


def _of_function(function: types.FunctionType, known: _Known) -> str:
    """Return what a function does and holds; of a library's its name, which another Python has, too."""
    if _is_library(function.__module__ or "") and "<" not in function.__qualname__:
        return _name(function)
    constants = [each for code in codes_of(function.__code__) for each in code.co_consts]
    others = [each for each in constants if not (isinstance(each, types.CodeType) or is_plain(each))]
    holds = [others, function.__defaults__, function.__kwdefaults__, closed_over(function), globals_of(function)]
    return code_text(function) + _of_parts(holds, known)


def _of_module(module: nn.Module) -> dict[str, Any]:
    """Return what a module consists of by name: of what its methods set, and has an underscore, only plain values."""
    maybe_caches = set_by(type(module))
    parts: dict[str, Any] = {}
    for name, value in sorted(vars(module).items()):
        if name in _TORCHS_OWN or (name.startswith("_") and _is_library(type(module).__module__)):
            continue
        if is_plain(value) or not (name in maybe_caches or name.startswith("_")):
            parts[name] = value
    return parts | {name: getattr(module, name) for name in ("_parameters", "_buffers", "_modules")}


def _of_tensor(x: torch.Tensor) -> str:
    x = x.detach()
    if x.layout != torch.strided:
        found = x.to_sparse().coalesce()
        return f"{tuple(x.shape)} {x.layout} {_of_tensor(found.indices())} {_of_tensor(found.values())}"
    if x.is_meta:
        return f"{tuple(x.shape)} {x.dtype}"
    flat = x.resolve_conj().resolve_neg().cpu().reshape(-1)
    return f"{tuple(x.shape)} {x.dtype} {_of_bytes(_some(flat).contiguous().view(torch.uint8).numpy())}"


def _of_array(x: np.ndarray, known: _Known) -> str:
    if not x.dtype.hasobject and x.dtype.kind != "T":
        return _of_bytes(_some(np.ascontiguousarray(x).reshape(-1)))
    several = x.reshape(-1).tolist()
    if all(type(each) in _BARE for each in several):
        return digest(repr(several))
    return _of_parts(several, known)


def _some(flat: Any) -> Any:
    """Return all of a flat tensor or array; of a very large one every so many of its numbers."""
    size = flat.numel() * flat.element_size() if isinstance(flat, torch.Tensor) else flat.nbytes
    return flat[:: max(1, -(-size // _MOST_BYTES))]


def _of_bytes(x: np.ndarray) -> str:
    return hashlib.sha256(x.tobytes()).hexdigest()


def _of_frame(value: Any) -> list[Any] | None:
    """Return what a pandas table, column or index holds; None of all else. It imports no pandas."""
    pandas = sys.modules.get("pandas")
    if pandas is None:
        return None
    if isinstance(value, pandas.Index):
        return [list(value.names), np.asarray(value)]
    if isinstance(value, pandas.Series):
        return [value.name, str(value.dtype), value.index, np.asarray(value)]
    if isinstance(value, pandas.DataFrame):
        return [value.columns, value.index, *(value.iloc[:, place] for place in range(value.shape[1]))]
    return None
