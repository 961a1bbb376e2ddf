"""What a study file that comes out of a storage may make a worker do, and what it lacks.

Whoever can write the storage can write that file: it names code to import (the objective, a loss), so a worker runs it
only where its user names the same code, or trusts the storage. Passwords and variables are not stored with it.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from hpo.document import dotted
from hpo.errors import InputError


def code_references(values: Mapping[str, Any]) -> list[str]:
    """Return what a study file's `values` have imported: the objective, and losses by import path."""
    params = values.get("params")
    loss = params.get("loss") if isinstance(params, Mapping) else None
    losses = loss.get("choices", []) if isinstance(loss, Mapping) else [loss]
    named = [each for each in losses if isinstance(each, str) and ":" in each] if isinstance(losses, list) else []
    return [str(values.get("objective")), *named]


def require_named(study: str, values: Mapping[str, Any], overrides: Mapping[str, str], named: Collection[str]) -> None:
    """Raise InputError unless all code of a stored study file is among the `named`, or set by `overrides`."""
    references = code_references(values)
    unnamed = references[1:] if "objective" in overrides else references
    unnamed = unnamed[:1] if "params.loss" in overrides else unnamed
    if foreign := [each for each in unnamed if each not in named and each != "None"]:
        wanted = " ".join(f"--objective {each}" for each in foreign)
        raise InputError(
            f"study {study!r}: the storage names code to run, {', '.join(foreign)}, and whoever can write the storage "
            f"chooses it; name it too ({wanted}) if you have that code here, or pass --trust-storage"
        )


def require_passwords(study: str, values: Mapping[str, Any], overrides: Collection[str]) -> None:
    """Raise InputError where a stored address has lost its password, and no override gives it."""
    given = {tuple(key.split(".")) for key in overrides}
    for path, value in _leaves(values, ()):
        set_here = any(path[: len(key)] == key for key in given)
        if isinstance(value, str) and not set_here and (":***@" in value or "=***" in value):
            name = dotted(path)
            option = f"--{name}" if name in ("tracking", "storage") else f"--set {name}="
            raise InputError(
                f"study {study!r}: {name} is {value!r}: a password is not kept in the storage; give the whole with "
                f"{option}, or write ${{NAME}} for the password in the study file and set NAME here"
            )


def _leaves(value: Any, path: tuple[str | int, ...]) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        yield path, value
        return
    for key, item in items:
        yield from _leaves(item, (*path, key))
