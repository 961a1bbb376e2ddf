"""How many trials to train at once: measured, since it depends on the network, the data and the machine.

On a CPU a stack must stay inside the cache; on a GPU it must fill it. So sizes are tried for a few steps each, from
small to large, until the time per trial no longer falls. What is too short to be worth the trying is not tried.
"""

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hpo.stack import Member, Stack, is_out_of_memory
from hpo.vmap_stack import NotStackable

SIZES = (1, 4, 16, 64, 256)
SHORT_SECONDS = 20.0
"""What takes no longer than this one at a time is trained so: to measure and to compile takes about as long."""
_WARM_UP, _STEPS = 3, 12

Batch = tuple[list[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The `capacity` to use, and why. `stack` is the one that was measured, empty again; None: train one at a time."""

    capacity: int
    why: str
    stack: Stack | None = None


def choose(make: Callable[[int], Stack], alone: Stack, member: Member, batch: Batch, n_steps: int, most: int) -> Choice:
    """Return the size of stack with the least time per trial.

    `make` gives a stack of a capacity, `alone` is the one for one trial at a time; `member` and `batch` are tried in
    them. `n_steps` are still to do, counted one trial at a time; no stack is larger than `most`.
    """
    base = seconds_per_step(alone, [member], batch)
    if base * n_steps < SHORT_SECONDS:
        return Choice(capacity=1, why=f"one trial at a time: all of it takes about {base * n_steps:.0f} s")
    best, times = Choice(capacity=1, why=""), {1: base}
    for k in itertools.takewhile(lambda size: size <= most, SIZES):
        try:
            stack = make(k)
            seconds = seconds_per_step(stack, [_copy(member, i) for i in range(k)], batch) / k
        except NotStackable as error:
            return Choice(capacity=1, why=f"one trial at a time: {error}")
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            break
        if k > 1 and seconds > 0.9 * times[best.capacity]:
            break
        if seconds < times[best.capacity]:
            times[k] = seconds
            best = Choice(capacity=k, why="", stack=stack)
    ratio = base / times[best.capacity]
    why = (
        f"{best.capacity} trials at once: {ratio:.1f} times as fast as one at a time without a compiled step (measured)"
    )
    return Choice(capacity=best.capacity, why=why, stack=best.stack)


def seconds_per_step(stack: Stack, members: list[Member], batch: Batch) -> float:
    """Return the time of one step of `stack` with `members`, who leave it again."""
    for member in members:
        stack.join(member)
    try:
        for _ in range(_WARM_UP):
            stack.step(*batch)
        _synchronize()
        start = time.perf_counter()
        for _ in range(_STEPS):
            stack.step(*batch)
        _synchronize()
        return (time.perf_counter() - start) / _STEPS
    finally:
        for member in members:
            stack.leave(member)


def _copy(member: Member, index: int) -> Member:
    return Member(number=-1 - index, seed=member.seed, params=member.params)


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
