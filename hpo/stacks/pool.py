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
from hpo.stacks.returning import Returning
from hpo.stacks.sharing import Sharing, Signature
from hpo.stacks.vmap_stack import VmapStack
from hpo.study.data import Split
from hpo.training.faults import TrialError
from hpo.training.loop_stack import LoopStack
from hpo.training.stack import Member, Stack, Stacks, Task

WORTH_STACKING = 3
"""How many members a new stack must have, unless it is compiled or on CUDA: two are as fast one after the other."""

_MOST_UNUSED = 16
"""So many stacks without members are kept for trials to come: what they have traced and compiled takes memory."""
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
        self._sharing = Sharing()
        self._returning = Returning()
        self._alone = LoopStack(task)
        self._queue: list[Member] = []

    @property
    def free(self) -> int:
        return self.capacity - sum(len(stack.members) for stack in self.active) - len(self._queue)

    @property
    def active(self) -> Sequence[Stack]:
        return [stack for stack in (*self._stacks, self._alone) if stack.members]

    def join(self, members: Iterable[Member]) -> None:
        waiting = {member: self._candidates(member) for member in members}
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

    def _candidates(self, member: Member) -> Iterator[Candidate]:
        """Yield `member` as it was in a stack before it was paused, if it was, then with each padding."""
        if member.resume is not None and (found := self._returning.take(member)) is not None:
            yield found
        yield from candidates(self._task, member, self._plan, self._example)

    def _join_stacks(
        self, waiting: Mapping[Member, Iterator[Candidate]], reasons: Mapping[Member, str]
    ) -> dict[Member, str]:
        """Put each member into the stack of its next candidate; return those for which that failed, and why.

        A member that has no next candidate is queued to be trained alone: `reasons` are why its others were refused.
        """
        refused: dict[Member, str] = {}
        found = [self._next(member, several, reasons) for member, several in waiting.items()]
        left = [each for each in found if each is not None]
        for each in left:
            self._sharing.note(each)
        while left:
            stack, group = self._next_group(left)
            grouped = set(map(id, group))
            left = [each for each in left if id(each) not in grouped]
            try:
                if stack is None and (self._is_hopeless(group[0]) or self._worth_stacking(None, group)):
                    stack = self._opened(group[0])
                    left += [each for each in group if not stack.suits(each)]
                    group = [each for each in group if stack.suits(each)]
            except NotStackable as error:
                refused |= {each.member: str(error) for each in group}
                continue
            if stack is not None and self._worth_stacking(stack, group):
                self._hold(stack)
                refused |= self._take(stack, group)
                continue
            self._say_few(group[0])
            self._queue += [each.member for each in group]
        return refused

    def _say_few(self, candidate: Candidate) -> None:
        """Say that trials are trained alone for being few, and what kept others from sharing a stack with them."""
        if self.capacity > 1:
            apart = self._sharing.why_apart(candidate)
            self._once.info(
                f"fewer than {WORTH_STACKING} trials that can share a stack are trained alone",
                f"as fast; {apart}" if apart else "as fast",
            )

    def _next_group(self, several: Sequence[Candidate]) -> tuple[VmapStack | None, list[Candidate]]:
        """Return those that share a stack with the first, or would by what is known, and that stack, if it is there."""
        first = several[0]
        stack = self._suiting(first)
        if stack is not None:
            return stack, [each for each in several if stack.suits(each)]
        signature = self._sharing.signature(first)
        alike = [each for each in several if self._sharing.signature(each) == signature]
        return None, [each for each in alike if each is first or self._suiting(each) is None]

    def _suiting(self, candidate: Candidate) -> VmapStack | None:
        return next((stack for stack in self._stacks if stack.suits(candidate)), None)

    def _hold(self, stack: VmapStack) -> None:
        """Keep a stack that is about to be used as the last; let go of those that were not for the longest time."""
        if not stack.members:
            self._stacks = [each for each in self._stacks if each is not stack] + [stack]
        unused = [each for each in self._stacks if not each.members and each is not stack]
        for each in unused[: max(0, len(unused) - _MOST_UNUSED)]:
            self._stacks.remove(each)

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
            elif each.member.pause is not None:
                self._returning.keep(each)
        return refused

    def _is_hopeless(self, candidate: Candidate) -> bool:
        """Whether it is known that no stack takes it, padded as it is: with another padding one may."""
        return (candidate.padder, candidate.signature) in self._hopeless

    def _opened(self, candidate: Candidate) -> VmapStack:
        """Return a new stack of `candidate`'s signature. Raises NotStackable."""
        reason = self._hopeless.get((candidate.padder, candidate.signature))
        if reason is None:
            stack = VmapStack(self._task, min(2, self.capacity), self._example, "graph", candidate.padder)
            stack.compiling.left = self._left
            reason = stack.open(candidate, takes_numbers=self._sharing.takes_numbers(candidate))
        if reason is not None:
            self._hopeless[candidate.padder, candidate.signature] = reason
            raise NotStackable(reason)
        if stack.signature.has_numbers:
            self._sharing.note_numbers(candidate)
        return stack

    def _worth_stacking(self, stack: VmapStack | None, group: Sequence[Candidate]) -> bool:
        """Whether a group is to be trained in a stack: `stack`, or one that is not there yet, whose step is traced."""
        members = [each.member for each in group]
        if len(members) >= WORTH_STACKING or self._task.device.type == "cuda":
            return True
        if stack is not None and (stack.members or stack.is_compiled(self._slots_for(stack, len(members)))):
            return True
        n_steps = self._steps_left(stack, members, self._sharing.signature(group[0]))
        return compile_pays(n_steps, self._task.device, left=self._left())

    def _slots_for(self, stack: VmapStack | None, n: int) -> int:
        return min(self.capacity, slots_for(n, general=stack is not None and stack.is_general))

    def _is_too_large(self, stack: VmapStack) -> bool:
        """Whether a stack is to have fewer slots: at a quarter, where each number of them is traced by itself."""
        n = len(stack.members)
        return n <= stack.capacity // 4 or (stack.is_general and self._slots_for(stack, n) < stack.capacity)

    def _resize(self, stack: VmapStack, members: Sequence[Member]) -> None:
        capacity = self._slots_for(stack, len(members)) if members else 0
        if capacity != stack.capacity:
            stack.resize(capacity)
        if capacity:
            stack.expect(self._steps_left(stack, members, stack.signature))

    def _steps_left(self, stack: VmapStack | None, members: Sequence[Member], signature: Signature) -> float:
        """Return about how many steps a stack of `members` has still to do, those of trials still to come counted.

        Where trials are paused, most are never resumed: all together are trained for a third of the epochs.
        """
        share = min(self._shared, len(members) / max(len(members), self.capacity - self.free))
        share *= self._sharing.share(signature)
        rounds = math.floor(self._ahead() * share / self._slots_for(stack, len(members)))
        n_epochs = self._task.epochs * (_OF_PAUSED if any(member.pause is not None for member in members) else 1)
        longest = max(self._task.epochs - member.epoch for member in members)
        return (longest + rounds * n_epochs) * self._task.steps_per_epoch(members[0].params)
