"""How a person, a scheduler or a container's manager stops a process: Ctrl-C and SIGTERM, once or twice."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

ANSWER_SECONDS = 6.0
"""How long a storage may take to answer before it counts as away: with `Stop.SECONDS` less than 30 s."""


class Stop:
    """Whether the user has asked to stop (Ctrl-C, SIGTERM): a worker then finishes its epoch, if it can in time."""

    SECONDS = 20.0
    """How long an epoch may still take: Slurm and Kubernetes wait 30 s before they kill."""

    def __init__(self, parent: int | None = None) -> None:
        """With a `parent`, the process that has started this one, it is also asked to stop when that is gone."""
        self._asked: float | None = None
        self._parent = parent

    def __call__(self) -> bool:
        if self._asked is None and self._parent is not None and os.getppid() != self._parent:
            self._asked = time.monotonic()
        return self._asked is not None

    def overdue(self) -> bool:
        return self._asked is not None and time.monotonic() - self._asked > self.SECONDS

    def ask(self, number: int, frame: object) -> None:
        """Take a signal; the second one stops at once."""
        if self._asked is not None:
            raise KeyboardInterrupt
        self._asked = time.monotonic()


@contextmanager
def signals(parent: int | None = None) -> Iterator[Stop]:
    """Have Ctrl-C and SIGTERM ask to stop, and the death of `parent`, if there is one."""
    stop = Stop(parent)
    if threading.current_thread() is not threading.main_thread():  # only the main thread is given signals
        yield stop
        return
    before = {number: signal.signal(number, stop.ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
