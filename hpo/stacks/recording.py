"""A step recorded as a CUDA graph: one launch replays all of its kernels.

What CUDA cannot record, or what does not give what the step itself gives, is not used, and the reason is kept for a
person. Source: PyTorch's notes on CUDA graphs (`torch.cuda.graph`).
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from hpo.stacks.differing import PROBED, Run, close, difference, different, probed
from hpo.stacks.state import StackState, Trained
from hpo.training.batches import Batches
from hpo.training.memory import is_out_of_memory
from hpo.training.torch_settings import random_states, set_random_states

Forward = Callable[[StackState, Sequence[Tensor]], Any]
"""A forward pass: from the state and a batch's inputs (B, ...), the outputs of all slots (K, B, ...)."""
_given_up: list[str] = []
"""Why no more steps are recorded in this process: torch 2.11 cannot record after a capture that failed."""
_living: dict[torch.device, WeakSet[Any]] = {}
"""Each device's graphs. They share memory: they are never replayed at once, and nothing in it outlives a replay."""


class NotRecorded(Exception):
    """A step is not replayed from a CUDA graph, and why."""


def in_place(run: Run) -> Run:
    """Return `run` so that it writes the state after it into the tensors of the state that it is given."""

    def step(state: StackState, inputs: Sequence[Tensor], targets: Tensor) -> tuple[Trained, Tensor]:
        trained, losses = run(state, inputs, targets)
        for own, new in zip(tree_leaves(state.trained), tree_leaves(trained), strict=True):
            own.copy_(new)
        return state.trained, losses

    return step


class CudaReplay:
    """A step recorded as a CUDA graph on the tensors of `state`, which are changed in place from then on.

    `run` writes in place (`in_place`).
    """

    def __init__(self, run: Run, state: StackState, inputs: Sequence[Tensor], targets: Tensor) -> None:
        self.state = state
        self._leaves = tree_leaves(state)
        self._inputs, self._targets = [x.clone() for x in inputs], targets.clone()

        def on_copies() -> None:
            run(*tree_map(torch.clone, (state, self._inputs, self._targets)))

        def record() -> None:
            _, self._losses = run(state, self._inputs, self._targets)

        self._graph = _captured(on_copies, record, targets.device)

    def __call__(self, state: StackState, inputs: Sequence[Tensor], targets: Tensor) -> tuple[Trained, Tensor]:
        if state is not self.state:
            for own, now in zip(self._leaves, tree_leaves(state), strict=True):
                if own is not now:
                    own.copy_(now)
        for own, now in zip(self._inputs, inputs, strict=True):
            own.copy_(now)
        self._targets.copy_(targets)
        self._graph.replay()
        return self.state.trained, self._losses.clone()


class ForwardReplay:
    """The outputs of all members for so many rows, recorded as a CUDA graph on the tensors of `state`.

    `run` changes nothing of the state.
    """

    def __init__(self, run: Forward, state: StackState, inputs: Sequence[Tensor]) -> None:
        self.state = state
        self._inputs = [x.clone() for x in inputs]

        def on_copies() -> None:
            run(*tree_map(torch.clone, (state, self._inputs)))

        def record() -> None:
            self._outputs = run(state, self._inputs)

        self._graph = _captured(on_copies, record, state.t.device)

    def __call__(self, inputs: Sequence[Tensor]) -> Any:
        for own, now in zip(self._inputs, inputs, strict=True):
            own.copy_(now)
        self._graph.replay()
        return tree_map(torch.clone, self._outputs)


class EpochReplay:
    """`n_steps` steps recorded as one CUDA graph, each on the next batch of an order that lies on the device.

    A launch then costs a part of a step's time, whatever Python does meanwhile. `order` is (batches, B) numbers of
    rows; `sums` (K,) is the sum of the losses since `start`.
    """

    def __init__(self, run: Run, state: StackState, batches: Batches, order: Tensor, n_steps: int) -> None:
        self.state, self.n_steps = state, n_steps
        self._order = order.clone()
        self._next = torch.zeros(1, dtype=torch.long, device=order.device)
        self._run, self._batches = run, batches
        self.sums = torch.zeros_like(self._step(tree_map(torch.clone, state), self._next.clone()))

        def on_copies() -> None:
            self._step(tree_map(torch.clone, state), self._next.clone())

        def record() -> None:
            for _ in range(n_steps):
                self.sums.add_(self._step(state, self._next))

        self._graph = _captured(on_copies, record, order.device)

    def _step(self, state: StackState, number: Tensor) -> Tensor:
        """Do the step of that number (1,), and count it; return the losses."""
        inputs, targets = self._batches.pick(self._order.index_select(0, number).squeeze(0))
        with torch.no_grad():
            _, losses = self._run(state, inputs, targets)
        number.add_(1)
        return losses

    def start(self, order: Tensor, first: int = 0) -> None:
        """Begin an epoch with the batches of `order`, of the same shape as at first, from number `first` on."""
        self._order.copy_(order)
        self._next.fill_(first)
        self.sums.zero_()

    def __call__(self) -> None:
        """Do the next `n_steps` steps."""
        self._graph.replay()


