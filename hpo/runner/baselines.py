"""Models that cost next to nothing, to be looked at beside a network: the majority class or the mean, a linear model,
scikit-learn's gradient boosting.

Each is fitted on the rows, prepared by the objective's `preprocess`, that the network was trained on, and gives outputs
such as the study's networks give, so that the study's own loss and metrics measure both. The first needs no inputs; the
others need a table.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from hpo.errors import HpoError, said
from hpo.light import Metric
from hpo.runner.table_models import MOST_INDICATORS, Absent, Table, boosted, linear, quiet
from hpo.seeds import derive
from hpo.study.data import DataInfo, Split, prediction
from hpo.study.objective import Objective
from hpo.study.probabilities import Taken, link_of
from hpo.training.batches import Batches
from hpo.training.evaluation import outputs_of
from hpo.training.stack import Task

MOST_ROWS = 50_000
"""So many rows are fitted to at the most."""
MOST_CLASSES = 100
LOOKED_AT = 256
"""So many rows show what a network's outputs are."""
MOST_MEASURED = 20_000
"""So many test rows are measured at the most."""
_MOST_COLUMNS = 500
_MOST_NUMBERS = 10_000_000
"""Rows times columns that are fitted to; and twice as many by the number of classes."""
_LEAST_CHANCE = 1e-12
"""A chance of nothing has no logarithm."""


@dataclass(frozen=True, kw_only=True)
class Form:
    """How a study's networks say what they predict of a row."""

    n_classes: int
    """0: they predict numbers."""
    shape: tuple[int, ...]
    """Of a row's outputs; of two classes it may be that of one number."""
    are: Literal["logits", "probabilities", "numbers"]

    def outputs(self, predicted: np.ndarray) -> Tensor:
        """Return what a network would give, (N, *shape) in float32, of chances (N, classes) or numbers (N, T)."""
        if not self.n_classes:
            return torch.as_tensor(predicted, dtype=torch.float32).reshape(-1, *self.shape)
        chances = torch.as_tensor(predicted, dtype=torch.float64)
        if int(torch.Size(self.shape).numel()) == 1:
            chances = chances[:, 1:]
        if self.are == "logits":
            chances = chances.clamp(_LEAST_CHANCE, 1 - _LEAST_CHANCE)
            chances = chances.logit() if chances.shape[1] == 1 else chances.log()
        return chances.float().reshape(-1, *self.shape)


def form_of(objective: Objective, info: DataInfo, params: Mapping[str, Any], outputs: Tensor, targets: Tensor) -> Form:
    """Return the form of a network's `outputs` (N, ...) for some rows, of these `targets`.

    Raises Absent where they are neither one class nor numbers like the targets.
    """
    shape = tuple(outputs.shape[1:])
    width, one_each = int(torch.Size(shape).numel()), targets.numel() == len(targets)
    of_classes = isinstance(objective.head(), nn.Sigmoid | nn.Softmax)
    of_classes = of_classes or link_of(objective, outputs, targets, params) != ""
    n = info.n_classes if info.n_classes > 1 else 0
    if not n and one_each and width > 1 and not targets.is_floating_point():
        n = width
    elif not n and one_each and width == 1 and of_classes:
        n = 2
    if n:
        if not one_each:
            raise Absent("a row has more than one class")
        if width != n and (n, width) != (2, 1):
            raise Absent(f"of {n} classes the networks give {width} outputs a row")
        return Form(n_classes=n, shape=shape, are="logits" if of_classes else _looks_like(outputs.float(), width))
    if outputs.shape != targets.shape and not (one_each and width == 1):
        raise Absent("the networks' outputs are no prediction of each target")
    if of_classes:
        raise Absent("a row has more than one class")
    return Form(n_classes=0, shape=shape, are="numbers")


def form_seen(task: Task, params: Mapping[str, Any], network: nn.Module, rows: Split, device: torch.device) -> Form:
    """Return the form of a network's outputs for a few `rows`, prepared; the network is on `device`. Raises Absent."""
    outputs = prediction(outputs_of(task, network, Batches(rows, device))).cpu()
    return form_of(task.objective, task.info, params, outputs, rows.targets.cpu())


def _looks_like(outputs: Tensor, width: int) -> Literal["logits", "probabilities"]:
    """Return what outputs of classes are where neither head nor loss says it."""
    shares = bool(((outputs >= 0) & (outputs <= 1)).all())
    sums = outputs.reshape(len(outputs), -1).sum(1)
    if shares and width > 1:
        shares = bool(torch.allclose(sums, torch.ones_like(sums), atol=1e-3))
    return "probabilities" if shares else "logits"


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """A model that was fitted in so many `seconds`; `predict` gives its outputs for rows that are prepared."""

    name: str
    seconds: float
    predict: Callable[[Split], Tensor]
    note: str = ""


