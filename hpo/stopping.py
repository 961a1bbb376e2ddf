"""How a person, a scheduler or a container's manager stops a process: Ctrl-C and SIGTERM, once or twice."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager


class Stop:
    """Whether the user has asked to stop (Ctrl-C, SIGTERM): a worker then finishes its epoch, if it can in time."""

    SECONDS = 20.0
    """How long an epoch may still take: Slurm and Kubernetes wait 30 s before they kill."""

    def __init__(self) -> None:
        self._asked: float | None = None

    def __call__(self) -> bool:
        return self._asked is not None

    def overdue(self) -> bool:
        return self._asked is not None and time.monotonic() - self._asked > self.SECONDS

    def ask(self, number: int, frame: object) -> None:
        """Take a signal; the second one stops at once."""
        if self._asked is not None:
            raise KeyboardInterrupt
        self._asked = time.monotonic()


@contextmanager
def signals() -> Iterator[Stop]:
    """Have Ctrl-C and SIGTERM ask to stop."""
    stop = Stop()
    before = {number: signal.signal(number, stop.ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
