"""torch.cuda's graphs without a GPU: what is captured is recorded, undone, and replayed on the same tensors.

The stand-in keeps the rules that matter to code that uses graphs. An operation that would wait for the GPU is refused
while capturing; nothing that is captured has happened at the end of the capture; a replay reads and writes the very
tensors of the capture, those that it made among them; random operations draw new numbers at each replay. Memory that
graphs share is refused once the last of them is gone; after a capture that failed the thread stays on its stream.
"""

import warnings
import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hpo.stacks import recording

WAITING = (
    *("_local_scalar_dense", "item", "nonzero", "equal", "is_nonzero", "masked_select", "bincount"),
    *("unique", "_unique", "_unique2", "unique_dim", "lift_fresh", "lift_fresh_copy"),
)
"""Operations of aten that wait for a GPU; `lift_fresh` is torch.tensor(...), a copy from memory that is not pinned."""


def waits(func: Any, args: Sequence[Any]) -> bool:
    """Whether an operation would wait for a GPU: to index by booleans does, since it counts them."""
    name = func._schema.name.removeprefix("aten::")
    if name in ("index", "index_put", "index_put_"):
        return any(x is not None and x.dtype == torch.bool for x in args[1])
    return name in WAITING


def written(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Return the tensors that an operation writes into."""
    arguments = func._schema.arguments
    given = {**{argument.name: value for argument, value in zip(arguments, args, strict=False)}, **kwargs}
    writes = [a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write]
    return [x for name in writes for x in tree_leaves(given.get(name)) if isinstance(x, Tensor)]


class Graph:
    """What was captured: it is known after its `CUDAGraph` is gone, its tensors are not."""

    made: list["Graph"] = []

    def __init__(self) -> None:
        self.calls: list[tuple[Any, Sequence[Any], Mapping[str, Any], Any]] = []
        self.n_replays = 0
        Graph.made.append(self)

    def replay(self) -> None:
        self.n_replays += 1
        with torch.no_grad():
            for func, args, kwargs, out in self.calls:
                again = func(*args, **kwargs)
                for own, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                    if isinstance(own, Tensor) and own.data_ptr() != new.data_ptr():
                        own.copy_(new)


class CUDAGraph:
    """As torch.cuda.CUDAGraph."""

    use: Counter[int] = Counter()
    """How many graphs use a pool. One that none uses is never forgotten: cuBLAS's workspace stays in it."""

    def __init__(self) -> None:
        self.graph = Graph()
        self._pool: int | None = None

    def capture_begin(self, pool: int | None) -> None:
        if pool in self.use and self.use[pool] == 0:
            raise RuntimeError("it->second->use_count > 0 INTERNAL ASSERT FAILED")
        number = len(self.use) if pool is None else pool
        self.use[number] += 1
        weakref.finalize(self, self._gone, self.graph, self.use, number).atexit = False
        self._pool = number

    @staticmethod
    def _gone(graph: Graph, use: Counter[int], pool: int) -> None:
        use[pool] -= 1
        graph.calls = [(func, (), {}, None) for func, *_ in graph.calls]

    def pool(self) -> int:
        assert self._pool is not None, "it was not captured"
        return self._pool

    def replay(self) -> None:
        self.graph.replay()


class Capture(TorchDispatchMode):
    """As torch.cuda.graph."""

    fails: str | None = None
    """What CUDA says to every capture, if it is to fail."""
    arguments: list[dict[str, Any]] = []

    running = 0

    def __init__(self, graph: CUDAGraph, **arguments: Any) -> None:
        super().__init__()
        self._cuda_graph, self._graph = graph, graph.graph
        self._before = dict[int, tuple[Tensor, Tensor]]()
        self._pool, self._on = arguments.get("pool"), OnStream(arguments["stream"])
        self._valid = True
        Capture.arguments.append(arguments)

    def __enter__(self) -> "Capture":
        self._on.__enter__()
        self._cuda_graph.capture_begin(self._pool)
        Capture.running += 1
        super().__enter__()
        return self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if waits(func, args) or Capture.fails:
            self._valid = False
            raise RuntimeError(Capture.fails or "CUDA error: operation not permitted when stream is capturing")
        for x in written(func, args, kwargs):
            self._before.setdefault(id(x), (x, x.clone()))
        out = func(*args, **kwargs)
        self._graph.calls.append((func, args, kwargs, out))
        return out

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        Capture.running -= 1
        for x, before in self._before.values():
            x.copy_(before)  # captured, not done
        if not self._valid:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
        self._on.__exit__(*error)


class Stream:
    """As torch.cuda.Stream."""

    now: "Stream"
    """On which the thread is."""

    def __init__(self, device: Any = None) -> None:
        self.device = device

    def wait_stream(self, other: "Stream") -> None:
        pass


def set_stream(stream: Stream) -> None:
    Stream.now = stream


class OnStream:
    """As torch.cuda.stream."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    def __enter__(self) -> None:
        self._before = Stream.now
        set_stream(self._stream)

    def __exit__(self, *error: Any) -> None:
        set_stream(self._before)


class SyncDebug(TorchDispatchMode):
    """As torch.cuda's mode in which what waits is an error."""

    on: list["SyncDebug"] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if waits(func, args):
            raise RuntimeError("called a synchronizing CUDA operation")
        return func(*args, **(kwargs or {}))

    @classmethod
    def set(cls, mode: int | str) -> None:
        warnings.warn("Synchronization debug mode is a prototype feature", stacklevel=1)
        if (mode in (2, "error")) == bool(cls.on):
            return
        if cls.on:
            cls.on.pop().__exit__(None, None, None)
        else:
            cls.on.append(cls())
            cls.on[-1].__enter__()


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> type[Capture]:
    """Have steps on the CPU recorded as on CUDA, by the project's own code on these stand-ins."""
    for module in ("vmap_step", "vmap_stack", "sizing"):
        monkeypatch.setattr(f"hpo.stacks.{module}.records", lambda device: True)
    monkeypatch.setattr(recording, "_given_up", [])
    monkeypatch.setattr(recording, "_living", {})
    forget_streams()
    for name, stand_in in {
        "Stream": Stream,
        "current_stream": lambda: Stream.now,
        "set_stream": set_stream,
        "stream": OnStream,
        "CUDAGraph": CUDAGraph,
        "graph": Capture,
        "get_sync_debug_mode": lambda: 2 if SyncDebug.on else 0,
        "set_sync_debug_mode": SyncDebug.set,
        "is_current_stream_capturing": lambda: Capture.running > 0,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(Stream, "now", Stream(), raising=False)
    monkeypatch.setattr(Capture, "fails", None)
    monkeypatch.setattr(Capture, "arguments", [])
    monkeypatch.setattr(CUDAGraph, "use", Counter())
    monkeypatch.setattr(Graph, "made", [])
    yield Capture
    forget_streams()


def forget_streams() -> None:
    recording._side_stream.cache_clear()
    recording._capture_stream.cache_clear()


class NoWaiting(TorchDispatchMode):
    """Within it an operation that would wait for a GPU raises, and what reads numbers past the dispatcher."""

    READING = ("tolist", "numpy", "cpu", "__array__")

    def __init__(self, lists: int = 0) -> None:
        """`lists`: how many lists of numbers may be read all the same."""
        super().__init__()
        self._lists = lists

    def __enter__(self) -> "NoWaiting":
        self._real = {name: getattr(Tensor, name) for name in self.READING}
        for name in self.READING:
            setattr(Tensor, name, partial(self._refused, name))
        Tensor.tolist = lambda x: self._tolist(x)
        super().__enter__()
        return self

    def _tolist(self, x: Tensor) -> Any:
        self._lists -= 1
        return self._real["tolist"](x) if self._lists >= 0 else self._refused("tolist")

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for name, real in self._real.items():
            setattr(Tensor, name, real)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if waits(func, args):
            self._refused(func)
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _refused(what: Any, *arguments: Any) -> None:
        raise RuntimeError(f"{what} would wait for the GPU")
