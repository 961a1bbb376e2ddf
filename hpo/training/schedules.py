"""Learning rate schedules as closed forms: what the learning rate is multiplied by at a step.

The same formula serves one trial (all steps at once, a table) and a stack (one step of K members, each with a schedule
of its own). Each is torch.optim.lr_scheduler's class of that name, stepped after every batch:

    constant    1
    cosine      CosineAnnealingLR(T_max=n_steps)
    one_cycle   OneCycleLR(learning_rate, n_steps, pct_start=schedule_pct_start, cycle_momentum=False)
    step        StepLR(step_size=schedule_step_size epochs, gamma=schedule_gamma)
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

NAMES = ("constant", "cosine", "one_cycle", "step")
DEFAULTS: Mapping[str, Any] = {
    "schedule": "constant",
    "schedule_pct_start": 0.3,
    "schedule_step_size": 10,
    "schedule_gamma": 0.1,
}
"""The hyperparameters of all schedules; `schedule_step_size` is in epochs."""
_DIV, _FINAL_DIV = 25.0, 1e4  # OneCycleLR's own div_factor and final_div_factor


def hyperparameters(params: Mapping[str, Any]) -> dict[str, float]:
    """Return a trial's schedule as numbers, `schedule` as its index in NAMES."""
    values = {name: params.get(name, default) for name, default in DEFAULTS.items()}
    return {name: float(value) for name, value in (values | {"schedule": NAMES.index(values["schedule"])}).items()}


def factor(hyper: Mapping[str, Any], i: Tensor, steps_per_epoch: int, epochs: int) -> Tensor:
    """Return the factor of step `i`, counted from 0; `hyper` (numbers or tensors) and `i` are broadcast."""
    n_steps = steps_per_epoch * epochs
    cosine = _anneal(1.0, 0.0, i / n_steps)
    peak = hyper["schedule_pct_start"] * n_steps - 1
    rise = _anneal(1 / _DIV, 1.0, i / _positive(peak))
    fall = _anneal(1.0, 1 / _DIV / _FINAL_DIV, (i - peak) / _positive(n_steps - 1 - peak))
    one_cycle = torch.where(i <= peak, rise, fall)
    # single precision has 0.3 epochs of 8 steps each a little longer: their end is one nevertheless
    ended = torch.floor(i / (hyper["schedule_step_size"] * steps_per_epoch) * (1 + 3e-7))
    step = hyper["schedule_gamma"] ** ended
    which = hyper["schedule"]
    if not isinstance(which, Tensor):
        which = i.new_tensor(which)
    forms = (torch.ones_like(i), cosine, one_cycle, step * torch.ones_like(i))
    result = forms[0]
    for index, form in enumerate(forms[1:], start=1):
        result = torch.where(which == index, form, result)
    return result


def table(params: Mapping[str, Any], steps_per_epoch: int, epochs: int) -> list[float]:
    """Return one trial's factors of all its steps."""
    i = torch.arange(steps_per_epoch * epochs, dtype=torch.float64)
    return factor(hyperparameters(params), i, steps_per_epoch, epochs).tolist()


def _anneal(start: float, end: float, share: Any) -> Any:
    return end + (start - end) / 2 * (1 + torch.cos(math.pi * share))


def _positive(length: Any) -> Any:
    """Return `length`, kept from being zero where a phase has no steps."""
    return length.clamp(min=1e-9) if isinstance(length, Tensor) else max(length, 1e-9)


def rates(params: Mapping[str, Any], steps_per_epoch: int, epochs: int) -> list[float] | None:
    """Return a trial's learning rate at the last step of each epoch; None: it stays what it is in the params."""
    if params.get("schedule", "constant") == "constant":
        return None
    last = torch.arange(1, epochs + 1, dtype=torch.float64) * steps_per_epoch - 1
    factors = factor(hyperparameters(params), last, steps_per_epoch, epochs)
    found: list[float] = (params["learning_rate"] * factors).tolist()
    return found
