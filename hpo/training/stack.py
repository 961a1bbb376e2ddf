"""A stack: the members (one trial's model, optimizer state and params each) that are trained together on one device.

`Stack` is the contract that the training loop speaks, `Stacks` that of several stacks side by side. The reference that
every faster stack must match is `hpo.training.loop_stack.LoopStack`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from hpo.errors import Interrupted
from hpo.study.data import DataInfo, batch_sizes
from hpo.study.loading import origin
from hpo.study.objective import Objective, Params
from hpo.training import optim
from hpo.training.batches import Batches
from hpo.training.faults import TrialError, ended_the_process, fault_of
from hpo.training.memory import Within, is_out_of_memory

Precision = Literal["float32", "tf32", "bf16"]
"""How a network computes: as it is; with TF32 in its matrix products (CUDA); under torch's autocast to bfloat16."""


Kept = Callable[[], dict[str, Tensor]]
"""Gives the weights and buffers of a member's network as they were when they were kept (`Stack.keep`)."""


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
        """Return `member`'s network on the device, its weights drawn from its seed. Raises TrialError."""
        return self.drawn(member).to(self.device)

    def drawn(self, member: "Member") -> nn.Module:
        """Return `member`'s network on the CPU, its weights drawn from its seed. Raises TrialError."""
        _set_seed(member.seed)
        with Within():
            network = self.network(member.params)
        member.n_parameters = sum(weight.numel() for weight in network.parameters() if not is_lazy(weight))
        return network

    def network(self, params: Params) -> nn.Module:
        """Return a network of `params`, on the CPU. Raises TrialError where they are infeasible."""
        with self.guarding():
            return self.objective.build(self.own(params), self.info)

    def own(self, params: Params) -> dict[str, Any]:
        """Return the params that one build is given: what it takes out of them is missed in no other."""
        return dict(params)

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
        accumulation: int = params.get(optim.ACCUMULATION, 1)
        return -(-len(batch_sizes(self.n_rows, params["batch_size"])) // accumulation)

    def shares(self, params: Params) -> list[float]:
        """Return of each batch of an epoch what share its rows are of those of its optimizer step."""
        sizes, n = batch_sizes(self.n_rows, params["batch_size"]), params.get(optim.ACCUMULATION, 1)
        groups = [sizes[start : start + n] for start in range(0, len(sizes), n)]
        return [size / sum(group) for group in groups for size in group]


def _set_seed(seed: int) -> None:
    """Do what `torch.manual_seed` does. Without an accelerator that notes a traceback for each kind of one, in a list
    that only grows, which takes longer than drawing a small network's weights."""
    if torch.accelerator.is_available():
        torch.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


@dataclass(eq=False, kw_only=True)
class Member:
    """One trial in training. `epoch` counts its finished epochs; `fault` is why it cannot continue.

    `joined` is the round of its stack in which it began: 0, unless it took the slot of one that left early.
    """

    number: int
    seed: int
    params: Mapping[str, Any]
    epoch: int = 0
    joined: int = 0
    rounds: list[int] = field(default_factory=list)
    """The round whose order of rows each of its epochs had (`hpo.training.loop.order`)."""
    fault: str | None = None
    pause: int | None = None
    """After how many epochs it is paused next, if that is known; it may be resumed, or not."""
    history: list[dict[str, float]] = field(default_factory=list)
    error: TrialError | None = None
    """What its fault comes from, where that is an error of the objective's code."""
    n_parameters: int | None = None
    """How many its network has, once that was built."""
    resume: Mapping[str, Any] | None = None
    """What it resumes from (`Stack.checkpoint`), where it does not start from scratch."""

    def note_fault(self, error: Exception, device: torch.device) -> None:
        """Note an error that is this member's own as its fault; raise any other error again."""
        if isinstance(error, TrialError):
            self.error, self.fault = error, error.fault.text
            return
        if not is_out_of_memory(error):
            raise error
        why = (str(error).splitlines() or [type(error).__name__])[0]
        self.fault = f"out of memory on {device}: {why}"


class Stack(ABC):
    """K members trained on the same batches, each as it would be alone.

    A fault of one member (out of memory in building its network, say) is noted in its `fault` and touches no other.
    Where all members are computed at once, what one needs all need, so running out of memory is no single member's
    fault: then the error is raised, and all members are as they were before, so that they may train in smaller stacks.
    """

    capacity: int
    """How many members it takes."""

    @property
    @abstractmethod
    def members(self) -> Sequence[Member]:
        """The members in it now, in the order of `step`'s and `evaluate`'s results."""

    @property
    def path(self) -> str | None:
        """How its steps run where there are several ways to, and why not in a faster one, for a person."""
        return None

    @abstractmethod
    def join(self, member: Member) -> None:
        """Build `member`'s network from its seed and take it in."""

    @abstractmethod
    def leave(self, member: Member) -> None:
        """Let `member` go, and its memory with it."""

    @abstractmethod
    def step(self, inputs: Sequence[Tensor], targets: Tensor) -> Tensor:
        """Do one optimizer step of every member on one batch (B, ...); return their losses, (K,), without gradient."""

    def epoch(self, batches: Batches, rows: Tensor, stopping: Callable[[], bool]) -> list[float]:
        """Do an epoch's steps on `rows` (N,), in their order; return each member's mean loss over all of them.

        Raises Interrupted, between two batches, as soon as `stopping` says so.
        """
        losses, sizes = [], []
        for inputs, targets in batches.epoch(self.members[0].params["batch_size"], rows):
            if stopping():
                raise Interrupted()
            losses.append(self.step(inputs, targets))
            sizes.append(len(targets))
        return _mean(losses, sizes)

    @abstractmethod
    def evaluate(self, batches: Batches) -> list[dict[str, float]]:
        """Return each member's `loss` and metrics over all rows of `batches`; empty for a member with a fault."""

    @abstractmethod
    def module(self, member: Member) -> nn.Module:
        """Return `member`'s network: the very one, or one with the same weights."""

    @abstractmethod
    def checkpoint(self, member: Member) -> dict[str, Any]:
        """Return all that `member`'s training resumes from, on the CPU: tensors and plain numbers.

        `model` and `optimizer` by the network's own names, so that every implementation takes it; `steps` done so far;
        `random`, the state of torch's generators, where they are this member's own.
        """

    def keep(self, member: Member) -> Kept:
        """Keep `member`'s weights and buffers as they are now; return what gives them as long as it is in the stack.

        What was kept of it before is let go.
        """
        weights = self.state(member)
        return lambda: weights

    def state(self, member: Member) -> dict[str, Tensor]:
        """Return a copy of the weights and buffers of `member`'s network."""
        return {name: tensor.detach().clone() for name, tensor in self.module(member).state_dict().items()}


def _mean(losses: list[Tensor], sizes: Sequence[int]) -> list[float]:
    """Return the mean over all rows of `losses`, each (K,) and the mean over its batch of so many rows."""
    weights = torch.tensor(sizes, dtype=losses[0].dtype, device=losses[0].device)
    means: list[float] = (weights @ torch.stack(losses) / weights.sum()).tolist()
    return means


class Stacks(ABC):
    """The stacks that are trained side by side, an epoch of each in turn, and which of them takes a new member."""

    @property
    @abstractmethod
    def free(self) -> int:
        """How many more members may join."""

    @abstractmethod
    def join(self, members: Iterable[Member]) -> None:
        """Take in new members, each in a stack that fits it."""

    @property
    @abstractmethod
    def active(self) -> Sequence[Stack]:
        """The stacks that have members."""


class SingleStack(Stacks):
    """A single stack, for members that all fit it."""

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
