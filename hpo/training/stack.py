"""A stack: the members (one trial's model, optimizer state and params each) that are trained together on one device.

`Stack` is the contract that the training loop speaks; `LoopStack` keeps it with K plain modules under torch.optim, one
after the other. It is the reference that every faster stack must match, and the fallback for what cannot be stacked.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from hpo.study.data import DataInfo, batch_sizes, prediction
from hpo.study.loading import origin
from hpo.study.objective import Objective, Params
from hpo.training import optim, schedules, stacked_optim
from hpo.training.batches import Batches
from hpo.training.faults import TrialError, ended_the_process, fault_of
from hpo.training.memory import Within, free_bytes, is_out_of_memory, n_bytes, shown

EVALUATION_ROWS = 8192
"""How many rows go through a network at once where no gradient is kept; metrics are of all rows all the same."""
_LARGE = 1 << 24
"""Bytes of a network for which it is worth asking how much memory is free."""
Precision = Literal["float32", "tf32", "bf16"]
"""How a network computes: as it is; with TF32 in its matrix products (CUDA); under torch's autocast to bfloat16."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What all members of a study share: what they learn, from how many rows, for how many epochs, where, and how."""

    objective: Objective
    info: DataInfo
    device: torch.device
    n_rows: int
    epochs: int
    precision: Precision = "float32"
    catch: Sequence[str] = ()
    """The exceptions that fail a trial, not the study."""

    def build(self, member: "Member") -> nn.Module:
        """Return `member`'s network, its weights drawn from its seed. Raises TrialError."""
        torch.manual_seed(member.seed)
        with Within():
            module = self.network(member.params)
        return module.to(self.device)

    def network(self, params: Params) -> nn.Module:
        """Return a network of `params`, on the CPU. Raises TrialError where they are infeasible."""
        with self.guarding():
            return self.objective.build(params, self.info)

    @contextmanager
    def guarding(self) -> Iterator[None]:
        """Raise TrialError from an error of the objective's code that is the trial's own, but for memory."""
        try:
            yield
        except SystemExit as error:
            raise ended_the_process(origin(error)) from error
        except Exception as error:
            fault = fault_of(error, self.catch, origin(error))
            if fault is None or is_out_of_memory(error):
                raise
            raise TrialError(fault) from error

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context in which networks are run."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.precision == "bf16" else nullcontext()

    def steps_per_epoch(self, params: Params) -> int:
        """Return how many optimizer steps an epoch has."""
        return -(-len(batch_sizes(self.n_rows, params["batch_size"])) // params.get(optim.ACCUMULATION, 1))

    def shares(self, params: Params) -> list[float]:
        """Return of each batch of an epoch what share its rows are of those of its optimizer step."""
        sizes, n = batch_sizes(self.n_rows, params["batch_size"]), params.get(optim.ACCUMULATION, 1)
        groups = [sizes[start : start + n] for start in range(0, len(sizes), n)]
        return [size / sum(group) for group in groups for size in group]


@dataclass(eq=False, kw_only=True)
class Member:
    """One trial in training. `epoch` counts its finished epochs; `fault` is why it cannot go on.

    `joined` is the round of its stack in which it began: 0, unless it took the slot of one that left early.
    """

    number: int
    seed: int
    params: Mapping[str, Any]
    epoch: int = 0
    joined: int = 0
    fault: str | None = None
    history: list[dict[str, float]] = field(default_factory=list)
    error: TrialError | None = None
    """What its fault comes from, where that is an error of the objective's code."""
    resume: Mapping[str, Any] | None = None
    """What it goes on from (`Stack.checkpoint`), where it is not at its beginning."""


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
    def evaluate(self, feed: Batches) -> list[dict[str, float]]:
        """Return each member's `loss` and metrics over the whole of `feed`; empty for a member with a fault."""

    @abstractmethod
    def module(self, member: Member) -> nn.Module:
        """Return `member`'s network: the very one, or one with the same weights."""

    @abstractmethod
    def checkpoint(self, member: Member) -> dict[str, Any]:
        """Return all that `member`'s training goes on from, on the CPU: tensors and plain numbers.

        `model` and `optimizer` by the network's own names, so that a stack of any kind takes it; `steps`, done so far;
        `random`, the state of torch's generators, where they are this member's own.
        """

    def state(self, member: Member) -> dict[str, Tensor]:
        """Return a copy of the weights and buffers of `member`'s network."""
        return {name: tensor.detach().clone() for name, tensor in self.module(member).state_dict().items()}


class Stacks(ABC):
    """The stacks that are trained side by side, an epoch of each in turn, and which of them takes a new member."""

    @property
    @abstractmethod
    def free(self) -> int:
        """How many more members may join."""

    @abstractmethod
    def join(self, members: Iterable[Member]) -> None:
        """Take in new members, each in a stack of its kind."""

    @property
    @abstractmethod
    def active(self) -> Sequence[Stack]:
        """The stacks that have members."""


class SingleStack(Stacks):
    """A single stack, for members that are all of its kind."""

    def __init__(self, stack: Stack) -> None:
        self._stack = stack

    @property
    def free(self) -> int:
        return self._stack.capacity - len(self._stack.members)

    def join(self, members: Iterable[Member]) -> None:
        for member in members:
            self._stack.join(member)

    @property
    def active(self) -> Sequence[Stack]:
        return [self._stack] if self._stack.members else []


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
            self._note_fault(member, error)

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
                    self._note_fault(member, error)
            losses.append(loss)
        return torch.stack(losses)

    def evaluate(self, feed: Batches) -> list[dict[str, float]]:
        results = []
        for member, slot in self._slots.items():
            result: dict[str, float] = {}
            if member.fault is None:
                try:
                    result = evaluate(self._task, slot.module, feed, member.params, self._metrics)
                except (RuntimeError, MemoryError, TrialError) as error:
                    self._note_fault(member, error)
                slot.module.train()
            results.append(result)
        return results

    def module(self, member: Member) -> nn.Module:
        return self._slots[member].module

    def checkpoint(self, member: Member) -> dict[str, Any]:
        return self._slots[member].checkpoint() | {"random": random_states(self._task.device)}

    def _note_fault(self, member: Member, error: Exception) -> None:
        """Take a fault that is a member's own; raise any other error again."""
        if isinstance(error, TrialError):
            member.error, member.fault = error, error.fault.text
            return
        if not is_out_of_memory(error):
            raise error
        why = (str(error).splitlines() or [type(error).__name__])[0]
        member.fault = f"out of memory on {self._task.device}: {why}"


def _require_room(module: nn.Module, params: Params, device: torch.device) -> None:
    """Raise MemoryError where a network that fits into the machine's memory cannot be trained in it.

    A GPU says so itself; of a machine without memory, the process is ended. Its gradients are counted, what its
    optimizer keeps of them, and the copy of its best epoch; what lies between its layers depends on the batch.
    """
    size = n_bytes(module)
    if device.type != "cpu" or size < _LARGE:
        return
    copies = 2 + len(stacked_optim.STATE.get(str(params["optimizer"]).lower(), ()))
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
        self._weights = [w for w in module.parameters() if w.requires_grad]
        self._optimizer = optim.make(params, self._weights)
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
        loss.backward()
        self._update()
        return loss.detach()

    def checkpoint(self) -> dict[str, Any]:
        """Return what `restore` takes."""
        state = {
            name: {key: _kept(value) for key, value in self._optimizer.state.get(weight, {}).items()}
            for name, weight in self.module.named_parameters()
        }
        model = {name: _kept(tensor) for name, tensor in self.module.state_dict().items()}
        return {"model": model, "optimizer": state, "steps": self._t}

    def restore(self, resume: Mapping[str, Any]) -> None:
        """Go on from where a checkpoint was made, right after an epoch's end."""
        self.module.load_state_dict(resume["model"])
        device = self._task.device
        for name, weight in self.module.named_parameters():
            state = {key: _moved(value, device) for key, value in resume["optimizer"].get(name, {}).items()}
            if state:
                self._optimizer.state[weight] = state
        self._t = resume["steps"]
        if resume.get("random") is not None:
            set_random_states(resume["random"])

    def _gather(self, loss: Tensor) -> Tensor:
        """Add one batch's part of a step's gradient; with the last of its batches, do the step."""
        share = self._shares[self._batch % len(self._shares)]
        (loss * share).backward()
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
        self._optimizer.step()


def _kept(value: Any) -> Any:
    return value.detach().cpu().clone() if isinstance(value, Tensor) else value


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device, copy=True) if isinstance(value, Tensor) else value


