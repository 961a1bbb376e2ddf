"""A stack: the members (one trial's model, optimizer state and params each) that are trained together on one device.

`Stack` is the contract that the training loop speaks; `LoopStack` keeps it with K plain modules under torch.optim, one
after the other. It is the reference that every faster stack must match, and the fallback for what cannot be stacked.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hpo import optim
from hpo.data import DataInfo, Split
from hpo.objective import Objective

EVALUATION_ROWS = 8192
"""How many rows go through a network at once where no gradient is kept; metrics are of all rows all the same."""


@dataclass(eq=False, kw_only=True)
class Member:
    """One trial in training. `epoch` counts its finished epochs; `fault` is why it cannot go on."""

    number: int
    seed: int
    params: Mapping[str, Any]
    epoch: int = 0
    fault: str | None = None
    history: list[dict[str, float]] = field(default_factory=list)


class Stack(ABC):
    """K members trained on the same batches, each as it would be alone.

    A fault of one member (out of memory) is noted in its `fault` and touches no other.
    """

    capacity: int
    """How many members it takes."""

    @property
    @abstractmethod
    def members(self) -> Sequence[Member]:
        """The members in it now, in the order of `step`'s and `evaluate`'s results."""

    @abstractmethod
    def join(self, member: Member) -> None:
        """Build `member`'s network from its seed and take it in."""

    @abstractmethod
    def leave(self, member: Member) -> None:
        """Let `member` go, and its memory with it."""

    @abstractmethod
    def step(self, inputs: Sequence[Tensor], targets: Tensor) -> Tensor:
        """Do one optimizer step of every member on one batch (B, ...); return their losses, (K,), without gradient."""

    @abstractmethod
    def evaluate(self, split: Split) -> list[dict[str, float]]:
        """Return each member's `loss` and metrics over the whole of `split`; empty for a member with a fault."""

    @abstractmethod
    def module(self, member: Member) -> nn.Module:
        """Return `member`'s network: the very one, not a copy."""

    def state(self, member: Member) -> dict[str, Tensor]:
        """Return a copy of the weights and buffers of `member`'s network."""
        return {name: tensor.detach().clone() for name, tensor in self.module(member).state_dict().items()}


class LoopStack(Stack):
    """K plain modules, K optimizers of torch.optim, one loop over them."""

    def __init__(self, objective: Objective, info: DataInfo, device: torch.device, capacity: int = 1) -> None:
        self.capacity = capacity
        self._objective, self._info, self._device = objective, info, device
        self._slots: dict[Member, _Slot] = {}
        self._nan = torch.full((), torch.nan, device=device)
        self._metrics = {name: metric.to(device) for name, metric in objective.metrics().items()}

    @property
    def members(self) -> Sequence[Member]:
        return list(self._slots)

    def join(self, member: Member) -> None:
        assert len(self._slots) < self.capacity
        self._slots[member] = slot = _Slot()
        try:
            torch.manual_seed(member.seed)
            slot.fill(self._objective.build(member.params, self._info).to(self._device), member.params)
        except (RuntimeError, MemoryError) as error:
            self._note_fault(member, error)

    def leave(self, member: Member) -> None:
        del self._slots[member]

    def step(self, inputs: Sequence[Tensor], targets: Tensor) -> Tensor:
        losses = []
        for member, slot in self._slots.items():
            loss = self._nan
            if member.fault is None:
                try:
                    loss = slot.step(self._objective, inputs, targets, member.params)
                except (RuntimeError, MemoryError) as error:
                    self._note_fault(member, error)
            losses.append(loss)
        return torch.stack(losses)

    def evaluate(self, split: Split) -> list[dict[str, float]]:
        results = []
        for member, slot in self._slots.items():
            result: dict[str, float] = {}
            if member.fault is None:
                try:
                    result = evaluate(self._objective, slot.module, split, member.params, self._metrics)
                except (RuntimeError, MemoryError) as error:
                    self._note_fault(member, error)
                slot.module.train()
            results.append(result)
        return results

    def module(self, member: Member) -> nn.Module:
        return self._slots[member].module

    def _note_fault(self, member: Member, error: Exception) -> None:
        """Take running out of memory, the one fault that is a member's own; raise any other error again."""
        if not is_out_of_memory(error):
            raise error
        member.fault = f"out of memory on {self._device}: {str(error).splitlines()[0]}"


class _Slot:
    """One member's module and optimizer, once it is filled with them."""

    module: nn.Module

    def fill(self, module: nn.Module, params: Mapping[str, Any]) -> None:
        """Take in a module that is on its device already: the optimizer is made after that."""
        self.module = module.train()
        self._weights = [w for w in module.parameters() if w.requires_grad]
        self._optimizer = optim.make(params, self._weights)

    def step(
        self, objective: Objective, inputs: Sequence[Tensor], targets: Tensor, params: Mapping[str, Any]
    ) -> Tensor:
        for weight in self._weights:  # what Optimizer.zero_grad does, at half its time
            weight.grad = None
        loss = objective.loss(self.module(*inputs), targets, params)
        loss.backward()
        self._optimizer.step()
        return loss.detach()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that the device, or the machine, has no memory left."""
    text = str(error)
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and ("can't allocate memory" in text or "not enough memory" in text)
    )


@torch.no_grad()
def evaluate(
    objective: Objective, module: nn.Module, split: Split, params: Mapping[str, Any], metrics: Mapping[str, Any]
) -> dict[str, float]:
    """Return `module`'s `loss` and `metrics` over the whole of `split`; the module is left in evaluation mode.

    Never a mean of batches' own metrics: the RMSE of a set is not the mean of its batches' RMSEs.
    """
    module.eval()
    parts = [
        module(*(x[start : start + EVALUATION_ROWS] for x in split.inputs.values()))
        for start in range(0, len(split), EVALUATION_ROWS)
    ]
    return measure(objective, torch.cat(parts), split.targets, params, metrics)


def measure(
    objective: Objective, outputs: Tensor, targets: Tensor, params: Mapping[str, Any], metrics: Mapping[str, Any]
) -> dict[str, float]:
    """Return the `loss` and the metrics of `outputs` (N, ...) against `targets`."""
    result = {"loss": float(objective.loss(outputs, targets, params))}
    for name, metric in metrics.items():
        metric.reset()
        metric.update(outputs, targets)
        result[name] = float(metric.compute())
    return result
