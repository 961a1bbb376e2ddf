"""What a study file that comes out of a storage may make a worker do, and what it lacks.

Whoever can write the storage can write that file: it names code to import (the objective, a loss), so a worker runs it
only where its user names the same code, or trusts the storage. Passwords and variables are not stored with it.
"""

from collections.abc import Collection, Iterator, Mapping
from pathlib import PurePath
from typing import Any

from hpo.errors import Fault, InputError
from hpo.study.document import Document
from hpo.study.ranges import Categorical
from hpo.study.spec import StudySpec
from hpo.study.yaml_values import dotted

_LOCAL = str(StudySpec.model_fields["tracking"].default)
"""Where a worker tracks that is told nothing: a file below its own folder."""


def code_references(spec: StudySpec) -> list[tuple[tuple[str, ...], str]]:
    """Return what a study has imported, each with its place: the objective, and losses by import path."""
    loss = spec.params.get("loss")
    losses = loss.choices if isinstance(loss, Categorical) else [loss]
    named = [(("params", "loss"), each) for each in losses if isinstance(each, str) and ":" in each]
    return [(("objective",), spec.objective), *named]


def unnamed_code(spec: StudySpec, document: Document, named: Collection[str]) -> list[Fault]:
    """Return a fault for all code that is neither among the `named` nor set by an override."""
    faults = []
    for path, code in code_references(spec):
        is_set = any(path[:end] in document.overridden for end in range(1, len(path) + 1))
        if code not in named and not is_set:
            message = (
                f"the storage names code to run, {code}, and whoever can write the storage chooses it; name it too "
                f"(--objective {code}) if you have that code here, or pass --trust-storage"
            )
            faults.append(Fault(path=path, message=message))
    return faults


def require_harmless(study: str, values: Mapping[str, Any], overrides: Collection[str]) -> None:
    """Raise InputError where a stored study file sends or reads what its writer should not choose.

    That is a tracking address, which gets the worker's credentials, a folder to write to outside of the worker's own,
    and environment variables outside of `options`.
    """
    for path, value in _not_given(values, overrides):
        if path[0] == "options":
            continue
        if path[0] == "tracking" and value not in (None, False, "off", _LOCAL):
            raise InputError(
                f"study {study!r}: the storage names the tracking address {value!r}; repeat it with --tracking, give "
                "another one (or off), or pass --trust-storage"
            )
        if path[0] == "output" and not _is_inside(value):
            raise InputError(
                f"study {study!r}: the storage names the folder {value!r} to write to; give one with --set output=, or "
                "pass --trust-storage"
            )
        if isinstance(value, str) and "${" in value:
            raise InputError(
                f"study {study!r}: the storage asks for this machine's variables in {dotted(path)}, {value!r}; give it "
                f"with {_option(path)}, or pass --trust-storage"
            )


def _is_inside(folder: Any) -> bool:
    """Whether a folder is below the working folder."""
    path = PurePath(str(folder))
    return not path.is_absolute() and ".." not in path.parts


def require_passwords(study: str, values: Mapping[str, Any], overrides: Collection[str]) -> None:
    """Raise InputError where a stored address has lost its password, and no override gives it."""
    for path, value in _not_given(values, overrides):
        if isinstance(value, str) and (":***@" in value or "=***" in value):
            raise InputError(
                f"study {study!r}: {dotted(path)} is {value!r}: a password is not kept in the storage; give the whole "
                f"with {_option(path)}, or write ${{NAME}} for the password in the study file and set NAME here"
            )


def _option(path: tuple[str | int, ...]) -> str:
    """Return how a user gives the value at `path`."""
    return f"--{path[0]}" if path in (("tracking",), ("storage",)) else f"--set {dotted(path)}="


def _not_given(values: Mapping[str, Any], overrides: Collection[str]) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """Yield each plain value with its path, but for those that an override gives."""
    given = [tuple(key.split(".")) for key in overrides]
    for path, value in _leaves(values, ()):
        if not any(path[: len(key)] == key for key in given):
            yield path, value


def _leaves(value: Any, path: tuple[str | int, ...]) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        yield path, value
        return
    for key, item in items:
        yield from _leaves(item, (*path, key))
