"""How many trials to train at once, and with how many threads: measured, since it depends on networks, data, machine.

On a CPU a stack must stay inside the cache; on a GPU it must fill it. Trials of other signatures (another batch size,
widths padded to another size) are in other stacks, so what a stack gains also depends on how many of a study's trials
have one signature: that is seen on configurations drawn from its space. A short study is not measured: that would not
pay.
"""

import math
import os
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from statistics import median
from typing import Any

import torch

from hpo.errors import Interrupted
from hpo.log import log
from hpo.stacks.alone import NotStackable
from hpo.stacks.candidate import Candidate
from hpo.stacks.compiling import TIMED_STEPS
from hpo.stacks.cost import SIZES, compile_pays, records, slots_for
from hpo.stacks.draws import grouped
from hpo.stacks.padding import Padder, Padding, PaddingPlan
from hpo.stacks.sharing import why_not_all
from hpo.stacks.vmap_stack import VmapStack
from hpo.stacks.vmap_step import STEPS_AT_ONCE
from hpo.study.data import Split, batch_sizes
from hpo.training.batches import Batches
from hpo.training.faults import TrialError
from hpo.training.loop_stack import LoopStack
from hpo.training.memory import free_bytes, free_if_cuda, is_out_of_memory
from hpo.training.stack import Member, Stack, Task
from hpo.training.torch_settings import torch_settings

SHORT_SECONDS = 20.0
"""What takes no longer than this one at a time is trained so: to measure and to compile takes about as long."""
AS_GIVEN = "as the study says"
_SHARE = 0.1
"""How much of the time that a study takes one at a time may go into measuring."""
_ROOM = 0.7
"""How much of the free memory a stack may take, by an estimate."""
_PADDINGS: tuple[Padding, ...] = ("fine", "coarse")
_TIMED_EPOCHS = 2
"""In the first of these a step is recorded, in the second it is timed."""
_WARM_UP, _STEPS = 2, 12
_ENOUGH_SECONDS = 0.25
"""Where steps take longer than this together, fewer of them are timed."""
_FIRST = 16
"""The size that is measured first, before larger ones, and smaller ones only where those are no faster: on a study of
minutes there is time to compile for one."""
_MOST_ALONE = 4.0
"""A single network that is compiled was at most so many times as fast: it is not measured where a stack is faster."""
_LITTLE_LARGER = 2.0
"""Networks that are padded to the largest and have no more than so many times as many weights cost little more."""
_ALONE = 8
"""How many of the drawn configurations are measured one at a time."""
_LARGE_STEP = 2e-3
"""Seconds of a step above which more threads may help; smaller operations only wait for each other."""


_TOO_LARGE = "one trial at a time: no networks could be drawn from the space to be compared"


_EARLIER_NAMES = {"grain": "padding"}


@dataclass(frozen=True, kw_only=True)
class StackSize:
    """`capacity` trials at once, with this `padding` and so many `threads`; and why. `stacked`: as a VmapStack."""

    capacity: int = 1
    stacked: bool = False
    padding: Padding = "fine"
    shared: float = 1.0
    """Of the trials in training, what share has one signature on average."""
    threads: int | None = None
    why: str

    @classmethod
    def stored(cls, values: Mapping[str, Any]) -> "StackSize":
        """Return what `dataclasses.asdict` gave of one, in this version or an earlier one. Raises TypeError."""
        return cls(**{_EARLIER_NAMES.get(name, name): value for name, value in values.items()})


