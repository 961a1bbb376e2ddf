"""The contract of an objective, and how one is found by name, import path or file.

An objective *describes*: its data, how params become a module, its loss, its metrics. It has no epoch loop, no Optuna,
no MLflow; the engine has those. A whole one:

    class Iris(Objective):
        '''Iris: three kinds of flower from four lengths.'''

        defaults = {"optimizer": "adam", "learning_rate": 0.01, "batch_size": 16, "n_hidden": 16}
        space = {"learning_rate": {"type": "float", "low": 1e-4, "high": 1e-1, "log": True}}

        def data(self): ...
        def build(self, params, info): return nn.Sequential(nn.Linear(4, params["n_hidden"]), nn.ReLU(), ...)
        def loss(self, outputs, targets, params): return F.cross_entropy(outputs, targets)
        def metrics(self): return {"accuracy": MulticlassAccuracy(3, average="micro")}
"""

import ast
import hashlib
import importlib
import importlib.util
import inspect
import sys
import sysconfig
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn
from torchmetrics import Metric

from hpo.errors import Fault, did_you_mean, said
from hpo.study import catalog, losses
from hpo.study.data import Data, DataInfo, Split
from hpo.study.spec import validate

Params = Mapping[str, Any]
"""One trial's hyperparameters by name: those that were sampled and those that are fixed."""


class Reporter(Protocol):
    """What an objective's own `train` is given: the data, and where to report after each epoch.

    `train` and `valid` are prepared by the objective's `preprocess`. When the best params are trained anew, `train`
    has the validation rows too, and what is reported of them is not used.
    """

    train: Split
    valid: Split
    epochs: int
    seed: int
    """What weights are to be drawn from."""

    def __call__(self, metrics: Mapping[str, float]) -> bool:
        """Report one epoch's metrics on `valid` by name, and return whether to go on; after False, return.

        Names beginning with `train_` are logged as they are.
        """


@dataclass(frozen=True)
class NoOptions:
    """The options of an objective that has none."""


class Objective(ABC):
    """What is to be learned. Subclass it; see the module's docstring for a whole example."""

    Options: ClassVar[type] = NoOptions
    """A frozen dataclass; study.yaml's `options` are validated by its annotations."""
    defaults: Mapping[str, Any] = {}
    """Every hyperparameter that `build` and `loss` read, and the engine's own (`optimizer`, `learning_rate`,
    `batch_size`, ...) where they differ from its defaults, each with the value it has when it is not searched. A
    property where it depends on the options; so may `space` be."""
    space: Mapping[str, Any] = {}
    """The default search space, as in study.yaml's `params`; used where the study names no range of its own."""
    info: DataInfo = DataInfo(inputs={}, input_dtypes={})
    """What the data is; set as soon as the engine has loaded it."""
    own_losses: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {}
    """The losses that the study gives by import path; set by the engine."""

    def __init__(self, options: Any = None) -> None:
        self.options = self.Options() if options is None else options

    @abstractmethod
    def data(self) -> Data:
        """Return the data, the same at every call. Raises DataError where it cannot be had."""

    def build(self, params: Params, info: DataInfo) -> nn.Module:
        """Return a new network for `params`, on the CPU, initialised from torch's global generator.

        It takes the preprocessed inputs in their order, each (B, ...), and gives what `loss` and `metrics` take; of
        several outputs (a tuple) `loss` takes all, metrics and `head` the first.
        """
        raise NotImplementedError

    def loss(self, outputs: Any, targets: Tensor, params: Params) -> Tensor:
        """Return the mean loss of a batch, a tensor of no dimensions.

        Unless it is overridden, it is the one that the param `loss` names: see `hpo.study.losses`, or an import path.
        """
        name = params["loss"]
        if name in self.own_losses:
            return self.own_losses[name](outputs, targets)
        return losses.BY_NAME[name](outputs, targets, params, self.info.class_counts)

    @abstractmethod
    def metrics(self) -> Mapping[str, Metric]:
        """Return new TorchMetrics objects by name, the study's default metric first.

        They take (outputs, targets). A metric's own `higher_is_better` says in which direction the search goes.
        The engine adds `loss`.
        """

    train: Callable[[Params, Reporter], nn.Module | None] | None = None
    """In place of `build` and `loss`: an objective's own training of one trial's params, in whatever way. It calls
    `report` after each epoch until that says no, and returns a network to be tested and exported, or None."""

    def preview(self, params: Params, report: Reporter) -> nn.Module | None:
        """Return the network that `train` would return for `params`; None: nothing is known before the first trial.

        Optional, for objectives with their own `train`: what cannot be trained, or exported, is then refused before
        anything runs. `report` has a few rows and one epoch; an error that is raised here is shown as it is.
        """
        return None

    @property
    def returns(self) -> str:
        """What messages call the network that `train` returns."""
        return "the network that train returns"

    def preprocess(self, train: Split) -> nn.Module:
        """Return a module without parameters that takes raw inputs to what the network takes.

        What it learns from `train` (a mean, a scale) it keeps in buffers. It is applied to the data once, and stands
        first in the exported module.
        """
        return nn.Identity()

    def about(self) -> Mapping[str, Any]:
        """Return what a user of the exported model must know to prepare its inputs: plain values, for bundle.json."""
        return {}

    def head(self) -> nn.Module:
        """Return a module without parameters that takes the network's outputs to predictions (a softmax, say).

        It stands last in the exported module, and nowhere else.
        """
        return nn.Identity()


class Function:
    """A plain Optuna objective, `f(trial) -> float`: it suggests its own params, reports and prunes itself."""

    train = None

    def __init__(self, call: Callable[[Any], Any]) -> None:
        self.call = call


