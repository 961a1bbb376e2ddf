"""What an objective is written in: its files, or a notebook's cells, as a fingerprint."""

import ast
import functools
import hashlib
import inspect
import sys
import types
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from hpo.study.objective import Function, Objective

_PLAIN = (type(None), bool, int, float, str)
_MOST = 1_000
"""Of a list or dict of more values than that it is not looked what they are."""
_DEEPEST = 20


def source_fingerprint(objective: Objective | Function) -> str:
    """Return the first 16 hex digits of a SHA-256 over the sources that the objective is written in.

    These are its file, those of the losses that the study names by path, and whatever they import from beside them; of
    what is written in a notebook, the functions and classes themselves, those that they name, and plain values.
    """
    own: list[Any] = [type(objective), *objective.own_losses.values()] if isinstance(objective, Objective) else []
    own += [called(objective.call)] if isinstance(objective, Function) else []
    sources = _Sources()
    for each in own:
        if not sources.add_file(each):
            sources.add(each)
    content = "".join(sources.texts).encode() + b"".join(file.read_bytes() for file in sorted(sources.files))
    return hashlib.sha256(content).hexdigest()[:16]


@dataclass(kw_only=True)
class _Sources:
    """Gathers what something is written in."""

    files: set[Path] = field(default_factory=set)
    texts: list[str] = field(default_factory=list)
    """Of what is in no file."""
    _seen: set[int] = field(default_factory=set)

    def add_file(self, found: Any) -> bool:
        """Add the file that a function or class is written in, and what that imports; return whether there is one."""
        with suppress(TypeError, OSError):
            file = Path(inspect.getsourcefile(found) or "")
            if file.is_file():
                _gather(file, self.files)
                return True
        return False

    def add(self, found: Any) -> None:
        """Add a function or class of a notebook, or of a file beside it; a callable object has no source of its own."""
        if id(found) in self._seen:
            return
        self._seen.add(id(found))
        found = inspect.unwrap(found) if callable(found) else found
        if not isinstance(found, types.FunctionType | type):
            return
        module = sys.modules.get(str(found.__module__))
        file = getattr(module, "__file__", None)
        file = file if file is not None and Path(file).is_file() else None  # "<stdin>" is none
        if file is not None and Path(file).absolute().parent == Path.cwd():
            self.add_file(found)
        elif file is None and getattr(module, "__spec__", None) is None:
            self._add_class(found) if isinstance(found, type) else self._add_function(found)

    def _add_class(self, cls: type) -> None:
        for name, value in sorted(vars(cls).items()):
            within = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
            if isinstance(within, types.FunctionType | type):
                self.add(within)
            elif not name.startswith("__") and is_plain(value):
                self.texts.append(f"{name}={value!r}")
        for base in cls.__bases__:
            self.add(base)

    def _add_function(self, function: types.FunctionType) -> None:
        try:
            self.texts.append(inspect.getsource(function))
        except (OSError, TypeError):  # it was compiled from a text that is gone
            self.texts.append(code_text(function))
        names = {name for each in codes_of(function.__code__) for name in each.co_names}
        for name in sorted(names & function.__globals__.keys()):
            value = function.__globals__[name]
            if isinstance(value, types.FunctionType | type):
                self.add(value)
            elif is_plain(value):
                self.texts.append(f"{name}={value!r}")
        for name, value in closed_over(function).items():
            if isinstance(value, types.FunctionType | type):
                self.add(value)
            elif is_plain(value):
                self.texts.append(f"{name}={value!r}")


def code_text(function: types.FunctionType) -> str:
    """Return what a function does, as text."""
    codes = codes_of(function.__code__)
    return " ".join(f"{c.co_code.hex()} {c.co_names} {list(filter(is_plain, c.co_consts))}" for c in codes)


def closed_over(function: types.FunctionType) -> dict[str, Any]:
    """Return what a function closes over, by name; of a method not its own class."""
    found = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with suppress(ValueError):  # nothing was put into it yet
            found[name] = cell.cell_contents
    return {name: value for name, value in found.items() if name != "__class__"}


def codes_of(code: types.CodeType) -> Iterator[types.CodeType]:
    """Give a code, and those of the functions within it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from codes_of(constant)


def called(call: Any) -> Any:
    """Return the function or class that a callable runs: that of a partial, of a method, of an object."""
    while isinstance(call, functools.partial):
        call = call.func
    if isinstance(call, types.MethodType):
        return call.__func__
    return call if isinstance(call, types.FunctionType | type) else type(call)


def digest(text: str) -> str:
    """Return the first 16 hex digits of a text's SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def is_plain(value: Any, depth: int = 0) -> bool:
    """Whether a value's `repr` says all of it; one that holds itself is none."""
    if type(value) in _PLAIN:
        return True
    parts: list[Any]
    if isinstance(value, list | tuple):
        parts = list(value)
    elif isinstance(value, dict):
        parts = [*value.keys(), *value.values()]
    elif is_dataclass(value) and not isinstance(value, type):
        parts = [getattr(value, each.name, None) for each in fields(value)]
    else:
        return False
    return depth < _DEEPEST and len(parts) <= _MOST and all(is_plain(each, depth + 1) for each in parts)


def file_fingerprint(objective: Objective | Function) -> str:
    """Return what an older version stored as `source_fingerprint`: of the objective's own file alone."""
    file = source_file(objective)
    return hashlib.sha256(file.read_bytes() if file else b"").hexdigest()[:16]


def source_file(objective: Objective | Function) -> Path | None:
    """Return the file that the objective is written in; None: a notebook's cell, or a callable object."""
    with suppress(TypeError, OSError):
        file = inspect.getsourcefile(called(objective.call) if isinstance(objective, Function) else type(objective))
        return Path(file) if file and Path(file).is_file() else None
    return None


def _gather(file: Path, files: set[Path]) -> None:
    """Add a source file to `files`, and those that it imports from its own folder, or from its own package."""
    if file in files or not file.is_file():
        return
    files.add(file)
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{name}" if node.module else name for name in names)]
        for name in names:
            parts = name.rpartition(f"{file.parent.name}.")[2].split(".")  # hpo.objectives.models: models
            beside = file.parent.joinpath(*parts)
            for candidate in (beside.with_suffix(".py"), beside / "__init__.py"):
                _gather(candidate, files)
