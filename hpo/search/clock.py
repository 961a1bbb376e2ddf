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
