"""What training in stacks costs: the one place for what sizing, the pool, and padding assume of it."""

import math

import torch

STEPS_THAT_PAY = {"cpu": 10_000, "cuda": 100_000}
"""How many steps of a stack pay for compiling it, by the type of the device; elsewhere it is not worth a try.

On a CPU compiling takes some 5 s, and saves about half a millisecond a step. On CUDA, where an uncompiled step is
replayed too, it is 15 to 40 s for a quarter of a millisecond: an estimate, which benchmarks/gpu.py is to replace.
"""
SIZES = {"cpu": (1, 4, 16, 64, 256), "mps": (1, 4, 16, 64, 256), "cuda": (1, 4, 16, 64, 256, 1024, 4096)}
"""How many trials at once `stack: auto` tries, by the type of the device."""


def compile_pays(n_steps: float, device: torch.device) -> bool:
    """Whether a stack that has so many steps to do is faster if it is compiled, the time to compile it counted."""
    return n_steps >= STEPS_THAT_PAY.get(device.type, math.inf)


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
