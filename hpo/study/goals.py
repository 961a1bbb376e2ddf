"""What a study optimizes: one metric, or several, of which one leads: pruning, best epoch and best trial go by it."""

from collections.abc import Sequence
from typing import Any, Literal

Direction = Literal["minimize", "maximize"]
DIRECTIONS = ("minimize", "maximize")


def metrics_of(value: Any) -> Any:
    """Return a study file's `metric`: a name, or several as a tuple; a list of one is that one. Raises ValueError."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list | tuple) or not value or not all(isinstance(name, str) and name for name in value):
        raise ValueError(f"must be a name, or a list of names such as [accuracy, n_parameters], but got {value!r:.100}")
    if twice := [name for i, name in enumerate(value) if name in value[:i]]:
        raise ValueError(f"must name each metric once; {twice[0]} stands there twice")
    return value[0] if len(value) == 1 else tuple(value)


def directions_of(value: Any) -> Any:
    """Return a study file's `direction`: one, or several as a tuple. Raises ValueError."""
    each = value if isinstance(value, list | tuple) else (value,)
    if value is not None and not (each and all(isinstance(one, str) and one in DIRECTIONS for one in each)):
        raise ValueError(f"must be minimize or maximize, or of several metrics a list of these, but got {value!r:.100}")
    return tuple(value) if isinstance(value, list | tuple) else value


def direction_of(maximize: bool) -> Direction:
    """Return Optuna's word for a direction."""
    return "maximize" if maximize else "minimize"


def front(values: Sequence[Sequence[float]], maximize: Sequence[bool]) -> list[int]:
    """Return the indices of the points that no other one is better than (the Pareto front), in their order.

    `values` are points with a number for each metric, all finite or infinite; `maximize` says of each metric whether
    more of it is better. A point is better than another one where it is as good in each metric and better in one; of
    equal points all are on the front.
    """
    import numpy as np  # not for a command that needs no front

    signed = [tuple(-x if more else x for x, more in zip(point, maximize, strict=True)) for point in values]
    on: set[tuple[float, ...]] = set()
    found = np.empty((len(set(signed)), len(maximize)))  # these as rows: most of many thousand trials may be on it
    for point in sorted(set(signed)):  # whatever is better than a point comes before it
        if not (found[: len(on)] <= point).all(axis=1).any():
            found[len(on)] = point
            on.add(point)
    return [i for i, point in enumerate(signed) if point in on]
