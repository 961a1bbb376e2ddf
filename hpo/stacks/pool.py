"""The members in training, divided into the stacks that run side by side: one for each signature.

Batch size, optimizer and the structure of the network decide which stack a member joins. A stack is as large as its
members need, so one that few trials fit costs little. What cannot be stacked trains alone, one at a time, in a
LoopStack, and the reason is said once.
"""

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence

from hpo.log import Once
from hpo.stacks.alone import NotStackable
from hpo.stacks.candidate import Candidate, candidates
from hpo.stacks.cost import compile_pays, slots_for
from hpo.stacks.padding import Padder, PaddingPlan
from hpo.stacks.vmap_stack import VmapStack
from hpo.study.data import Split
from hpo.training.faults import TrialError
from hpo.training.loop_stack import LoopStack
from hpo.training.stack import Member, Stack, Stacks, Task

WORTH_STACKING = 3
"""How many members a new stack must have, unless it is compiled or on CUDA: two are as fast one after the other."""

_OF_PAUSED = 1 / 3
"""Which part of the epochs is trained where trials are paused: see benchmarks/pruning.py."""


class Pool(Stacks):
    """Up to `capacity` members, in stacks by their signatures."""

    def __init__(
        self,
        task: Task,
        capacity: int,
        example: Split,
        plan: PaddingPlan,
        *,
        once: Once | None = None,
        ahead: Callable[[], int] = lambda: 0,
        shared: float = 1.0,
        left: Callable[[], float] = lambda: math.inf,
    ) -> None:
        """`example`: a few rows as they are trained on. `once` logs what cannot be stacked.

        `ahead` returns how many trials are still to come, of which no more than the share `shared` have one signature:
        that decides whether to compile, with the seconds that trials may still take, which `left` gives.
        """
        self.capacity = capacity
        self._task, self._example, self._plan = task, example, plan
        self._once, self._ahead, self._shared, self._left = once or Once(), ahead, shared, left
        self._stacks: list[VmapStack] = []
        self._hopeless: dict[tuple[Padder, Hashable], str] = {}
        self._alone = LoopStack(task)
        self._queue: list[Member] = []

    @property
    def free(self) -> int:
        return self.capacity - sum(len(stack.members) for stack in self.active) - len(self._queue)

    @property
    def active(self) -> Sequence[Stack]:
        return [stack for stack in (*self._stacks, self._alone) if stack.members]

    def join(self, members: Iterable[Member]) -> None:
        waiting = {member: candidates(self._task, member, self._plan, self._example) for member in members}
        reasons: dict[Member, str] = {}
        while waiting:
            refused = self._join_stacks(waiting, reasons)
            reasons |= refused
            waiting = {member: waiting[member] for member in refused}
        for stack in self._stacks:
            if self._is_too_large(stack):
                self._resize(stack, stack.members)
        while self._queue and not self._alone.members:
            self._alone.join(self._queue.pop(0))

    def _join_stacks(
        self, waiting: Mapping[Member, Iterator[Candidate]], reasons: Mapping[Member, str]
    ) -> dict[Member, str]:
        """Put each member into the stack of its next candidate; return those for which that failed, and why.

        A member that has no next candidate is queued to be trained alone: `reasons` are why its others were refused.
        """
        refused: dict[Member, str] = {}
        groups: dict[VmapStack, list[Candidate]] = {}
        for member, several in waiting.items():
            each = self._next(member, several, reasons)
            if each is not None:
                try:
                    groups.setdefault(self._stack_of(each), []).append(each)
                except NotStackable as error:
                    refused[member] = str(error)
        for stack, group in groups.items():
            if self._worth_stacking(stack, [each.member for each in group]):
                refused |= self._take(stack, group)
                continue
            if self.capacity > 1:
                self._once.info(
                    f"fewer than {WORTH_STACKING} trials with networks of one shape are trained alone",
                    "as fast",
                )
            self._queue += [each.member for each in group]
        return refused

    def _next(self, member: Member, several: Iterator[Candidate], reasons: Mapping[Member, str]) -> Candidate | None:
        """Return the next of a member's candidates; None where it is queued to be trained alone."""
        try:
            each = next(several, None)
            reason = reasons.get(member, "")
        except NotStackable as error:
            each, reason = None, str(error)
        except TrialError:  # it is raised again, and ends its trial, where that is alone
            self._queue.append(member)
            return None
        if each is None:
            like = f"trials like trial {member.number}" if member.number >= 0 else "networks like the default one"
            self._once.info(f"{like} are trained one at a time", reason)
            self._queue.append(member)
        return each

    def _take(self, stack: VmapStack, group: Sequence[Candidate]) -> dict[Member, str]:
        """Make room in a stack and have it take a group of candidates; return those that it refuses, and why."""
        if stack.free < len(group) or not stack.members:
            self._resize(stack, [*stack.members, *(each.member for each in group)])
        refused = stack.take(group)
        for each in group:
            if each.member in refused:
                self._hopeless[each.padder, each.signature] = refused[each.member]
        return refused

    def _stack_of(self, candidate: Candidate) -> VmapStack:
        """Return the stack of `candidate`'s signature, made if there is none. Raises NotStackable."""
        for stack in self._stacks:
            if stack.suits(candidate):
                return stack
        reason = self._hopeless.get((candidate.padder, candidate.signature))
        if reason is None:
            stack = VmapStack(self._task, min(2, self.capacity), self._example, "graph", candidate.padder)
            stack.compiling.left = self._left
            reason = stack.open(candidate)
        if reason is not None:
            self._hopeless[candidate.padder, candidate.signature] = reason
            raise NotStackable(reason)
        self._stacks.append(stack)
        return stack

    def _worth_stacking(self, stack: VmapStack, members: Sequence[Member]) -> bool:
        return (
            len(members) >= WORTH_STACKING
            or bool(stack.members)
            or self._task.device.type == "cuda"
            or stack.is_compiled(self._slots_for(stack, len(members)))
            or compile_pays(self._steps_left(stack, members), self._task.device, left=self._left())
        )

    def _slots_for(self, stack: VmapStack, n: int) -> int:
        return min(self.capacity, slots_for(n, general=stack.is_general))

    def _is_too_large(self, stack: VmapStack) -> bool:
        """Whether a stack is to have fewer slots: at a quarter, where each number of them is traced by itself."""
        n = len(stack.members)
        return n <= stack.capacity // 4 or (stack.is_general and self._slots_for(stack, n) < stack.capacity)

    def _resize(self, stack: VmapStack, members: Sequence[Member]) -> None:
        capacity = self._slots_for(stack, len(members)) if members else 0
        if capacity != stack.capacity:
            stack.resize(capacity)
        if capacity:
            stack.expect(self._steps_left(stack, members))

    def _steps_left(self, stack: VmapStack, members: Sequence[Member]) -> float:
        """Return about how many steps a stack of `members` has still to do, those of trials still to come counted.

        Where trials are paused, most are never resumed: all together are trained for a third of the epochs.
        """
        share = min(self._shared, len(members) / max(len(members), self.capacity - self.free))
        rounds = math.floor(self._ahead() * share / self._slots_for(stack, len(members)))
        n_epochs = self._task.epochs * (_OF_PAUSED if any(member.pause is not None for member in members) else 1)
        longest = max(self._task.epochs - member.epoch for member in members)
        return (longest + rounds * n_epochs) * stack.steps_per_epoch
