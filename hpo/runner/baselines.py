"""Models that cost next to nothing, to be looked at beside a network: the majority class or the mean, a linear model,
scikit-learn's gradient boosting.

Each is fitted on the rows, prepared by the objective's `preprocess`, that the network was trained on, and gives outputs
such as the study's networks give, so that the study's own loss and metrics measure both. The first needs no inputs; the
others need a table.
"""

import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics import Metric

from hpo.errors import HpoError, said
from hpo.seeds import derive
from hpo.study.data import DataInfo, Split, prediction
from hpo.study.objective import Objective

MOST_ROWS = 50_000
"""So many rows are fitted to, or measured, at the most."""
MOST_CLASSES = 100
_MOST_COLUMNS = 2000
_MOST_NUMBERS = 10_000_000
"""Rows times columns that are fitted to; and twice as many by the number of classes."""
_MOST_CATEGORIES = 254
"""scikit-learn's gradient boosting takes 255 bins, one of them for missing values."""
_MOST_INDICATORS = 20
"""For so many categories of a column the linear model has a weight each; rarer ones share one."""
_TREES, _FIRST_TREES, _TREE_SECONDS = 100, 10, 2.0
_LEAST_CHANCE = 1e-12
"""A chance of nothing has no logarithm."""
_SMALL = 1_000_000
"""Below so many numbers, threads wait for each other longer than they work."""
LOGITS = ("bce", "cross_entropy", "nll")
"""The losses by name that take logits."""


class Absent(Exception):
    """Why something cannot be had, in one line."""


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
    of_classes = isinstance(objective.head(), nn.Sigmoid | nn.Softmax) or params.get("loss") in LOGITS
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
        table = _Table.of(chosen)
        x, y = table(chosen), _wanted(form, chosen.targets)
    except (Exception, SystemExit) as error:  # the user's own preprocess, a library's, memory
        return fitted, [f"no linear model and no gradient boosting: {why(error)}"]
    some = "" if len(chosen) == len(train) else f"fitted to {len(chosen):,} of {len(train):,} rows"
    for name, make in (("linear model", _linear), ("HistGradientBoosting", _boosted)):
        try:
            name, fit = make(form, table, seed)  # which imports scikit-learn
            start = time.perf_counter()
            with _quiet(x.size):
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
        most = min(most, _MOST_NUMBERS // max(1, columns), 2 * _MOST_NUMBERS // max(1, columns * form.n_classes))
    return taken(train, some_rows(len(train), most, seed)).through(preprocess)


def _wanted(form: Form, targets: Tensor) -> np.ndarray:
    """Return the targets as scikit-learn takes them: classes (N,), numbers (N,) or (N, T)."""
    flat = targets.cpu().reshape(len(targets), -1)
    y: np.ndarray = (flat.long() if form.n_classes else flat.double()).numpy()
    return y[:, 0] if y.shape[1] == 1 else y


@dataclass(frozen=True)
class _Table:
    """A split as one matrix (N, F) of float64: of each column its categories, or None where it is numbers.

    Integers are codes of categories, unless they are many or negative. In the matrix a category is its place among
    those of the rows that were fitted to, and NaN where it is none of them.
    """

    columns: tuple[np.ndarray | None, ...]

    @classmethod
    def of(cls, split: Split) -> "_Table":
        columns: list[np.ndarray | None] = []
        for x in split.inputs.values():
            codes = x.dtype in (torch.int16, torch.int32, torch.int64)
            for column in x.cpu().reshape(len(x), -1).T.numpy():
                found = np.unique(column) if codes else None
                few = found is not None and len(found) <= _MOST_CATEGORIES and found[0] >= 0
                columns.append(found if few else None)
        return cls(tuple(columns))

    def __call__(self, split: Split) -> np.ndarray:
        parts = [x.cpu().reshape(len(x), -1).double().numpy() for x in split.inputs.values()]
        matrix = np.concatenate(parts, 1)
        for place, known in enumerate(self.columns):
            if known is not None:
                at = np.searchsorted(known, matrix[:, place]).clip(max=len(known) - 1)
                matrix[:, place] = np.where(known[at] == matrix[:, place], at, np.nan)
        return matrix

    @property
    def is_category(self) -> list[bool]:
        return [known is not None for known in self.columns]


_Fit = Callable[[np.ndarray, np.ndarray], tuple[Any, str]]
"""Takes inputs (N, F) and targets; returns the fitted model, and what it was spared."""


def _linear(form: Form, table: _Table, seed: int) -> tuple[str, _Fit]:
    """Return a linear model of standardised numbers, the missing ones at their median, and of categories."""
    from sklearn.compose import make_column_transformer
    from sklearn.impute import SimpleImputer
    from sklearn.linear_model import LinearRegression, LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import OneHotEncoder, StandardScaler

    filled = make_pipeline(SimpleImputer(strategy="median", keep_empty_features=True), StandardScaler())
    indicators = OneHotEncoder(
        max_categories=_MOST_INDICATORS, handle_unknown="infrequent_if_exist", sparse_output=False
    )
    category = table.is_category
    prepared = make_column_transformer(
        (filled, [i for i, each in enumerate(category) if not each]),
        (indicators, [i for i, each in enumerate(category) if each]),
    )
    model = make_pipeline(prepared, LogisticRegression() if form.n_classes else LinearRegression())
    name = "logistic regression" if form.n_classes else "linear regression"
    return name, lambda x, y: (model.fit(x, y), "")


def _boosted(form: Form, table: _Table, seed: int) -> tuple[str, _Fit]:
    """Return gradient boosting by scikit-learn's own settings, but for the trees that would take more than seconds."""
    from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor

    kind = HistGradientBoostingClassifier if form.n_classes else HistGradientBoostingRegressor
    category = table.is_category
    keys = {"categorical_features": category if any(category) else None, "random_state": seed % 2**32}
    model = kind(max_iter=_FIRST_TREES, warm_start=True, **keys)

    def fit(x: np.ndarray, y: np.ndarray) -> tuple[Any, str]:
        if y.ndim > 1:
            raise Absent("it predicts one number a row")
        start = time.perf_counter()
        model.fit(x, y)
        affordable = int(_FIRST_TREES * _TREE_SECONDS / max(time.perf_counter() - start, 1e-9))
        trees = min(_TREES, max(affordable, _FIRST_TREES))
        if model.n_iter_ == _FIRST_TREES < trees:  # it has not stopped early by itself
            model.set_params(max_iter=trees)
            model.fit(x, y)
        return model, "" if trees == _TREES else f"{trees} of {_TREES} trees"

    return "HistGradientBoosting", fit


@contextmanager
def _quiet(numbers: int) -> Iterator[None]:
    """Within this scikit-learn warns of nothing, and has few threads where there is little to do."""
    from threadpoolctl import threadpool_limits

    with warnings.catch_warnings(), threadpool_limits(1 if numbers < _SMALL else 4):
        warnings.simplefilter("ignore")
        yield


def _predictor(form: Form, table: _Table, model: Any) -> Callable[[Split], Tensor]:
    def predict(rows: Split) -> Tensor:
        x = table(rows)
        with _quiet(x.size):
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
    metric.update(prediction(outputs), targets)
    return float(metric.compute())
