"""A connection to PostgreSQL that does not wait for ever. Imported only where there is one: psycopg takes its time."""

import time
from collections.abc import Generator
from typing import Any

import psycopg
from psycopg import waiting

from hpo.stopping import ANSWER_SECONDS


class NoAnswer(psycopg.OperationalError):
    """PostgreSQL has sent nothing for `ANSWER_SECONDS`."""


class Impatient(psycopg.Connection[Any]):
    """A connection that closes itself where the server sends nothing for `ANSWER_SECONDS`, and raises NoAnswer."""

    def wait(self, gen: Any, interval: float = 0.1, timeout: float | None = None) -> Any:
        """Do what psycopg's own does. Ctrl-C closes the connection too: to cancel would be to wait for the server."""
        try:
            return waiting.wait(_listening(gen), self.pgconn.socket, interval=interval)
        except (NoAnswer, KeyboardInterrupt):
            self.close()
            raise


def _listening(gen: Generator[Any, Any, Any]) -> Generator[Any, Any, Any]:
    """Pass on what psycopg's `gen` waits for; it is sent None each `interval` in which nothing came."""
    heard = time.monotonic()
    try:
        wanted = next(gen)
        while True:
            ready = yield wanted
            if ready:
                heard = time.monotonic()
            elif time.monotonic() - heard > ANSWER_SECONDS:
                raise NoAnswer(f"PostgreSQL has sent nothing for {ANSWER_SECONDS:g} s")
            wanted = gen.send(ready)
    except StopIteration as done:
        return done.value
