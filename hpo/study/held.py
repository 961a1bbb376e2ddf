"""What an objective holds beside its code, as digests: another process, or a later run, may hold something else."""

import dis
import functools
import hashlib
import inspect
import types
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from hpo.study.objective import Function, Objective
from hpo.study.sources import closed_over, code_text, codes_of, digest, is_plain

_GIVEN = "."
"""Before the name of what the objective's own methods never set: whoever made it has. By itself, that such names are
there: an earlier version had none, and left out what is no plain value."""
_NOT_ITS_OWN = ("options", "info", "own_losses")
"""What the engine sets, and the options, which are a part of the study."""
_MOST_BYTES, _MOST_VALUES = 1 << 26, 100_000
_CODE = (types.FunctionType, property, classmethod, staticmethod, functools.cached_property)


def held(objective: Objective | Function) -> dict[str, str]:
    """Return digests of the values and functions that an objective and its class hold, by their names.

    An instance that a program made may hold others than one that is made by its class and its options. So may a class
    that is made in a function: what its methods close over is among them, and the globals that they read. Of a value
    that cannot be looked into it is its type alone. Digests, since a value may be a password.
    """
    if isinstance(objective, Function):
        return _digests(_held_by(objective.call), _set_by(_object_of(objective.call)))
    several: dict[str, Any] = {}
    for cls in reversed(type(objective).__mro__[: type(objective).__mro__.index(Objective)]):
        several |= {name: value for name, value in vars(cls).items() if not name.startswith("__")}
    functions = {name: each for name, value in several.items() for each in _functions_in(value)}
    several = {name: value for name, value in several.items() if not isinstance(value, _CODE)}  # a part of the source
    for name, function in functions.items():
        several |= {f"{name}: {key}": each for key, each in closed_over(function).items()}
        several |= _globals_of(function)
    several |= vars(objective)
    return _digests({k: v for k, v in several.items() if k not in _NOT_ITS_OWN}, _set_by(type(objective)))


def other_values(objective: Mapping[str, str], before: Mapping[str, str]) -> list[str]:
    """Return the names of what is something else than `before`, by what `held` has returned then and now.

    What one has and the other has not is that, too, unless the objective's own methods set it: it may be a cache.
    """
    names = {name for name in objective if _in_any_form(name, before) is not None}
    if _GIVEN in before:
        names |= {name for name in objective.keys() ^ before.keys() if name.startswith(_GIVEN)}
    others = [name for name in names if objective.get(name) != _in_any_form(name, before)]
    return sorted({name.removeprefix(_GIVEN) for name in others})


def _in_any_form(name: str, before: Mapping[str, str]) -> str | None:
    """Return what `before` has of a name; an earlier version had all without the mark."""
    return before.get(name) if _GIVEN in before else before.get(name.removeprefix(_GIVEN))


def _object_of(call: Any) -> type:
    """Return the class of the object whose attributes a callable may set when it is called."""
    while isinstance(call, functools.partial):
        call = call.func
    return type(call.__self__ if isinstance(call, types.MethodType) else call)


def _set_by(cls: type) -> set[str]:
    """Return the names of the attributes that a class's methods set, but for `__init__`: they may be caches."""
    names = set()
    for each in cls.__mro__:
        for name, value in vars(each).items():
            if isinstance(value, functools.cached_property):
                names.add(name)
            if name != "__init__":
                names |= {stored for function in _functions_in(value) for stored in _stored(function, "STORE_ATTR")}
    return names


def _functions_in(value: Any) -> Iterator[types.FunctionType]:
    """Give the functions that an attribute of a class runs."""
    parts = (getattr(value, name, None) for name in ("fget", "fset", "func", "__func__"))
    found = (inspect.unwrap(each) for each in (value, *parts) if isinstance(each, types.FunctionType))
    yield from (each for each in found if isinstance(each, types.FunctionType))


def _stored(function: types.FunctionType, operation: str) -> set[str]:
    codes = codes_of(function.__code__)
    return {each.argval for code in codes for each in dis.get_instructions(code) if each.opname == operation}


