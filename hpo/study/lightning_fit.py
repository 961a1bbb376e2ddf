"""One trial in Lightning's Trainer: on rows of a Reporter, stopped by it, quiet, and leaving the process as it was."""

import logging
import math
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Dataset

from hpo import seeds
from hpo.errors import InputError
from hpo.log import silenced
from hpo.study.data import Split, batch_sizes
from hpo.study.objective import Reporter

SET_BY_HPO = {
    *("accelerator", "devices", "num_nodes", "strategy", "plugins"),
    *("max_epochs", "min_epochs", "min_steps", "num_sanity_val_steps"),
    *("logger", "enable_checkpointing"),
    *("check_val_every_n_epoch", "val_check_interval", "limit_val_batches", "overfit_batches", "fast_dev_run"),
}
"""Arguments of Trainer that are the study's: with others it would train elsewhere, or past the study's stop, or what
is logged as an epoch's `val_loss` would be of other weights or rows."""
EVALUATION_ROWS = 1024
_LOGGERS = ("lightning", "lightning.pytorch", "lightning.fabric", "pytorch_lightning", "lightning_fabric")


def fit(
    base: Any,
    module: Any,
    hooks: "Hooks",
    report: Reporter,
    rows: "Rows",
    more: dict[str, Any],
) -> None:
    """Train `module`, of Lightning's class `base`, on `report.train`; `more` are further arguments of Trainer."""
    package = package_of(base)
    lightning = import_module(package)
    environments, callbacks = (import_module(f"{package}.{name}") for name in ("plugins.environments", "callbacks"))
    device = report.train.targets.device
    arguments = {"enable_progress_bar": False, "enable_model_summary": False} | more
    # of the kind that Lightning calls after the module's own hook, which may log, or change weights
    of_hooks = type(
        "Reporting", (callbacks.Checkpoint,), {name: staticmethod(getattr(hooks, name)) for name in Hooks.NAMES}
    )
    with quiet():
        trainer = lightning.Trainer(
            accelerator="gpu" if device.type == "cuda" else device.type,
            devices=[device.index or 0] if device.type == "cuda" else 1,
            max_epochs=report.epochs,
            num_sanity_val_steps=0,
            logger=False,
            enable_checkpointing=False,
            plugins=[environments.LightningEnvironment()],  # else it takes a worker's share of Slurm's tasks as its own
            **arguments,
        )
        trainer.callbacks.append(of_hooks())
        validates = type(module).validation_step is not base.validation_step
        loaders = [rows.shuffled(report.train, report.seed), rows.in_order(report.valid) if validates else None]
        try:
            trainer.fit(module, *loaders)
        except SystemExit as error:
            if isinstance(error.__context__, KeyboardInterrupt):  # a second Ctrl-C, which Lightning makes an exit of
                raise KeyboardInterrupt from error
            raise


def package_of(base: type[nn.Module]) -> str:
    """Return how Lightning was imported: `lightning.pytorch` or `pytorch_lightning`."""
    return "pytorch_lightning" if base.__module__.startswith("pytorch_lightning") else "lightning.pytorch"


