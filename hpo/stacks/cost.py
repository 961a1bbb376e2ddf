"""What training in stacks costs: the one place for what sizing, the pool, and padding assume of it."""

import math
from statistics import fmean

import torch

COMPILE_SECONDS = {"cpu": 5.0, "cuda": 25.0}
"""What compiling a step costs, by the type of the device; elsewhere it is not worth a try.

On a CPU 1 to 7 s (torch 2.14, one core, 2026-11-28), of a step of up to `_USUAL` operations. On CUDA an estimate, until
a step was compiled in this process (`note_compiled`).
"""
_USUAL = 300
"""The time grows as the square of the operations: 11 and 113 s of CPU for 276 (an MLP) and 959 (TabM with embeddings),
on one and the same busy core (2026-11-29)."""
_SAVED_SHARE = 0.5
"""How much of a step compiling saves: on a CPU measured 0.55 to 0.76 for perceptrons, 0.3 for a convolution; on CUDA,
where a step that is not compiled is replayed, an estimate, until it was measured in this process (`note_saved`)."""
_TYPICAL_STEP = {"cpu": 1.5e-3, "cuda": 0.5e-3}
"""Seconds of a small stack's step that is not compiled."""
SIZES = {"cpu": (1, 4, 16, 64, 256), "mps": (1, 4, 16, 64, 256), "cuda": (1, 4, 16, 64, 256, 1024, 4096)}
"""How many trials at once `stack: auto` tries, by the type of the device."""


_compiled: dict[torch.device, list[float]] = {}
_saved: dict[torch.device, list[float]] = {}
"""What was measured of compiling in this process: the seconds that a usual step took, the shares that were saved."""
_OF_TIME = 1 / 8
"""Compiling is to take no more of the seconds that trials have: on a busy machine it takes several times as long."""


def compile_pays(
    n_steps: float,
    device: torch.device,
    step_seconds: float | None = None,
    n_operations: int = 0,
    left: float = math.inf,
) -> bool:
    """Whether a stack that has so many steps to do is faster if it is compiled, the time to compile it counted.

    `step_seconds`: how long a step takes that is not compiled, where that was measured: then what compiling costs and
    saves is as it was measured too. `n_operations`: of a step's graph, where it is known. `left`: how many seconds
    trials may still take.
    """
    seconds, share = COMPILE_SECONDS.get(device.type, math.inf), _SAVED_SHARE
    if step_seconds is None:
        step_seconds = _TYPICAL_STEP.get(device.type, 0.0)
    else:
        seconds = max(_compiled.get(device, [seconds]))
        share = fmean(_saved.get(device, [share]))
    cost = seconds * _of_usual(n_operations)
    return n_steps * share * step_seconds >= cost and _OF_TIME * left >= cost


def note_compiled(device: torch.device, seconds: float, n_operations: int) -> None:
    """Take note of how long compiling a step of so many operations took. Found in a cache it takes less."""
    _compiled.setdefault(device, []).append(seconds / _of_usual(n_operations))


def note_saved(device: torch.device, captured: float, compiled: float) -> None:
    """Take note of how many seconds a step took before and after it was compiled."""
    _saved.setdefault(device, []).append(1 - compiled / captured)


def _of_usual(n_operations: int) -> float:
    """Return how many times as long as a usual step's a step's compilation takes."""
    return max(1.0, n_operations / _USUAL) ** 2


def power_of_two(n: int) -> int:
    """Return the smallest power of two that is at least `n`, which is at least 1.

    Slots and widths are rounded up to it: so few different ones are captured or compiled, and at most half is padding.
    """
    assert n >= 1
    power: int = 1 << (n - 1).bit_length()
    return power


def slots_for(n: int, *, general: bool) -> int:
    """Return how many slots a stack of `n` members has, at least as many.

    `general`: one graph is for all numbers of two or more; then at most an eighth is padding, so that there are few
    numbers nevertheless, at each of which what is compiled is compared once.
    """
    if not general:
        return power_of_two(n)
    unit = max(1, power_of_two(n) // 16)
    return max(2, -(-n // unit) * unit)


def records(device: torch.device) -> bool:
    """Whether a stack's steps on `device` are recorded once and replayed (`hpo.stacks.recording`)."""
    return device.type == "cuda"
