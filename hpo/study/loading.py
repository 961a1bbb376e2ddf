"""An objective found by name, import path or file, and made with its options."""

import importlib
import importlib.util
import inspect
import sys
import sysconfig
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from types import MethodType, ModuleType
from typing import Any, cast

from hpo.errors import Fault, Faulty, collecting, did_you_mean, said
from hpo.light import lightly
from hpo.study import catalog, losses
from hpo.study.checking import validate
from hpo.study.objective import Function, Objective

_AT = ("objective",)
_CALLED_WITH: Mapping[str, Sequence[str]] = {
    "data": (),
    "build": ("params", "info"),
    "loss": ("outputs", "targets", "params"),
    "metrics": (),
    "train": ("params", "report"),
    "preview": ("params", "report"),
    "preprocess": ("train",),
    "about": (),
    "head": (),
}
"""What the engine gives each method of an objective, in that order; `train` may take `resume` besides."""


def load(where: str, options: Mapping[str, Any], folder: Path) -> tuple[Objective | Function | None, list[Fault]]:
    """Return what `where` names, an objective made with `options` or a function, or the faults that keep it from that.

    `where` is one of hpo's own (`hpo objectives`), or `module[:Name]`, `package.module[:Name]`, or
    `path/to/file.py[:Name]`; modules and files are found in `folder` (where the study file lies), else in the current
    one. `:name` may be a function.
    """
    target, _, name = where.partition(":")
    faults: list[Fault] = []
    with collecting(faults):
        module = _module(target, folder, _AT)
        found = getattr(module, name, None) if name else None
        if callable(found) and not isinstance(found, type):
            return function(found, where, options)
        cls = _class(module, target, name)
        return make(cls, f"{target}:{cls.__name__}", options, folder)
    return None, faults


def make(
    cls: type[Objective], called: str, options: Mapping[str, Any], folder: Path
) -> tuple[Objective | None, list[Fault]]:
    """Return an objective of class `cls`, made with `options`, or the faults that keep it from that."""
    faults: list[Fault] = []
    with collecting(faults):
        _require_whole(cls, called)
        made, more = validate(cls.Options, options, ("options",))
        faults += more
        if not more:
            return _made(cls, called, _beside(made, folder)), []
    return None, faults


def require_trainable(objective: Objective, called: str) -> None:
    """Raise Faulty where an objective lacks what it is trained with."""
    _require_whole(type(objective), called)
    cls = type(objective)
    if cls.loss is Objective.loss and "loss" not in objective.defaults and cls.train is None:
        raise Faulty(_AT, f"{called} does not define loss; or let its defaults name one: " + ", ".join(losses.BY_NAME))
    for name, arguments in _CALLED_WITH.items():
        if (method := getattr(objective, name)) is not None:
            _require_takes(method, arguments, f"{called}.{name}", "resume" if name == "train" else None)


def function(
    found: Callable[[Any], Any], called: str, options: Mapping[str, Any]
) -> tuple[Function | None, list[Fault]]:
    """Return a plain Optuna objective, or the faults that keep it from that; it takes a trial, and no options."""
    faults = [Fault(path=("options", key), message="a function has no options") for key in options]
    with collecting(faults):
        _require_takes(found, ["trial"], called)
        return Function(found), faults
    return None, faults


def _require_takes(call: Callable[..., Any], arguments: Sequence[str], called: str, by_name: str | None = None) -> None:
    """Raise Faulty where something cannot be called as the engine calls it: with what is given `by_name`, if it has it.

    What a class defines has its `self` besides.
    """
    wanted = ", ".join(arguments) or "nothing"
    try:
        takes = inspect.signature(call)
    except (TypeError, ValueError) as error:
        if not isinstance(call, MethodType):  # of a built-in nothing is known
            return
        raise Faulty(_AT, f"{called} must take {wanted} besides self, but does not take self") from error
    more = {by_name: None} if by_name is not None and by_name in takes.parameters else {}
    try:
        takes.bind(*arguments, **more)
    except TypeError as error:
        raise Faulty(_AT, f"{called} must take {wanted}, but takes {takes}: {error}") from error


def _class(module: ModuleType, target: str, name: str) -> type[Objective]:
    """Return the objective of that name, or the only one, in a module. Raises Faulty."""
    classes = {
        key: value
        for key, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, Objective) and value.__module__ == module.__name__
    }
    if name and name not in classes:
        known = [*classes, *(key for key, value in vars(module).items() if inspect.isfunction(value))]
        raise Faulty(_AT, f"{target} has no objective and no function {name!r}{did_you_mean(name, known)}")
    if not name and len(classes) != 1:
        which = (
            f"write {target}:Name with one of {', '.join(classes)}"
            if classes
            else f"subclass hpo.study.objective.Objective, or write {target}:function for a plain Optuna objective"
        )
        raise Faulty(_AT, f"{target} must hold exactly one objective, but holds {len(classes)}; {which}")
    return classes[name] if name else next(iter(classes.values()))


