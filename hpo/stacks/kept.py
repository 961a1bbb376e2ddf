"""What an objective's own code keeps while a trial trains, outside of its network: trials at once would share it.

That is in the objective, in what it holds, in its class, or in globals that its methods name.
"""

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch

from hpo.study.data import Split
from hpo.study.objective import Objective, Params
from hpo.training.evaluation import in_full
from hpo.training.faults import TrialError
from hpo.training.kinds import NOT_READ, PLAIN, state_of
from hpo.training.outside import own_classes
from hpo.training.stack import Member, Task


def kept_in_objective(task: Task, one: Params, other: Params, example: Split) -> list[str]:
    """Return what two trials leave as something else, by `build` or by `loss`: `self.NAME`, `CLASS.NAME`.

    The loss of a trial that trains beside others would read that of the trial that was built last. A method is named
    for a global that it reads. The objective and its classes have their attributes of before at the end.
    """
    own = vars(task.objective)
    before, of_classes = dict(own), [(cls, dict(vars(cls))) for cls in own_classes(task.objective)]
    try:
        return sorted(_kept(task, one, other, example))
    except (TrialError, RuntimeError, MemoryError):  # said where the network is trained, and ends that trial alone
        return []
    finally:
        own.clear()
        own.update(before)
        for cls, attributes in of_classes:
            _restore(cls, attributes)


def _restore(cls: type, attributes: Mapping[str, Any]) -> None:
    with suppress(AttributeError, TypeError):  # what cannot be set was not set by the trial either
        for name in vars(cls).keys() - attributes.keys():
            delattr(cls, name)
        for name, value in attributes.items():
            if vars(cls)[name] is not value:
                setattr(cls, name, value)


def _kept(task: Task, one: Params, other: Params, example: Split) -> set[str]:
    task.drawn(Member(number=-1, seed=0, params=dict(one)))
    first = _seen(task.objective)
    network = task.drawn(Member(number=-1, seed=1, params=dict(other))).to(task.device).eval()
    second = _seen(task.objective)
    with torch.enable_grad(), task.guarding(), task.autocast():  # as in training: what is counted may be so there only
        outputs = in_full(network(*example.inputs.values()))
        task.objective.loss(outputs, example.targets, dict(other))
    return _differing(first, second) | _differing(second, _seen(task.objective))


def _seen(objective: Objective) -> dict[str, tuple[Any, Any]]:
    """Return the attributes, held so that none of them gives its place in memory to another, and how they are now."""
    several = {f"self.{name}": value for name, value in vars(objective).items()}
    for cls in own_classes(objective):
        several |= {f"{cls.__name__}.{name}": value for name, value in vars(cls).items() if name not in NOT_READ}
    return {name: (value, state_of(value)) for name, value in several.items()}


def _differing(before: Mapping[str, tuple[Any, Any]], after: Mapping[str, tuple[Any, Any]]) -> set[str]:
    found = set()
    for name, (value, state) in after.items():
        old, old_state = before.get(name, (None, None))
        is_same = state == old_state and (isinstance(value, PLAIN) or value is old)
        if not is_same:
            found.add(name)
    return found
