"""How a person, a scheduler or a container's manager stops a process: Ctrl-C, SIGTERM, or a terminal that is closed."""

import math
import os
import signal
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

ANSWER_SECONDS = 6.0
"""How long a storage may take to answer before it counts as away: with `StopToken.SECONDS` less than 30 s."""

_HANGUP: signal.Signals | None = getattr(signal, "SIGHUP", None)
"""What comes when the terminal is closed, or its connection lost; not every system has it."""


class StopToken:
    """Whether to stop: the one thing that all who wait or train ask.

    `requested`: finish the epoch, if it can be done in time. `immediate`: stop between two batches.
    """

    SECONDS = 20.0
    """How long an epoch may still take: Slurm and Kubernetes wait 30 s before they kill."""
    END_SECONDS = 27.0
    """By when after the signal all is to be over, also what is sent at the end; the interpreter takes a second."""
    LAUNCHED_SECONDS = 24.0
    """The same of a process with a `parent`, which ends after it."""

    def __init__(self, parent: int | None = None) -> None:
        """With a `parent`, the process that has started this one, it is also asked to stop when that is gone."""
        self._asked: float | None = None
        self._parent = parent
        self.heard: Callable[[], object] = lambda: None
        """Called within the handler of the first signal: what else is to hear of it without a delay."""

    def requested(self) -> bool:
        """Whether the user has asked to stop (Ctrl-C, SIGTERM, SIGHUP)."""
        if self._asked is None and self._parent is not None and os.getppid() != self._parent:
            self._asked = time.monotonic()
        return self._asked is not None

    def immediate(self) -> bool:
        """Whether the time to finish an epoch is over, too."""
        return self._asked is not None and time.monotonic() - self._asked > self.SECONDS

    def seconds_left(self) -> float:
        """Return how long this process may still take to end; infinity where nobody has asked it to."""
        if not self.requested() or self._asked is None:
            return math.inf
        limit = self.END_SECONDS if self._parent is None else self.LAUNCHED_SECONDS
        return max(0.0, self._asked + limit - time.monotonic())

    def ask(self, number: int, frame: object) -> None:
        """Take a signal; the second one stops at once, unless it is SIGHUP: the system and a shell send one each."""
        if number == _HANGUP:
            _leave_terminal()
        if self._asked is not None and number == _HANGUP:
            return
        if self._asked is not None:
            self._asked = -math.inf
            raise KeyboardInterrupt
        self._asked = time.monotonic()
        self.heard()

    def limited(self) -> "LimitedStop":
        """Return a token that also stops at a deadline of its own."""
        return LimitedStop(self)


class LimitedStop(StopToken):
    """A token that stops when `token` does, or at its `deadline` (by time.monotonic), whichever is first."""

    def __init__(self, token: StopToken) -> None:
        super().__init__()
        self._token = token
        self.deadline = math.inf
        self.look: Callable[[], float] | None = None
        """Gives the deadline where it may change; asked at the end of epochs."""

    def out_of_time(self) -> bool:
        if self.look is not None:
            self.deadline = self.look()
        return time.monotonic() >= self.deadline

    def requested(self) -> bool:
        return self._token.requested() or self.out_of_time()

    def immediate(self) -> bool:
        return self._token.immediate() or time.monotonic() >= self.deadline

    def seconds_left(self) -> float:
        return self._token.seconds_left()


@contextmanager
def signals(parent: int | None = None) -> Iterator[StopToken]:
    """Have Ctrl-C, SIGTERM, a terminal that is closed and the death of `parent`, if there is one, ask to stop."""
    stop = StopToken(parent)
    if threading.current_thread() is not threading.main_thread():  # only the main thread is given signals
        yield stop
        return
    asking = [signal.SIGINT, signal.SIGTERM]
    if _HANGUP is not None and signal.getsignal(_HANGUP) != signal.SIG_IGN:  # `nohup` has it ignored
        asking.append(_HANGUP)
    before = {number: signal.signal(number, stop.ask) for number in asking}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def handlers_kept() -> Iterator[None]:
    """Have signals handled after this as before it, whatever a library that is started within puts in their place."""
    known = [signal.SIGINT, signal.SIGTERM, *([] if _HANGUP is None else [_HANGUP])]
    before = {number: signal.getsignal(number) for number in known}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                if handler is not None:  # else it was not set from Python, and cannot be
                    signal.signal(number, handler)


def _leave_terminal() -> None:
    """Print nowhere what would be printed on the terminal that is closed: each attempt would be an error."""
    for output in (1, 2):
        with suppress(OSError):
            if stat.S_ISCHR(os.fstat(output).st_mode):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, output)
                os.close(nowhere)
