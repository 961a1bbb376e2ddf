"""Modules that hold in a buffer what other modules hold in their code: so members that differ in it share a stack."""

import inspect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from hpo.seeds import derive

SETS_RATE = "its code sets the rate (p) of a dropout layer while it is trained"


class NotStackable(Exception):
    """A member cannot be trained in a stack, and why; it trains in a LoopStack instead."""


class RateDropout(nn.Dropout):
    """nn.Dropout with its rate in a buffer, whose masks are a member's own.

    Within `masks_of_a_step` a mask follows from `key` (the member's seed and which dropout of its network it is), from
    `step`, how many steps it has done, and from each element's place: whatever is trained beside the member, and
    however far it is padded. Elsewhere it is drawn from torch's stream, as nn.Dropout's.

    Code that looks for nn.Dropout finds it, but there is no one rate to be read or set.
    """

    rate: Tensor
    key: Tensor
    step: Tensor
    writes: bool
    """Whether it changes what it is given, if that is asked of it (`inplace`): most networks do not look at that."""
    is_idle: bool
    """Whether its rate is 0 and stays that: then it draws nothing, as nn.Dropout does not."""

    def __init__(self, rate: float, index: int = 0) -> None:
        """`index`: which dropout of its network it is; `with_masks_of` makes a key of it."""
        nn.Module.__init__(self)
        self.inplace = self.writes = self.is_idle = False
        self.register_buffer("rate", torch.tensor(float(rate)))
        self.register_buffer("key", torch.tensor(index))
        self.register_buffer("step", torch.tensor(0))

    @classmethod
    def like(cls, layer: nn.Dropout, index: int, writes: bool) -> "RateDropout":
        """Return one in place of `layer`, with its hooks and whatever attributes it was given."""
        new = cls(layer.p, index)
        for key, value in vars(layer).items():
            if isinstance(value, dict) and key in vars(new):
                vars(new)[key].update(value)
            elif key != "p":
                vars(new)[key] = value
        new.writes = writes and new.inplace
        return new

    @property
    def p(self) -> float:
        raise NotStackable("its code reads the rate (p) of a dropout layer, of which in a stack each trial has its own")

    @p.setter
    def p(self, value: float) -> None:
        raise NotStackable(SETS_RATE)

    def extra_repr(self) -> str:
        return f"inplace={self.inplace}"

    def forward(self, x: Tensor) -> Tensor:
        if _SCALES:
            return F.dropout(x, float(self.rate), self.training, self.writes)
        if not self.training or self.is_idle:
            return x
        keep = 1 - self.rate
        if _CALLS is None:
            kept = (torch.rand_like(x) < keep).to(x.dtype)
        else:
            # times a power of two is exact as it is; float64 Apple's GPUs do not have
            last = _int32((keep * 2**32).long() - 1 - 2**31)
            # numbers, not booleans: Inductor writes one of these to memory in the time of a hundred of those
            kept = torch.where(self._drawn(x, _CALLS) <= last, (keep > 0).to(x.dtype), 0)
        # rate 1 keeps nothing, and nothing over nothing is no number
        out = x * kept / keep.clamp(min=1e-7)
        return x.copy_(out) if self.writes else out

    def _drawn(self, x: Tensor, calls: dict[int, int]) -> Tensor:
        """Return any int32, each as likely, for each element of `x`; others in the next call of the same step."""
        calls[id(self)] = call = calls.get(id(self), -1) + 1
        # (1,): products of () with a number are compiled, by way of torch.func, with what float32 has of that number
        number = _int32(self.key + self.step * _PRIMES[0]).unsqueeze(0)
        number = _mixed(_mixed(number) + _wrapped(call * _PRIMES[1]))
        for dim, size in enumerate(x.shape):
            places = torch.arange(size, dtype=torch.int32, device=x.device) * _PRIMES[2 + dim % 3]
            number = number.unsqueeze(-1) + places
            number = _mixed(number) if dim < x.ndim - 1 else number
        return (_round(_round(number)) ^ -(2**31)).squeeze(0)


_CALLS: dict[int, int] | None = None
"""How often each dropout was called in this step; None: there is no step."""
_SCALES = False
"""Whether `ScalingDropout` is entered."""
_PRIMES = (1640531527, 1097514319, 668265263, 374761393, 1540483477)


def _mixed(number: Tensor) -> Tensor:
    """Return an int32 that follows from another as if at random (Mueller's integer hash)."""
    number = _round(_round(number))
    return _high(number) ^ number


def _round(number: Tensor) -> Tensor:
    return (_high(number) ^ number) * 73244475  # modulo 2**32, as int32 is multiplied: twice as fast as int64


def _high(number: Tensor) -> Tensor:
    """Return the higher 16 bits of an int32."""
    return (number >> 16) & 0xFFFF


def _int32(number: Tensor) -> Tensor:
    """Return the lower 32 bits of an int64."""
    lower: Tensor = _wrapped(number)
    return lower.to(torch.int32)


