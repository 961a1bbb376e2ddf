"""K networks of one structure trained as one: `torch.func.vmap` over stacked weights, one step for all members.

The step is written once, as a plain function of tensors. It runs as it is (`eager`, the reference), captured as a graph
(`graph`), or compiled (`compiled`, where a C++ compiler is found); on CUDA it is replayed from a CUDA graph besides.
The same sums, in fewer calls. What may differ between members lives in (K,) tensors: weights, buffers, the optimizer's
state, its hyperparameters, the schedule's, the numbers that the loss reads. Dropout draws its masks from the stack's
own stream: equal to training alone in distribution, not bit for bit.

Shapes: K slots, B rows of a batch; a weight (K, ...), a loss (K,).
"""

import inspect
import logging
import math
import shutil
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves, tree_map

from hpo.stacks.padding import Padder, as_it_is
from hpo.stacks.structure import PaddedModule, RateDropout, own_state
from hpo.study.data import Split
from hpo.study.objective import Params
from hpo.training import schedules, stacked_optim
from hpo.training.batches import Batches
from hpo.training.memory import is_out_of_memory
from hpo.training.metrics import Measuring
from hpo.training.optim import ACCUMULATION, ARGUMENTS, MAX_GRAD_NORM, optimizer_class
from hpo.training.stack import EVALUATION_ROWS, Member, Stack, Task, in_full, joined

How = Literal["eager", "graph", "compiled"]


_ABSENT = "absent"


class NotStackable(Exception):
    """A member cannot be trained in a stack, and why; it is to be trained in a LoopStack."""


class _RecordingParams(Mapping[str, Any]):
    """Params that note which of them are looked for, whether one by one or all at once."""

    def __init__(self, params: Params) -> None:
        self._params = params
        self.names: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.names.add(name)
        return self._params[name]

    def __iter__(self) -> Iterator[str]:
        self.names.update(self._params)
        return iter(self._params)

    def __len__(self) -> int:
        return len(self._params)

    def copy(self) -> dict[str, Any]:
        """As a dict has it: at other times a loss is given one."""
        return dict(self)

    def __or__(self, other: Mapping[str, Any]) -> dict[str, Any]:
        return dict(self) | dict(other)


@dataclass(frozen=True, kw_only=True, eq=False)
class Candidate:
    """A member with its network in the study's frame, before it joins a stack.

    `probe` is the same network with other weights, framed, and `outputs` what that gave alone on the stack's example:
    an initialisation may hide what a frame does to a network (a last layer of zeros hides all that is before it).
    `reads` are the params that the loss reads there, `activations` the bytes that all layers give for one row.
    """

    member: Member
    framed: PaddedModule
    probe: PaddedModule
    outputs: Any
    reads: Sequence[str]
    activations: int

    def bytes_in_a_stack(self) -> int:
        """Return about how much memory this member needs there, training a batch: weights and what is kept of them,
        gradients, and what lies between layers (forward and backward)."""
        optimizer = str(self.member.params["optimizer"]).lower()
        copies = 4 + 2 * len(stacked_optim.STATE[optimizer])  # old, new, gradient, mask; each state old and new
        module, shapes = self.framed.module, self.framed.shapes
        weights = sum(math.prod(shapes[n]) * w.element_size() for n, w in module.named_parameters())
        return copies * weights + 3 * self.member.params["batch_size"] * self.activations

    @property
    def signature(self) -> Hashable:
        """What members of one stack have in common."""
        params = self.member.params
        engine = tuple(name in params for name in ("schedule", MAX_GRAD_NORM))
        return str(params["optimizer"]).lower(), params["batch_size"], engine, self.framed.signature