class Hooks:
    """What is done at Lightning's hooks: each epoch is measured and reported, and the Trainer is stopped."""

    NAMES = ("on_train_start", "on_train_batch_end", "on_train_epoch_end")

    def __init__(self, measured: Callable[[], dict[str, float]], report: Reporter, rehearsal: bool) -> None:
        self._measured, self._report, self._rehearsal = measured, report, rehearsal
        self._loss: Tensor | float = 0.0
        self._n_rows = 0
        self._on_sigterm = signal.getsignal(signal.SIGTERM)
        self._last: dict[str, float] = {}
        """What was measured last, and reported."""

    def on_train_start(self, trainer: Any, module: Any) -> None:
        """Take SIGTERM back, which Lightning would make an exit of; refuse a module without an optimizer."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._on_sigterm)
        # where none was returned, Lightning has one of its own, of a tensor of its own
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        trained = {id(each) for group in groups for each in group["params"]}
        if self._rehearsal and module.automatic_optimization and trained.isdisjoint(map(id, module.parameters())):
            raise InputError(
                f"{type(module).__name__}.configure_optimizers returns no optimizer of the module's parameters, so "
                "nothing would be learned; return one, or set self.automatic_optimization = False and step your own"
            )

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Add the batch's loss to the epoch's; refuse a training_step that gives none."""
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor):
            n_rows = len(tree_leaves(batch)[0])
            if module.automatic_optimization:  # Lightning has divided it
                loss = loss * trainer.accumulate_grad_batches
            self._loss, self._n_rows = self._loss + loss.detach() * n_rows, self._n_rows + n_rows
        elif self._rehearsal and module.automatic_optimization:
            raise InputError(
                f"{type(module).__name__}.training_step returned None, so nothing would be learned; return the loss, "
                "or set self.automatic_optimization = False and step the optimizers in it"
            )

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        """Measure and report the epoch that has ended."""
        logged = trainer.callback_metrics
        self._last = self._measured()
        metrics = dict(self._last)
        if "val_loss" in logged:
            metrics["loss"] = float(logged["val_loss"])
        if "train_loss" in logged:
            metrics["train_loss"] = float(logged["train_loss"])
        elif self._n_rows:
            metrics["train_loss"] = float(self._loss / self._n_rows)
        self._loss, self._n_rows = 0.0, 0
        if not self._report(metrics):
            trainer.should_stop = True

    def require_as_reported(self, name: str) -> None:
        """Raise InputError if the network, once the Trainer has ended, is not what was reported of its last epoch."""
        now = self._measured()
        off = [n for n, x in self._last.items() if not math.isclose(x, now[n], rel_tol=1e-3, abs_tol=1e-6)]
        if off and all(math.isfinite(each[off[0]]) for each in (now, self._last)):
            raise InputError(
                f"{name}: {off[0]} was {self._last[off[0]]:.6g} after the last epoch, but is {now[off[0]]:.6g} once "
                "the Trainer has ended: a callback (StochasticWeightAveraging, WeightAveraging) or on_train_end "
                "changes the weights then, so that the network exported would not be the one measured; remove it, or "
                "average in on_train_epoch_end"
            )


class Rows:
    """Loaders over a split that lies in memory: whole batches are sliced, not put together row by row."""

    def __init__(self, batch: Callable[[Mapping[str, Tensor], Tensor], Any], batch_size: int) -> None:
        self._batch, self._batch_size = batch, batch_size

    def shuffled(self, split: Split, seed: int) -> "DataLoader[Any]":
        """Return a loader that draws another order each epoch; never a batch of one row, as BatchNorm wants it."""
        generator = torch.Generator().manual_seed(seeds.derive(seed, "order"))
        return self._loader(split, lambda: torch.randperm(len(split), generator=generator))

    def in_order(self, split: Split) -> "DataLoader[Any]":
        """Return a loader over the rows as they are."""
        return self._loader(split, lambda: torch.arange(len(split)))

    def _loader(self, split: Split, order: Callable[[], Tensor]) -> "DataLoader[Any]":
        sizes = batch_sizes(len(split), self._batch_size)
        return DataLoader(_Slices(split, self._batch), batch_size=None, sampler=_Order(order, sizes))


class _Slices(Dataset[Any]):
    def __init__(self, split: Split, batch: Callable[[Mapping[str, Tensor], Tensor], Any]) -> None:
        self._split, self._batch = split, batch

    def __getitem__(self, rows: Tensor) -> Any:
        rows = rows.to(self._split.targets.device)
        return self._batch({name: x[rows] for name, x in self._split.inputs.items()}, self._split.targets[rows])


class _Order:
    """The rows of each batch, in a new order for each epoch."""

    def __init__(self, order: Callable[[], Tensor], sizes: list[int]) -> None:
        self._order, self._sizes = order, sizes

    def __len__(self) -> int:
        return len(self._sizes)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(torch.split(self._order(), self._sizes))


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Have `network` in evaluation mode and without gradients, then each part of it in the mode that it was in."""
    modes = [(part, part.training) for part in network.modules()]
    network.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, training in modes:
            part.training = training


@contextmanager
def quiet() -> Iterator[None]:
    """Leave out what Lightning itself says (which GPUs there are, how many workers a loader has), not the module."""
    with silenced(*_LOGGERS, level=logging.ERROR), warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"(pytorch_)?lightning")
        yield