def _globals_of(function: types.FunctionType) -> dict[str, Any]:
    """Return the numbers, texts and arrays of its module that a function reads, by name, and does not set itself."""
    names = {name for code in codes_of(function.__code__) for name in code.co_names}
    found = {name: function.__globals__.get(name) for name in names - _stored(function, "STORE_GLOBAL")}
    kinds = (bool, int, float, str, torch.Tensor, np.ndarray)  # a list or a dict may be a cache
    return {f"global {name}": x for name, x in found.items() if isinstance(x, kinds)}


def _held_by(call: Any) -> dict[str, Any]:
    """Return what a callable has beside its code, by name: arguments that are given, an object's attributes, defaults,
    what it closes over, numbers, texts and arrays of its module."""
    if isinstance(call, functools.partial):
        given = {f"argument {place}": value for place, value in enumerate(call.args, 1)}
        return {**_held_by(call.func), **given, **call.keywords}
    if isinstance(call, types.MethodType):
        return {**_held_by(call.__func__), **getattr(call.__self__, "__dict__", {})}
    if not isinstance(call, types.FunctionType):
        return dict(getattr(call, "__dict__", {}))
    defaults = {f"default {place}": value for place, value in enumerate(call.__defaults__ or (), 1)}
    return {**defaults, **(call.__kwdefaults__ or {}), **closed_over(call), **_globals_of(call)}


def _digests(several: Mapping[str, Any], set_by_itself: set[str]) -> dict[str, str]:
    """Return the digests of values by name; those that are not set by the objective's own methods are marked.

    Of those that are, and of what has an underscore before its name, only plain values are looked at: a cache is empty
    at first, and holds a table then.
    """
    found = {_GIVEN: ""}
    for name, value in several.items():
        if name not in set_by_itself and not name.startswith("_"):
            mark = "" if ":" in name or name.startswith("global ") else _GIVEN
            found[f"{mark}{name}"] = digest(_text_of(value))
        elif isinstance(value, types.FunctionType) or is_plain(value):
            found[name] = digest(_text_of(value))
    return found


def _text_of(value: Any, known: dict[int, str] | None = None) -> str:
    """Return a text that says what a value is; of what cannot be looked into its type.

    `known` has the texts of the containers that it is in (their types alone) and that were looked into, by their ids.
    """
    known = {} if known is None else known
    kind = type(value).__qualname__  # its module is `__main__` here, and has a name in a worker
    try:
        if isinstance(value, types.FunctionType):
            return code_text(value) + repr({key: x for key, x in closed_over(value).items() if is_plain(x)})
        if isinstance(value, torch.Tensor | np.ndarray):
            return f"{kind} {_of_numbers(value)}"
        if isinstance(value, nn.Module):
            return f"{value!r} {[(name, _of_numbers(each)) for name, each in value.state_dict().items()]}"
        if is_plain(value) or isinstance(value, np.generic):
            return repr(value)
        if isinstance(value, list | tuple | dict | set | frozenset):
            parts = [part for pair in value.items() for part in pair] if isinstance(value, dict) else [*value]
            if len(parts) > _MOST_VALUES:
                return f"{kind} {len(parts)}"
            if id(value) not in known:
                known[id(value)] = kind
                texts = [digest(_text_of(part, known)) for part in parts]
                known[id(value)] = f"{kind} {sorted(texts) if isinstance(value, set | frozenset) else texts}"
            return known[id(value)]
    except Exception:  # of a `__repr__` of its own
        pass
    return kind


def _of_numbers(x: Any) -> str:
    """Return the shape, type and a digest of the numbers of a tensor or an array; of a very large one of some."""
    array = x.detach().cpu() if isinstance(x, torch.Tensor) else torch.from_numpy(np.ascontiguousarray(x))
    flat = array.reshape(-1)
    every = -(-flat.numel() * flat.element_size() // _MOST_BYTES)
    some = flat[:: max(1, every)].contiguous().view(torch.uint8).numpy()
    return f"{tuple(array.shape)} {array.dtype} {hashlib.sha256(some.tobytes()).hexdigest()}"
