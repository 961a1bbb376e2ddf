"""VmapStack: K networks of one structure trained as one, `torch.func.vmap` over stacked weights.

What may differ between members lives in (K,) tensors (`hpo.stacks.state`): weights, buffers, the optimizer's state, its
hyperparameters, the schedule's, the numbers that the loss reads. Dropout's masks are a member's own
(`hpo.stacks.tensor_modules.RateDropout`): equal to training alone in distribution, not bit for bit.

Shapes: K slots, B rows of a batch; a weight (K, ...), a loss (K,).
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from hpo.errors import Interrupted
from hpo.stacks.admission import Admission, not_batched
from hpo.stacks.alone import OUTSIDE, NotStackable, why_rows_matter
from hpo.stacks.candidate import Candidate, candidate
from hpo.stacks.compiling import Decision
from hpo.stacks.cost import records
from hpo.stacks.padding import Padder, unpadded
from hpo.stacks.sharing import Signature, signature_of
from hpo.stacks.slots import Slots
from hpo.stacks.state import StackState
from hpo.stacks.structure import own_state
from hpo.stacks.vmap_step import Execution, VmapStep
from hpo.study.data import Split, batch_sizes
from hpo.training.batches import Batches
from hpo.training.evaluation import EVALUATION_ROWS, in_pieces, joined
from hpo.training.faults import TrialError
from hpo.training.memory import is_out_of_memory, total_bytes
from hpo.training.metrics import Measuring
from hpo.training.stack import Kept, Member, Stack, Task

_OTHER_STRUCTURE = "its structure is not that of the stack"
_ROWS_AT_ONCE: Mapping[str, int] = {"cuda": 1 << 20}  # of all members together; on a CPU they stay in its cache
_OF_MEMORY = 0.1
"""How much of a GPU's memory what lies between layers may take in an evaluation. Not of what is free at the moment: how
many rows go through a network at once is the same in each run, and with it how its outputs are rounded."""


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
        self._signature: Signature | None = None
        self._row_bytes, self._most_rows = 1, math.inf
        """What lies between a member's layers, for one row; and, of all members, the rows that memory had room for."""
        self._mixes_rows = False
        self._without_network: set[Member] = set()
        self._admission = Admission(task, example, self._slots)
        self._measuring = Measuring(task.objective, task.device)

    @property
    def members(self) -> Sequence[Member]:
        return self._slots.members

    @property
    def free(self) -> int:
        """How many slots are empty."""
        return self._slots.free

    @property
    def signature(self) -> Signature:
        """What its members have in common."""
        assert self._signature is not None, "no member has given this stack its signature"
        return self._signature

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
        at_once = self.compiling.expect(n_steps, self.capacity, self._captured)
        self.execution = "compiled" if at_once or self.is_compiled(self.capacity) else "graph"

    def _captured(self) -> tuple[str, int]:
        """Return the code of its step as it was captured, and how many operations that has."""
        return self._opened.code, self._opened.n_operations

    def suits(self, candidate: Candidate) -> bool:
        """Whether `candidate` has this stack's signature."""
        return self._step is not None and signature_of(candidate, self._slots.state.loss_hyper) == self._signature

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

    def open(self, first: Candidate, *, takes_numbers: bool = False) -> str | None:
        """Make this the stack of `first`'s signature, without taking it in; return why it cannot be stacked, if so.

        `takes_numbers`: it is known that the loss takes no tensors in place of its numbers, so that is not tried.
        """
        self._slots.state = StackState.empty(first, self.capacity, self._task.device)
        if takes_numbers:
            self._slots.state = self._slots.state._replace(loss_hyper={})
        self._step = VmapStep(self._task, first.probe.module, first.member.params, first.reads)
        self._signature = signature_of(first, self._slots.state.loss_hyper)
        self._row_bytes = max(1, first.activations)
        self._mixes_rows = first.mixes_rows
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
        inputs, targets = [x.clone() for x in self._example.inputs.values()], self._example.targets
        before = own_state(template)
        try:
            self._opened.try_out(self._slots.state, inputs, targets, self.execution)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            if not self._slots.state.loss_hyper:
                return not_batched(error)
            self._slots.state = self._slots.state._replace(loss_hyper={})
            self._signature = signature_of(first, self._slots.state.loss_hyper)
            return self._try_out(first, template)
        if own_state(template) != before:
            return OUTSIDE
        member = replace(first.member, params=dict(first.member.params))  # into which the loss may write
        return why_rows_matter(self._task, member, first.padded.signature, self._example)

    def take(self, candidates: Sequence[Candidate]) -> dict[Member, str]:
        """Take in `candidates`, at most as many as there are free slots; return those that cannot join, and why."""
        suitable = [each for each in candidates if self.suits(each)]
        assert len(suitable) <= self.free, "the stack is full"
        refused = {each.member: _OTHER_STRUCTURE for each in candidates if each not in suitable}
        several = {self._slots.take(each.member): each for each in suitable}
        try:
            wrong = self._admission.wrong(self._opened, several) if several else {}
            if several:
                self._slots.fill({slot: (each.member, each.padded) for slot, each in several.items()})
            for slot, each in several.items():
                if each.member.resume is not None:
                    self._slots.restore(slot, each.member, each.member.resume)
        except BaseException:
            for each in suitable:
                self.leave(each.member)
            raise
        for slot, each in several.items():
            if slot in wrong:
                refused[each.member] = wrong[slot]
                self.leave(each.member)
            else:  # by its own params or buffers it may do so where those before it did not
                self._mixes_rows |= each.mixes_rows
        return refused

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
        if self._step is None or not records(self._task.device):
            return super().epoch(batches, rows, stopping)
        one_by_one = self._without_network or not batches.resident
        start = time.perf_counter()
        means = (super().epoch if one_by_one else self._recorded_epoch)(batches, rows, stopping)
        seconds, n_steps = time.perf_counter() - start, len(batch_sizes(len(rows), self._step.params["batch_size"]))
        if self.execution != "eager":
            form = self.capacity, self.execution == "compiled"
            if self.compiling.after_epoch(seconds, n_steps, form, self._captured):
                self.execution = "compiled"
        return means

    def _recorded_epoch(self, batches: Batches, rows: Tensor, stopping: Callable[[], bool]) -> list[float]:
        """Do an epoch, many steps in one CUDA graph, but for the first of all and what is left over at the end."""
        rows = rows.to(self._task.device)
        order = torch.split(rows, batch_sizes(len(rows), self._opened.params["batch_size"]))
        equal = torch.stack([each for each in order if len(each) == len(order[0])])  # all but the last, perhaps
        sums = torch.zeros(self.capacity, device=rows.device)

        def one_by_one(some: Sequence[Tensor]) -> None:
            nonlocal sums
            for each in some:
                if stopping():
                    raise Interrupted()
                sums = sums + self._step_of_all(*batches.pick(each)) * len(each)

        n_done = 0
        many = self._opened.epoch(self._slots.state, batches, equal, self.execution)
        if many is None:
            one_by_one(order[:1])  # which records a step, or copies the state to where one is recorded
            n_done, many = 1, self._opened.epoch(self._slots.state, batches, equal, self.execution)
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
        timed = self.execution == "graph" and not records(self._task.device)
        if timed and self.compiling.after(time.perf_counter() - start, self._captured):
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
        rows, fewest = self._rows_at_once()

        def outputs_of(inputs: Sequence[Tensor]) -> Any:
            return self._opened.evaluation(state, inputs, self.execution)

        parts, fitted = in_pieces(outputs_of, batches, rows, fewest)
        if fitted < rows:
            self._most_rows = fitted * self.capacity
        outputs = joined(parts, dim=1)
        live = self._slots.live()
        if self._without_network:
            live = live[~self._missing()]
        outputs, numbers = tree_map(lambda x: x[live], (outputs, state.loss_hyper))
        params = [member.params for member in having]
        measured = self._measuring(outputs, batches.targets, params, numbers, self._opened.reads)
        results = dict(zip(having, measured, strict=True))
        return [results.get(member, {}) for member in self.members]

    def _rows_at_once(self) -> tuple[int, int]:
        """Return how many rows go through all networks at once in an evaluation, and how many do in a step."""
        device, fewest = self._task.device, int(self._opened.params["batch_size"])
        rows = max(256, _ROWS_AT_ONCE.get(device.type, EVALUATION_ROWS) // self.capacity)
        if self._mixes_rows:
            rows = EVALUATION_ROWS  # as alone
        most = min(self._most_rows, _OF_MEMORY * total_bytes(device) / self._row_bytes) / self.capacity
        return int(min(rows, max(fewest, most))), fewest

    def module(self, member: Member) -> nn.Module:
        module = self._task.build(member)
        module.load_state_dict(self.state(member))
        buffers, tensors = dict(module.named_buffers()), self._slots.tensors(member)
        with torch.no_grad():
            for name in tensors.keys() - module.state_dict().keys():  # those too that are not persistent
                buffers[name].copy_(tensors[name])
        return module

    def state(self, member: Member) -> dict[str, Tensor]:
        return self._slots.state_dict(member)

    def keep(self, member: Member) -> Kept:
        return self._slots.keep(member)

    def checkpoint(self, member: Member) -> dict[str, Any]:
        return self._slots.checkpoint(member)
