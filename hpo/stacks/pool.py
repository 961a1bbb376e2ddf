"""The members in training, divided into the stacks that run side by side: one for each kind of member.

Batch size, kind of optimizer and the structure of the network decide which stack a member joins. A stack is as large as
its members need, so one that few trials fit costs little. What cannot be stacked trains alone, one at a time, in a
LoopStack, and the reason is said once.
"""

import math
from collections.abc import Callable, Hashable, Iterable, Sequence

import torch

from hpo.stacks.padding import PaddingPlan
from hpo.stacks.vmap_stack import Candidate, How, NotStackable, VmapStack, candidate
from hpo.study.data import Split
from hpo.training.faults import TrialError
from hpo.training.memory import is_out_of_memory
from hpo.training.stack import LoopStack, Member, Stack, Stacks, Task

WORTH_STACKING = 3
"""How many members a new stack must have, unless it is compiled or on CUDA: two are as fast one after the other."""
WORTH_COMPILING = 10_000
"""How many steps of a stack pay for compiling it: that takes some 5 s, and saves about half a millisecond a step."""


class Pool(Stacks):
    """Up to `capacity` members, in stacks of their kinds."""

    def __init__(
        self,
        task: Task,
        capacity: int,
        example: Split,
        frames: PaddingPlan,
        *,
        say: Callable[[str], None] = lambda text: None,
        ahead: Callable[[], int] = lambda: 0,
        shared: float = 1.0,
    ) -> None:
        """`example`: a few rows as they are trained on. `say` is told, for a person, what cannot be stacked.

        `ahead` tells how many trials are still to come, of which no more than the share `shared` is of one kind: that
        decides whether to compile.
        """
        self.capacity = capacity
        self._task, self._example, self._frames = task, example, frames
        self._say, self._ahead, self._shared = say, ahead, shared
        self._stacks: list[VmapStack] = []
        self._hopeless: dict[tuple[int, Hashable], str] = {}
        self._alone = LoopStack(task)
        self._queue: list[Member] = []

    @property
    def free(self) -> int:
        return self.capacity - sum(len(stack.members) for stack in self.active) - len(self._queue)

    @property
    def active(self) -> Sequence[Stack]:
        return [stack for stack in (*self._stacks, self._alone) if stack.members]

    def join(self, members: Iterable[Member]) -> None:
        waiting = [(member, 0) for member in members]
        while waiting:
            waiting = self._place(waiting)
        for stack in self._stacks:
            if len(stack.members) <= stack.capacity // 4:
                self._resize(stack, len(stack.members))
        while self._queue and not self._alone.members:
            self._alone.join(self._queue.pop(0))

    def _place(self, waiting: Sequence[tuple[Member, int]]) -> list[tuple[Member, int]]:
        """Put each member into a stack of its kind in the frame of that level; return those to be tried in the next.

        Those for which there is none are queued to be trained alone.
        """
        kinds: dict[VmapStack, list[tuple[int, Candidate]]] = {}
        refused: list[tuple[Member, int, str]] = []
        for member, level in waiting:
            try:
                each = self._candidate(member, level)
                kinds.setdefault(self._stack_of(each, level), []).append((level, each))
            except NotStackable as error:
                refused.append((member, level, str(error)))
            except TrialError:  # it is raised again, and ends its trial, where that is alone
                self._queue.append(member)
        for stack, group in kinds.items():
            if not self._worth_stacking(stack, len(group)):
                if self.capacity > 1:
                    self._say(f"trials of a kind that fewer than {WORTH_STACKING} share are trained alone: as fast")
                self._queue += [each.member for _, each in group]
                continue
            if stack.free < len(group) or not stack.members:
                self._resize(stack, len(stack.members) + len(group))
            reasons = stack.take([each for _, each in group])
            for level, each in group:
                if each.member in reasons:
                    self._hopeless[level, each.signature] = reasons[each.member]
                    refused.append((each.member, level, reasons[each.member]))
        again = [(member, level + 1) for member, level, _ in refused if level + 1 < len(self._frames)]
        for member, level, reason in refused:
            if level + 1 == len(self._frames):
                self._say(f"trials like trial {member.number} are trained one at a time: {reason}")
                self._queue.append(member)
        return again

    def _candidate(self, member: Member, level: int) -> Candidate:
        """Raises NotStackable; also for a network that the machine has no memory for, which may fail, but alone."""
        try:
            return candidate(self._task, member, self._frames[level], self._example)
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, torch.OutOfMemoryError) or not is_out_of_memory(error):
                raise  # a GPU may be full of others: stacks are to be smaller
            raise NotStackable("memory has no room to try its network in a stack") from error

    def _stack_of(self, candidate: Candidate, level: int) -> VmapStack:
        """Return the stack of `candidate`'s kind, made if there is none. Raises NotStackable."""
        for stack in self._stacks:
            if stack.suits(candidate):
                return stack
        reason = self._hopeless.get((level, candidate.signature))
        if reason is None:
            stack = VmapStack(self._task, 1, self._example, "graph", self._frames[level])
            reason = stack.open(candidate)
        if reason is not None:
            self._hopeless[level, candidate.signature] = reason
            raise NotStackable(reason)
        self._stacks.append(stack)
        return stack

    def _worth_stacking(self, stack: VmapStack, n_members: int) -> bool:
        return (
            n_members >= WORTH_STACKING
            or bool(stack.members)
            or self._task.device.type == "cuda"
            or self._how(stack, n_members, 1 << (n_members - 1).bit_length()) == "compiled"
        )

    def _resize(self, stack: VmapStack, n_members: int) -> None:
        capacity = 1 << (n_members - 1).bit_length() if n_members else 0
        if capacity != stack.capacity:
            stack.resize(capacity)
        if capacity:
            stack.how = self._how(stack, n_members, capacity)

    def _how(self, stack: VmapStack, n_members: int, capacity: int) -> How:
        """Return whether the steps that a stack of that size has still to do pay for compiling it, or it is done."""
        if stack.is_compiled(capacity):
            return "compiled"
        share = min(self._shared, n_members / max(n_members, self.capacity - self.free))
        rounds = 1 + math.floor(self._ahead() * share / capacity)
        n_steps = rounds * self._task.epochs * stack.steps_per_epoch
        return "compiled" if n_steps >= WORTH_COMPILING else "graph"
