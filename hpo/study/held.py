"""What an objective holds beside its code, as digests: another process, or a later run, may hold something else."""

import functools
import sys
import types
from collections.abc import Mapping
from typing import Any

from hpo.study.contents import functions_in, globals_of, is_bare, set_by, stored_by, text_of
from hpo.study.objective import Function, Objective
from hpo.study.sources import called, closed_over, code_text, digest, is_plain

_GIVEN = "."
"""Before the name of what the objective's own methods never set: whoever made it has. By itself, that such names are
there: an earlier version had none, and left out what is no plain value."""
_FORM = ":form"
"""Which form the digests have that have `_LOOKED_INTO` before them: it says so beside them, and no attribute is called
that. An earlier version had none, and other digests of all but bare values."""
_LOOKED_INTO = "~"
_ITS_CODE = f":code on Python {sys.version_info.major}.{sys.version_info.minor}"
"""The code of what no file defines by a name; each version of Python compiles it otherwise."""
_NOT_ITS_OWN = ("options", "info", "own_losses")
"""What the engine sets, and the options, which are a part of the study."""
_CODE = (types.FunctionType, property, classmethod, staticmethod, functools.cached_property)


def held(objective: Objective | Function) -> dict[str, str]:
    """Return digests of the values and functions that an objective and its class hold, by their names.

    An instance that a program made may hold others than one that is made by its class and its options. So may a class
    that is made in a function: what its methods close over is among them, and the globals that they read. Of a value
    that cannot be looked into it is its type alone. Digests, since a value may be a password.
    """
    code = {_ITS_CODE: digest(text)} if (text := _unnamed_code(objective)) else {}
    if isinstance(objective, Function):
        return _digests(_held_by(objective.call), set_by(_object_of(objective.call))) | code
    several: dict[str, Any] = {}
    for cls in reversed(type(objective).__mro__[: type(objective).__mro__.index(Objective)]):
        several |= {name: value for name, value in vars(cls).items() if not name.startswith("__")}
    functions = {name: each for name, value in several.items() for each in functions_in(value)}
    several = {name: value for name, value in several.items() if not isinstance(value, _CODE)}  # a part of the source
    for name, function in functions.items():
        several |= {f"{name}: {key}": each for key, each in closed_over(function).items()}
        several |= globals_of(function)
    several |= vars(objective)
    return _digests({k: v for k, v in several.items() if k not in _NOT_ITS_OWN}, set_by(type(objective))) | code


def what_differs_unnamed(objective: Objective | Function, now: Mapping[str, str], before: Mapping[str, str]) -> str:
    """Return in what an objective that no name tells from others is another than that of `before`; nothing: in nothing.

    A lambda, a partial, an object that is called, what is made within a function: a study may have its name by chance,
    as in a loop that makes one after the other. `now` and `before` are what `held` gives. Beside the code only numbers
    and texts that it was made with are compared: anything else may change as it is called.
    """
    if now.get(_ITS_CODE) != before.get(_ITS_CODE, now.get(_ITS_CODE)):
        return "code"
    if not isinstance(objective, Function) or (objective.call is called(objective.call) and _ITS_CODE not in now):
        return ""  # a class says what it is made with by its options, and a function has its name
    function = called(objective.call)
    set_again = stored_by(function, "STORE_DEREF") if isinstance(function, types.FunctionType) else set()
    made_with = {
        name for name, value in _held_by(objective.call).items() if isinstance(value, bool | int | float | str)
    }
    names = [n for n in other_values(now, before) if n in made_with - set_again and f"{_GIVEN}{n}" in now]
    return f"value of {', '.join(names)}" if names else ""


def _unnamed_code(objective: Objective | Function) -> str:
    """Return the code of an objective that was made within a function, or is a lambda; nothing: it is another one."""
    what = called(objective.call) if isinstance(objective, Function) else type(objective)
    if "<" not in what.__qualname__:
        return ""
    if isinstance(what, types.FunctionType):
        return code_text(what)
    return " ".join(code_text(function) for value in vars(what).values() for function in functions_in(value))


def other_values(objective: Mapping[str, str], before: Mapping[str, str]) -> list[str]:
    """Return the names of what is something else than `before`, by what `held` has returned then and now.

    What one has and the other has not is that, too, unless the objective's own methods set it: it may be a cache.
    """
    names = {name for name in objective if _in_any_form(name, before) is not None}
    if _GIVEN in before:
        names |= {name for name in objective.keys() ^ before.keys() if name.startswith(_GIVEN)}
    if not of_one_form(objective, before):
        names = {name for name in names if not objective.get(name, "").startswith(_LOOKED_INTO)} - {_FORM}
    others = [name for name in names - {_ITS_CODE} if objective.get(name) != _in_any_form(name, before)]
    return sorted({name.removeprefix(_GIVEN) for name in others})


def of_one_form(several: Mapping[str, str], others: Mapping[str, str]) -> bool:
    """Whether two versions that made digests of the same value made the same of it; of bare values they did."""
    return several.get(_FORM) == others.get(_FORM)


def _in_any_form(name: str, before: Mapping[str, str]) -> str | None:
    """Return what `before` has of a name; an earlier version had all without the mark."""
    return before.get(name) if _GIVEN in before else before.get(name.removeprefix(_GIVEN))


def _object_of(call: Any) -> type:
    """Return the class of the object whose attributes a callable may set when it is called."""
    while isinstance(call, functools.partial):
        call = call.func
    return type(call.__self__ if isinstance(call, types.MethodType) else call)


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
    return {**defaults, **(call.__kwdefaults__ or {}), **closed_over(call), **globals_of(call)}


def _digests(several: Mapping[str, Any], set_by_itself: set[str]) -> dict[str, str]:
    """Return the digests of values by name; those that are not set by the objective's own methods are marked.

    Of those that are, and of what has an underscore before its name, only plain values are looked at: a cache is empty
    at first, and holds a table then.
    """
    found = {_GIVEN: "", _FORM: "v2"}
    for name, value in several.items():
        if name not in set_by_itself and not name.startswith("_"):
            mark = "" if ":" in name or name.startswith("global ") else _GIVEN
            found[f"{mark}{name}"] = _digest(value)
        elif isinstance(value, types.FunctionType) or is_plain(value):
            found[name] = _digest(value)
    return found


def _digest(value: Any) -> str:
    return f"{'' if is_bare(value) else _LOOKED_INTO}{digest(text_of(value))}"
