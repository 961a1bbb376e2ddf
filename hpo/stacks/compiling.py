"""When a stack's steps are compiled: once that pays, and by one process at a time of all that need the same ones.

The others train on as they do, and find the compiled step in Inductor's cache when it is their turn.
"""

import hashlib
import math
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from hpo.stacks.cost import compile_pays, records

TIMED_STEPS = 5
"""How many steps are timed before it is decided whether to compile them."""
_LONGEST_SECONDS = 300.0
"""Who waits for a peer that compiles does not wait longer."""


class Decision:
    """Whether the steps that a stack has still to do are to be compiled."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._expected, self._timed = 0.0, list[float]()
        self._turn: FileLock | None = None
        self.waits = False
        """Whether to wait for a peer that compiles the same: where it is measured how fast compiled steps are."""
        self.left: Callable[[], float] = lambda: math.inf
        """Gives the seconds that trials may still take."""

    def expect(self, n_steps: float, capacity: int) -> bool:
        """Take note of how many steps there may be still to do; return whether they are to be compiled at once.

        That is counted where steps are recorded, and for a single member, whose result must not follow from the clock.
        """
        counted = records(self._device) or capacity == 1
        self._expected, self._timed = 0.0 if counted else n_steps, []
        return counted and compile_pays(n_steps, self._device, left=math.inf if capacity == 1 else self.left())

    def after(self, seconds: float, captured: Callable[[], tuple[str, int]]) -> bool:
        """Return whether to compile now, after a step that took so long; call `done` when that is done.

        `captured` gives the code that is to be compiled, and how many operations it has. Of a few steps the shortest
        counts; where a peer compiles the same, it is asked again after as many more.
        """
        if not self._expected:
            return False
        self._timed.append(seconds)
        self._expected -= 1
        if len(self._timed) < TIMED_STEPS:
            return False
        code, n_operations = captured()
        if not compile_pays(self._expected, self._device, min(self._timed), n_operations, self.left()):
            self._expected = 0.0
            return False
        self._timed.clear()
        if not self._take_turn(code):
            return False
        self._expected = 0.0
        return True

    def _take_turn(self, code: str) -> bool:
        key = hashlib.sha256(f"{torch.__version__}\n{code}".encode()).hexdigest()[:16]
        folder = Path(tempfile.gettempdir()) / f"hpo-compiling-{getattr(os, 'getuid', str)()}"
        turn = FileLock(folder / f"{key}.lock")
        try:
            folder.mkdir(exist_ok=True)
            turn.acquire(timeout=_LONGEST_SECONDS if self.waits else 0)
        except Timeout:
            return self.waits
        except OSError:  # where no file can be made: then each compiles for itself
            return True
        self._turn = turn
        return True

    def done(self) -> None:
        """Let a peer have its turn."""
        if self._turn is not None:
            with suppress(OSError):
                self._turn.release()
            self._turn = None