def fit_baselines(
    form: Form, train: Split, preprocess: nn.Module, seed: int, most: int = MOST_ROWS
) -> tuple[list[Fitted], list[str]]:
    """Return what could be fitted to at most so many rows of `train`, and in a line each why others could not.

    All but the first are absent where inputs are no table; of them nothing is said then. Raises Absent where targets
    are no classes although the networks' outputs are.
    """
    if form.n_classes and not _are_classes(train.targets, form.n_classes):
        raise Absent(f"the targets are not the classes 0 to {form.n_classes - 1}")
    fitted = [_constant(form, train.targets)]
    absent: list[str] = []
    try:
        if not is_table(train, preprocess):
            return fitted, absent
        _require_few(form, train)
        chosen = _sample(train, preprocess, form, seed, most)
        table = Table.of(chosen)
        x, y = table(chosen), _wanted(form, chosen.targets)
    except (Exception, SystemExit) as error:  # the user's own preprocess, a library's, memory
        return fitted, [f"no linear model and no gradient boosting: {why(error)}"]
    some = "" if len(chosen) == len(train) else f"fitted to {len(chosen):,} of {len(train):,} rows"
    for name, make in (("linear model", linear), ("HistGradientBoosting", boosted)):
        try:
            name, fit = make(table, seed, of_classes=form.n_classes > 0)  # which imports scikit-learn
            start = time.perf_counter()
            with quiet(x.size):
                model, note = fit(x, y)
            seconds = time.perf_counter() - start
            predict = _predictor(form, table, model)
            fitted.append(
                Fitted(name=name, seconds=seconds, predict=predict, note=", ".join(filter(None, [some, note])))
            )
        except (Exception, SystemExit) as error:
            absent.append(f"no {name}: {why(error)}")
    return fitted, absent


def _are_classes(targets: Tensor, n: int) -> bool:
    return bool((targets == targets.round()).all()) and int(targets.min()) >= 0 and int(targets.max()) < n


def why(error: BaseException) -> str:
    """Return in a line why something cannot be had: our own reason, or an error of whatever was tried."""
    return said(error) if isinstance(error, Absent | HpoError) else f"{type(error).__name__}: {said(error)}"


def _constant(form: Form, targets: Tensor) -> Fitted:
    """Return what says the same of every row: how frequent each class is, the likeliest first; or the mean."""
    start = time.perf_counter()
    if form.n_classes:
        counts = torch.bincount(targets.reshape(-1).long().cpu(), minlength=form.n_classes).double()
        said_of_all, name = (counts / counts.sum()).numpy()[None], "majority class"
    else:
        said_of_all, name = targets.double().mean(0, keepdim=True).reshape(1, -1).cpu().numpy(), "mean of the targets"
    seconds = time.perf_counter() - start

    def predict(rows: Split) -> Tensor:
        return form.outputs(np.repeat(said_of_all, len(rows), 0))

    return Fitted(name=name, seconds=seconds, predict=predict)


def is_table(split: Split, preprocess: nn.Module) -> bool:
    """Whether each input, once it is prepared, is one of numbers or codes for each row and column."""
    few = taken(split, torch.arange(min(2, len(split)))).through(preprocess)
    return all(x.ndim <= 2 and not x.is_complex() for x in few.inputs.values())


def taken(split: Split, rows: Tensor) -> Split:
    """Return these rows (M,) of a split."""
    rows = rows.to(split.targets.device)
    return replace(split, inputs={n: x[rows] for n, x in split.inputs.items()}, targets=split.targets[rows])


def some_rows(n: int, most: int, seed: int) -> Tensor:
    """Return the numbers of `most` of `n` rows, drawn at random and in their order; of fewer rows, all."""
    if n <= most:
        return torch.arange(n)
    generator = torch.Generator().manual_seed(derive(seed, "baseline rows"))
    return torch.randperm(n, generator=generator)[:most].sort().values


def _require_few(form: Form, train: Split) -> None:
    if form.n_classes > MOST_CLASSES:
        raise Absent(f"there are more than {MOST_CLASSES} classes")
    if not form.n_classes and train.targets[0].numel() > MOST_CLASSES:
        raise Absent(f"there are more than {MOST_CLASSES} targets a row")


def _sample(train: Split, preprocess: nn.Module, form: Form, seed: int, most: int) -> Split:
    """Return the rows that are fitted to, prepared: so many that it takes seconds."""
    one = taken(train, torch.arange(1)).through(preprocess)
    columns = sum(x[0].numel() for x in one.inputs.values())
    if columns > _MOST_COLUMNS:
        raise Absent(f"there are more than {_MOST_COLUMNS:,} columns")
    if most <= MOST_ROWS:
        columns = sum(x[0].numel() * (1 if x.is_floating_point() else MOST_INDICATORS) for x in one.inputs.values())
        most = min(most, _MOST_NUMBERS // max(1, columns), 2 * _MOST_NUMBERS // max(1, columns * form.n_classes))
    return taken(train, some_rows(len(train), most, seed)).through(preprocess)


def _wanted(form: Form, targets: Tensor) -> np.ndarray:
    """Return the targets as scikit-learn takes them: classes (N,), numbers (N,) or (N, T)."""
    flat = targets.cpu().reshape(len(targets), -1)
    y: np.ndarray = (flat.long() if form.n_classes else flat.double()).numpy()
    return y[:, 0] if y.shape[1] == 1 else y


def _predictor(form: Form, table: Table, model: Any) -> Callable[[Split], Tensor]:
    def predict(rows: Split) -> Tensor:
        x = table(rows)
        with quiet(x.size):
            if not form.n_classes:
                return form.outputs(model.predict(x))
            chances = np.zeros((len(x), form.n_classes))
            chances[:, np.asarray(model.classes_, dtype=int)] = model.predict_proba(x)
            return form.outputs(chances)

    return predict


def value_of(
    objective: Objective, name: str, outputs: Any, targets: Tensor, params: Mapping[str, Any], metric: Metric | None
) -> float:
    """Return the loss, or `metric`, which has that name, of `outputs` (N, ...) against `targets`."""
    if metric is None:
        return float(objective.loss(outputs, targets, params))
    metric.reset()
    metric.update(Taken(objective, outputs, targets, params).by(metric), targets)
    return float(metric.compute())
