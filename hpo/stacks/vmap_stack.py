"""VmapStack: K networks of one structure trained as one, `torch.func.vmap` over stacked weights.

What may differ between members lives in (K,) tensors (`hpo.stacks.state`): weights, buffers, the optimizer's state, its
hyperparameters, the schedule's, the numbers that the loss reads. Dropout's masks are a member's own
(`hpo.stacks.tensor_modules.RateDropout`): equal to training alone in distribution, not bit for bit.

Shapes: K slots, B rows of a batch; a weight (K, ...), a loss (K,).
"""

import math
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from hpo.errors import Interrupted
from hpo.stacks.alone import OUTSIDE, NotStackable, Trying, unlike, why_rows_matter
from hpo.stacks.candidate import Candidate, candidate
from hpo.stacks.compiling import Decision
from hpo.stacks.cost import records
from hpo.stacks.moved import outputs_when_moved
from hpo.stacks.padding import Padder, unpadded
from hpo.stacks.recording import line
from hpo.stacks.slots import Slots
from hpo.stacks.state import StackState
from hpo.stacks.structure import own_state
from hpo.stacks.vmap_step import Execution, VmapStep
from hpo.study.data import Split, batch_sizes
from hpo.training.batches import Batches
from hpo.training.evaluation import EVALUATION_ROWS, joined
from hpo.training.faults import TrialError
from hpo.training.memory import is_out_of_memory
from hpo.training.metrics import Measuring
from hpo.training.stack import Kept, Member, Stack, Task

_ABSENT, _OTHER_STRUCTURE = "absent", "its structure is not that of the stack"
_ROWS_AT_ONCE: Mapping[str, int] = {"cuda": 1 << 20}  # of all members together; on a CPU they stay in its cache
_DRAWS = "it draws random numbers in training, of which padding may make something else"
_OTHER_STEP = "its gradients in a stack are not those alone"