def _require_whole(cls: type[Objective], called: str) -> None:
    """Raise Faulty where a class does not define what an objective must."""
    if missing := _missing(cls):
        raise Faulty(_AT, f"{called} does not define {', '.join(missing)}")
    if not is_dataclass(cls.Options):
        raise Faulty(_AT, f"{called}.Options must be a dataclass, but is {cls.Options!r}")


def _made(cls: type[Objective], called: str, options: Any) -> Objective:
    """Return an objective with those options. Raises Faulty."""
    try:
        objective = cls(options)
        require_trainable(objective, called)
    except Faulty:
        raise
    except Exception as error:
        raise Faulty(_AT, f"{called} cannot be made: {origin(error)}") from error
    return objective


def load_function(where: str, folder: Path, at: tuple[str, ...]) -> Callable[..., Any]:
    """Return the function (or a class made without arguments) that `module:name` or `file.py:name` is.

    Raises Faulty.
    """
    target, _, name = where.partition(":")
    module = _module(target, folder, at)
    found = getattr(module, name, None)
    try:
        found = found() if isinstance(found, type) else found
    except Exception as error:
        raise Faulty(at, f"{where} cannot be made: {origin(error)}") from error
    if not callable(found):
        known = [key for key, value in vars(module).items() if callable(value)]
        raise Faulty(at, f"{target} has no function {name!r}{did_you_mean(name, known)}")
    return cast("Callable[..., Any]", found)


def _missing(cls: type[Objective]) -> list[str]:
    """Return the names of what an objective must define and `cls` does not."""
    missing = sorted(cls.__abstractmethods__)
    if cls.build is Objective.build and cls.train is None:
        missing.append("build (or train)")
    return missing


def _beside(options: Any, folder: Path) -> Any:
    """Return `options` with its relative paths as they are from `folder`, where the study file lies, if there."""
    found = {f.name: folder / getattr(options, f.name) for f in fields(options) if _is_path(getattr(options, f.name))}
    return replace(options, **{name: path for name, path in found.items() if path.exists()})


def _is_path(value: Any) -> bool:
    return isinstance(value, Path)


def _module(target: str, folder: Path, at: tuple[str, ...]) -> ModuleType:
    """Import a file or a module. Raises Faulty."""
    try:
        return _import(target, folder)
    except _NotFound as error:
        raise Faulty(at, str(error)) from error
    except (Exception, SystemExit) as error:  # the user's own code: whatever it raises is theirs to see
        raise Faulty(at, f"{target} cannot be imported: {origin(error)}") from error


class _NotFound(Exception):
    """There is no such module or file."""


def _import(target: str, folder: Path) -> ModuleType:
    if target in catalog.names():
        with lightly("sklearn"):  # never around a user's own code, which may look at what it imports
            return importlib.import_module(f"hpo.objectives.{target}")
    if target == "__main__":
        raise _NotFound("it was defined in a notebook, which no other process can import; save it in a file")
    _find_beside(folder)
    if target.endswith(".py"):
        tried = [folder / target, Path(target)]
        path = next((p for p in tried if p.is_file()), None)
        if path is None:
            raise _NotFound(f"no such file: {' nor '.join(dict.fromkeys(str(p) for p in tried))}")
        module_name = f"hpo_objective_{path.stem}"
        spec = importlib.util.spec_from_file_location(module_name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module
        spec.loader.exec_module(module)
        return module
    try:
        return importlib.import_module(target)
    except ModuleNotFoundError as error:
        if error.name is None or not (target == error.name or target.startswith(f"{error.name}.")):
            raise
        if "." in target:
            raise _NotFound(f"there is no module {target}") from error
        known = catalog.names()
        raise _NotFound(f"there is no objective and no module {target!r}{did_you_mean(target, known)}") from error


def _find_beside(folder: Path) -> None:
    """Have modules be found beside the study file and in the current folder, whatever started this process."""
    for beside in (str(folder.absolute()), str(Path.cwd())):
        if beside not in sys.path:
            sys.path.insert(0, beside)
    if importlib.util.find_spec("objectives") is None:  # what was written for version 0.1 imports from there
        sys.modules["objectives"] = importlib.import_module("hpo.objectives")


def origin(error: BaseException) -> str:
    """Return the error as Python names it, with the file and line of the user's own code that it came from."""
    frames = [(f.filename, f.lineno) for f in traceback.extract_tb(error.__traceback__)]
    libraries = (
        str(Path(__file__).parents[1]),
        sysconfig.get_paths()["purelib"],
        sysconfig.get_paths()["stdlib"],
        "<frozen",
    )
    own = [frame for frame in frames if not frame[0].startswith(libraries)] or frames[-1:]
    if isinstance(error, SyntaxError):
        own = [(str(error.filename), error.lineno)]
    place = f" ({own[-1][0]}:{own[-1][1]})" if own else ""
    return f"{type(error).__name__}: {said(error)}{place}"
