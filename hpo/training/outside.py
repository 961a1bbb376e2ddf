"""What a trial keeps outside of its network's tensors, which it must have again when it is resumed.

That are attributes of modules and of the objective that training changes: a count that a warm-up goes by, a list of
losses. Numbers, texts, tensors, and lists, tuples and dicts of them are kept in a checkpoint; where something else has
changed, a generator or a criterion with buffers of its own, the trial is resumed from scratch.
"""

import hashlib
from collections import deque
from collections.abc import Hashable, Iterator, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from hpo.study.objective import Objective
from hpo.training.kinds import KNOWN, NOT_READ, NOT_STATE, PLAIN, Kinds

_OBJECTIVE, _NETWORK, _CLASS = "objective", "network.", "class "
_MANY, _MOST = 10_000, 1 << 20
"""So many values are looked into, and tensors of at most so many numbers."""


def own_classes(objective: Objective) -> list[type]:
    """Return the objective's class and those above it, below hpo's own."""
    return [cls for cls in type(objective).__mro__ if issubclass(cls, Objective) and cls is not Objective]


class Outside:
    """Watches what `module`, just built by `objective`, and the objective itself hold outside of tensors."""

    def __init__(self, module: nn.Module, objective: Objective) -> None:
        self._module, self._objective = module, objective
        self._before = {(path, name): content for path, name, _, content in self._attributes()}

    def _holders(self) -> dict[str, dict[str, Any]]:
        modules = {f"{_NETWORK}{path}": vars(each) for path, each in self._module.named_modules()}
        classes = {f"{_CLASS}{cls.__name__}": dict(vars(cls)) for cls in own_classes(self._objective)}
        return {**modules, **classes, _OBJECTIVE: vars(self._objective)}

    def _attributes(self) -> Iterator[tuple[str, str, Any, Hashable]]:
        """Give each attribute: who holds it, its name, itself, and what it holds."""
        own = {id(each) for each in self._module.modules()}  # what a checkpoint has anyway
        own |= {id(each) for each in (*self._module.parameters(), *self._module.buffers())}
        contents = _Contents(own.union(map(id, own_classes(self._objective))))
        for path, attributes in self._holders().items():
            left_out = NOT_READ if path.startswith(_CLASS) else frozenset() if path == _OBJECTIVE else NOT_STATE
            for name, value in attributes.items():
                cached = path == _OBJECTIVE and isinstance(getattr(type(self._objective), name, None), cached_property)
                if not cached and name not in left_out:
                    yield path, name, value, contents.of(value)

    def changed(self) -> tuple[dict[str, dict[str, Any]], list[str]]:
        """Return what is something else than at first, by its holder and name, and what of it cannot be kept."""
        kept: dict[str, dict[str, Any]] = {}
        lost = []
        for path, name, value, content in self._attributes():
            if self._before.get((path, name)) == content:
                continue
            if _can_be_kept(value) and not path.startswith(_CLASS):
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


class _Contents:
    """Gives what values hold, as far as they can be looked into; of those of the ids `elsewhere` nothing."""

    def __init__(self, elsewhere: set[int]) -> None:
        self._known: dict[int, Hashable] = dict.fromkeys(elsewhere, "looked at elsewhere")
        self._kinds = Kinds(elsewhere)
        self._kept: list[Any] = []  # so that no id is given twice

    def of(self, value: Any) -> Hashable:
        if isinstance(value, PLAIN):
            return repr(value)
        if id(value) not in self._known:
            self._kept.append(value)
            self._known[id(value)] = "seen"  # where it holds itself
            try:
                self._known[id(value)] = self._look(value) if len(self._known) < _MANY else self._kinds.of(value)
            except Exception:  # what its author or a library wrote: a look stops no trial
                self._known[id(value)] = self._kinds.of(value)
        return self._known[id(value)]

    def _look(self, value: Any) -> Hashable:
        if isinstance(value, Tensor):
            return _numbers(value)
        if isinstance(value, torch.Generator):
            return value.get_state().numpy().tobytes()
        if isinstance(value, nn.Module):
            held = [*value.named_parameters(), *value.named_buffers()]
            held += [(name, each) for m in value.modules() for name, each in vars(m).items() if name not in NOT_STATE]
            return tuple((name, self.of(each)) for name, each in held)
        if isinstance(value, list | tuple | deque | dict):
            if len(value) > _MANY:
                return len(value)  # paths of images, say
            several = value.items() if isinstance(value, dict) else enumerate(value)
            return type(value).__name__, tuple((repr(key), self.of(each)) for key, each in several)
        attributes = getattr(value, "__dict__", None)
        if not isinstance(attributes, dict) or isinstance(value, type) or _is_known(type(value)):
            return self._kinds.of(value)
        return (
            type(value).__qualname__,
            self._kinds.of(value),
            tuple((key, self.of(x)) for key, x in attributes.items()),
        )


def _is_known(cls: type) -> bool:
    """Whether a class is a library's: what such an object has cached is no state."""
    return cls.__module__.partition(".")[0] in KNOWN


def _numbers(x: Tensor) -> Hashable:
    """Return a tensor's numbers: what is written through `.data` is counted nowhere. Of many, how often they were."""
    if x.layout != torch.strided or x.is_quantized or x.is_meta or x.numel() > _MOST:
        return None if x.is_inference() else x._version
    numbers = x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return tuple(x.shape), str(x.dtype), hashlib.blake2b(numbers, digest_size=16).digest()


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
