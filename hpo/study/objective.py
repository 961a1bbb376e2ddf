"""The contract of an objective; `hpo.study.loading` finds one by name, import path or file.

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

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from hpo.light import Metric
from hpo.study import losses
from hpo.study.data import Data, DataInfo, Split

Params = Mapping[str, Any]
"""One trial's hyperparameters by name: those that were sampled and those that are fixed."""


class Reporter(Protocol):
    """What an objective's own `train` is given: the data, and where to report after each epoch.

    >>> class Mean(hpo.Objective):
    ...     defaults = {"shift": 0.0}
    ...     space = {"shift": {"type": "float", "low": -1.0, "high": 1.0}}
    ...     def data(self):
    ...         part = hpo.Split(inputs={"x": torch.ones(20, 1)}, targets=torch.ones(20, 1))
    ...         return hpo.Data(train=part, valid=part, test=part)
    ...     def metrics(self):
    ...         return {"mse": torchmetrics.MeanSquaredError()}
    ...     def train(self, params, report):
    ...         for epoch in range(report.epochs):
    ...             error = (report.valid.inputs["x"] + params["shift"] - report.valid.targets).square().mean()
    ...             if not report({"mse": float(error)}):
    ...                 return None
    >>> hpo.run(Mean, trials=3, epochs=2, tracking="off", quiet=True).counts.finished
    3

    `train` and `valid` are prepared by the objective's `preprocess`. In the refit of the best params `train` has the
    validation rows too, and what is reported of them is not used.
    """

    train: Split
    valid: Split
    epochs: int
    seed: int
    """What weights are to be drawn from."""

    def __call__(self, metrics: Mapping[str, float], state: Mapping[str, Any] | None = None) -> bool:
        """Report one epoch's metrics on `valid` by name, and return whether to go on; after False, return.

        Names beginning with `train_` are logged as they are. `state` is what `train` is given as `resume` where the
        trial is resumed after this epoch: tensors, numbers and texts in mappings and lists.
        """


@dataclass(frozen=True)
class NoOptions:
    """The options of an objective that has none."""


class SeenParams(dict[str, Any]):
    """Params that remember which of them were read."""

    def __init__(self, params: Params) -> None:
        super().__init__(params)
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.read.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.read.add(name)
        return super().get(name, default)


class Objective(ABC):
    """What is to be learned: data, network, loss, metrics. Subclass it; it has no epoch loop, no Optuna, no MLflow.

    >>> class Line(hpo.Objective):
    ...     defaults = {"loss": "mse", "learning_rate": 0.1, "batch_size": 20}
    ...     space = {"learning_rate": {"type": "float", "low": 1e-3, "high": 0.5, "log": True}}
    ...     def data(self):
    ...         x = torch.randn(100, 3, generator=torch.Generator().manual_seed(0))
    ...         parts = (slice(0, 60), slice(60, 80), slice(80, 100))
    ...         splits = [hpo.Split(inputs={"features": x[p]}, targets=x[p].sum(1, keepdim=True)) for p in parts]
    ...         return hpo.Data(train=splits[0], valid=splits[1], test=splits[2])
    ...     def build(self, params, info):
    ...         return torch.nn.Linear(info.n_features, 1)
    ...     def metrics(self):
    ...         return {"r2": torchmetrics.R2Score()}
    >>> study = hpo.run(Line, trials=2, epochs=3, tracking="off", quiet=True)
    >>> study.best.metrics["valid_r2"] > 0
    True
    """

    Options: ClassVar[type] = NoOptions
    """A frozen dataclass; study.yaml's `options` are validated by its annotations."""
    defaults: Mapping[str, Any] = {}
    """Every hyperparameter that `build` and `loss` read, and the engine's own (`optimizer`, `learning_rate`,
    `batch_size`, ...) where they differ from its defaults, each with the value it has when it is not searched. A
    property where it depends on the options; so may `space` be."""
    space: Mapping[str, Any] = {}
    """The default search space, as in study.yaml's `params`; used where the study names no range of its own."""
    defaults_first: bool = False
    """Whether the first trial has the `defaults` of all that is searched, as if they were the study's `start_with`:
    where they were tuned. A study that names a `start_with` has that instead."""
    pace: Mapping[str, int] = {}
    """`epochs` and `patience` of a study that has a `time`, where its file names none: how long a trial is to be. And
    `ensemble`, of how many networks the model is to be, where the time is two minutes or more."""
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

    train: Callable[..., nn.Module | None] | None = None
    """In place of `build` and `loss`: an objective's own training of one trial's params, in whatever way. It calls
    `report` after each epoch until that says no, and returns a network to be tested and exported, or None.

    With a third parameter, `resume`, its trials can be paused and resumed (`pruner: halving`, retries): that is the
    `state` last reported before, or None; epochs that were reported then are not reported again."""

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


def resumes(train: Callable[..., Any]) -> bool:
    """Whether an objective's own `train` takes what it resumes from."""
    return "resume" in inspect.signature(train).parameters
