"""What hpo logs, written down."""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from hpo.log import shown_by


class _Texts(logging.Handler):
    def __init__(self, level: int) -> None:
        super().__init__(level)
        self.texts: list[str] = []
        self._earlier = set(threading.enumerate()) - {threading.current_thread()}

    def emit(self, record: logging.LogRecord) -> None:
        if threading.current_thread() not in self._earlier:  # an earlier test's tracker may still try to send
            self.texts.append(record.getMessage())


@contextmanager
def recorded(level: int = logging.INFO) -> Iterator[list[str]]:
    """Give the list of what is logged, from that level on, in this."""
    handler = _Texts(level)
    with shown_by(handler):
        yield handler.texts
