"""What hpo says while it works: its one logger, which shows no secret, and a handler set on it for a while."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from hpo.errors import masked

log = logging.getLogger("hpo")
"""A warning is what a person should act on, or know is wrong, and that it is over; all else is information."""


SHOWN = "hpo_shown"
"""The attribute of what is logged that a person sees already, in a live view: it is for a file."""


def _mask(record: logging.LogRecord) -> bool:
    record.msg, record.args = masked(record.getMessage()), ()
    return True


log.addFilter(_mask)


@contextmanager
def shown_by(handler: logging.Handler, unless_handled: bool = False) -> Iterator[None]:
    """Have `handler`, and no handler of the root, show what is logged from INFO on.

    With `unless_handled` only where the program has set no handlers of its own, which else decide.
    """
    if unless_handled and (log.handlers or logging.getLogger().handlers):
        yield
        return
    level, propagates = log.level, log.propagate
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False  # each text is shown once
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        log.propagate = propagates


@contextmanager
def silenced(*names: str, level: int = logging.CRITICAL) -> Iterator[None]:
    """Leave out what the loggers of other packages say below `level`: what fails is said in one line of ours."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(level)
    try:
        yield
    finally:
        for logger, before in zip(loggers, levels, strict=True):
            logger.setLevel(before)


class Once:
    """Logs `what: why`, unless the same `why` was logged by it before, of another trial, say."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def info(self, what: str, why: str) -> None:
        """Log it as information."""
        self._log(logging.INFO, what, why)

    def warning(self, what: str, why: str) -> None:
        """Log it as a warning."""
        self._log(logging.WARNING, what, why)

    def _log(self, level: int, what: str, why: str) -> None:
        if why not in self._said:
            self._said.add(why)
            log.log(level, f"{what}: {why}", stacklevel=3)