def candidate(task: Task, member: Member, fit: Padder, example: Split) -> Candidate:
    """Build `member`'s network and try it on `example`, a few rows as they are trained on.

    Raises NotStackable for an optimizer that has no stacked form, or a module that holds state outside of tensors;
    TrialError where the objective's code says that the configuration is at fault.
    """
    _require_stacked_form(member.params)
    probe = task.build(member).eval()
    reads = _RecordingParams(member.params)
    before = own_state(probe)
    with torch.no_grad(), task.autocast(), _counting(probe) as given:
        for weight in probe.parameters():
            weight += 0.1 * torch.randn_like(weight)
        with task.guarding():
            outputs = in_full(probe(*example.inputs.values()))
            task.objective.loss(outputs, example.targets, reads)
    if own_state(probe) != before:
        raise NotStackable("its forward changes the module's own attributes")
    return Candidate(
        member=member,
        framed=fit(task.build(member).train(), member.params),
        probe=fit(probe.train(), member.params),
        outputs=outputs,
        reads=sorted(reads.names),
        activations=sum(given) // len(example),
    )


@contextmanager
def _counting(module: nn.Module) -> Iterator[list[int]]:
    """Give a list that fills with the bytes of what each layer of `module` gives."""
    given: list[int] = []

    def count(module: nn.Module, inputs: Any, outputs: Any) -> None:
        given.extend(x.numel() * x.element_size() for x in tree_leaves(outputs) if isinstance(x, Tensor))

    hooks = [each.register_forward_hook(count) for each in module.modules() if not list(each.children())]
    try:
        yield given
    finally:
        for hook in hooks:
            hook.remove()


def _require_stacked_form(params: Params) -> None:
    name = str(params["optimizer"]).lower()
    if name not in stacked_optim.HYPERPARAMETERS:
        raise NotStackable(f"optimizer {name} has no stacked form; {', '.join(stacked_optim.HYPERPARAMETERS)} have")
    if params.get(ACCUMULATION, 1) > 1:
        raise NotStackable("its gradients are gathered over several batches, to save memory")
    cls = optimizer_class(name)
    assert cls is not None
    takes = inspect.signature(cls).parameters
    for key in params:
        if key in ARGUMENTS and key not in stacked_optim.HYPERPARAMETERS[name] and ARGUMENTS[key] in takes:
            raise NotStackable(f"{name} with {key} has no stacked form")


