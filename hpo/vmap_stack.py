"""K networks of one structure trained as one: `torch.func.vmap` over stacked weights, one step for all members.

The step is written once, as a plain function of tensors. It runs as it is (`eager`, the reference), captured as a graph
(`graph`), or compiled (`compiled`, where a C++ compiler is found): the same sums, in fewer calls. What may differ
between members lives in (K,) tensors: weights, buffers, the optimizer's state and its hyperparameters. What may not is
their `signature`, read off the built module. Dropout draws its masks from the stack's own stream: equal to training
alone in distribution, not bit for bit.

Shapes: K members, B rows of a batch; a weight (K, ...), a loss (K,).
"""

import inspect
import logging
import shutil
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from hpo import stacked_optim
from hpo.data import DataInfo, Split
from hpo.objective import Objective, Params
from hpo.optim import ARGUMENTS, optimizer_class
from hpo.stack import EVALUATION_ROWS, Member, Stack, is_out_of_memory, measure

How = Literal["eager", "graph", "compiled"]


class NotStackable(Exception):
    """A member cannot be trained in a stack, and why; it is to be trained in a LoopStack."""


class RateDropout(nn.Module):
    """nn.Dropout with its rate in a buffer, so that members of one stack may have rates of their own."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.register_buffer("rate", torch.tensor(float(rate)))

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        keep = 1 - self.rate
        # rate 1 keeps nothing, and nothing over nothing is no number
        return torch.where(torch.rand_like(x) < keep, x / keep.clamp(min=1e-7), torch.zeros_like(x))


def stackable(module: nn.Module) -> nn.Module:
    """Return `module` with each nn.Dropout in it replaced by a RateDropout; the module given is changed."""
    for parent in module.modules():
        for name, child in parent.named_children():
            if type(child) is nn.Dropout:
                setattr(parent, name, RateDropout(child.p))
    return RateDropout(module.p) if type(module) is nn.Dropout else module


Padding = Mapping[str, tuple[int | None, ...]]
"""By tensor name, for each of its axes: the largest size a study's members have there, None where all have the same."""
_BUCKETS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
_SIZES = ("in_features", "out_features", "num_features", "in_channels", "out_channels")
"""Attributes of torch.nn's own modules that say what the shapes say, and that their forward does not use."""


def padding(modules: Sequence[nn.Module]) -> Padding:
    """Return on which axes the tensors of a study's networks differ in size, read off some that show its extremes."""
    shapes: dict[str, list[tuple[int, ...]]] = {}
    for module in modules:
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            shapes.setdefault(name, []).append(tuple(tensor.shape))
    found = {}
    for name, each in shapes.items():
        if len({len(shape) for shape in each}) == 1:
            axes = zip(*each, strict=True)
            found[name] = tuple(max(sizes) if len(set(sizes)) > 1 else None for sizes in axes)
    return {name: axes for name, axes in found.items() if any(axes)}


def padded(name: str, shape: Sequence[int], widest: Padding) -> tuple[int, ...]:
    """Return the shape in which a tensor of `shape` is stacked: the next bucket, not the widest, which costs time."""
    axes = widest.get(name, (None,) * len(shape))
    return tuple(
        size if most is None else min(most, next((b for b in _BUCKETS if b >= size), most))
        for size, most in zip(shape, axes, strict=True)
    )


def signature(module: nn.Module, params: Params, reads: Sequence[str] = (), widest: Padding | None = None) -> Hashable:
    """Return what members must have in common to share a stack; equal for modules that only their tensors tell apart.

    `reads` are the params that the loss reads as plain numbers. Raises NotStackable for an optimizer that has no
    stacked form.
    """
    name = str(params["optimizer"]).lower()
    if name not in stacked_optim.HYPERPARAMETERS:
        raise NotStackable(f"optimizer {name} has no stacked form; {', '.join(stacked_optim.HYPERPARAMETERS)} have")
    cls = optimizer_class(name)
    assert cls is not None
    for key in params:
        if key in ARGUMENTS and key not in stacked_optim.HYPERPARAMETERS[name] and _takes(cls, ARGUMENTS[key]):
            raise NotStackable(f"{name} with {key} has no stacked form")
    tensors = tuple(
        (n, padded(n, t.shape, widest or {}), t.dtype) for n, t in (*module.named_parameters(), *module.named_buffers())
    )
    frozen = tuple(n for n, w in module.named_parameters() if not w.requires_grad)
    parts = tuple((n, type(m), _attributes(m)) for n, m in module.named_modules())
    return name, params["batch_size"], tensors, frozen, parts, tuple((key, params[key]) for key in reads)


