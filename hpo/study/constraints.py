"""Constraints: what a trial must come to beside its metric, as a study file says it, `n_parameters: "<= 100000"`."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

N_PARAMETERS = "n_parameters"
"""How many trainable parameters a trial's network has; known before it is trained."""
LATENCY: Mapping[str, int] = {"latency": 1, "latency_256": 256}
"""The time that a trial's network takes for a batch, in milliseconds, by how many rows the batch has."""
OF_ANY_TRIAL = (N_PARAMETERS, *LATENCY)
"""What can be constrained of any trial whose network the engine builds, beside its metrics."""
_UNITS = {"ms": 1.0, "s": 1000.0}
_FORM = re.compile(r"(<=|>=)\s*([^\s<>=]+?)\s*(ms|s)?")


@dataclass(frozen=True, kw_only=True)
class Constraint:
    """What a `name` of a trial must be: at most `bound`, or (`is_least`) at least. A latency is in milliseconds."""

    name: str
    bound: float
    is_least: bool

    @property
    def unit(self) -> str:
        return "ms" if self.name in LATENCY else ""

    @property
    def text(self) -> str:
        """The constraint as a study file has it, `<= 100000`."""
        return f"{'>=' if self.is_least else '<='} {_plain(self.bound)}{self.unit}"

    def excess(self, value: float) -> float:
        """Return by how much a value breaks the constraint; it holds where that is 0 or less."""
        return self.bound - value if self.is_least else value - self.bound

    def violation(self, value: float) -> float:
        """Return `excess` as a part of the bound: Optuna's samplers add up those of several constraints."""
        return self.excess(value) / (abs(self.bound) or 1.0)

    def said(self, value: float) -> str:
        """Return what a value is, and by how much it breaks the constraint, if it does."""
        over = self.excess(value)
        by = f", broken by {_shown(over)}{self.unit}" if over > 0 else ""
        return f"{self.name} {_shown(value)}{self.unit} (must be {self.text}{by})"


def parse(name: str, text: Any) -> Constraint:
    """Return the constraint that a study file gives as `text` for `name`. Raises ValueError."""
    example = "<= 2ms" if name in LATENCY else "<= 100000" if name == N_PARAMETERS else ">= 0.9"
    found = _FORM.fullmatch(text.strip()) if isinstance(text, str) else None
    bound = _number(found[2]) if found else None
    if found is None or bound is None:
        raise ValueError(f'{name}: must be <= or >= and a finite number, such as "{example}", but got {text!r:.60}')
    unit = found[3]
    if name in LATENCY and unit is None:
        raise ValueError(f'{name}: must have a unit, ms or s, such as "{example}", but got {text!r:.60}')
    if name not in LATENCY and unit is not None:
        raise ValueError(f'{name}: must be a number without a unit, such as "{example}", but got {text!r:.60}')
    is_least = found[1] == ">="
    if name in OF_ANY_TRIAL and not is_least and bound <= 0:
        raise ValueError(f"{name}: is above 0 in every trial, so the constraint would never hold, but got {text!r:.60}")
    return Constraint(name=name, bound=float(f"{bound * _UNITS[unit]:.12g}") if unit else bound, is_least=is_least)


def constraints_in(texts: Any) -> dict[str, Constraint]:
    """Return constraints by name, as a study file or a storage has them; what a storage has that is none is left out.

    A study file's were checked when it was read.
    """
    found = {}
    for name, text in texts.items() if isinstance(texts, Mapping) else ():
        try:
            found[str(name)] = parse(str(name), text)
        except ValueError:
            continue
    return found


def checked(values: Any) -> dict[str, str]:
    """Return a study file's `constraints`, each in one form. Raises ValueError."""
    if not isinstance(values, Mapping):
        raise ValueError(
            f'must be a mapping of names to texts, such as {{n_parameters: "<= 100000"}}, but got {values!r:.60}'
        )
    return {str(name): parse(str(name), text).text for name, text in values.items()}


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _plain(number: float) -> str:
    """Return a number that is read back as the same one."""
    return str(int(number)) if number == int(number) and abs(number) < 1e15 else repr(number)


def _shown(number: float) -> str:
    return f"{number:,.0f}" if number == int(number) and abs(number) < 1e15 else f"{number:.4g}"
