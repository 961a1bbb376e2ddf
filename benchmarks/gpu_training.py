"""The items of `gpu.py --part training`: forward, backward and optimizer alone, on the cases of `throughput.py`.

A row of a stack is measured captured, and then compiled, with the same members: joining takes as long as training them.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import throughput
import torch
from gpu_items import Card, Item, Result, Seen, require
from gpu_steps import CPU
from gpu_toys import wanted_path
from throughput import Bench

from hpo.stacks import vmap_step
from hpo.stacks.padding import Padding, PaddingPlan
from hpo.stacks.pool import Pool
from hpo.stacks.vmap_stack import VmapStack
from hpo.stacks.vmap_step import Execution, VmapStep
from hpo.training.batches import Batch, Batches
from hpo.training.loop_stack import LoopStack
from hpo.training.memory import free_all
from hpo.training.stack import Precision, Stack
from hpo.training.torch_settings import torch_settings

DOCUMENTED = "documented loop"
EXECUTIONS: Sequence[Execution] = ("graph", "compiled")
N_PROFILED, N_ENQUEUED = 5, 20
"""Steps that are profiled, and steps of which it is measured how long the host takes to ask for them."""


@cache
def bench_of(name: str, device: torch.device) -> Bench:
    """Return a case made ready: its data is read once in a process."""
    return Bench(name, str(device), 1)


def documented(card: Card, name: str, device: torch.device) -> Seen:
    """An epoch of the documented loop, on the card or on one core of the CPU."""
    bench = bench_of(name, device)
    n = throughput.N_ALONE if name == "widths" and not card.small else 1
    measure = throughput.documented_epoch(bench, bench.members(n), _seconds(card))
    return {"ms": measure() / n * 1000, "x documented": None}


def one_at_a_time(card: Card, name: str) -> Seen:
    """An epoch of one member in a LoopStack: what short studies and networks that do not stack have."""
    bench = bench_of(name, card.device)
    rows, stack = Batches(bench.train, card.device), LoopStack(bench.task)
    stack.join(bench.members(1)[0])
    with torch_settings(card.device, precision="float32"):
        return _measured(card, bench, rows, [stack], 1)


@dataclass
class Ready:
    """Members that have joined their stacks, and how long that took."""

    key: tuple[Any, ...]
    bench: Bench
    rows: Batches
    pool: Pool
    seconds: float


_ready: list[Ready] = []
"""The last members: they are trained captured first, then compiled."""


def ready(card: Card, name: str, k: int, padding: Padding, precision: Precision) -> Ready:
    """Return k members in their stacks; those that were ready before are let go of."""
    key = (name, k, padding, precision)
    if _ready and _ready[0].key == key:
        return _ready[0]
    _ready.clear()
    with suppress(RuntimeError):  # torch 2.11, once a capture has failed
        free_all(card.device)
    bench = bench_of(name, card.device)
    rows, task = Batches(bench.train, card.device), replace(bench.task, precision=precision)
    start = time.perf_counter()
    pool = Pool(task, k, rows.head(8), PaddingPlan(bench.space, bench.build, padding))
    pool.join(bench.members(k))
    card.wait()
    require(sum(len(stack.members) for stack in pool.active) == k, "some wait to be trained alone")
    _ready.append(Ready(key=key, bench=bench, rows=rows, pool=pool, seconds=time.perf_counter() - start))
    return _ready[0]


def stacked(
    card: Card, name: str, k: int, execution: Execution, padding: Padding = "fine", precision: Precision = "float32"
) -> Seen:
    """An epoch of k members at once."""
    with torch_settings(card.device, precision=precision):
        made = ready(card, name, k, padding, precision)
        stacks = [stack for stack in made.pool.active if isinstance(stack, VmapStack)]
        for stack in stacks:
            stack.expect(0)
            stack.execution = execution
        recording = _timed(vmap_step, "recorded"), _timed(vmap_step, "recorded_epoch")
        with _timed(VmapStep, "_compile") as compiling, recording[0] as step, recording[1] as many:
            for stack in stacks:
                for batch in _both_sizes(made.bench, made.rows, stack):
                    stack.step(*batch)
                if vmap_step.records(card.device):
                    _epoch(made.rows, stack)
            card.wait()
        figures = dict(_measured(card, made.bench, made.rows, stacks, k))
        valid = Batches(made.bench.valid, card.device)
        for stack in stacks:
            stack.evaluate(valid)  # in which it is recorded
        start = time.perf_counter()
        for _ in range(3):
            for stack in stacks:
                stack.evaluate(valid)
        figures["evaluate ms"] = (time.perf_counter() - start) / 3 * 1000
    figures |= {"join s": made.seconds, "compile s": compiling[0], "capture s": step[0] + many[0]}
    paths = {stack.path for stack in stacks}
    other = f"NOT {wanted_path(execution, card.device)}: " if paths != {wanted_path(execution, card.device)} else ""
    figures["seen"] = f"{other}{' / '.join(map(str, paths))}{f', {len(stacks)} stacks' if len(stacks) > 1 else ''}"
    return figures


def _both_sizes(bench: Bench, rows: Batches, stack: Stack) -> Sequence[Batch]:
    """Return a whole batch and the last, smaller one, which has a step of its own."""
    size = bench.case.fixed["batch_size"]
    inputs, targets = next(iter(rows.epoch(size, torch.arange(len(rows)))))
    last = len(rows) % size or size
    return [(inputs, targets), ([x[:last] for x in inputs], targets[:last])]


def _measured(card: Card, bench: Bench, rows: Batches, stacks: Sequence[Stack], k: int) -> dict[str, Any]:
    """Return what an epoch of stacks with k members in all takes: by the wall, by the GPU's clock, of the host."""
    size = bench.case.fixed["batch_size"]
    batches = partial(rows.epoch, size, torch.randperm(len(rows)))
    if card.cuda:
        torch.cuda.reset_peak_memory_stats(card.device)
    each = _seconds(card) / len(stacks)
    if vmap_step.records(card.device):
        wall = sum(_epoch_seconds(card, rows, stack, each) for stack in stacks)
    else:
        wall = sum(bench.epoch(batches, stack.step, each) for stack in stacks)
    figures: dict[str, Any] = {"ms": wall / k * 1000, "x documented": None}
    if not card.cuda:
        return figures | {"MiB": throughput._peak_mib()}
    figures["ms by events"] = sum(_by_events(card, rows, stack) for stack in stacks) / k
    batch = _both_sizes(bench, rows, stacks[0])[0]
    figures |= _profiled(card, partial(stacks[0].step, *batch))
    card.wait()
    start = time.perf_counter()
    for _ in range(N_ENQUEUED):
        stacks[0].step(*batch)
    figures["host us per step"] = (time.perf_counter() - start) / N_ENQUEUED * 1e6
    card.wait()
    return figures | {"MiB": torch.cuda.max_memory_reserved(card.device) / 2**20}