class VmapStack(Stack):
    """Slots for members of one signature, which the first that join give. Empty slots are trained along."""

    def __init__(
        self,
        task: Task,
        capacity: int,
        example: Split,
        how: How = "eager",
        fit: Padder = as_it_is,
    ) -> None:
        """`example`: a few rows as they are trained on; each member that joins is tried on them.

        `fit` puts a network into the study's frame. One smaller than its frame stands in the corner of the frame's
        shapes, the rest is zero and stays zero, since its gradients are masked: it is the network that it would be
        alone.
        """
        self.capacity = capacity
        self.how: How = how
        self._task, self._example, self._fit = task, example, fit
        self._slots: list[Member | None] = [None] * capacity
        self._corners: dict[Member, dict[str, tuple[str, tuple[slice, ...]]]] = {}
        self._template: nn.Module | None = None
        self._signature: Hashable = None
        self._steps: dict[tuple[int, int, How], Callable[..., Any]] = {}
        self._measuring = Measuring(task.objective, task.device)

    @property
    def members(self) -> Sequence[Member]:
        return [member for member in self._slots if member is not None]

    @property
    def free(self) -> int:
        """How many slots are empty."""
        return self._slots.count(None)

    @property
    def steps_per_epoch(self) -> int:
        """How many steps an epoch of its members has."""
        return self._task.steps_per_epoch(self._params)

    def is_compiled(self, capacity: int) -> bool:
        """Whether there is a compiled step for so many slots."""
        return (capacity, self._params["batch_size"], "compiled") in self._steps

    def suits(self, candidate: Candidate) -> bool:
        """Whether `candidate` is of this stack's kind."""
        return self._template is not None and self._kind_of(candidate) == self._signature

    def _kind_of(self, candidate: Candidate) -> Hashable:
        structural = [name for name in candidate.reads if name not in self._loss_hyper]
        return candidate.signature, tuple((name, candidate.member.params.get(name, _ABSENT)) for name in structural)

    def join(self, member: Member) -> None:
        """Raises NotStackable where `member` cannot join."""
        each = candidate(self._task, member, self._fit, self._example)
        reason = self.open(each) if self._template is None else None
        reason = reason or self.take([each]).get(member)
        if reason is not None:
            raise NotStackable(reason)

    def open(self, first: Candidate) -> str | None:
        """Make this the stack of `first`'s kind, without taking it in; return why it cannot be stacked, if so."""
        self._begin(first)
        reason = self._fault(first)
        if reason is not None:
            self._template = None
        return reason

    def take(self, candidates: Sequence[Candidate]) -> dict[Member, str]:
        """Take in `candidates`, at most as many as there are free slots; return those that cannot join, and why."""
        refused, slots = {}, {}
        for each in candidates:
            if self.suits(each):
                slots[each] = self._slots.index(None)
                self._slots[slots[each]] = each.member
                self._fill(slots[each], each.member, each.probe)
            else:
                refused[each.member] = "its structure is not that of the stack"
        wrong = self._wrong({slot: each.outputs for each, slot in slots.items()})
        for each, slot in slots.items():
            self._fill(slot, each.member, each.framed)
            if each.member.resume is not None:
                self._restore(slot, each.member, each.member.resume)
            if slot in wrong:
                refused[each.member] = wrong[slot]
                self.leave(each.member)
        return refused

    def resize(self, capacity: int) -> None:
        """Change the number of slots to `capacity`, at least as many as there are members, who move together."""
        kept, n = self._live(), len(self.members)

        def moved(tensor: Tensor) -> Tensor:
            new = tensor.new_zeros((capacity, *tensor.shape[1:]))
            new[:n] = tensor[kept]
            return new

        if self._template is not None:
            self._weights, self._buffers, self._state, self._t, self._hyper, self._loss_hyper, self._masks = tree_map(
                moved, self._arguments()
            )
        self._slots = [*self.members, *[None] * (capacity - n)]
        self.capacity = capacity

    def _live(self) -> Tensor:
        """Return the slots that have a member, (n,)."""
        slots = [slot for slot, member in enumerate(self._slots) if member is not None]
        return torch.tensor(slots, dtype=torch.long, device=self._task.device)

    def leave(self, member: Member) -> None:
        self._slots[self._slots.index(member)] = None
        del self._corners[member]

    def _begin(self, first: Candidate) -> None:
        params, module, shapes = first.member.params, first.framed.module, first.framed.shapes
        device = self._task.device

        def rows(name: str, tensor: Tensor) -> Tensor:
            return torch.zeros((self.capacity, *shapes[name]), dtype=tensor.dtype, device=device)

        weights = {name: w for name, w in module.named_parameters() if w.requires_grad}
        frozen = {name: w for name, w in module.named_parameters() if not w.requires_grad}
        dtype = next((w.dtype for w in weights.values()), torch.float32)

        def column() -> Tensor:
            return torch.zeros(self.capacity, dtype=dtype, device=device)

        self._params, self._template = params, module
        self._optimizer = str(params["optimizer"]).lower()
        self._scheduled, self._clipped = "schedule" in params, MAX_GRAD_NORM in params
        self._weights = {name: rows(name, w) for name, w in weights.items()}
        self._buffers = {name: rows(name, b) for name, b in (*frozen.items(), *module.named_buffers())}
        self._masks = {name: rows(name, w) for name, w in weights.items() if name in first.framed.varied}
        self._state = stacked_optim.initial_state(self._optimizer, self._weights)
        self._hyper = {name: column() for name in self._hyperparameters(params)}
        self._loss_hyper = {name: column() for name in first.reads if type(params.get(name)) is float}
        self._t = column()
        self._signature = self._kind_of(first)

    def _hyperparameters(self, params: Params) -> dict[str, float]:
        """Return one member's hyperparameters that a step needs: the optimizer's, the schedule's, the largest norm."""
        values = stacked_optim.hyperparameters(self._optimizer, params)
        values |= schedules.hyperparameters(params) if self._scheduled else {}
        return values | ({MAX_GRAD_NORM: float(params[MAX_GRAD_NORM])} if self._clipped else {})

    def _fill(self, slot: int, member: Member, framed: PaddedModule) -> None:
        """Put `member` with its network into a slot, at the beginning of its training."""
        filled = framed.filled()
        corners = {name: tuple(slice(0, size) for size in tensor.shape) for name, tensor in filled.items()}
        self._corners[member] = {own: (name, corners[name]) for own, name in framed.names.items()}
        with torch.no_grad():
            for name, rows in (*self._weights.items(), *self._buffers.items()):
                rows[slot] = 0
                if name in self._masks:
                    self._masks[name][slot] = 0
                if name in filled:
                    rows[slot][corners[name]] = filled[name]
                    if name in self._masks:
                        self._masks[name][slot][corners[name]] = 1
            for states in self._state.values():
                for rows in states.values():
                    rows[slot] = 0
            self._t[slot] = 0
            for name, value in self._hyperparameters(member.params).items():
                self._hyper[name][slot] = value
            for name, rows in self._loss_hyper.items():
                rows[slot] = member.params[name]

    def _wrong(self, alone: Mapping[int, Any]) -> dict[int, str]:
        """Return by slot why its outputs in the stack are not those of its own network, `alone`."""
        if not alone:
            return {}
        try:
            stacked = self._forward(list(self._example.inputs.values()))
        except Exception as error:
            if is_out_of_memory(error):
                raise
            return dict.fromkeys(alone, _reason(error))
        wrong = {}
        tolerance = 5e-2 if self._task.precision == "bf16" else 1e-4
        for slot, outputs in alone.items():
            for got, expected in zip(tree_leaves(stacked), tree_leaves(outputs), strict=True):
                scale = expected.abs().max().clamp(min=1.0) * tolerance
                same = got[slot].shape == expected.shape and bool((got[slot] - expected).abs().max() <= scale)
                if torch.isfinite(expected).all() and not same:
                    wrong[slot] = "its outputs in a stack are not those alone: its module has state outside of tensors"
        return wrong

    def _fault(self, first: Candidate) -> str | None:
        """Return why torch.func has no rule for the network or the loss, if so.

        A loss that does not take its numbers as tensors gets them as numbers, which members must then have in common.
        """
        inputs, targets = list(self._example.inputs.values()), self._example.targets
        assert self._template is not None
        before = own_state(self._template)
        try:
            if self.how == "eager":
                with torch.no_grad():
                    self._step(*tree_map(torch.clone, self._arguments()), inputs, targets)
            else:
                self._capture(inputs, targets)
            self._forward(inputs)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            if not self._loss_hyper:
                return _reason(error)
            self._loss_hyper = {}
            self._signature = self._kind_of(first)
            return self._fault(first)
        if own_state(self._template) != before:
            return "its forward changes the module's own attributes"
        return None

    def step(self, inputs: Sequence[Tensor], targets: Tensor) -> Tensor:
        key = (self.capacity, len(targets), self.how)
        run = self._steps.get(key)
        if run is None:
            run = self._steps[key] = self._prepare(inputs, targets)
        with torch.no_grad():
            self._weights, self._buffers, self._state, self._t, losses = run(*self._arguments(), inputs, targets)
        return losses if None not in self._slots else losses[self._live()]

    def _arguments(self) -> tuple[Any, ...]:
        return self._weights, self._buffers, self._state, self._t, self._hyper, self._loss_hyper, self._masks

    def _prepare(self, inputs: Sequence[Tensor], targets: Tensor) -> Callable[..., Any]:
        """Return the step for batches of this size, captured or compiled as `how` says."""
        assert self._template is not None
        self._template.train()
        if self.how == "eager":
            return self._step
        run = graph = self._capture(inputs, targets)
        common = len(targets) == self._params["batch_size"]  # an epoch's last, smaller batch is not worth compiling
        if self.how == "compiled" and common and (self._task.device.type != "cpu" or shutil.which("c++") is not None):
            logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # "No CUDA runtime is found"
            run = torch.compile(graph, dynamic=False)
            try:
                with torch.no_grad():
                    run(*tree_map(torch.clone, (*self._arguments(), list(inputs), targets)))
            except Exception as error:  # a compiler that does not work here: its errors have no common base
                if is_out_of_memory(error):
                    raise
                run = graph
        if self._task.device.type == "cuda":
            return self._recorded(run, inputs, targets)
        return run

    def _recorded(self, run: Callable[..., Any], inputs: Sequence[Tensor], targets: Tensor) -> Callable[..., Any]:
        """Return `run` recorded as a CUDA graph; as it is, where that fails or does not give what `run` gives."""
        state = self._arguments()[:4]
        before = tree_map(torch.clone, state)
        try:
            replay = CudaReplay(run, self._arguments(), inputs, targets)
            with torch.no_grad():
                losses = run(*tree_map(torch.clone, self._arguments()), inputs, targets)[-1]
                replayed = replay(*self._arguments(), inputs, targets)[-1]
            random = any(isinstance(module, RateDropout) for module in self._template.modules())
            good = random or torch.allclose(losses, replayed, rtol=1e-3, atol=1e-5, equal_nan=True)
        except Exception as error:  # whatever CUDA cannot record
            if is_out_of_memory(error):
                raise
            good = False
        with torch.no_grad():
            for now, then in zip(tree_leaves(state), tree_leaves(before), strict=True):
                now.copy_(then)  # nothing was trained yet
        return replay if good else run

    def _capture(self, inputs: Sequence[Tensor], targets: Tensor) -> Callable[..., Any]:
        """Return the step as a graph of plain operations, for batches of this size."""
        copies = tree_map(torch.clone, (*self._arguments(), list(inputs), targets))
        with torch.no_grad():
            return make_fx(lambda *a: self._step(*a))(*copies)  # on copies: tracing runs BatchNorm once

    def _step(
        self,
        weights: Any,
        buffers: Any,
        state: Any,
        t: Tensor,
        hyper: Any,
        loss_hyper: Any,
        masks: Any,
        inputs: Sequence[Tensor],
        targets: Tensor,
    ) -> tuple[Any, ...]:
        """Return weights, buffers, state, t and losses (K,) after one step. Nothing is changed in place."""

        def loss_of(
            weights: Any, buffers: Any, loss_hyper: Any, inputs: Sequence[Tensor], targets: Tensor
        ) -> tuple[Tensor, Any]:
            buffers = {name: b.clone() for name, b in buffers.items()}  # BatchNorm changes its own in place
            with self._task.autocast():
                outputs = functional_call(self._template, {**weights, **buffers}, tuple(inputs))
            return self._task.objective.loss(in_full(outputs), targets, {**self._params, **loss_hyper}), buffers

        batched = vmap(grad_and_value(loss_of, has_aux=True), in_dims=(0, 0, 0, None, None), randomness="different")
        gradients, (losses, buffers) = batched(weights, buffers, loss_hyper, list(inputs), targets)
        gradients |= {name: gradients[name] * mask for name, mask in masks.items()}
        if self._clipped:
            gradients = stacked_optim.clipped(gradients, hyper[MAX_GRAD_NORM])
        if self._scheduled:
            steps, epochs = self._task.steps_per_epoch(self._params), self._task.epochs
            rate = hyper["learning_rate"] * schedules.factor(hyper, t, steps, epochs)
            hyper = {**hyper, "learning_rate": rate}
        t = t + 1
        weights, state = stacked_optim.step(self._optimizer, weights, gradients, state, hyper, t)
        return weights, buffers, state, t, losses

    def evaluate(self, feed: Batches) -> list[dict[str, float]]:
        rows = max(256, EVALUATION_ROWS // self.capacity)
        outputs = joined([self._forward(inputs) for inputs, _ in feed.chunks(rows)], dim=1)
        live = self._live()
        outputs, numbers = tree_map(lambda x: x[live], (outputs, self._loss_hyper))
        return self._measuring(outputs, feed.targets, [member.params for member in self.members], numbers)

    def _forward(self, inputs: Sequence[Tensor]) -> Any:
        """Return the outputs of all slots, (K, B, ...), in evaluation mode."""
        assert self._template is not None
        self._template.eval()

        def forward(weights: Any, buffers: Any, inputs: Sequence[Tensor]) -> Any:
            return functional_call(self._template, {**weights, **buffers}, tuple(inputs))

        try:
            with torch.no_grad(), self._task.autocast():
                return in_full(vmap(forward, in_dims=(0, 0, None))(self._weights, self._buffers, list(inputs)))
        finally:
            self._template.train()

    def module(self, member: Member) -> nn.Module:
        module = self._task.build(member)
        module.load_state_dict(self.state(member))
        return module

    def state(self, member: Member) -> dict[str, Tensor]:
        slot, rows = self._slots.index(member), {**self._weights, **self._buffers}
        return {own: rows[name][slot][corner].clone() for own, (name, corner) in self._corners[member].items()}

    def checkpoint(self, member: Member) -> dict[str, Any]:
        slot, t = self._slots.index(member), self._t[self._slots.index(member)]
        step = {} if self._optimizer == "sgd" else {"step": t.float().cpu().clone()}  # as torch.optim keeps it
        optimizer = {
            own: step | {key: rows[slot][corner].cpu().clone() for key, rows in self._state[name].items()}
            for own, (name, corner) in self._corners[member].items()
            if name in self._state
        }
        model = {name: tensor.cpu() for name, tensor in self.state(member).items()}
        return {"model": model, "optimizer": optimizer, "steps": int(t)}

    def _restore(self, slot: int, member: Member, resume: Mapping[str, Any]) -> None:
        """Have the member in `slot` go on from a checkpoint."""
        with torch.no_grad():
            for own, (name, corner) in self._corners[member].items():
                rows = self._weights if name in self._weights else self._buffers
                rows[name][slot][corner] = resume["model"][own].to(self._task.device)
                kept = resume["optimizer"].get(own, {})
                for key, states in self._state.get(name, {}).items():
                    if kept.get(key) is not None:  # torch's SGD has no buffer before its first step
                        states[slot][corner] = kept[key].to(self._task.device)
            self._t[slot] = resume["steps"]


class CudaReplay:
    """A step recorded as a CUDA graph, for the tensors it is given: they are changed in place from then on.

    A replay costs one launch for all of the step's kernels. Source: PyTorch's notes on CUDA graphs.
    """

    def __init__(
        self, run: Callable[..., Any], arguments: tuple[Any, ...], inputs: Sequence[Tensor], targets: Tensor
    ) -> None:
        self._arguments = arguments
        self._inputs, self._targets = [x.clone() for x in inputs], targets.clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.no_grad(), torch.cuda.stream(side):
            for _ in range(2):  # what is set up at a first call must not be recorded; on copies, so nothing is trained
                run(*tree_map(torch.clone, (*arguments, self._inputs, self._targets)))
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(self._graph):
            *new, self._losses = run(*arguments, self._inputs, self._targets)
            for old_tensor, new_tensor in zip(tree_leaves(arguments[: len(new)]), tree_leaves(new), strict=True):
                old_tensor.copy_(new_tensor)

    def __call__(self, *arguments: Any) -> tuple[Any, ...]:
        *given, inputs, targets = arguments
        for own, now in zip(tree_leaves(self._arguments), tree_leaves(given), strict=True):
            if own is not now:
                own.copy_(now)  # another batch size's graph has tensors of its own
        for own, now in zip(self._inputs, inputs, strict=True):
            own.copy_(now)
        self._targets.copy_(targets)
        self._graph.replay()
        return *self._arguments[:4], self._losses.clone()


def _reason(error: Exception) -> str:
    return f"torch.func cannot batch it ({type(error).__name__}: {str(error).strip().splitlines()[0][:200]})"
