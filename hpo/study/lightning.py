"""A LightningModule as an objective: its own training_step and optimizers, hpo's search, test and export.

    class Wine(hpo.LightningObjective):
        '''Three cultivars of wine.'''

        module = LitWine               # the class; called with those params that its __init__ names
        network = "net"                # its attribute with the network that is tested and exported
        defaults = {"n_hidden": 16, "lr": 0.01, "batch_size": 32}
        space = {"lr": {"type": "float", "low": 1e-4, "high": 1e-1, "log": True}}

        def data(self): ...            # or: datamodule = WineData
        def metrics(self): return {"accuracy": MulticlassAccuracy(3, average="micro")}

Lightning (`pip install 'hpo[lightning]'`) is imported only when a trial is trained, and as the module's class was: as
`lightning.pytorch` or as `pytorch_lightning`.
"""

import inspect
from collections.abc import Callable, Mapping
from operator import attrgetter
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hpo.errors import DataError, InputError, did_you_mean
from hpo.study import lightning_fit as fitting
from hpo.study.data import Data, prediction
from hpo.study.lightning_parts import base_of, plain, require_no_transfer_hooks, split_of
from hpo.study.objective import Objective, Params, Reporter, SeenParams
from hpo.study.probabilities import Taken


class LightningObjective(Objective):
    """An objective whose trials are trained by a LightningModule, one at a time; see the module's docstring.

    Rows go to `training_step` as `batch` says, `params["batch_size"]` at a time, shuffled by the trial's seed. After
    each epoch the network is measured on the validation rows by `metrics`, whatever the module itself logs; of that,
    `train_loss` is logged too, and `val_loss` is the metric `loss`. A module's own validation_step is run.

    What cannot be trained or exported is refused before the first trial: the corners of the space are trained for one
    epoch of a few rows.

    >>> issubclass(hpo.LightningObjective, hpo.Objective)
    True
    """

    module: ClassVar[Any] = None
    """The LightningModule's class. Its `__init__` is called with the params that it names (with all, where it takes
    `**kwargs`), and with `n_features` and `n_classes` of the data where it names these."""
    network: ClassVar[str | None] = None
    """The module's attribute (`"net"`, `"model.body"`) that holds the network; None: the module's own forward is it."""
    datamodule: ClassVar[Any] = None
    """The class of a LightningDataModule that is made without arguments, in place of `data`; for others see `read`."""
    class_names: ClassVar[tuple[str, ...]] = ()
    """The names of a datamodule's classes; where they are not given, they are the numbers."""

    def data(self) -> Data:
        """Return the rows of `datamodule`; override it for any other data. Raises DataError."""
        if not isinstance(self.datamodule, type):
            came = "there is none" if self.datamodule is None else f"it is a {type(self.datamodule).__name__}"
            raise DataError(
                f"{type(self).__name__} needs a method `data`, or `datamodule` as the class of a LightningDataModule, "
                f"but {came}; for one with arguments write `def data(self): return self.read(WineData(...))`"
            )
        return self.read(self.datamodule())

    def read(self, datamodule: Any) -> Data:
        """Return the rows of a LightningDataModule's train, val and test dataloaders, read once. Raises DataError."""
        require_no_transfer_hooks(type(datamodule), self._name)
        with fitting.quiet():
            datamodule.prepare_data()
            datamodule.setup("fit")
            datamodule.setup("test")
            train, valid, test = (split_of(datamodule, kind) for kind in ("train", "val", "test"))
        names, targets = tuple(self.class_names), [split.targets for split in (train, valid, test)]
        if not names and not any(y.is_floating_point() for y in targets):
            names = tuple(map(str, range(1 + max(int(y.max()) for y in targets))))
        return Data(train=train, valid=valid, test=test, class_names=names)

    def batch(self, inputs: Mapping[str, Tensor], targets: Tensor) -> Any:
        """Return what `training_step` is given of some rows: (input, ..., targets), unless this is overridden."""
        return (*inputs.values(), targets)

    def trainer(self, params: Params) -> Mapping[str, Any]:
        """Return more arguments of Trainer: `gradient_clip_val`, `accumulate_grad_batches`, `callbacks`, ..."""
        return {}

    def train(self, params: Params, report: Reporter) -> nn.Module:
        """Train the module of one trial's `params`; return its network. Raises InputError."""
        return self._fit(params, report, rehearsal=False)

    def preview(self, params: Params, report: Reporter) -> nn.Module:
        """Train as `train` does, on a few rows, and refuse what would train nothing. Raises InputError."""
        return self._fit(params, report, rehearsal=True)

    @property
    def returns(self) -> str:
        """What messages call the network."""
        if self.network is None:
            return f"forward of {self.module.__name__} (network = None)"
        return f"{self.module.__name__}.{self.network}"

    def _fit(self, params: Params, report: Reporter, rehearsal: bool) -> nn.Module:
        if "batch_size" not in params:
            raise InputError(f'{self._name}: its `defaults` name no batch_size; add "batch_size": 32, say')
        base = base_of(self.module, self._name)
        seen = SeenParams(params)
        more = self._trainer_arguments(seen)
        given = self._arguments(params)
        if rehearsal:
            self._require_used(params, {*seen.read, *given, "batch_size"})
        require_no_transfer_hooks(self.module, self._name)
        torch.manual_seed(report.seed)
        module = self.module(**given)
        hooks = fitting.Hooks(self._measuring(module, base, report), report, rehearsal)
        fitting.fit(base, module, hooks, report, fitting.Rows(self.batch, int(params["batch_size"])), more)
        hooks.require_as_reported(self._name)
        return self._network(module, base)

    @property
    def _name(self) -> str:
        return f"objective {type(self).__name__}"

    def _trainer_arguments(self, params: Params) -> dict[str, Any]:
        more = dict(self.trainer(params))
        if taken := sorted(fitting.SET_BY_HPO & more.keys()):
            raise InputError(
                f"{self._name}: trainer must not give {', '.join(taken)}, which the study decides; remove it"
            )
        return more

    def _arguments(self, params: Params) -> dict[str, Any]:
        """Return what the module's `__init__` is called with. Raises InputError where it demands more than there is."""
        known = {"n_features": self.info.n_features, "n_classes": self.info.n_classes, **params}
        takes = inspect.signature(self.module).parameters.values()
        if any(each.kind is each.VAR_KEYWORD for each in takes):
            named = {each.name for each in takes}
            return {name: value for name, value in known.items() if name in params or name in named}
        keywords = [each for each in takes if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)]
        lacking = [each.name for each in keywords if each.default is each.empty and each.name not in known]
        if lacking:
            raise InputError(
                f"{self._name}: {self.module.__name__}.__init__ demands {lacking[0]!r}, which is no param and no "
                f"size of the data (n_features, n_classes){did_you_mean(lacking[0], list(params))}; add it to defaults"
            )
        return {each.name: known[each.name] for each in keywords if each.name in known}

    def _require_used(self, params: Params, used: set[str]) -> None:
        """Raise InputError for a param that nothing reads: its search would be a search of noise."""
        if unused := [name for name in params if name not in used]:
            takes = list(inspect.signature(self.module).parameters)
            raise InputError(
                f"{self._name}: nothing reads the param {unused[0]!r}: {self.module.__name__}.__init__ takes "
                f"{', '.join(takes) or 'nothing'}{did_you_mean(unused[0], takes)}; remove it, or have __init__ or "
                "`trainer` read it"
            )

    def _network(self, module: nn.Module, base: type[nn.Module]) -> nn.Module:
        """Return the network that `network` names. Raises InputError."""
        known = [name for name, _ in module.named_children()]
        if self.network is None:
            if not any("forward" in vars(each) for each in type(module).__mro__ if each not in base.__mro__):
                raise InputError(
                    f"{self._name}: {type(module).__name__} has no forward of its own; write which attribute holds its "
                    f'network, network = "{known[0] if known else "net"}"; its networks: {", ".join(known) or "none"}'
                )
            return plain(module, base)
        try:
            found = attrgetter(self.network)(module)
        except AttributeError as error:
            raise InputError(
                f'{self._name}: network = "{self.network}", but {type(module).__name__} has no such attribute'
                f"{did_you_mean(self.network, known)}; its networks: {', '.join(known) or 'none'}"
            ) from error
        if not isinstance(found, nn.Module):
            raise InputError(
                f'{self._name}: network = "{self.network}" must name a network (nn.Module), but '
                f"{type(module).__name__}.{self.network} is a {type(found).__name__}"
            )
        return plain(found, base)

    def _measuring(self, module: nn.Module, base: type[nn.Module], report: Reporter) -> Callable[[], dict[str, float]]:
        """Return what measures the module's network, in evaluation mode, on the validation rows."""
        rows, metrics = report.valid, {n: each.to(report.valid.targets.device) for n, each in self.metrics().items()}

        def measured() -> dict[str, float]:
            network = self._network(module, base)
            with fitting.evaluating(network):
                chunks = zip(*(torch.split(x, fitting.EVALUATION_ROWS) for x in rows.inputs.values()), strict=True)
                outputs = torch.cat([prediction(network(*inputs)) for inputs in chunks])
            values = {}
            for name, metric in metrics.items():
                metric.reset()
                metric.update(Taken(self, outputs, rows.targets, {}).by(metric), rows.targets)
                values[name] = float(metric.compute())
            return values

        return measured