def _epoch(rows: Batches, stack: Stack) -> None:
    """Train an epoch as a study does: many steps at once, where they are recorded so."""
    stack.epoch(rows, torch.randperm(len(rows)), lambda: False)


def _epoch_seconds(card: Card, rows: Batches, stack: Stack, seconds: float) -> float:
    """Return the time of an epoch: the median of as many as `seconds` are enough for, one at the least."""
    until, taken = time.perf_counter() + seconds, list[float]()
    card.wait()
    while not taken or time.perf_counter() < until:
        start = time.perf_counter()
        _epoch(rows, stack)
        card.wait()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def _by_events(card: Card, rows: Batches, stack: Stack) -> float:
    """Return the ms of an epoch by the GPU's clock."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    _epoch(rows, stack)
    end.record()
    card.wait()
    return start.elapsed_time(end)


def _profiled(card: Card, step: Callable[[], Any]) -> dict[str, Any]:
    """Return how many kernels a step has and how long they take; the longest of them in the details."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    try:
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
            for _ in range(N_PROFILED):
                step()
            card.wait()
        events = [e for e in profiled.events() if e.device_type == DeviceType.CUDA]
    except Exception as error:  # where the driver does not let anybody profile
        return {"details": {"profiler": f"{type(error).__name__}: {error}"}}
    kernels = [(e.name, e.time_range.elapsed_us()) for e in events if not getattr(e, "is_user_annotation", False)]
    by_name: dict[str, float] = {}
    for name, us in kernels:
        by_name[name[:80]] = by_name.get(name[:80], 0.0) + us / N_PROFILED
    longest = sorted(by_name.items(), key=lambda item: -item[1])[:12]
    return {
        "kernels per step": len(kernels) / N_PROFILED,
        "us per step": sum(us for _, us in kernels) / N_PROFILED,
        "details": {"us per step of the longest kernels": dict(longest)},
    }


@contextmanager
def _timed(owner: Any, name: str) -> Iterator[list[float]]:
    """`throughput._timed` within a block: the seconds that `owner`'s function of that name takes, in a list."""
    real = getattr(owner, name)
    try:
        yield throughput._timed(owner, name)
    finally:
        setattr(owner, name, real)


def _seconds(card: Card) -> float:
    """Return how long a row is measured."""
    return 0.2 if card.small else 3.0


def items(card: Card) -> list[Item]:
    """Return the rows, in the order in which they are worth their time."""
    rows: list[Item] = []

    def add(name: str, run: Callable[[Card], Seen], needs: float = 8.0, seconds: float = 60.0) -> None:
        rows.append(Item(name=name, run=run, needs=needs, seconds=seconds))

    def add_stack(name: str, k: int, **more: Any) -> None:
        words = ", ".join(map(str, more.values()))
        for execution in EXECUTIONS:
            how = "captured" if execution == "graph" else execution
            title = f"{name}: stack of {k}{f', {words}' if words else ''}, {how}"
            needs = 15.0 if execution == "graph" else 25.0
            add(title, partial(stacked, name=name, k=k, execution=execution, **more), needs, 150.0)

    def add_plain(name: str) -> None:
        add(f"{name}: {DOCUMENTED}, {card.device}", partial(documented, name=name, device=card.device), 10.0)
        if card.cuda:
            add(f"{name}: {DOCUMENTED}, one CPU core", partial(documented, name=name, device=CPU), 15.0)
        add(f"{name}: one at a time, not compiled", partial(one_at_a_time, name=name))

    add_plain("california")
    for k in (1, 4) if card.small else (256, 64, 1024, 16, 1):
        add_stack("california", k)
    fashion: list[tuple[int, Precision]] = [(64, "float32"), (64, "tf32"), (64, "bf16")]
    fashion += [(16, precision) for _, precision in fashion]
    add_plain("fashion")
    for k, precision in [(2, "float32"), (2, "bf16")] if card.small else fashion:
        add_stack("fashion", k, precision=precision)
    add_plain("widths")
    add_stack("widths", 4 if card.small else 64, padding="coarse")
    return rows


def finish(results: Sequence[Result]) -> None:
    """Add how many times as fast as the documented loop on the same device each row is."""
    base: Mapping[str, float] = {
        each.name.partition(":")[0]: each.figures["ms"]
        for each in results
        if DOCUMENTED in each.name and "CPU core" not in each.name and "ms" in each.figures
    }
    for each in results:
        documented_ms = base.get(each.name.partition(":")[0])
        if documented_ms is not None and each.figures.get("ms"):
            each.figures["x documented"] = documented_ms / each.figures["ms"]
