"""How much memory is left on a device: a machine that runs out does not raise, it ends the process.

So what would take too much is refused before it is made: `Within` looks at every tensor that code asks for.
"""

import gc
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, Generic, TypeVar

import psutil
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

Key = TypeVar("Key")
Value = TypeVar("Value")

_CGROUPS = (  # a container's limit and use, and of the use what is given back when needed, as cgroups v2 and v1 have it
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "/sys/fs/cgroup/memory/memory.stat",
    ),
)
TO_LOOK_AT, _ONE_TO_LOOK_AT = 0.05, 0.1
"""How much of the free memory networks may take that are built to be compared, and how much one of the first two."""
_KEPT_FREE = 0.2
"""How much of the free memory is left to others while a network is built."""
_OF_THE_MACHINE = ("can't allocate memory", "not enough memory", "calculation overflowed")
_NO_MEMORY = (
    *_OF_THE_MACHINE,
    "out of memory",  # CUDA's runtime ("CUDA error: out of memory"), MPS's, HIP's; a loader's worker repeats it
    *("ALLOC_FAILED", "ALLOCATION_FAILED"),  # the states of cuBLAS, cuDNN, cuSOLVER, cuFFT, cuSPARSE
    "cudaErrorMemoryAllocation",
)
"""What the texts of RuntimeErrors have in common that come from a lack of memory; not all are OutOfMemoryErrors."""
_LARGE = 1 << 24
"""Bytes of a tensor for which it is asked how much memory is free: that takes a tenth of a millisecond."""


def free_bytes(device: torch.device) -> int:
    """Return how many bytes may still be taken on `device`: of the GPU, or of the machine and its container."""
    if device.type == "cuda":  # what torch holds, and nobody uses, is free to us
        return torch.cuda.mem_get_info(device)[0] + max(
            0, torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        )
    free = psutil.virtual_memory().available
    for limit, used, stat in _CGROUPS:
        with suppress(OSError, ValueError):  # there is none, or it says "max"
            free = min(free, int(Path(limit).read_text()) - int(Path(used).read_text()) + _cached(Path(stat)))
    return max(0, free)


def total_bytes(device: torch.device) -> float:
    """Return how many bytes a GPU has, whoever uses them; of other devices that is not known, infinity."""
    return torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else math.inf


def _cached(stat: Path) -> int:
    """Return how much of a container's use is copies of files that nobody needs at the moment."""
    with suppress(OSError):
        lines = dict(line.split() for line in stat.read_text().splitlines())
        return int(lines.get("total_inactive_file", lines.get("inactive_file", 0)))
    return 0


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that the device, or the machine, has no memory left.

    So does a RuntimeError that was raised while such an error was handled: the end of a CUDA graph's capture, say, that
    ran out of memory within.
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    before = error.__cause__ or error.__context__
    return any(words in str(error) for words in _NO_MEMORY) or (before is not None and is_out_of_memory(before))


def is_of_the_machine(error: BaseException) -> bool:
    """Whether `error`, of no memory, is of the machine's own, whatever the device."""
    return isinstance(error, MemoryError) or any(words in str(error) for words in _OF_THE_MACHINE)


def free_all(device: torch.device) -> None:
    """Give back what torch holds of `device`'s memory and nobody uses, once more memory than it has was asked for.

    Compiled steps and graphs are in reference cycles, and neither torch nor CUDA collects those itself.
    """
    gc.collect()
    if device.type == "cuda":
        with suppress(RuntimeError):  # torch 2.11 raises ever after a capture that failed
            torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def free_if_cuda(device: torch.device) -> None:
    """Do so on CUDA, once a stack is let go of: torch's imports and tracing may have it in a circle.

    A machine's memory is not as tight, and to look for circles takes some tenths of a second.
    """
    if device.type == "cuda":
        free_all(device)


def n_bytes(network: nn.Module) -> int:
    """Return the bytes of a network's parameters and buffers."""
    return sum(x.numel() * x.element_size() for x in (*network.parameters(), *network.buffers()))


def networks_at_once(network: nn.Module) -> int:
    """Return how many networks as large as this one may be held only to be inspected, on the CPU: at least two."""
    return max(2, int(TO_LOOK_AT * free_bytes(torch.device("cpu")) / max(1, n_bytes(network))))


def most_to_look_at() -> int:
    """Return how many bytes one network may have that is built to be inspected."""
    return int(_ONE_TO_LOOK_AT * free_bytes(torch.device("cpu")))


class Within(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch does not annotate __init_subclass__
    """A context in which a tensor that the machine has no memory for is not made: MemoryError is raised instead.

    So is one with which those that were made would be more than `most` bytes in all.
    """

    def __init__(self, most: float = math.inf) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch does not annotate it
        self._most, self._made = most, 0
        self._reserve: float | None = None

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Say that torch need not import its compiler, for a second or two, to keep it from this class."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        size = _size_of_new(func, args, kwargs or {})
        if size:
            self._require(size)
        return func(*args, **(kwargs or {}))

    def _require(self, size: int) -> None:
        self._made += size
        if self._made > self._most:
            raise MemoryError(f"{shown(self._made)} are more than the {shown(self._most)} that it may take")
        if size < _LARGE:
            return
        free = free_bytes(torch.device("cpu"))
        if self._reserve is None:
            self._reserve = _KEPT_FREE * free
        if size > free - self._reserve:
            raise MemoryError(f"it asks for {shown(size)} at once, and {shown(free)} are free")


def shown(size: float) -> str:
    """Return a number of bytes as a person reads it."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"


def _size_of_new(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """Return how many bytes of the machine's memory an operation that makes a tensor of a given size takes."""
    index = _index_of_size(func)
    if index is None or torch.device(kwargs.get("device") or "cpu").type != "cpu":
        return 0
    size = args[index] if index < len(args) else kwargs.get("size", ())
    like = next((x for x in args if isinstance(x, torch.Tensor)), None)
    if like is not None and like.device.type != "cpu" and kwargs.get("device") is None:
        return 0
    dtype = kwargs.get("dtype") or (torch.get_default_dtype() if like is None else like.dtype)
    return math.prod(map(int, size)) * dtype.itemsize


@cache
def _index_of_size(func: Callable[..., Any]) -> int | None:
    """Return which of an operation's arguments is the size of the tensor that it makes; None: it makes none so."""
    schema = func._schema  # type: ignore[attr-defined]
    if any(result.alias_info is not None for result in schema.returns):
        return None
    return next((i for i, argument in enumerate(schema.arguments) if argument.name == "size"), None)


def used_mib(device: torch.device) -> float:
    """Return how much memory this process has, in MiB: of its GPU, where it is one, else of the machine."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return float(psutil.Process().memory_info().rss) / 2**20


class Bounded(Generic[Key, Value]):
    """Values that may take so many bytes together: the oldest is let go first, what is too large alone is not kept."""

    def __init__(self, most: float) -> None:
        """`most`: how many bytes."""
        self._most = most
        self._kept: dict[Key, tuple[Value, int]] = {}
        self.size = 0
        """How many bytes they have now."""

    def keep(self, key: Key, value: Value, size: int) -> None:
        """Keep a value of `size` bytes in place of what was kept by that key."""
        self.take(key)
        if size > self._most:
            return
        self._kept[key] = value, size
        self.size += size
        while self.size > self._most:
            self.take(next(iter(self._kept)))

    def take(self, key: Key) -> Value | None:
        """Return what was kept by that key, and forget it; None: it is not here."""
        value, size = self._kept.pop(key, (None, 0))
        self.size -= size
        return value
