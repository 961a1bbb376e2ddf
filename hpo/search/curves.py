"""A trial's learning curves as they are stored with it: plain JSON, which has no NaN and no infinity."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from optuna.trial import FrozenTrial

from hpo.search import schema
from hpo.study.value import averaged

Curves = Mapping[str, Sequence[float]]
"""Each metric's values by its name, one an epoch; NaN where an epoch did not report it."""


def curves_of(epochs: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    """Return the curves of a trial that reported these metrics, epoch by epoch."""
    names = dict.fromkeys(name for metrics in epochs for name in metrics)
    return {name: [float(metrics.get(name, math.nan)) for metrics in epochs] for name in names}


def to_json(curves: Curves) -> dict[str, list[float | str]]:
    """Return `curves` in plain JSON: what is not finite is a text (`nan`, `inf`, `-inf`)."""
    return {name: [float(x) if math.isfinite(x) else str(float(x)) for x in values] for name, values in curves.items()}


def from_json(stored: Any) -> dict[str, list[float]]:
    """Return what `to_json` was given. Raises ValueError for anything else, which others may write into the storage."""
    if not isinstance(stored, Mapping):
        raise ValueError(f"are {stored!r:.100}, not lists of numbers by name")
    curves = {}
    for name, values in stored.items():
        if not isinstance(values, list) or not all(_is_number(x) for x in values):
            raise ValueError(f"{name} is {values!r:.100}, not a list of numbers")
        curves[str(name)] = [float(x) for x in values]
    return curves


def reported(trial: FrozenTrial) -> list[float]:
    """Return what a trial has reported to Optuna, epoch by epoch (of a function: step by step)."""
    return [value for _, value in sorted(trial.intermediate_values.items())]


def steps_in(trial: FrozenTrial) -> list[int] | None:
    """Return the steps at which a plain function has reported, in order; None: they are epochs, from 0, none left out.

    A function counts as it likes: every hundredth of its steps, say, and not in their order.
    """
    steps = sorted(trial.intermediate_values)
    return None if steps == [*range(len(steps))] else steps


def where(value: str, epoch: int) -> str:
    """Return when a trial had its value, for a person: in which epoch (`epoch`, from 0), or over which epochs.

    `value` is the study's: `best`, `last` or `mean_of_K`.
    """
    first = max(0, epoch + 1 - (averaged(value) or 1))
    return f"epoch {epoch + 1}" if first == epoch else f"mean of epochs {first + 1} to {epoch + 1}"


def curves_in(trial: FrozenTrial, key: str) -> dict[str, list[float]]:
    """Return the curves that are stored of a trial; of one that has none, what it has reported, as `key`.

    They are stored when it ends: one that is running has none, nor has one that was interrupted, or of an earlier
    version. Of a function with steps of its own there is one number for each of `steps_in`. Raises ValueError for what
    hpo did not write.
    """
    stored = trial.user_attrs.get(schema.CURVES)
    curves = {key: reported(trial)} if stored is None else from_json(stored)
    return curves if steps_in(trial) is None else dict.fromkeys(curves, reported(trial))


def _is_number(x: Any) -> bool:
    return type(x) in (int, float) or x in ("nan", "inf", "-inf")
