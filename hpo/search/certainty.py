"""How sure a mean of few results is, and which of several configurations is really the best: pure arithmetic.

A configuration that was trained with n fresh seeds has n results, each of which is a number. Where each seed had a
split of its own, the splits share most of their rows: results are then more alike than independent ones, and `overlap`
(rows of validation divided by rows of train) widens what is said (Nadeau and Bengio, Machine Learning 52, 2003).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

LEVEL = 0.95
_RESAMPLES = 10_000


@dataclass(frozen=True, kw_only=True)
class Interval:
    """What the mean of all results that there could be lies within, at `LEVEL`."""

    low: float
    high: float

    @property
    def is_clear(self) -> bool:
        """Whether it is on one side of 0."""
        return self.low > 0 or self.high < 0


def mean_of(values: Sequence[float]) -> float:
    """Return the mean. Raises StatisticsError where there are no values."""
    return fmean(values)


def deviation_of(values: Sequence[float]) -> float | None:
    """Return the standard deviation of a sample; None where there are less than two values."""
    return stdev(values) if len(values) > 1 else None


def interval_of(
    values: Sequence[float], *, maximize: bool, picked_of: int = 1, overlap: float = 0.0
) -> Interval | None:
    """Return Student's interval of the mean; None where there are less than two values.

    Of the best of `picked_of` means less is to be expected than of one that was not picked: its interval reaches
    farther to the side that is worse, by Bonferroni's rule, so that it holds the true mean in `LEVEL` of cases all the
    same.
    """
    from scipy.special import stdtrit  # scipy.stats takes half a second to import

    deviation, n = deviation_of(values), len(values)
    if deviation is None:
        return None
    error, mean, tail = deviation * math.sqrt(1 / n + overlap), mean_of(values), (1 - LEVEL) / 2
    worse = error * float(stdtrit(n - 1, 1 - tail / picked_of))
    better = error * float(stdtrit(n - 1, 1 - tail))
    below, above = (worse, better) if maximize else (better, worse)
    return Interval(low=mean - below, high=mean + above)


def chances_of_best(results: Sequence[Sequence[float]], *, maximize: bool, overlap: float = 0.0) -> list[float]:
    """Return for each configuration in how many of many resamplings its mean is the best; of equals, each has a share.

    `results` are as many numbers of each configuration, of the same seeds in the same order: seeds are resampled for
    all together, as what they share (a split) is no difference. A resampled mean of n differs too little from that of
    all, by the factor sqrt(1 - 1/n), which is made up for.

    The best of several means is the best by luck, too: means are shrunk towards each other by as much as chance alone
    explains of how they differ (the empirical Bayes estimate of James and Stein). Where it explains all, no
    configuration is more likely the best than another.
    """
    import numpy as np

    values = np.asarray(results, dtype=float)
    n_configurations, n = values.shape
    if n < 2 or n_configurations < 2:
        return [1 / n_configurations] * n_configurations
    means = values.mean(1, keepdims=True)
    by_chance = (values - means - values.mean(0) + values.mean()).var(ddof=0) * n_configurations * n
    by_chance *= (1 / n + overlap) / ((n_configurations - 1) * (n - 1))
    between = float(means.var(ddof=1))
    kept = max(0.0, 1 - float(by_chance) / between) if between > 0 else 0.0
    rows = np.random.default_rng(0).integers(0, n, (_RESAMPLES, n))
    spread = (values[:, rows].mean(2) - means) * math.sqrt(n / (n - 1) * (1 + n * overlap))
    resampled = (kept * means + math.sqrt(kept) * spread) * (1 if maximize else -1)
    is_best = np.isclose(resampled, resampled.max(0), rtol=1e-12, atol=0)
    chances: list[float] = (is_best / is_best.sum(0)).mean(1).tolist()
    return chances


def interval_of_difference(by: float, without: Sequence[float]) -> Interval | None:
    """Return Student's interval of a difference that was measured on some rows; None: it cannot be said.

    `without` are the differences without each of as many groups of these rows, all of about one size: the grouped
    jackknife, which takes any metric of a whole set (Efron and Tibshirani, An Introduction to the Bootstrap, 1993,
    chapter 11). Both models were measured on the same rows, so what is hard for both makes no difference.
    """
    from scipy.special import stdtrit

    n = len(without)
    if n < 2 or not all(map(math.isfinite, (by, *without))):
        return None
    mean = mean_of(without)
    error = math.sqrt((n - 1) / n * sum((each - mean) ** 2 for each in without))
    reach = error * float(stdtrit(n - 1, 1 - (1 - LEVEL) / 2))
    return Interval(low=by - reach, high=by + reach)