def _captured(on_copies: Callable[[], None], record: Callable[[], None], device: torch.device) -> Any:
    """Return what `record` does as a CUDA graph. Twice before, the same is done on copies: what is set up at a first
    call must not be recorded, and what waits at a second one would spoil the capture."""
    here, side = torch.cuda.current_stream(), _side_stream(device)
    side.wait_stream(here)
    try:
        with torch.no_grad(), torch.cuda.stream(side):
            on_copies()
            with _refusing_waits():
                on_copies()
    finally:
        here.wait_stream(side)
    graph, living = torch.cuda.CUDAGraph(), _living.setdefault(device, WeakSet())
    other = next(iter(living), None)  # held meanwhile: torch refuses memory that no graph uses any more
    pool = None if other is None else other.pool()
    stream = _capture_stream(device)
    first: Exception | None = None
    try:
        # other threads may allocate meanwhile: one that pins batches in memory does
        with (
            torch.no_grad(),
            torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"),
        ):
            try:
                record()
            except Exception as error:
                first = error  # the end of the capture raises another one, which says only that there was one
                raise
    except Exception as error:
        why = line(first or error)
        if _fails_ever_after():
            _given_up.append(f"an earlier one failed in this process: {why}")
        if is_out_of_memory(error):
            raise
        raise NotRecorded(why) from error
    finally:
        torch.cuda.set_stream(here)  # torch leaves the thread on the stream of a capture that failed
    living.add(graph)
    return graph


@contextmanager
def _refusing_waits() -> Iterator[None]:
    """Within it what waits for the GPU raises RuntimeError."""
    before = torch.cuda.get_sync_debug_mode()
    try:
        _set_sync_debug_mode("error")
        yield
    finally:
        _set_sync_debug_mode(before)


def _set_sync_debug_mode(mode: int | str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it does not see every wait
        torch.cuda.set_sync_debug_mode(mode)


@contextmanager
def _recording(state: StackState, device: torch.device) -> Iterator[tuple[StackState, dict[str, Tensor]]]:
    """Yield copies of the state and the random generators' states; give both back at the end, whatever changed them.

    Raises NotRecorded where CUDA cannot record, for whatever reason but memory.
    """
    if _given_up:
        raise NotRecorded(_given_up[0])
    before, generators = tree_map(torch.clone, state), random_states(device)
    try:
        yield before, generators
    except NotRecorded:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise NotRecorded(line(error)) from error
    finally:
        with torch.no_grad():
            for now, then in zip(tree_leaves(state), tree_leaves(before), strict=True):
                now.copy_(then)  # nothing was trained yet
        set_random_states(generators, device)


def recorded(run: Run, state: StackState, inputs: Sequence[Tensor], targets: Tensor, tolerance: float) -> CudaReplay:
    """Return `run`, which writes in place, as a CUDA graph on the tensors of `state`, which are as before at the end.

    Raises NotRecorded where CUDA cannot record it, or where two replays do not give what two calls of `run` give.
    """
    with _recording(state, targets.device) as (before, _):
        replay = CudaReplay(run, state, inputs, targets)
        why = difference(run, replay, before, inputs, targets, tolerance)
        if why is not None:
            raise NotRecorded(f"replayed it differs in {why}")
    return replay


def recorded_epoch(
    run: Run, state: StackState, batches: Batches, order: Tensor, n_steps: int, tolerance: float
) -> EpochReplay:
    """Return `n_steps` steps of `run`, which writes in place, as one CUDA graph; see `EpochReplay`.

    Raises NotRecorded where CUDA cannot record them, or where a replay does not give what the steps give one by one.
    """
    with _recording(state, order.device) as (before, generators):
        replay = EpochReplay(run, state, batches, order, n_steps)
        if "eps" in state.hyper:  # other optimizers make no more of what is rounding than it is
            before = before._replace(hyper=probed(before.hyper, n_steps))
            for name in PROBED:
                state.hyper[name].copy_(before.hyper[name])
        set_random_states(generators, order.device)
        expected, sums = tree_map(torch.clone, before), torch.zeros_like(replay.sums)
        with torch.no_grad():
            for rows in order[:n_steps]:
                sums += run(expected, *batches.pick(rows))[1]
        set_random_states(generators, order.device)
        replay.start(order)
        replay()
        why = different(before.trained, expected.trained, state.trained, 10 * tolerance)
        if why is None and not close(sums, replay.sums, 10 * tolerance * (n_steps + sums.abs())):
            why = "the losses"
        if why is not None:
            raise NotRecorded(f"{n_steps} steps at once differ in {why}")
    return replay


def recorded_forward(run: Forward, state: StackState, inputs: Sequence[Tensor], tolerance: float) -> ForwardReplay:
    """Return `run` as a CUDA graph on the tensors of `state`.

    Raises NotRecorded where CUDA cannot record it, or where two replays do not give what two calls of `run` give.
    """
    device = state.t.device
    with _recording(state, device) as (before, generators), torch.no_grad():
        replay = ForwardReplay(run, state, inputs)
        for rows in (inputs, [x.flip(0) for x in inputs]):
            set_random_states(generators, device)
            expected = tree_leaves(run(before, rows))
            set_random_states(generators, device)
            for one, other in zip(expected, tree_leaves(replay(rows)), strict=True):
                if not (one.is_floating_point() or one.is_complex()):  # masks have neither a difference nor a size
                    one, other = one.double(), other.double()
                if not close(one, other, tolerance * (1 + one.abs())):
                    raise NotRecorded("replayed it differs")
    return replay


def line(error: BaseException) -> str:
    """Return an error in one line."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"


def _fails_ever_after() -> bool:
    """Whether torch cannot record any more once a capture has failed (pytorch/pytorch#180395, cured in 2.12)."""
    return tuple(map(int, torch.__version__.split("+")[0].split(".")[:2])) < (2, 12)


@cache
def _side_stream(device: torch.device) -> Any:
    """Return one stream for what is done before recordings: each holds a workspace of cuBLAS's."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch does not annotate it


@cache
def _capture_stream(device: torch.device) -> Any:
    """Return one stream for all recordings on `device`: torch's own is of the device that was the current one at first.

    Another one than before: cuBLAS's workspace for it is then in the graphs' memory.
    """
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch does not annotate it
