"""A param's values as places on an axis: logarithms, choices, the value of an `or`, and none at all, each its own."""

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hpo.export.files import finite

LONGEST = 40
"""How many characters of a text of the user's a figure shows."""
HAS_NOT: Any = object()
"""In place of the value of a param that a trial does not have; None is a value as any other."""
_TICKS = 6
_BESIDE = 0.12
"""How far below a range, as a share of it, stands what is not within it."""


def text(value: Any) -> str:
    """Return a text of the user's as plotly shows it: its own small HTML in it is no HTML, and it is cut."""
    whole = f"{value:g}" if isinstance(value, float) else str(value)
    cut = whole if len(whole) <= LONGEST else f"{whole[: LONGEST - 1]}…"
    return html.escape(" ".join(cut.split()), quote=False)


@dataclass(frozen=True)
class Axis:
    """An axis of one param: `place` says where a value stands, `ticks` what is written where."""

    name: str
    low: float
    high: float
    log: bool
    choices: Mapping[str, int]
    """Of a categorical param: the place of each choice, by its `repr`."""
    beside: str | None
    """What is written for values outside of the range: those of an `or`."""
    gaps: bool
    """Whether some trials do not have the param."""

    @property
    def numeric(self) -> bool:
        return not self.choices

    def place(self, value: Any) -> float:
        """Return where a value stands; `HAS_NOT` stands below all others."""
        if value is HAS_NOT:
            return self._below(2 if self.beside is not None else 1)
        if self.choices:
            return float(self.choices.get(repr(value), len(self.choices)))
        number = _number(value)
        if number is None or not self.within(value):
            return self._below(1)
        return math.log10(number) if self.log else number

    def within(self, value: Any) -> bool:
        """Whether a value is a number of the range, not a choice, nor that of an `or`."""
        number = _number(value)
        if not self.numeric or number is None or (self.log and number <= 0):
            return False
        place, slack = math.log10(number) if self.log else number, 1e-9 * (self.high - self.low)
        return self.low - slack <= place <= self.high + slack

    def ticks(self) -> tuple[list[float], list[str]]:
        """Return the places that are marked, and what is written there."""
        if self.choices:
            places, labels = [float(i) for i in range(len(self.choices))], [text(label) for label in self._labels()]
        else:
            places = _decades(self.low, self.high) if self.log else _round(self.low, self.high)
            labels = [f"{10**place:.4g}" if self.log else f"{place:.6g}" for place in places]
        if self.beside is not None:
            places, labels = [self._below(1), *places], [text(self.beside), *labels]
        if self.gaps:
            places, labels = [self.place(HAS_NOT), *places], ["none", *labels]
        return places, labels

    def ends(self) -> tuple[float, float]:
        """Return the places between which everything stands, with some room."""
        room = 0.04 * (self.high - self.low) if self.numeric else 0.4
        steps = (self.beside is not None) + self.gaps
        return (self._below(steps) if steps else self.low) - room, self.high + room

    def _labels(self) -> list[str]:
        """Return the choices, texts without their quotes unless they would look like another one: 1 and '1'."""
        plain = [_unrepr(choice) for choice in self.choices]
        return [label if plain.count(label) == 1 else choice for label, choice in zip(plain, self.choices, strict=True)]

    def _below(self, steps: int) -> float:
        return self.low - steps * (_BESIDE * (self.high - self.low) if self.numeric else 1.0)


def axis_of(name: str, known: Mapping[str, Any], values: Sequence[Any]) -> Axis:
    """Return the axis of a param; `known` is its distribution (`Facts.distributions`), `values` those of the trials.

    A trial that does not have the param has `HAS_NOT` in its place.
    """
    have = [value for value in values if value is not HAS_NOT]
    gaps = len(have) < len(values)
    if "choices" in known or "low" not in known:
        options = [*known.get("choices", ()), *have]
        choices = {each: i for i, each in enumerate(dict.fromkeys(map(repr, options)))}
        return Axis(name, 0.0, float(max(len(choices) - 1, 1)), False, choices or {"": 0}, None, gaps)
    low, high = float(known["low"]), float(known["high"])
    log = bool(known.get("log")) and low > 0
    if log:
        low, high = math.log10(low), math.log10(high)
    if not high > low:  # a range of one value
        low, high = low - 0.5, high + 0.5
    axis = Axis(name, low, high, log, {}, None, gaps)
    outside = next((value for value in have if not axis.within(value)), HAS_NOT)
    beside = None if outside is HAS_NOT else text(known.get("otherwise", outside))
    return Axis(name, low, high, log, {}, beside, gaps)


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    number: float | None = finite(float(value))
    return number


def _unrepr(choice: str) -> str:
    quoted = len(choice) > 1 and choice[0] == choice[-1] and choice[0] in "'\""
    return choice[1:-1] if quoted else choice


def _round(low: float, high: float) -> list[float]:
    """Return a few round numbers between two."""
    rough = (high - low) / _TICKS
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * k for k in (1, 2, 5, 10) if unit * k >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def _decades(low: float, high: float) -> list[float]:
    """Return the logarithms of a few round numbers between two logarithms."""
    whole = range(math.floor(low), math.ceil(high) + 1)
    digits = (1,) if high - low > 2.5 else (1, 2, 5)
    every = max(1, round((high - low) / _TICKS))
    places = [i + math.log10(k) for i in whole for k in digits if i % every == 0]
    return [place for place in places if low - 1e-9 <= place <= high + 1e-9] or [low, high]
