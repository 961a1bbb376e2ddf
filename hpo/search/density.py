"""The density that TPE fits to trials, computed faster than Optuna does it, and to the same digits.

It is a mixture of kernels, one a trial, each a product over the params. Optuna computes each kernel at each sample and
param. Here the logarithm of a kernel of continuous params is a polynomial, so all of them are two products of matrices;
and of params with steps, kernels that are alike are computed once. `tests/test_tpe.py` compares both.
"""

from collections.abc import Callable
from typing import Any, cast

import numpy as np
from optuna.samplers._tpe.parzen_estimator import _ParzenEstimator
from optuna.samplers._tpe.probability_distributions import _BatchedCategoricalDistributions, _unique_inverse_2d

NARROW = 1e-3
"""Kernels narrower than that part of a param's range would cost digits: such a mixture is left to Optuna."""


class Density:
    """Optuna's estimator of a set of trials. With `sample` it draws as that does."""

    def __init__(self, estimator: _ParzenEstimator) -> None:
        self.sample = estimator.sample
        self._estimator = estimator
        mixture = estimator._mixture_distribution
        with np.errstate(divide="ignore"):  # of a weight of 0
            self._constant = np.log(mixture.weights)
        self._discrete: dict[int, Callable[[np.ndarray], np.ndarray]] = {}
        """By the param's place: kernels at values of it, shape (values, kernels)."""
        self._continuous: list[int] = []
        self._is_log: list[bool] = []
        continuous: list[Any] = []
        self._is_exact = all(map(_is_exact, mixture.distributions))
        if not self._is_exact:
            return
        for place, of in enumerate(mixture.distributions):
            if isinstance(of, _BatchedCategoricalDistributions):
                self._discrete[place] = _categorical(of)
            elif of.step:
                self._discrete[place] = _stepped(of)
            else:
                self._continuous.append(place)
                self._is_log.append(of.is_log)
                continuous.append(of)
        if continuous:
            self._expand(continuous)

    def _expand(self, of: list[Any]) -> None:
        """Take kernels apart into the factors of x^2 and x and a constant, with x measured from the range's middle."""
        low, high = np.array([[each.adapted_low, each.adapted_high] for each in of]).T
        place, width = (np.array([getattr(each, name) for each in of]).T for name in ("mu", "sigma"))
        mass = _ndtr((high - place) / width) - _ndtr((low - place) / width)
        self._middle = (low + high) / 2
        steep = 1 / width**2
        pull = (place - self._middle) * steep
        at_middle = -((place - self._middle) * pull) / 2 - np.log(width * mass) - np.log(2 * np.pi) / 2
        self._constant = self._constant + at_middle.sum(axis=1)
        self._square, self._linear = -steep.T / 2, pull.T

    def log_pdf(self, samples: dict[str, np.ndarray]) -> np.ndarray:
        """Return the logarithm of the density at each of the samples, given by param as Optuna stores them."""
        if not self._is_exact:
            return self._estimator.log_pdf(samples)
        values = list(samples.values())
        kernels = np.tile(self._constant, (len(values[0]), 1))
        if self._continuous:
            some = [values[place] for place in self._continuous]
            x = np.array([np.log(each) if log else each for each, log in zip(some, self._is_log, strict=True)]).T
            x = x - self._middle
            kernels += x**2 @ self._square + x @ self._linear
        for place, at in self._discrete.items():
            unique, inverse = np.unique(values[place], return_inverse=True)
            kernels += at(unique)[inverse]
        most = kernels.max(axis=1)
        most[np.isneginf(most)] = 0
        with np.errstate(divide="ignore"):
            return cast(np.ndarray, np.log(np.exp(kernels - most[:, None]).sum(axis=1)) + most)


def _is_exact(of: Any) -> bool:
    """Whether kernels are wide enough, and within the range: with a range that changes, trials may lie outside."""
    if isinstance(of, _BatchedCategoricalDistributions):
        return True
    low, high = of.adapted_low, of.adapted_high
    wide = of.step or (of.sigma >= NARROW * (high - low)).all()
    return bool(wide and ((low <= of.mu) & (of.mu <= high)).all())


def _categorical(of: Any) -> Callable[[np.ndarray], np.ndarray]:
    with np.errstate(divide="ignore"):
        logs = np.log(of.weights).T
    return lambda values: cast(np.ndarray, logs[values.astype(int)])


def _stepped(of: Any) -> Callable[[np.ndarray], np.ndarray]:
    place, width, kernels = _unique_inverse_2d(of.mu, of.sigma)
    whole = _log_mass((of.adapted_low - place) / width, (of.adapted_high - place) / width)

    def at(values: np.ndarray) -> np.ndarray:
        left, right = (values + half for half in (-of.step / 2, of.step / 2))
        if of.is_log:
            left, right = np.log(left), np.log(right)
        masses: np.ndarray = _log_mass((left[:, None] - place) / width, (right[:, None] - place) / width)
        return np.take(masses - whole, kernels, axis=1)

    return at


def _log_mass(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Return the logarithm of the normal distribution's mass between `low` and `high`; -inf beyond a float's range."""
    flipped = low > 0  # of the upper tail the mirror image, whose digits are not lost beside 1
    low, high = np.where(flipped, -high, low), np.where(flipped, -low, high)
    with np.errstate(divide="ignore"):
        return cast(np.ndarray, np.log(_ndtr(high) - _ndtr(low)))


def _ndtr(x: np.ndarray) -> np.ndarray:
    """Return the normal distribution's mass below `x`. SciPy is imported late: `hpo status` has no use for it."""
    from scipy.special import ndtr

    return cast(np.ndarray, ndtr(x))
