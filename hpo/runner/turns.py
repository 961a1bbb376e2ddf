"""What one process at a time does in a study's folder: the others wait, say for what, and end when asked to stop."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from hpo.errors import Interrupted
from hpo.log import log

_LOOK_SECONDS = 0.5
"""How often to ask whether to stop meanwhile."""
_SAY_SECONDS = 2.0
"""A wait that is shorter is not worth a line: peers that end together take turns within milliseconds."""


def take_turn(folder: Path, what: str, stopping: Callable[[], bool]) -> AbstractContextManager[Any]:
    """Return the lock of `folder`, held, once no other process has it; give it to `with`.

    `what` is what the other process does, for a person. Raises Interrupted once `stopping` says so; OSError where no
    lock can be made.
    """
    lock = FileLock(folder.with_name(f".{folder.name}.lock"))
    start, is_said = time.monotonic(), False
    while True:
        try:
            return lock.acquire(timeout=_LOOK_SECONDS)
        except Timeout:  # which is an OSError
            if stopping():
                raise Interrupted(f"interrupted while another process {what}; run the same command again") from None
        if not is_said and time.monotonic() - start >= _SAY_SECONDS:
            log.info(f"another process {what}; waiting until it is done")
            is_said = True
