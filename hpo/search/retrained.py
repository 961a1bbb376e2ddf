"""Configurations that were trained again with fresh seeds: their means, how sure these are, and the best of them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from hpo.search.beside import Difference
from hpo.search.certainty import Interval, chances_of_best, deviation_of, interval_of, mean_of
from hpo.search.view import NO_TRIAL
from hpo.study.spec_parts import Confirm


@dataclass(frozen=True, kw_only=True)
class Result:
    """One training of a configuration: its `value` at its best `epoch` (from 0), or the `fault` by which it failed."""

    value: float | None = None
    epoch: int = 0
    fault: str | None = None

    def stored(self) -> list[Any]:
        """Return it as plain JSON."""
        return [self.value, self.epoch] if self.fault is None else [None, self.epoch, self.fault]


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """A configuration that was trained again: its trial's `number`, and the `value` that it had in the search."""

    number: int
    value: float
    results: Sequence[Result]
    """By run: one a seed, and of folds one a fold of each seed."""

    @property
    def values(self) -> list[float]:
        """The values of those that did not fail."""
        return [result.value for result in self.results if result.value is not None]

    @property
    def n_failed(self) -> int:
        return len(self.results) - len(self.values)

    @property
    def mean(self) -> float:
        return mean_of(self.values) if self.values else math.nan

    @property
    def deviation(self) -> float | None:
        """The standard deviation over runs; None where it is not known."""
        return deviation_of(self.values)

    @property
    def epoch(self) -> int:
        """The median of its runs' best epochs, counted from 0, the earlier of two."""
        epochs = sorted(result.epoch for result in self.results if result.value is not None)
        return epochs[(len(epochs) - 1) // 2] if epochs else 0


@dataclass(frozen=True, kw_only=True)
class Confirmed:
    """Configurations that were trained again with fresh seeds, the best mean first."""

    configurations: Sequence[Configuration]
    how: Confirm
    overlap: float
    """Rows of validation divided by rows of train where runs have splits of their own; else 0."""
    maximize: bool
    default: Configuration | None = None
    """The default configuration, trained with the same seeds; it is among `configurations` where it was one of the
    best. None: it was not trained."""

    @property
    def winner(self) -> Configuration:
        return self.configurations[0]

    @cached_property
    def interval(self) -> Interval | None:
        """Of the winner's mean, at 95%; None where there is only one result."""
        return interval_of(
            self.winner.values, maximize=self.maximize, picked_of=len(self.configurations), overlap=self.overlap
        )

    @cached_property
    def chances(self) -> list[float]:
        """For each configuration, how likely it is really the best; 0 for one that has failed in a run."""
        whole = [each.values if not each.n_failed else None for each in self.configurations]
        compared = [values for values in whole if values]
        found = iter(chances_of_best(compared, maximize=self.maximize, overlap=self.overlap) if compared else ())
        return [next(found) if values else 0.0 for values in whole]

    @property
    def search_best(self) -> Configuration:
        """The configuration that was the best of the search."""
        return (max if self.maximize else min)(self.configurations, key=lambda each: each.value)

    @property
    def optimism(self) -> float:
        """By how much the search's best value is better than the mean of that very configuration."""
        best = self.search_best
        return (best.value - best.mean) * (1 if self.maximize else -1)

    @cached_property
    def gain(self) -> Difference | None:
        """By how much the winner's mean is better than the default configuration's, seed by seed.

        None: the default was not trained, or failed, or is itself the winner.
        """
        default, sign = self.default, 1 if self.maximize else -1
        if default is None or self.is_default:
            return None
        pairs = zip(self.winner.results, default.results, strict=True)
        gains = [sign * (a.value - b.value) for a, b in pairs if a.value is not None and b.value is not None]
        if not gains:
            return None
        interval = interval_of(gains, maximize=True, picked_of=len(self.configurations), overlap=self.overlap)
        return Difference(by=mean_of(gains), interval=interval)

    @property
    def is_default(self) -> bool:
        """Whether the winner is the default configuration."""
        return self.default is not None and self.default.number == self.winner.number

    def as_dict(self) -> dict[str, Any]:
        """Return all of it as plain values; scripts rely on the keys."""
        winner, interval = self.winner, self.interval
        return {
            "number": winner.number,
            "mean": winner.mean,
            "std": winner.deviation,
            "interval": None if interval is None else [interval.low, interval.high],
            "chance_of_best": self.chances[0],
            "optimism": self.optimism,
            "search_best": self.search_best.number,
            "search_value": self.search_best.value,
            "how": self.how.model_dump(),
            "default": self._default_as_dict(),
            "configurations": [
                {
                    "number": each.number,
                    "search_value": each.value,
                    "mean": each.mean,
                    "std": each.deviation,
                    "values": each.values,
                    "n_failed": each.n_failed,
                    "chance_of_best": chance,
                }
                for each, chance in zip(self.configurations, self.chances, strict=True)
            ],
        }

    def _default_as_dict(self) -> dict[str, Any] | None:
        default, gain = self.default, self.gain
        if default is None:
            return None
        return {
            "number": None if default.number == NO_TRIAL else default.number,
            "mean": default.mean,
            "std": default.deviation,
            "values": default.values,
            "n_failed": default.n_failed,
            "gain": None if gain is None else gain.as_dict(),
        }