@dataclass(frozen=True, kw_only=True)
class Sizing:
    """What is measured: `draws` are params as the study will have them (`looked_at`), `n_trials` are still to come."""

    task: Task
    batches: Batches
    example: Split
    plan_of: Callable[[Padding], PaddingPlan]
    draws: Sequence[Mapping[str, Any]]
    n_too_large: int = 0
    """How many more were drawn, whose networks are too large to be built for this: they train one at a time."""
    n_trials: int
    most: int
    """No stack is larger: a sampler that learns from the trials before must have some rounds."""
    seconds: float = math.inf
    """How long the study may take."""
    rounds: int = 1
    """So many times at the least all slots are to be trained in that time."""
    stopping: Callable[[], bool] = lambda: False

    def _room_for(self, groups: Mapping[Hashable, Sequence[Candidate]]) -> int:
        """Return how many of the largest of these trials fit into the device's memory at once, and at least 1."""
        largest = max((each.bytes_in_a_stack() for group in groups.values() for each in group), default=0)
        return max(1, int(_ROOM * free_bytes(self.task.device) / largest)) if largest else 1

    def given(self, capacity: int) -> StackSize:
        """Return what the study asks for: so many trials at once, or as many as memory has room for.

        One at a time is a stack of one where the study's steps pay for compiling it, since that is faster. A network
        that draws random numbers never is: they are others in a stack, and how many trials there are must not matter.
        """
        if not self.draws:
            return StackSize(why=_TOO_LARGE)
        n_steps = self.n_trials * self._n_steps(self.draws[0])
        if capacity == 1 and (not compile_pays(n_steps, self.task.device) or self._has_large_steps()):
            return StackSize(why=AS_GIVEN)
        groups, reasons = self._groups("fine")
        if not groups:
            return StackSize(why=f"one trial at a time: {reasons[0]}")
        shared = self._shared(groups)
        if capacity == 1 and any(each.alone.draws for group in groups.values() for each in group):
            return StackSize(why=AS_GIVEN)
        if capacity == 1:
            return StackSize(stacked=compile_pays(n_steps * shared, self.task.device), shared=shared, why=AS_GIVEN)
        room = self._room_for(groups)
        why = AS_GIVEN
        if room < min(capacity, self.n_trials):
            why = f"{room} trials at once, not {capacity}: memory is free for no more"
        return StackSize(capacity=min(capacity, room), stacked=True, shared=shared or 1.0, why=why)

    def _has_large_steps(self) -> bool:
        """Whether a step is as fast as it can be on a CPU: inductor's was three times slower, measured."""
        if self.task.device.type == "cuda":
            return False
        first = Member(number=-1, seed=0, params=self.draws[0])
        seconds = self._seconds_alone(first) / self._n_steps(first.params)
        return seconds >= _LARGE_STEP

    def _groups(self, padding: Padding) -> tuple[dict[Hashable, list[Candidate]], list[str]]:
        """Return those of the drawn trials that can be stacked, by their signature, and why others cannot."""
        return grouped(self.task, self.draws, self.plan_of(padding).loosest, self.example)

    def _shared(self, groups: Mapping[Hashable, Sequence[Candidate]]) -> float:
        """Return which share of the other trials has a trial's own signature, on average."""
        n_drawn = len(self.draws) + self.n_too_large
        return sum((len(group) / n_drawn) ** 2 for group in groups.values())

    def choose(self) -> StackSize:
        """Return what gives the most trials per hour. Raises Interrupted as soon as `stopping` says so."""
        if self.seconds < SHORT_SECONDS:
            return StackSize(why=f"one trial at a time: the study has only {self.seconds:.0f} s")
        if not self.draws:
            return StackSize(why=_TOO_LARGE)
        members = [Member(number=-1 - i, seed=i, params=params) for i, params in enumerate(self.draws)]
        some = members[:: max(1, len(members) // _ALONE)][:_ALONE]
        alone = sum(self._seconds_alone(member) for member in some) / len(some)
        total = min(alone * self.n_trials, self.seconds)  # without `trials` there are as many as fit
        if total < SHORT_SECONDS:
            return StackSize(why=f"one trial at a time: all of it takes about {total:.0f} s")
        deadline = time.monotonic() + _SHARE * total
        log.info("stack: measuring how many trials to train at once")
        found = {padding: self._groups(padding) for padding in _PADDINGS}
        most = min(self.most, self._room_for(found[_PADDINGS[-1]][0]))
        sizes = [k for k in SIZES[self.task.device.type] if 1 < k <= most]
        large, small, paddings = [k for k in sizes if k >= _FIRST], [k for k in sizes if k < _FIRST], _in_order(found)
        best, best_gain, reasons = StackSize(why="one trial at a time"), 1.0, []
        for padding, several in (*product(paddings, [large]), *product(paddings, [small]), (_PADDINGS[0], [1])):
            if (several == small and best.capacity > _FIRST) or (several == [1] and best_gain >= _MOST_ALONE):
                continue
            try:
                for choice, gain in self._gains(*found[padding], padding, total, several, deadline):
                    if gain > best_gain:
                        best, best_gain = choice, gain
            except NotStackable as error:
                reasons.append(str(error))
        if best.stacked:
            width = "" if best.padding == "fine" else ", all padded to the largest"
            how_fast = f"{best_gain:.1f} times as fast as one after the other (measured)"
            n = "one trial at a time, compiled" if best.capacity == 1 else f"{best.capacity} trials at once"
            why = f"{n}{width}: {how_fast}"
        else:
            why = f"one trial at a time: {reasons[0] if reasons else 'no stack is faster (measured)'}"
        return self._with_threads(replace(best, why=why), members)

    def _gains(
        self,
        groups: Mapping[Hashable, Sequence[Candidate]],
        reasons: Sequence[str],
        padding: Padding,
        total: float,
        sizes: Sequence[int],
        deadline: float,
    ) -> Iterator[tuple[StackSize, float]]:
        """Yield choices and how many times as fast as one at a time they are; until more members gain no more.

        `groups` and `reasons` are those of this padding (`_groups`). One at a time the study takes `total` seconds.
        Making a stack for each signature counts too: compiling is slow.
        """
        padder = self.plan_of(padding).loosest
        if not groups:
            raise NotStackable(reasons[0])
        common = max(groups.values(), key=len)
        if not sizes or time.monotonic() > deadline:
            return
        # the others train one at a time
        stacked = total * sum(map(len, groups.values())) / (len(self.draws) + self.n_too_large)
        # of K trials at once, so many have one signature on average, from a trial's point of view
        shared = self._shared(groups)
        alone = sum(self._seconds_alone(each.member) for each in common[:_ALONE]) / len(common[:_ALONE])
        before, measured = 0.0, 0
        for k in sizes:
            n = max(1, round(k * shared))
            if time.monotonic() > deadline:
                return
            if n == measured or (n == 1 and k > 1):
                continue
            took = self._seconds_stacked([common[i % len(common)] for i in range(n)], padder, k, shared)
            free_if_cuda(self.task.device)  # the next stack is larger
            if took is None:
                return
            to_begin, seconds = took
            if self.rounds * (to_begin + seconds) > self.seconds:
                return
            will_take = total - stacked + len(groups) * to_begin + stacked * seconds / n / alone
            gain, measured = total / will_take, n
            yield StackSize(capacity=k, stacked=True, padding=padding, shared=shared, why=""), gain
            if gain < 1.1 * before:
                return
            before = gain

    def _seconds_alone(self, member: Member) -> float:
        """Return the time of a whole trial, one at a time."""
        stack = LoopStack(self.task)
        stack.join(member)
        return self._seconds_per_step(stack) * self._n_steps(member.params)

    def _seconds_stacked(
        self, group: Sequence[Candidate], padder: Padder, capacity: int, shared: float
    ) -> tuple[float, float] | None:
        """Return the time to make a stack of `group`, and that of all its trials; None where there is no memory."""
        params = group[0].member.params
        rounds = max(1, round(self.n_trials / capacity))
        start = time.perf_counter()
        try:
            n_slots = min(capacity, slots_for(len(group), general=False))
            stack = VmapStack(self.task, n_slots, self.example, "graph", padder)
            reason = stack.open(group[0]) or why_not_all(stack.signature, group)
            copies = [replace(each, member=replace(each.member, number=-1 - i)) for i, each in enumerate(group)]
            reason = reason or next(iter(stack.take(copies).values()), None)
            if reason is not None:
                raise NotStackable(reason)
            stack.compiling.waits = True
            stack.expect(rounds * shared * self._n_steps(params))
            some, n_steps = self._some_steps(stack)
            for _ in range(TIMED_STEPS + 1 if n_steps == 1 else _TIMED_EPOCHS + 1):
                some()  # it is compiled in the last of these, if that pays
            to_begin = time.perf_counter() - start
            return to_begin, self._seconds_per_step(stack) * self._n_steps(params)
        except TrialError as error:
            raise NotStackable(str(error)) from error
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return None

    def _n_steps(self, params: Mapping[str, Any]) -> int:
        return self.task.epochs * self.task.steps_per_epoch(params)

    def _seconds_per_step(self, stack: Stack) -> float:
        """Return the median of some steps: beside other programs a few take many times as long."""
        some, n_steps = self._some_steps(stack)
        for _ in range(_WARM_UP):
            some()
        _synchronize(self.task.device)
        taken: list[float] = []
        while len(taken) < _STEPS and sum(taken) < _ENOUGH_SECONDS:
            if self.stopping():
                raise Interrupted()
            start = time.perf_counter()
            some()
            _synchronize(self.task.device)
            taken.append(time.perf_counter() - start)
        return median(taken) / n_steps

    def _some_steps(self, stack: Stack) -> tuple[Callable[[], Any], int]:
        """Return what does some steps of `stack`, and how many: one, or where many are one CUDA graph a short epoch."""
        batch_size = stack.members[0].params["batch_size"]
        if isinstance(stack, VmapStack) and records(self.task.device):
            rows = torch.arange(min(2 * STEPS_AT_ONCE * batch_size, len(self.batches)))
            return lambda: stack.epoch(self.batches, rows, self.stopping), len(batch_sizes(len(rows), batch_size))
        rows = torch.arange(min(batch_size, len(self.batches)))
        batch = next(self.batches.epoch(batch_size, rows))
        return lambda: stack.step(*batch), 1

    def _with_threads(self, choice: StackSize, members: Sequence[Member]) -> StackSize:
        """Return `choice` with as many threads as there are cores, where large steps are faster so."""
        n_cores, now = os.cpu_count() or 1, torch.get_num_threads()
        if self.task.device.type != "cpu" or n_cores == now or "OMP_NUM_THREADS" in os.environ:
            return choice
        member = members[0]
        one = self._seconds_alone(member)
        if one / self._n_steps(member.params) < _LARGE_STEP:
            return choice
        with torch_settings(self.task.device, threads=n_cores):
            several = self._seconds_alone(member)
        if several > 0.8 * one:
            return choice
        return replace(
            choice, threads=n_cores, why=f"{choice.why}; {n_cores} threads: {one / several:.1f} times as fast as {now}"
        )


def _in_order(found: Mapping[Padding, tuple[Mapping[Hashable, Sequence[Candidate]], Sequence[str]]]) -> list[Padding]:
    """Return the paddings that differ, the most promising first: measuring may end before the last of them.

    Where padding all to the largest makes networks little larger, fewer steps to compile for weigh more.
    """

    def size(padding: Padding) -> tuple[int, int]:
        groups = found[padding][0].values()
        return sum(math.prod(x) for each in groups for one in each for x in one.padded.shapes.values()), len(groups)

    paddings = [each for i, each in enumerate(_PADDINGS) if size(each) not in map(size, _PADDINGS[:i])]
    little = size(paddings[-1])[0] <= _LITTLE_LARGER * size(paddings[0])[0]
    return paddings[::-1] if little else paddings


def _synchronize(device: torch.device) -> None:
    """Wait until `device` has done what was asked of it so far: a GPU is only told what to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
