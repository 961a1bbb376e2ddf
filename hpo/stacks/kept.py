"""What an objective's own code keeps in the objective while a trial trains: trials at once would share it."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hpo.stacks.kinds import PLAIN
from hpo.study.data import Split
from hpo.study.objective import Objective, Params
from hpo.training.evaluation import in_full
from hpo.training.faults import TrialError
from hpo.training.stack import Member, Task


def kept_in_objective(task: Task, one: Params, other: Params, example: Split) -> list[str]:
    """Return which attributes of the objective two trials leave there as something else, by `build` or by `loss`.

    The loss of a trial that trains beside others would read those of the trial that was built last. The objective is
    left as it was.
    """
    before = dict(vars(task.objective))
    try:
        return sorted(_kept(task, one, other, example))
    except (TrialError, RuntimeError, MemoryError):  # said where the network is trained, and ends that trial alone
        return []
    finally:
        vars(task.objective).clear()
        vars(task.objective).update(before)


def _kept(task: Task, one: Params, other: Params, example: Split) -> set[str]:
    task.drawn(Member(number=-1, seed=0, params=dict(one)))
    first = _seen(task.objective)
    network = task.drawn(Member(number=-1, seed=1, params=dict(other))).to(task.device).eval()
    second = _seen(task.objective)
    with torch.no_grad(), task.guarding(), task.autocast():
        outputs = in_full(network(*example.inputs.values()))
        task.objective.loss(outputs, example.targets, dict(other))
    return _differing(first, second) | _differing(second, _seen(task.objective))


def _seen(objective: Objective) -> dict[str, tuple[Any, Any]]:
    """Return the attributes, held so that none of them gives its place in memory to another, and how they are now."""
    return {name: (value, _state(value)) for name, value in vars(objective).items()}


def _state(value: Any) -> Any:
    if isinstance(value, PLAIN):
        return repr(value)
    return value._version if isinstance(value, Tensor) and not value.is_inference() else None


def _differing(before: Mapping[str, tuple[Any, Any]], after: Mapping[str, tuple[Any, Any]]) -> set[str]:
    found = set()
    for name, (value, state) in after.items():
        old, old_state = before.get(name, (None, None))
        is_same = state == old_state and (isinstance(value, PLAIN) or value is old)
        if not is_same:
            found.add(name)
    return found