def random_states(device: torch.device) -> dict[str, Tensor]:
    """Return the states of torch's generators that code on `device` draws from."""
    states = {"cpu": torch.get_rng_state()}
    return states | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def set_random_states(states: Mapping[str, Tensor]) -> None:
    """Take up the states that `random_states` gave."""
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def in_full(outputs: Any) -> Any:
    """Return outputs that autocast left in bfloat16 in float32: losses and metrics are not to be rounded."""
    return tree_map(lambda x: x.float() if x.dtype == torch.bfloat16 else x, outputs)


def joined(parts: Sequence[Any], dim: int = 0) -> Any:
    """Return the outputs of several batches as one."""
    return tree_map(lambda *tensors: torch.cat(tensors, dim), *parts) if len(parts) > 1 else parts[0]


@torch.no_grad()
def evaluate(
    task: Task, module: nn.Module, feed: Batches, params: Params, metrics: Mapping[str, Any]
) -> dict[str, float]:
    """Return `module`'s `loss` and `metrics` over the whole of `feed`; the module is left in evaluation mode.

    Never a mean of batches' own metrics: the RMSE of a set is not the mean of its batches' RMSEs.
    """
    module.eval()
    with task.guarding():
        with task.autocast():
            parts = [module(*inputs) for inputs, _ in feed.chunks(EVALUATION_ROWS)]
        return measure(task.objective, in_full(joined(parts)), feed.targets, params, metrics)


def measure(
    objective: Objective, outputs: Any, targets: Tensor, params: Params, metrics: Mapping[str, Any]
) -> dict[str, float]:
    """Return the `loss` and the metrics of `outputs` (N, ...) against `targets`."""
    result = {} if objective.train is not None else {"loss": float(objective.loss(outputs, targets, params))}
    for name, metric in metrics.items():
        metric.reset()
        metric.update(prediction(outputs), targets)
        result[name] = float(metric.compute())
    return result