def load(
    where: str, options: Mapping[str, Any], folder: Path
) -> tuple[Objective | None, list[Fault]] | tuple[Function, list[Fault]]:
    """Return what `where` names, an objective made with `options` or a function, or the faults that keep it from that.

    `where` is one of hpo's own (`hpo objectives`), or `module[:Name]`, `package.module[:Name]`, or
    `path/to/file.py[:Name]`; modules and files are found in `folder` (where the study file lies), else in the current
    one. `:name` may be a function.
    """
    target, _, name = where.partition(":")
    at = ("objective",)
    module, faults = _module(target, folder, at)
    if module is None:
        return None, faults
    classes = {
        key: value
        for key, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, Objective) and value.__module__ == module.__name__
    }
    found = getattr(module, name, None) if name else None
    if callable(found) and not isinstance(found, type):
        unknown = [Fault(path=("options", key), message="a function has no options") for key in options]
        return Function(found), unknown
    if name and name not in classes:
        known = [*classes, *(key for key, value in vars(module).items() if inspect.isfunction(value))]
        message = f"{target} has no objective and no function {name!r}{did_you_mean(name, known)}"
        return None, [Fault(path=at, message=message)]
    if not name and len(classes) != 1:
        which = (
            f"write {target}:Name with one of {', '.join(classes)}"
            if classes
            else f"subclass hpo.study.objective.Objective, or write {target}:function for a plain Optuna objective"
        )
        return None, [
            Fault(path=at, message=f"{target} must hold exactly one objective, but holds {len(classes)}; {which}")
        ]
    cls = classes[name] if name else next(iter(classes.values()))
    return make(cls, f"{target}:{cls.__name__}", options, folder)


def make(
    cls: type[Objective], called: str, options: Mapping[str, Any], folder: Path
) -> tuple[Objective | None, list[Fault]]:
    """Return an objective of class `cls`, made with `options`, or the faults that keep it from that."""
    at = ("objective",)
    if missing := _missing(cls):
        return None, [Fault(path=at, message=f"{called} does not define {', '.join(missing)}")]
    if not is_dataclass(cls.Options):
        return None, [Fault(path=at, message=f"{called}.Options must be a dataclass, but is {cls.Options!r}")]
    made, faults = validate(cls.Options, options, ("options",))
    if faults:
        return None, faults
    try:
        objective = cls(_beside(made, folder))
        faults = lacking(objective, called)
    except Exception as error:
        return None, [Fault(path=at, message=f"{called} cannot be made: {origin(error)}")]
    return (None, faults) if faults else (objective, [])


def lacking(objective: Objective, called: str) -> list[Fault]:
    """Return what an objective lacks to be trained."""
    cls = type(objective)
    if missing := _missing(cls):
        return [Fault(path=("objective",), message=f"{called} does not define {', '.join(missing)}")]
    if cls.loss is Objective.loss and "loss" not in objective.defaults and cls.train is None:
        message = f"{called} does not define loss; or let its defaults name one: " + ", ".join(losses.BY_NAME)
        return [Fault(path=("objective",), message=message)]
    return []


def source_fingerprint(objective: "Objective | Function") -> str:
    """Return the first 16 hex digits of a SHA-256 over the sources that the objective is written in.

    These are its file, those of the losses that the study names by path, and whatever they import from beside them.
    """
    own = [objective.call] if isinstance(objective, Function) else [type(objective), *objective.own_losses.values()]
    files: set[Path] = set()
    content = b""
    for each in own:
        with suppress(TypeError, OSError):  # a callable object has no source of its own
            file = Path(inspect.getsourcefile(each) or "")
            if file.is_file():
                _gather(file, files)
            else:  # a notebook's cell
                content += inspect.getsource(each).encode()
    content += b"".join(file.read_bytes() for file in sorted(files))
    return hashlib.sha256(content).hexdigest()[:16]


def file_fingerprint(objective: "Objective | Function") -> str:
    """Return what an older version stored as `source_fingerprint`: of the objective's own file alone."""
    content = b""
    with suppress(TypeError, OSError):
        file = inspect.getsourcefile(objective.call if isinstance(objective, Function) else type(objective))
        content = Path(file).read_bytes() if file else b""
    return hashlib.sha256(content).hexdigest()[:16]


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


def load_function(where: str, folder: Path, at: tuple[str, ...]) -> tuple[Callable[..., Any] | None, list[Fault]]:
    """Return the function (or a class made without arguments) that `module:name` or `file.py:name` is, or why not."""
    target, _, name = where.partition(":")
    module, faults = _module(target, folder, at)
    if module is None:
        return None, faults
    found = getattr(module, name, None)
    try:
        found = found() if isinstance(found, type) else found
    except Exception as error:
        return None, [Fault(path=at, message=f"{where} cannot be made: {origin(error)}")]
    if not callable(found):
        known = [key for key, value in vars(module).items() if callable(value)]
        return None, [Fault(path=at, message=f"{target} has no function {name!r}{did_you_mean(name, known)}")]
    return found, []


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


def _module(target: str, folder: Path, at: tuple[str, ...]) -> tuple[ModuleType | None, list[Fault]]:
    try:
        return _import(target, folder), []
    except _NotFound as error:
        return None, [Fault(path=at, message=str(error))]
    except (Exception, SystemExit) as error:  # the user's own code: whatever it raises is theirs to see
        return None, [Fault(path=at, message=f"{target} cannot be imported: {origin(error)}")]


class _NotFound(Exception):
    """There is no such module or file."""


def _import(target: str, folder: Path) -> ModuleType:
    if target in catalog.names():
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
