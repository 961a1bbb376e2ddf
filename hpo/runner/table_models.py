"""scikit-learn's linear model and gradient boosting of a table, in about as many seconds as they may take."""

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hpo.light import lightly
from hpo.study.data import Split

_MOST_CATEGORIES = 254
"""scikit-learn's gradient boosting takes 255 bins, one of them for missing values."""
MOST_INDICATORS = 20
"""For so many categories of a column the linear model has a weight each; rarer ones share one."""
_TREES, _STEPS, _SECONDS = 100, 100, 2.0
"""Trees, and steps of the logistic regression, at the most; and about how long each of the two may take."""
_SMALL = 1_000_000
"""Below so many numbers, threads wait for each other longer than they work."""


class Absent(Exception):
    """Why something cannot be had, in one line."""


@dataclass(frozen=True)
class Table:
    """A split as one matrix (N, F) of float64: of each column its categories, or None where it is numbers.

    Integers are codes of categories, unless they are many or negative. In the matrix a category is its place among
    those of the rows that were fitted to, and NaN where it is none of them.
    """

    columns: tuple[np.ndarray | None, ...]

    @classmethod
    def of(cls, split: Split) -> "Table":
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


Fit = Callable[[np.ndarray, np.ndarray], tuple[Any, str]]
"""Takes inputs (N, F) and targets; returns the fitted model, and what it was spared."""


def linear(table: Table, seed: int, *, of_classes: bool) -> tuple[str, Fit]:
    """Return a linear model of standardised numbers, the missing ones at their median, and of categories."""
    with lightly("sklearn"):
        from sklearn.compose import make_column_transformer
        from sklearn.impute import SimpleImputer
        from sklearn.linear_model import LinearRegression, LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import OneHotEncoder, StandardScaler

    filled = make_pipeline(SimpleImputer(strategy="median", keep_empty_features=True), StandardScaler())
    indicators = OneHotEncoder(
        max_categories=MOST_INDICATORS, handle_unknown="infrequent_if_exist", sparse_output=False
    )
    category = table.is_category
    prepared = make_column_transformer(
        (filled, [i for i, each in enumerate(category) if not each]),
        (indicators, [i for i, each in enumerate(category) if each]),
    )
    if not of_classes:
        model = make_pipeline(prepared, LinearRegression())
        return "linear regression", lambda x, y: (model.fit(x, y), "")

    def fit(x: np.ndarray, y: np.ndarray) -> tuple[Any, str]:
        logistic = LogisticRegression(max_iter=_STEPS // 10, warm_start=True)
        start, ready = time.thread_time(), prepared.fit_transform(x)
        for done in range(10):
            logistic.fit(ready, y)
            spent = time.thread_time() - start
            if logistic.n_iter_.max() < _STEPS // 10:
                break  # it has converged
            if spent * (done + 2) / (done + 1) > _SECONDS and done < 9:
                return make_pipeline(prepared, logistic), "not converged"
        return make_pipeline(prepared, logistic), ""

    return "logistic regression", fit


def boosted(table: Table, seed: int, *, of_classes: bool) -> tuple[str, Fit]:
    """Return gradient boosting by scikit-learn's own settings, but for the trees that would take more than seconds."""
    with lightly("sklearn"):
        from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor

    kind = HistGradientBoostingClassifier if of_classes else HistGradientBoostingRegressor
    category = table.is_category
    keys = {"categorical_features": category if any(category) else None, "random_state": seed % 2**32}
    model = kind(warm_start=True, **keys)

    def fit(x: np.ndarray, y: np.ndarray) -> tuple[Any, str]:
        if y.ndim > 1:
            raise Absent("it predicts one number a row")
        spent, trees, each = 0.0, 0, 0.0
        for most in (1, 9, _TREES - 10):
            more = min(most, int((_SECONDS - spent) / each)) if each else most
            if more < 1:
                break
            start = time.thread_time()  # other processes take no time of this
            model.set_params(max_iter=trees + more)
            model.fit(x, y)
            took = max(time.thread_time() - start, 1e-9)
            spent, trees, each = spent + took, trees + more, took / more
            if model.n_iter_ < trees:
                return model, ""  # it has stopped early by itself
        return model, "" if trees == _TREES else f"{trees} of {_TREES} trees"

    return "HistGradientBoosting", fit


@contextmanager
def quiet(numbers: int) -> Iterator[None]:
    """Within this scikit-learn warns of nothing, and has few threads where there is little to do."""
    from threadpoolctl import threadpool_limits

    with warnings.catch_warnings(), threadpool_limits(1) if numbers < _SMALL else nullcontext():
        warnings.simplefilter("ignore")
        yield