class VmapStack(Stack):
    """Slots for members of one signature, which the first that join give. Empty slots are trained along."""

    def __init__(
        self,
        task: Task,
        capacity: int,
        example: Split,
        execution: Execution = "eager",
        padder: Padder = unpadded,
    ) -> None:
        """`example`: a few rows as they are trained on; each member that joins is tried on them.

        `padder` pads a network to the shapes of the study's stacks. Since the gradients of what is padded are masked,
        it is the network that it would be alone.
        """
        self.capacity = capacity
        self.execution: Execution = execution
        self.compiling = Decision(task.device)
        self._task, self._example, self._padder = task, example, padder
        self._slots = Slots(capacity, task.device)
        self._step: VmapStep | None = None
        self._signature: Hashable = None
        self._without_network: set[Member] = set()
        self._compared: set[Hashable] = set()
        self._measuring = Measuring(task.objective, task.device)

    @property
    def members(self) -> Sequence[Member]:
        return self._slots.members

    @property
    def free(self) -> int:
        """How many slots are empty."""
        return self._slots.free

    @property
    def steps_per_epoch(self) -> int:
        """How many steps an epoch of its members has."""
        return self._task.steps_per_epoch(self._opened.params)

    @property
    def _opened(self) -> VmapStep:
        assert self._step is not None, "no member has given this stack its signature"
        return self._step

    @property
    def path(self) -> str | None:
        return None if self._step is None else self._step.path(self.capacity, self.execution)

    def is_compiled(self, capacity: int) -> bool:
        """Whether there is a compiled step for so many slots."""
        return self._opened.is_compiled(capacity)

    @property
    def is_general(self) -> bool:
        """Whether its steps are neither traced nor compiled again for another number of slots, of two or more."""
        return self._opened.is_general

    def expect(self, n_steps: float) -> None:
        """Say how many steps there may be still to do: they are compiled as soon as that pays (`Decision`)."""
        at_once = self.compiling.expect(n_steps, self.capacity)
        self.execution = "compiled" if at_once or self.is_compiled(self.capacity) else "graph"

    def suits(self, candidate: Candidate) -> bool:
        """Whether `candidate` has this stack's signature."""
        return self._step is not None and self._signature_of(candidate) == self._signature

    def _signature_of(self, candidate: Candidate) -> Hashable:
        params, numbers = candidate.member.params, self._slots.state.loss_hyper  # which must be there, too
        read = [(name, params.get(name, _ABSENT)) for name in candidate.reads if name not in numbers]
        return candidate.signature, (*read, *(name in params for name in numbers))

    def join(self, member: Member) -> None:
        """Raises NotStackable where `member` cannot join."""
        assert self.free, "the stack is full"
        try:
            each = candidate(self._task, member, self._padder, self._example)
        except (RuntimeError, MemoryError, TrialError) as error:
            member.note_fault(error, self._task.device)
            self._slots.take(member)
            self._without_network.add(member)
            return
        reason = self.open(each) if self._step is None else None
        reason = reason or self.take([each]).get(member)
        if reason is not None:
            raise NotStackable(reason)

    def open(self, first: Candidate) -> str | None:
        """Make this the stack of `first`'s signature, without taking it in; return why it cannot be stacked, if so."""
        self._slots.state = StackState.empty(first, self.capacity, self._task.device)
        self._step = VmapStep(self._task, first.probe.module, first.member.params)
        self._signature = self._signature_of(first)
        try:
            reason = self._try_out(first, first.probe.module)
        except BaseException:
            self._step = None
            raise
        if reason is not None:
            self._step = None
        return reason

    def _try_out(self, first: Candidate, template: nn.Module) -> str | None:
        """Return why torch.func has no rule for the network or the loss, if so.

        A loss that does not take its numbers as tensors gets them as numbers, which members must then have in common.
        """
        inputs, targets = list(self._example.inputs.values()), self._example.targets
        before = own_state(template)
        try:
            self._opened.try_out(self._slots.state, inputs, targets, self.execution)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            if not self._slots.state.loss_hyper:
                return _reason(error)
            self._slots.state = self._slots.state._replace(loss_hyper={})
            self._signature = self._signature_of(first)
            return self._try_out(first, template)
        if own_state(template) != before:
            return OUTSIDE
        return why_rows_matter(self._task, first.member, first.padded.signature, self._example)

    def take(self, candidates: Sequence[Candidate]) -> dict[Member, str]:
        """Take in `candidates`, at most as many as there are free slots; return those that cannot join, and why."""
        suitable = [each for each in candidates if self.suits(each)]
        assert len(suitable) <= self.free, "the stack is full"
        refused = {each.member: _OTHER_STRUCTURE for each in candidates if each not in suitable}
        slots = {each: self._slots.take(each.member) for each in suitable}
        try:
            if slots:
                self._slots.fill({slot: (each.member, each.probe) for each, slot in slots.items()})
            wrong = self._wrong({slot: each.outputs for each, slot in slots.items()})
            several = {slot: each for each, slot in slots.items() if slot not in wrong}
            new = {each.padded.form: slot for slot, each in several.items()}
            new = {form: slot for form, slot in new.items() if form not in self._compared}
            wrong |= self._wrong_step(several, new) | self._wrong_when_moved(several, new)
            self._compared |= {form for form, slot in new.items() if slot not in wrong}
            if slots:
                self._slots.fill({slot: (each.member, each.padded) for each, slot in slots.items()})
            for each, slot in slots.items():
                if each.member.resume is not None:
                    self._slots.restore(slot, each.member, each.member.resume)
        except BaseException:
            for each in suitable:
                self.leave(each.member)
            raise
        for each, slot in slots.items():
            if slot in wrong:
                refused[each.member] = wrong[slot]
                self.leave(each.member)
        return refused

    def _wrong(self, alone: Mapping[int, Any]) -> dict[int, str]:
        """Return by slot why its outputs in the stack are not those of its own network, `alone`."""
        if not alone:
            return {}
        try:
            stacked = self._opened.forward(self._slots.state, list(self._example.inputs.values()))
        except Exception as error:
            if is_out_of_memory(error):
                raise
            return dict.fromkeys(alone, _reason(error))
        of = {slot: tree_map(lambda x, slot=slot: x[slot], stacked) for slot in alone}
        found = {slot: unlike(of[slot], outputs, self._task.precision) for slot, outputs in alone.items()}
        return {slot: reason for slot, reason in found.items() if reason is not None}

    def _wrong_step(self, several: Mapping[int, Candidate], new: Mapping[Hashable, int]) -> dict[int, str]:
        """Return by slot why its first step in a stack is not its own; of each `new` form one is looked at."""
        wrong = {slot: _DRAWS for slot, each in several.items() if each.alone.is_random and each.is_padded}
        new = {form: slot for form, slot in new.items() if not several[slot].alone.is_random}
        if not new:
            return wrong
        inputs, targets, state = list(self._example.inputs.values()), self._example.targets, self._slots.state
        state = state._replace(weights=tree_map(torch.clone, state.weights))  # a forward may write into them
        try:
            with torch.no_grad(), Trying():
                gradients, buffers, _ = self._opened.gradients(state, inputs, targets)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            return dict.fromkeys(several, _reason(error))
        for form, first in new.items():
            member, alone = several[first].member, several[first].alone
            if not alone.is_like(self._slots.own(member, {**gradients, **buffers}), self._task.precision):
                wrong |= {slot: _OTHER_STEP for slot, each in several.items() if each.padded.form == form}
        return wrong

    def _wrong_when_moved(self, several: Mapping[int, Candidate], new: Mapping[Hashable, int]) -> dict[int, str]:
        """Return by slot why its outputs are not its own with other weights; of each `new` form one is looked at."""
        some = {slot: several[slot] for slot in new.values() if several[slot].is_padded}
        found: dict[Hashable, str] = {}
        for alone in outputs_when_moved(self._task, some, self._example) if some else ():
            self._slots.fill({slot: (several[slot].member, several[slot].probe) for slot in some})
            found |= {several[slot].padded.form: why for slot, why in self._wrong(alone).items()}
        return {slot: found[each.padded.form] for slot, each in several.items() if each.padded.form in found}

    def resize(self, capacity: int) -> None:
        """Change the number of slots to `capacity`, at least as many as there are members, who move together."""
        self._slots.resize(capacity)
        self.capacity = capacity
        if self._step is not None:
            self._step.forget()

    def leave(self, member: Member) -> None:
        self._slots.release(member)
        self._without_network.discard(member)

    def step(self, inputs: Sequence[Tensor], targets: Tensor) -> Tensor:
        if self._step is None:  # no member has a network
            return torch.full((len(self.members),), math.nan, device=self._task.device)
        losses = self._step_of_all(inputs, targets)
        if self._slots.free:
            losses = losses[self._slots.live()]
        if self._without_network:
            losses = losses.masked_fill(self._missing(), math.nan)
        return losses

    def epoch(self, batches: Batches, rows: Tensor, stopping: Callable[[], bool]) -> list[float]:
        if self._step is None or self._without_network or not (batches.resident and records(self._task.device)):
            return super().epoch(batches, rows, stopping)
        rows = rows.to(self._task.device)
        order = torch.split(rows, batch_sizes(len(rows), self._step.params["batch_size"]))
        equal = torch.stack([each for each in order if len(each) == len(order[0])])  # all but the last, perhaps
        sums = torch.zeros(self.capacity, device=rows.device)

        def one_by_one(some: Sequence[Tensor]) -> None:
            nonlocal sums
            for each in some:
                if stopping():
                    raise Interrupted()
                sums = sums + self._step_of_all(*batches.pick(each)) * len(each)

        n_done = 0
        many = self._step.epoch(self._slots.state, batches, equal, self.execution)
        if many is None:
            one_by_one(order[:1])  # which records a step, or copies the state to where one is recorded
            n_done, many = 1, self._step.epoch(self._slots.state, batches, equal, self.execution)
        if many is not None:
            self._slots.settle()
            many.start(equal, n_done)
            while n_done + many.n_steps <= len(equal):
                if stopping():
                    raise Interrupted()
                many()
                n_done += many.n_steps
            sums = sums + many.sums * len(order[0])
        one_by_one(order[n_done:])
        means: list[float] = (sums / len(rows))[self._slots.live()].tolist()
        return means

    def _step_of_all(self, inputs: Sequence[Tensor], targets: Tensor) -> Tensor:
        """Do one step; return the losses of all slots, (K,), the empty ones too."""
        self._slots.settle()
        start = time.perf_counter()
        try:
            self._slots.state, losses = self._opened(self._slots.state, inputs, targets, self.execution)
        finally:
            self.compiling.done()
        if self.execution == "graph":
            seconds, step = time.perf_counter() - start, self._opened
            if self.compiling.after(seconds, lambda: (step.code, step.n_operations)):
                self.execution = "compiled"
        return losses

    def _missing(self) -> Tensor:
        """Return which members have no network, (n,)."""
        return torch.tensor([member in self._without_network for member in self.members], device=self._task.device)

    def evaluate(self, batches: Batches) -> list[dict[str, float]]:
        having = [member for member in self.members if member not in self._without_network]
        if not having:
            return [{} for _ in self.members]
        state = self._slots.state
        rows = max(256, _ROWS_AT_ONCE.get(self._task.device.type, EVALUATION_ROWS) // self.capacity)
        outputs = joined([self._opened.forward(state, inputs) for inputs, _ in batches.chunks(rows)], dim=1)
        live = self._slots.live()
        if self._without_network:
            live = live[~self._missing()]
        outputs, numbers = tree_map(lambda x: x[live], (outputs, state.loss_hyper))
        params = [member.params for member in having]
        results = dict(zip(having, self._measuring(outputs, batches.targets, params, numbers), strict=True))
        return [results.get(member, {}) for member in self.members]

    def module(self, member: Member) -> nn.Module:
        module = self._task.build(member)
        module.load_state_dict(self.state(member))
        return module

    def state(self, member: Member) -> dict[str, Tensor]:
        return self._slots.tensors(member)

    def keep(self, member: Member) -> Kept:
        return self._slots.keep(member)

    def checkpoint(self, member: Member) -> dict[str, Any]:
        return self._slots.checkpoint(member)


def _reason(error: Exception) -> str:
    return f"torch.func cannot batch it ({line(error)})"
