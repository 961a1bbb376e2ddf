"""The time, as leases and outages read it; a test hands in one that it moves by hand."""

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Clock:
    """`monotonic` measures how long something takes; `now` is the date, seconds since 1970, which may be wrong."""

    monotonic: Callable[[], float] = time.monotonic
    now: Callable[[], float] = time.time


SYSTEM = Clock()
"""This machine's clock."""


def duration(seconds: float) -> str:
    """Return seconds as `0.4 s`, `12 s`, `3 min` or `1 h 20 min`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