def _takes(cls: type, argument: str) -> bool:
    return argument in inspect.signature(cls).parameters


def _attributes(module: nn.Module) -> Hashable:
    """Return a module's own attributes that are no tensors: what its forward may branch on or compute with."""
    sizes = _SIZES if type(module).__module__.startswith("torch.nn") else ()
    own = {k: v for k, v in vars(module).items() if k not in _INTERNAL and k not in sizes}
    return tuple(sorted((key, _plain(value)) for key, value in own.items()))


_INTERNAL = set(vars(nn.Module()))


def _plain(value: Any) -> str:
    """Return text that is equal for equal plain values; for anything else, text that no other object has."""
    if isinstance(value, list | tuple):
        return f"{type(value).__name__}[{','.join(map(_plain, value))}]"
    if isinstance(value, dict):
        return f"dict[{','.join(f'{key!r}:{_plain(item)}' for key, item in value.items())}]"
    if value is None or isinstance(value, bool | int | float | str | torch.dtype | torch.Size):
        return repr(value)
    if callable(value) and getattr(value, "__closure__", None) is None and hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    return f"{type(value).__name__}@{id(value)}"


def _reason(error: Exception) -> str:
    return f"torch.func cannot batch it ({type(error).__name__}: {str(error).strip().splitlines()[0][:200]})"


