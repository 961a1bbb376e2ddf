"""What training in stacks costs: the one place for what sizing, the pool, and padding assume of it."""

import torch

STEPS_THAT_PAY = 10_000
"""How many steps of a stack pay for compiling it: that takes some 5 s, and saves about half a millisecond a step."""


def compile_pays(n_steps: float) -> bool:
    """Whether a stack that has so many steps to do is faster if it is compiled, the time to compile it counted."""
    return n_steps >= STEPS_THAT_PAY


def power_of_two(n: int) -> int:
    """Return the smallest power of two that is at least `n`, which is at least 1.

    Slots and widths are rounded up to it: so few different ones are captured or compiled, and at most half is padding.
    """
    assert n >= 1
    power: int = 1 << (n - 1).bit_length()
    return power


def records(device: torch.device) -> bool:
    """Whether a stack's steps on `device` are recorded once and replayed (`hpo.stacks.recording`)."""
    return device.type == "cuda"
