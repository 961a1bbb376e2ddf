"""The process that talks to MLflow: the trainer's own would share its interpreter's lock with MLflow's work.

It is given items on stdin, a line of JSON each, and answers on stdout: `{"log": [level, text]}` for what is to be
logged, then `{"answer": ...}`. It ends with its parent, so that no two processes ever send what one outbox holds.
"""

import json
import logging
import os
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any, TextIO

from hpo.log import shown_by, silenced
from hpo.tracking.runs import Runs

PARENT_SECONDS = 1.0
"""How often it looks for its parent, whose end of the pipe a child of that one's may hold open."""


class _ToParent(logging.Handler):
    """Hands what is logged to the parent."""

    def __init__(self, answers: TextIO) -> None:
        super().__init__()
        self._answers = answers

    def emit(self, record: logging.LogRecord) -> None:
        _write(self._answers, {"log": [record.levelno, record.getMessage()]})


def serve(config: dict[str, Any]) -> None:
    """Send whatever item comes in, until the parent closes stdin, or is gone."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # MLflow prints there
    lines: SimpleQueue[str] = SimpleQueue()
    threading.Thread(target=_listen, args=(lines,), daemon=True).start()
    threading.Thread(target=_leave_with, args=(os.getppid(),), daemon=True).start()
    runs = Runs(**config)
    with quiet(), shown_by(_ToParent(answers)):
        while True:
            _write(answers, {"answer": runs.attempt(json.loads(lines.get()))._asdict()})


def _listen(lines: "SimpleQueue[str]") -> None:
    for line in sys.stdin:
        lines.put(line)
    os._exit(0)  # amid a call, too: what has no answer is sent again by whoever adopts the outbox


def _leave_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(PARENT_SECONDS)
    os._exit(0)


def _write(file: TextIO, message: dict[str, Any]) -> None:
    try:
        file.write(json.dumps(message) + "\n")
        file.flush()
    except OSError:  # nobody listens any more
        os._exit(0)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep MLflow's and alembic's own lines (tables made, runs viewed, deprecations in their code) off the terminal."""
    with silenced("mlflow", "alembic", "mlflow.store.db.utils"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
