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

from hpo.stacks.cost import compile_pays, note_saved

Captured = Callable[[], tuple[str, int]]
"""Gives the code of a step that is to be compiled, and how many operations it has."""
TIMED_STEPS = 5
"""How many steps are timed before it is decided whether to compile them."""
_LONGEST_SECONDS = 300.0
"""Who waits for a peer that compiles does not wait longer."""


class Decision:
    """Whether the steps that a stack has still to do are to be compiled."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._expected, self._timed = 0.0, list[float]()
        self._form: tuple[int, bool] | None = None
        self._known: tuple[int, float] | None = None
        """How long a step of so many slots takes that is recorded, and not compiled."""
        self._turn: FileLock | None = None
        self.waits = False
        """Whether to wait for a peer that compiles the same: where it is measured how fast compiled steps are."""
        self.left: Callable[[], float] = lambda: math.inf
        """Gives the seconds that trials may still take."""

    def expect(self, n_steps: float, capacity: int, captured: Captured) -> bool:
        """Take note of how many steps there may be still to do; return whether they are to be compiled at once.

        That is counted for a single member, whose result must not follow from the clock; others' steps are timed.
        """
        self.done()
        self._expected, self._timed = 0.0 if capacity == 1 else n_steps, []
        if capacity == 1:
            return compile_pays(n_steps, self._device)
        return self._known is not None and self._known[0] == capacity and self._decide(self._known[1], captured)

    def after(self, seconds: float, captured: Captured) -> bool:
        """Return whether to compile now, after a step that took so long; call `done` when that is done.

        Of a few steps the shortest counts; where a peer compiles the same, it is asked again after as many more.
        """
        if not self._expected:
            return False
        self._timed.append(seconds)
        self._expected -= 1
        if len(self._timed) < TIMED_STEPS:
            return False
        seconds = min(self._timed)
        self._timed.clear()
        return self._decide(seconds, captured)

    def after_epoch(self, seconds: float, n_steps: int, form: tuple[int, bool], captured: Captured) -> bool:
        """Return whether to compile now, as `after` does, where steps are recorded: a single one cannot be timed.

        `seconds`: of an epoch of `n_steps`, up to its losses. `form`: how many slots there are, and whether the step is
        compiled; the first epoch of each does not count, since the step is recorded in it.
        """
        before, self._form = self._form, form
        self._expected = max(0.0, self._expected - n_steps)
        if form != before:
            return False
        step, (n_slots, is_compiled) = seconds / n_steps, form
        if is_compiled:
            if self._known is not None and self._known[0] == n_slots:
                note_saved(self._device, self._known[1], step)
                self._known = None
            return False
        self._known = n_slots, step
        return bool(self._expected) and self._decide(step, captured)

    def _decide(self, seconds: float, captured: Captured) -> bool:
        code, n_operations = captured()
        if not compile_pays(self._expected, self._device, seconds, n_operations, self.left()):
            self._expected = 0.0
            return False
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
