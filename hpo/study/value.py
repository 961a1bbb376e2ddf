"""What a trial's value is: its metric in its best epoch, in its last one, or the mean over its last few."""

import re
from collections.abc import Sequence
from statistics import fmean
from typing import Any

BEST, LAST = "best", "last"
_MEAN = re.compile("mean_of_([2-9]|[1-9][0-9]{1,8})")


def check_value(value: Any) -> Any:
    """Return what the study file says as `value`. Raises ValueError."""
    if isinstance(value, str) and (value in (BEST, LAST) or averaged(value) is not None):
        return value
    raise ValueError(f"must be best, last or mean_of_K (K at least 2, such as mean_of_3), but got {value!r}")


def averaged(value: str) -> int | None:
    """Return over how many of its last epochs a trial's value is a mean; None: it is that of one epoch."""
    found = _MEAN.fullmatch(value)
    return None if found is None else int(found[1])


def too_long(value: str, epochs: int) -> str | None:
    """Return why a trial of so many epochs cannot have such a value, if so."""
    k = averaged(value)
    if k is None or k <= epochs:
        return None
    return f"must be a mean over at most {epochs} epochs, the number of `epochs`, but got {value!r}"


def value_of(curve: Sequence[float], value: str, *, maximize: bool) -> tuple[float, int]:
    """Return a trial's value, and the epoch (from 0) whose weights are the trial's.

    `curve` is its metric, epoch by epoch, of which there is at least one. A mean is over as many of the last epochs as
    there are, and belongs to none of them: the weights are those of the last.
    """
    last = len(curve) - 1
    if value == BEST:
        best = max(curve) if maximize else min(curve)
        return best, curve.index(best)
    return fmean(curve[-(averaged(value) or 1) :]), last