def _wrapped(number: Any) -> Any:
    """Return the number with the same lower 32 bits that an int32 has."""
    return ((number & 0xFFFFFFFF) ^ 2**31) - 2**31


class ScalingDropout(TorchFunctionMode):
    """Within this dropout draws nothing: it scales every number by what follows from its rate, nn.Dropout as that in
    tensors, so that a network with either can be compared."""

    def __enter__(self) -> Any:
        global _SCALES
        _SCALES = True
        return super().__enter__()  # type: ignore[no-untyped-call]  # torch does not annotate it

    def __exit__(self, *error: Any) -> None:
        global _SCALES
        _SCALES = False
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.dropout:
            return func(*args, **(kwargs or {}))
        call = inspect.signature(F.dropout).bind(*args, **(kwargs or {}))
        call.apply_defaults()
        x, rate, training, inplace = call.args
        rate = float(np.float32(rate))  # as the tensor has it
        scale = 0.5 - rate / 4 if training else 1.0  # of rate 0 too: where it is to be in place may not depend on that
        return x.mul_(scale) if inplace else x * scale


@contextmanager
def masks_of_a_step() -> Iterator[None]:
    """Within this, which is one step's forward pass, the masks of dropout are each member's own."""
    global _CALLS
    before, _CALLS = _CALLS, {}
    try:
        yield
    finally:
        _CALLS = before


def with_masks_of(module: nn.Module, seed: int) -> nn.Module:
    """Return `module`, whose dropouts draw from now on what a member of that seed draws. To be called once."""
    for each in module.modules():
        if isinstance(each, RateDropout):
            each.key.fill_(derive(seed, "dropout", int(each.key)))
    return module


def step_buffers(module: nn.Module) -> list[str]:
    """Return the names of the buffers that are to hold how many steps a member has done."""
    return [f"{name}.step".lstrip(".") for name, each in module.named_modules() if isinstance(each, RateDropout)]


def has_dropout(module: nn.Module) -> bool:
    """Whether a network whose dropout is in tensors has any."""
    return any(isinstance(each, RateDropout) for each in module.modules())


def idle_dropout(module: nn.Module) -> None:
    """Have the dropouts in tensors whose rate is 0 draw nothing. A stack of such takes none of another rate."""
    for each in module.modules():
        if isinstance(each, RateDropout):
            each.is_idle = float(each.rate) == 0


def dropout_writes(module: nn.Module) -> bool:
    """Whether dropout in tensors that is to work in place does."""
    return any(isinstance(each, RateDropout) and each.writes for each in module.modules())


class SelectOne(nn.Module):
    """One of several modules that have no weights (activations, say); which one is in a buffer."""

    chosen: Tensor

    def __init__(self, options: Sequence[nn.Module], chosen: int) -> None:
        super().__init__()
        self.options = nn.ModuleList(options)
        self.register_buffer("chosen", torch.tensor(chosen))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.options[0](_if(self.chosen == 0, x))
        for index, option in enumerate(self.options[1:], start=1):
            chosen = self.chosen == index
            out = torch.where(chosen, option(_if(chosen, x)), out)
        return out


def _if(used: Tensor, x: Tensor) -> Tensor:
    """Return `x`, whose gradient is 0 where what is computed of it is not used: that of a root at 0 is no number."""
    return torch.where(used, x, x.detach())


class Gated(nn.Sequential):
    """A sequence of which the modules from `first` to `last` may be left out; how many are used is in a buffer."""

    used: Tensor

    def __init__(self, modules: Mapping[str, nn.Module], first: int, last: int, used: int) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        self.first, self.last = first, last
        self.register_buffer("used", torch.tensor(used))

    def forward(self, x: Tensor) -> Tensor:
        for index, module in enumerate(self):
            if not self.first <= index < self.last:
                x = module(x)
                continue
            used = self.used > index - self.first
            y = module(_if(used, x))
            if y.shape != x.shape:
                raise ValueError(f"a layer that may be left out changes the shape {tuple(x.shape)}")
            x = torch.where(used, y, x)
        return x


CONTROLS: Mapping[type, tuple[str, ...]] = {
    RateDropout: ("rate", "key", "step"),
    SelectOne: ("chosen",),
    Gated: ("used",),
}
"""The buffers that the common structure adds to a network: no part of its own state."""


def is_control(module: nn.Module, name: str) -> bool:
    path, _, last = name.rpartition(".")
    return last in CONTROLS.get(type(module.get_submodule(path)), ())


def tensor_dropout(module: nn.Module, *, writes: bool = False) -> nn.Module:
    """Return `module` with each nn.Dropout in it replaced by a RateDropout; the module given is changed.

    `writes`: those that are to work in place do.
    """
    found = itertools.count()
    for parent in list(module.modules()):
        for name, child in list(parent._modules.items()):  # one that is used at several places, at each of them
            if type(child) is nn.Dropout:
                setattr(parent, name, RateDropout.like(child, next(found), writes))
    return RateDropout.like(module, 0, writes) if type(module) is nn.Dropout else module
