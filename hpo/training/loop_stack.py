"""LoopStack: K plain modules under torch.optim, one after the other.

It is the reference that every faster stack must match, and the fallback for members that cannot be stacked.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hpo.study.objective import Params
from hpo.training import optim, schedules, stacked_optim
from hpo.training.batches import Batches
from hpo.training.evaluation import evaluate, in_full
from hpo.training.faults import TrialError
from hpo.training.memory import free_bytes, n_bytes, shown
from hpo.training.outside import Outside
from hpo.training.stack import Member, Stack, Task
from hpo.training.torch_settings import random_states, set_random_states

_LARGE = 1 << 24
"""Bytes of a network for which it is worth asking how much memory is free."""


class LoopStack(Stack):
    """K plain modules, K optimizers of torch.optim, one loop over them."""

    def __init__(self, task: Task, capacity: int = 1) -> None:
        self.capacity = capacity
        self._task = task
        self._slots: dict[Member, _Slot] = {}
        self._nan = torch.full((), torch.nan, device=task.device)
        self._metrics = {name: metric.to(task.device) for name, metric in task.objective.metrics().items()}

    @property
    def members(self) -> Sequence[Member]:
        return list(self._slots)

    def join(self, member: Member) -> None:
        assert len(self._slots) < self.capacity
        self._slots[member] = slot = _Slot(self._task)
        try:
            module = self._task.build(member)
            _require_room(module, member.params, self._task.device)
            slot.fill(module, member.params)
            if member.resume is not None:
                slot.restore(member.resume)
        except (RuntimeError, MemoryError, TrialError) as error:
            member.note_fault(error, self._task.device)

    def leave(self, member: Member) -> None:
        del self._slots[member]

    def step(self, inputs: Sequence[Tensor], targets: Tensor) -> Tensor:
        losses = []
        for member, slot in self._slots.items():
            loss = self._nan
            if member.fault is None:
                try:
                    loss = slot.step(inputs, targets)
                except (RuntimeError, MemoryError, TrialError) as error:
                    member.note_fault(error, self._task.device)
            losses.append(loss)
        return torch.stack(losses)

    def evaluate(self, batches: Batches) -> list[dict[str, float]]:
        results = []
        for member, slot in self._slots.items():
            result: dict[str, float] = {}
            if member.fault is None:
                try:
                    result = evaluate(self._task, slot.module, batches, member.params, self._metrics)
                except (RuntimeError, MemoryError, TrialError) as error:
                    member.note_fault(error, self._task.device)
                slot.module.train()
            results.append(result)
        return results

    def module(self, member: Member) -> nn.Module:
        return self._slots[member].module

    def checkpoint(self, member: Member) -> dict[str, Any]:
        return self._slots[member].checkpoint() | {"random": random_states(self._task.device)}


def _require_room(module: nn.Module, params: Params, device: torch.device) -> None:
    """Raise MemoryError where a network that fits into the machine's memory cannot be trained in it.

    A GPU says so itself; of a machine without memory, the process is ended. Its gradients are counted, what its
    optimizer keeps of them, and the copy of its best epoch; what lies between its layers depends on the batch.
    """
    size = n_bytes(module)
    if device.type != "cpu" or size < _LARGE:
        return
    optimizer = str(params["optimizer"]).lower()
    copies = 2 + (len(stacked_optim.state_names(optimizer, params)) if optimizer in stacked_optim.STATE else 0)
    free = free_bytes(device)
    if copies * size > free:
        raise MemoryError(f"to train its {shown(size)} takes {shown(copies * size)} more, and {shown(free)} are free")


class _Slot:
    """One member's module, optimizer and schedule, once it is filled with them."""

    module: nn.Module

    def __init__(self, task: Task) -> None:
        self._task = task

    def fill(self, module: nn.Module, params: Params) -> None:
        """Take in a module that is on its device already: the optimizer is made after that."""
        self.module, self._params = module.train(), params
        self._outside = Outside(module, self._task.objective)
        # with the frozen ones, as `Adam(module.parameters())`: they may be trained later, and have no gradient before
        self._weights = [w for w in module.parameters() if w.requires_grad or w.is_floating_point()]
        self._optimizer = optim.make(params, self._weights, sparse=optim.gives_sparse(module))
        self._max_norm = params.get(optim.MAX_GRAD_NORM, 0)
        self._factors: list[float] = []
        if params.get("schedule", "constant") != "constant":
            self._factors = schedules.table(params, self._task.steps_per_epoch(params), self._task.epochs)
        self._t = 0
        self._shares = self._task.shares(params) if params.get(optim.ACCUMULATION, 1) > 1 else []
        self._batch, self._gathered = 0, 0.0

    def step(self, inputs: Sequence[Tensor], targets: Tensor) -> Tensor:
        if not self._gathered:
            for weight in self._weights:  # what Optimizer.zero_grad does, at half its time
                weight.grad = None
        with self._task.guarding():
            with self._task.autocast():
                outputs = self.module(*inputs)
            loss = self._task.objective.loss(in_full(outputs), targets, self._params)
        if self._shares:
            return self._gather(loss)
        torch.autograd.backward(loss)
        self._update()
        return loss.detach()

    def checkpoint(self) -> dict[str, Any]:
        """Return what `restore` takes; under `lost` what changes in training and cannot be kept."""
        state = {
            name: {key: _kept(value) for key, value in self._optimizer.state.get(weight, {}).items()}
            for name, weight in self.module.named_parameters()
        }
        whole = {**dict(self.module.named_buffers()), **self.module.state_dict()}  # those too that are not persistent
        kept, lost = self._outside.changed()
        model = {name: _kept(tensor) for name, tensor in whole.items()}
        return {"model": model, "optimizer": state, "steps": self._t, "outside": kept, "lost": lost}

    def restore(self, resume: Mapping[str, Any]) -> None:
        """Resume from a checkpoint, which is made right after an epoch's end."""
        persistent, device = self.module.state_dict().keys(), self._task.device
        self.module.load_state_dict({name: x for name, x in resume["model"].items() if name in persistent})
        with torch.no_grad():
            for name, buffer in self.module.named_buffers():
                if name not in persistent and name in resume["model"]:  # stacks of earlier versions did not keep it
                    buffer.copy_(resume["model"][name])
        self._outside.restore(resume.get("outside", {}), device)
        for name, weight in self.module.named_parameters():
            state = {key: _moved(value, device) for key, value in resume["optimizer"].get(name, {}).items()}
            if "step" in state and not self._counts_on_device():
                state["step"] = state["step"].cpu()  # where torch reads it: on the device it would wait for each
            if state:
                self._optimizer.state[weight] = state
        self._t = resume["steps"]
        if resume.get("random") is not None:
            set_random_states(resume["random"], device)

    def _counts_on_device(self) -> bool:
        """Whether the optimizer keeps its count of steps on the device: torch.optim does where it need not read it."""
        return any(group.get("fused") or group.get("capturable") for group in self._optimizer.param_groups)

    def _gather(self, loss: Tensor) -> Tensor:
        """Add one batch's part of a step's gradient; with the last of its batches, do the step."""
        share = self._shares[self._batch % len(self._shares)]
        torch.autograd.backward(loss * share)
        self._batch += 1
        self._gathered += share
        if self._gathered > 1 - 1e-6:
            self._update()
            self._gathered = 0.0
        return loss.detach()

    def _update(self) -> None:
        if self._max_norm:
            nn.utils.clip_grad_norm_(self._weights, self._max_norm)
        if self._factors:
            for group in self._optimizer.param_groups:
                group["lr"] = self._params["learning_rate"] * self._factors[min(self._t, len(self._factors) - 1)]
        self._t += 1
        optim.step(self._optimizer)


def _kept(value: Any) -> Any:
    return value.detach().cpu().clone() if isinstance(value, Tensor) else value


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device, copy=True) if isinstance(value, Tensor) else value