class Reads(dict[str, Any]):
    """Params that note which of them are read."""

    def __init__(self, params: Params) -> None:
        super().__init__(params)
        self.names: list[str] = []

    def __getitem__(self, name: str) -> Any:
        self.names.append(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.names.append(name)
        return super().get(name, default)


class VmapStack(Stack):
    """`capacity` slots of one signature, which the first member that joins gives. Empty slots are trained along."""

    def __init__(
        self,
        objective: Objective,
        info: DataInfo,
        device: torch.device,
        capacity: int,
        example: Split,
        how: How = "eager",
        widest: Padding | None = None,
    ) -> None:
        """`example`: a few rows as they are trained on; each member that joins is tried on them.

        `widest`: see `padding`. A narrower member stands in the corner of its bucket's shapes, the rest is zero and
        stays zero, since its gradients are masked: it is the network that it would be alone.
        """
        self.capacity = capacity
        self._example, self._widest = example, widest or {}
        self._objective, self._info, self._device = objective, info, device
        self._how: How = "graph" if how == "compiled" and shutil.which("c++") is None else how
        self._slots: list[Member | None] = [None] * capacity
        self._shapes: dict[Member, dict[str, torch.Size]] = {}
        self._template: nn.Module | None = None
        self._signature: Hashable = None
        self._steps: dict[int, Callable[..., Any]] = {}
        self._metrics = {name: metric.to(device) for name, metric in objective.metrics().items()}

    @property
    def members(self) -> Sequence[Member]:
        return [member for member in self._slots if member is not None]

    def admit(self, member: Member) -> None:
        """Raise NotStackable where `member` could not join: its structure is another, or torch.func cannot batch it."""
        self.join(member)
        self.leave(member)

    def join(self, member: Member) -> None:
        """Raises NotStackable, see `admit`."""
        torch.manual_seed(member.seed)
        module = stackable(self._objective.build(member.params, self._info).to(self._device))
        outputs, reads = self._alone(module, member.params)
        first = self._template is None
        if first:
            self._begin(module, member.params, reads)
        elif signature(module, member.params, self._structural(reads), self._widest) != self._signature:
            raise NotStackable("its structure is not that of the stack")
        slot = self._slots.index(None)
        self._slots[slot] = member
        self._fill(slot, member, module)
        try:
            self._verify(slot, outputs)
            if first:
                self._try_step(member.params, reads, module)
        except NotStackable:
            self._slots[slot] = None
            self._template = None if first else self._template
            raise

    def _structural(self, reads: Sequence[str]) -> list[str]:
        """Return those of the params that the loss reads which it does not take as tensors."""
        return [name for name in reads if name not in self._loss_hyper]

    def _fill(self, slot: int, member: Member, module: nn.Module) -> None:
        tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        self._shapes[member] = {name: tensor.shape for name, tensor in tensors.items()}
        with torch.no_grad():
            for name, rows in (*self._weights.items(), *self._buffers.items()):
                corner = tuple(slice(0, size) for size in tensors[name].shape)
                rows[slot] = 0
                rows[slot][corner] = tensors[name]
                if name in self._masks:
                    self._masks[name][slot] = 0
                    self._masks[name][slot][corner] = 1
            for states in self._state.values():
                for rows in states.values():
                    rows[slot] = 0
            self._t[slot] = 0
            for name, value in stacked_optim.hyperparameters(self._optimizer, member.params).items():
                self._hyper[name][slot] = value
            for name, rows in self._loss_hyper.items():
                rows[slot] = member.params[name]

    def _verify(self, slot: int, alone: Tensor) -> None:
        """Raise NotStackable where the member's outputs in the stack are not those of its own module."""
        try:
            stacked = self._forward(self._example)[slot]
        except Exception as error:
            raise NotStackable(_reason(error)) from error
        scale = alone.abs().max().clamp(min=1.0)
        same = stacked.shape == alone.shape and bool((stacked - alone).abs().max() <= 1e-4 * scale)
        if torch.isfinite(alone).all() and not same:
            raise NotStackable("its outputs in a stack are not those alone: its module has state outside of tensors")

    def _try_step(self, params: Params, reads: Sequence[str], module: nn.Module) -> None:
        """Raise NotStackable where torch.func has no rule for the network or the loss.

        A loss that does not take its numbers as tensors gets them as numbers, which members must then have in common.
        """
        inputs, targets = list(self._example.inputs.values()), self._example.targets
        try:
            if self._how == "eager":
                with torch.no_grad():
                    self._step(*torch.utils._pytree.tree_map(torch.clone, self._arguments()), inputs, targets)
            else:
                self._capture(inputs, targets)
        except Exception as error:
            if not self._loss_hyper:
                raise NotStackable(_reason(error)) from error
            self._loss_hyper = {}
            self._signature = signature(module, params, reads, self._widest)
            self._try_step(params, reads, module)

    def _begin(self, module: nn.Module, params: Params, reads: Sequence[str]) -> None:
        def rows(name: str, tensor: Tensor) -> Tensor:
            shape = (self.capacity, *padded(name, tensor.shape, self._widest))
            return torch.zeros(shape, dtype=tensor.dtype, device=self._device)

        weights = {name: w for name, w in module.named_parameters() if w.requires_grad}
        frozen = {name: w for name, w in module.named_parameters() if not w.requires_grad}
        dtype = next((w.dtype for w in weights.values()), torch.float32)

        def column(value: float) -> Tensor:
            return torch.full((self.capacity,), value, dtype=dtype, device=self._device)

        self._params = params
        self._loss_hyper = {name: column(params[name]) for name in reads if type(params.get(name)) is float}
        self._signature = signature(module, params, self._structural(reads), self._widest)
        self._optimizer = str(params["optimizer"]).lower()
        self._template = module
        self._weights = {name: rows(name, w) for name, w in weights.items()}
        self._buffers = {name: rows(name, b) for name, b in (*frozen.items(), *module.named_buffers())}
        self._masks = {name: rows(name, w) for name, w in weights.items() if name in self._widest}
        self._state = stacked_optim.initial_state(self._optimizer, self._weights)
        self._hyper = {n: column(v) for n, v in stacked_optim.HYPERPARAMETERS[self._optimizer].items()}
        self._rates = {f"{n}.rate".removeprefix(".") for n, m in module.named_modules() if isinstance(m, RateDropout)}
        self._t = column(0.0)

    def _alone(self, module: nn.Module, params: Params) -> tuple[Tensor, Sequence[str]]:
        """Return the module's own outputs on the example, and the names of the params that the loss reads there."""
        reads = Reads(params)
        module.eval()
        with torch.no_grad():
            outputs = module(*self._example.inputs.values())
            self._objective.loss(outputs, self._example.targets, reads)
        module.train()
        return outputs, sorted(set(reads.names))

    def leave(self, member: Member) -> None:
        self._slots[self._slots.index(member)] = None
        del self._shapes[member]

    def step(self, inputs: Sequence[Tensor], targets: Tensor) -> Tensor:
        run = self._steps.get(len(targets))
        if run is None:
            run = self._steps[len(targets)] = self._prepare(inputs, targets)
        with torch.no_grad():
            self._weights, self._buffers, self._state, self._t, losses = run(*self._arguments(), inputs, targets)
        return losses[[slot for slot, member in enumerate(self._slots) if member is not None]]

    def _arguments(self) -> tuple[Any, ...]:
        return self._weights, self._buffers, self._state, self._t, self._hyper, self._loss_hyper, self._masks

    def _prepare(self, inputs: Sequence[Tensor], targets: Tensor) -> Callable[..., Any]:
        """Return the step for batches of this size, captured or compiled as `how` says."""
        assert self._template is not None
        self._template.train()
        if self._how == "eager":
            return self._step
        graph = self._capture(inputs, targets)
        if self._how != "compiled":
            return graph
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # "No CUDA runtime is found"
        compiled = torch.compile(graph, dynamic=False)
        try:
            with torch.no_grad():
                compiled(*torch.utils._pytree.tree_map(torch.clone, (*self._arguments(), list(inputs), targets)))
        except Exception as error:  # a compiler that does not work here: its errors have no common base
            if is_out_of_memory(error):
                raise
            self._how = "graph"
            return graph
        return compiled

    def _capture(self, inputs: Sequence[Tensor], targets: Tensor) -> Callable[..., Any]:
        """Return the step as a graph of plain operations, for batches of this size."""
        copies = torch.utils._pytree.tree_map(torch.clone, (*self._arguments(), list(inputs), targets))
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
            outputs = functional_call(self._template, {**weights, **buffers}, tuple(inputs))
            return self._objective.loss(outputs, targets, {**self._params, **loss_hyper}), buffers

        batched = vmap(grad_and_value(loss_of, has_aux=True), in_dims=(0, 0, 0, None, None), randomness="different")
        gradients, (losses, buffers) = batched(weights, buffers, loss_hyper, list(inputs), targets)
        gradients |= {name: gradients[name] * mask for name, mask in masks.items()}
        t = t + 1
        weights, state = stacked_optim.step(self._optimizer, weights, gradients, state, hyper, t)
        return weights, buffers, state, t, losses

    def evaluate(self, split: Split) -> list[dict[str, float]]:
        outputs_KN = self._forward(split)
        return [
            measure(self._objective, outputs_KN[slot], split.targets, member.params, self._metrics)
            for slot, member in enumerate(self._slots)
            if member is not None
        ]

    def _forward(self, split: Split) -> Tensor:
        """Return the outputs of all slots, (K, N, ...), in evaluation mode."""
        assert self._template is not None
        self._template.eval()
        rows = max(256, EVALUATION_ROWS // self.capacity)

        def forward(weights: Any, buffers: Any, inputs: Sequence[Tensor]) -> Tensor:
            return functional_call(self._template, {**weights, **buffers}, tuple(inputs))

        with torch.no_grad():
            parts = [
                vmap(forward, in_dims=(0, 0, None))(
                    self._weights, self._buffers, [x[start : start + rows] for x in split.inputs.values()]
                )
                for start in range(0, len(split), rows)
            ]
        self._template.train()
        return torch.cat(parts, dim=1)

    def module(self, member: Member) -> nn.Module:
        module = self._objective.build(member.params, self._info).to(self._device)
        module.load_state_dict(self.state(member))
        return module

    def state(self, member: Member) -> dict[str, Tensor]:
        slot, shapes = self._slots.index(member), self._shapes[member]
        return {
            name: rows[slot][tuple(slice(0, size) for size in shapes[name])].clone()
            for name, rows in (*self._weights.items(), *self._buffers.items())
            if name not in self._rates
        }
