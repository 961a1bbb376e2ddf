"""What a trial keeps outside of its network's tensors, which it must have again when it is resumed.

That are attributes of modules and of the objective that training changes: a count that a warm-up goes by, a list of
losses. Numbers, texts, tensors, and lists, tuples and dicts of them are kept in a checkpoint; of what else changes
nothing is known, and such a trial is resumed from scratch.
"""

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from hpo.study.objective import Objective
from hpo.training.kinds import NOT_STATE, PLAIN, state_of

OBJECTIVE = "objective"
_NETWORK = "network."


class Outside:
    """Watches what `module`, just built by `objective`, and the objective itself hold outside of tensors."""

    def __init__(self, module: nn.Module, objective: Objective) -> None:
        self._module, self._objective = module, objective
        self._before = {(path, name): (value, state_of(value)) for path, name, value in self._attributes()}

    def _holders(self) -> dict[str, dict[str, Any]]:
        modules = {f"{_NETWORK}{path}": vars(each) for path, each in self._module.named_modules()}
        return {**modules, OBJECTIVE: vars(self._objective)}

    def _attributes(self) -> Iterator[tuple[str, str, Any]]:
        for path, own in self._holders().items():
            for name, value in own.items():
                cached = path == OBJECTIVE and isinstance(getattr(type(self._objective), name, None), cached_property)
                if not cached and (path == OBJECTIVE or name not in NOT_STATE):
                    yield path, name, value

    def changed(self) -> tuple[dict[str, dict[str, Any]], list[str]]:
        """Return what is something else than at first, by its holder and name, and what of it cannot be kept."""
        kept: dict[str, dict[str, Any]] = {}
        lost = []
        for path, name, value in self._attributes():
            old, state = self._before.get((path, name), (None, None))
            if state == state_of(value) and (value is old or isinstance(value, PLAIN)):
                continue
            if _can_be_kept(value):
                kept.setdefault(path, {})[name] = _copied(value, torch.device("cpu"))
            else:
                lost.append(f"{path}.{name}")
        return kept, lost

    def restore(self, kept: Mapping[str, Mapping[str, Any]], device: torch.device) -> None:
        """Set what `changed` has returned. A network that has no such part any more is left as it is."""
        holders = self._holders()
        for path, attributes in kept.items():
            for name, value in attributes.items():
                if path in holders:
                    holders[path][name] = _copied(value, device)


def _can_be_kept(value: Any) -> bool:
    """Whether a checkpoint can hold a value: `torch.load(weights_only=True)` gives it back."""
    if isinstance(value, Mapping):
        return type(value) is dict and all(isinstance(key, PLAIN) and _can_be_kept(v) for key, v in value.items())
    if isinstance(value, list | tuple):
        return type(value) in (list, tuple) and all(map(_can_be_kept, value))
    return type(value) is Tensor or type(value) in PLAIN


def _copied(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to(device, copy=True)
    if isinstance(value, Mapping):
        return {key: _copied(each, device) for key, each in value.items()}
    return type(value)(_copied(each, device) for each in value) if isinstance(value, list | tuple) else value
