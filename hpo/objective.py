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

import importlib
import importlib.util
import sys
import sysconfig
import traceback
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

from torch import Tensor, nn
from torchmetrics import Metric

from hpo import catalog
from hpo.data import Data, DataInfo, Split
from hpo.errors import Fault, did_you_mean
from hpo.spec import validate

Params = Mapping[str, Any]
"""One trial's hyperparameters by name: those that were sampled and those that are fixed."""


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

    def __init__(self, options: Any = None) -> None:
        self.options = self.Options() if options is None else options

    @abstractmethod
    def data(self) -> Data:
        """Return the data, the same at every call. Raises DataError where it cannot be had."""

    @abstractmethod
    def build(self, params: Params, info: DataInfo) -> nn.Module:
        """Return a new network for `params`, on the CPU, initialised from torch's global generator.

        It takes the preprocessed inputs in their order, each (B, ...), and gives what `loss` and `metrics` take.
        """

    @abstractmethod
    def loss(self, outputs: Tensor, targets: Tensor, params: Params) -> Tensor:
        """Return the mean loss of a batch, a tensor of no dimensions."""

    @abstractmethod
    def metrics(self) -> Mapping[str, Metric]:
        """Return new TorchMetrics objects by name, the study's default metric first.

        They take (outputs, targets). A metric's own `higher_is_better` says in which direction the search goes.
        The engine adds `loss`.
        """

    def preprocess(self, train: Split) -> nn.Module:
        """Return a module without parameters that takes raw inputs to what the network takes.

        What it learns from `train` (a mean, a scale) it keeps in buffers. It is applied to the data once, and stands
        first in the exported module.
        """
        return nn.Identity()

    def head(self) -> nn.Module:
        """Return a module without parameters that takes the network's outputs to predictions (a softmax, say).

        It stands last in the exported module, and nowhere else.
        """
        return nn.Identity()


def load(where: str, options: Mapping[str, Any], folder: Path) -> tuple[Objective | None, list[Fault]]:
    """Return the objective that `where` names, made with `options`, or the faults that keep it from being made.

    `where` is the name of a module in `objectives/`, or `package.module[:Name]`, or `path/to/file.py[:Name]`, the
    path from `folder` (where the study file lies), else from the current one.
    """
    target, _, name = where.partition(":")
    at = ("objective",)
    try:
        module = _import(target, folder)
    except _NotFound as error:
        return None, [Fault(path=at, message=str(error))]
    except (Exception, SystemExit) as error:  # the user's own code: whatever it raises is theirs to see
        return None, [Fault(path=at, message=f"{target} cannot be imported: {origin(error)}")]
    classes = {
        key: value
        for key, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, Objective) and value.__module__ == module.__name__
    }
    if name and name not in classes:
        return None, [Fault(path=at, message=f"{target} has no objective {name!r}{did_you_mean(name, classes)}")]
    if not name and len(classes) != 1:
        which = (
            f"write {target}:Name with one of {', '.join(classes)}" if classes else "subclass hpo.objective.Objective"
        )
        return None, [
            Fault(path=at, message=f"{target} must hold exactly one objective, but holds {len(classes)}; {which}")
        ]
    cls = classes[name] if name else next(iter(classes.values()))
    if missing := sorted(cls.__abstractmethods__):
        return None, [Fault(path=at, message=f"{target}:{cls.__name__} does not define {', '.join(missing)}")]
    if not is_dataclass(cls.Options):
        return None, [
            Fault(path=at, message=f"{target}:{cls.__name__}.Options must be a dataclass, but is {cls.Options!r}")
        ]
    made, faults = validate(cls.Options, options, ("options",))
    if faults:
        return None, faults
    try:
        return cls(made), []
    except Exception as error:
        return None, [Fault(path=at, message=f"{target}:{cls.__name__} cannot be made: {origin(error)}")]


class _NotFound(Exception):
    """There is no such module or file."""


def _import(target: str, folder: Path) -> ModuleType:
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
    full = target if "." in target else f"objectives.{target}"
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # the console script `hpo` sees the same modules as `python -m hpo`
    try:
        return importlib.import_module(full)
    except ModuleNotFoundError as error:
        if error.name is None or not (full == error.name or full.startswith(f"{error.name}.")):
            raise
        hint = did_you_mean(target, catalog.names()) if "." not in target else ""
        raise _NotFound(f"there is no module {full}{hint}") from error


def origin(error: BaseException) -> str:
    """Return the error as Python names it, with the file and line of the user's own code that it came from."""
    frames = [(f.filename, f.lineno) for f in traceback.extract_tb(error.__traceback__)]
    libraries = (
        str(Path(__file__).parent),
        sysconfig.get_paths()["purelib"],
        sysconfig.get_paths()["stdlib"],
        "<frozen",
    )
    own = [frame for frame in frames if not frame[0].startswith(libraries)] or frames[-1:]
    if isinstance(error, SyntaxError):
        own = [(str(error.filename), error.lineno)]
    place = f" ({own[-1][0]}:{own[-1][1]})" if own else ""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}{place}"
