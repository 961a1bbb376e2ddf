"""One searched parameter: its Optuna distribution, when it applies, which values it takes."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from hpo.study.ranges import Categorical, FloatRange, IntRange, Searched

RANGE = "range"
"""The choice of `<name>:or` that stands for a value from the range."""


@dataclass(frozen=True, kw_only=True)
class Dimension:
    """One searched parameter, with the condition under which it is asked for."""

    name: str
    searched: Searched

    @property
    def distribution(self) -> BaseDistribution:
        s = self.searched
        if isinstance(s, Categorical):
            return CategoricalDistribution(s.choices)
        if isinstance(s, IntRange):
            return IntDistribution(s.low, int(top_of(s)), log=s.log, step=s.step or 1)
        return FloatDistribution(s.low, top_of(s), log=s.log, step=s.step)

    @property
    def branch(self) -> CategoricalDistribution | None:
        """The distribution of `<name>:or`, where there is an `or`."""
        otherwise = None if isinstance(self.searched, Categorical) else self.searched.otherwise
        return None if otherwise is None else CategoricalDistribution((otherwise, RANGE))

    @property
    def branch_name(self) -> str:
        return f"{self.name}:or"

    def applies(self, params: Mapping[str, Any]) -> bool:
        """Whether `params`, which hold all that this one depends on, meet its condition."""
        return all(name in params for name in self.searched.when) and self.meets(params)

    def meets(self, params: Mapping[str, Any]) -> bool:
        """Whether `params`, which may lack some that this one depends on, contradict no part of its condition."""
        when = self.searched.when.items()
        return all(any(same(params[name], value) for value in values) for name, values in when if name in params)

    def condition(self) -> str:
        """Return when the parameter is asked for, as a person writes it down; empty: always."""
        conditions = (f"{name} is {' or '.join(map(str, values))}" for name, values in self.searched.when.items())
        return f"when {' and '.join(conditions)}" if self.searched.when else ""

    def takes(self, value: Any) -> bool:
        """Whether `value` is one this parameter can have."""
        s = self.searched
        if isinstance(s, Categorical):
            return any(same(value, choice) for choice in s.choices)
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        if s.otherwise is not None and value == s.otherwise:
            return True
        if not s.low <= value <= s.high or (isinstance(s, IntRange) and value != int(value)):
            return False
        steps = (value - s.low) / s.step if s.step else 0.0
        return math.isclose(steps, round(steps), abs_tol=1e-6)

    @property
    def n_values(self) -> int | None:
        """How many values there are, or None where there is no end of them."""
        s = self.searched
        if isinstance(s, Categorical):
            return len(s.choices)
        if s.step is None and (s.log or isinstance(s, FloatRange)):
            return None
        low, high, step = (Decimal(str(x)) for x in (s.low, s.high, s.step or 1))
        return int((high - low) // step) + 1 + (s.otherwise is not None)

    def values(self) -> list[Any] | None:
        """Return all values, or None where there is no end of them."""
        s = self.searched
        if isinstance(s, Categorical):
            return list(s.choices)
        if isinstance(s, IntRange) and not s.log:
            values: list[Any] = list(range(s.low, s.high + 1, s.step or 1))
        elif isinstance(s, FloatRange) and s.step is not None:
            low, top, step = (Decimal(str(x)) for x in (s.low, top_of(s), s.step))  # 0.1 + 2 * 0.1 is more than 0.3
            values = [float(low + i * step) for i in range(int((top - low) // step) + 1)]
        else:
            return None
        return values if s.otherwise is None else [s.otherwise, *values]

    def describe(self) -> str:
        """Return the parameter as a person writes it down: `1e-05 .. 0.1, log`."""
        s = self.searched
        if isinstance(s, Categorical):
            text = " | ".join(str(choice) for choice in s.choices)
        else:
            text = f"{s.low:g} .. {s.high:g}" + (f", step {s.step:g}" if s.step else "") + (", log" if s.log else "")
            text += "" if s.otherwise is None else f", or {s.otherwise:g}"
        return text + (f"  {self.condition()}" if s.when else "")


def same(left: Any, right: Any) -> bool:
    """Whether two scalars are equal, `true` and 1 told apart, and 3 steps of 0.1 being 0.3."""
    if isinstance(left, bool) != isinstance(right, bool):
        return False
    if isinstance(left, float) and isinstance(right, int | float):
        return math.isclose(left, right, rel_tol=1e-9, abs_tol=1e-15)
    return bool(left == right)


def top_of(searched: FloatRange | IntRange) -> float:
    """Return the largest value that steps from `low` reach; Optuna takes it itself, but warns each time."""
    if not searched.step:
        return searched.high
    low, high, step = (Decimal(str(x)) for x in (searched.low, searched.high, searched.step))
    return float(low + (high - low) // step * step)
