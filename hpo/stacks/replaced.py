"""Whether a network does as it did once some of its layers are replaced by those of a stack: code may look at them.

A stack is compared with a network whose dropout is in tensors already, and by its first step if that draws nothing. So
it is compared here, alone, with the network as it was built: it looks for layers by their types, reads what they hold,
or leaves something in place.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from hpo.stacks.alone import OUTSIDE, NotStackable, require_layout, rounding_of, unlike
from hpo.stacks.padding import Padder
from hpo.stacks.structure import PaddedModule, own_state, tensors
from hpo.stacks.tensor_modules import SETS_RATE, RateDropout, ScalingDropout, is_control, tensor_dropout
from hpo.study.data import Split
from hpo.study.objective import Params
from hpo.training.evaluation import in_full
from hpo.training.memory import is_out_of_memory
from hpo.training.stack import Task
from hpo.training.torch_settings import random_states, set_random_states

_MODES = {"evaluation": False, "training": True}


class Given(NamedTuple):
    """What a network gives on the example: its outputs, and its own buffers after that."""

    outputs: list[Tensor]
    buffers: dict[str, Tensor]


def with_tensor_dropout(task: Task, network: nn.Module, example: Split) -> nn.Module:
    """Return `network`, which is on the device and changed, with its dropout in tensors, in evaluation mode.

    Layers that are to work in place do so where it matters. Raises NotStackable where it does not as it did then.
    """
    layers = [each for each in network.modules() if type(each) is nn.Dropout]
    if not layers:
        return network
    before, rates = own_state(network), [each.p for each in layers]
    try:
        expected = {mode: given(task, network, example, training=training) for mode, training in _MODES.items()}
    except Exception as error:
        if is_out_of_memory(error):
            raise
        # what fails as it is fails again, where its trial is ended by that
        return tensor_dropout(network).to(task.device).eval()
    if own_state(network.eval()) != before:
        raise NotStackable(OUTSIDE)
    if [each.p for each in layers] != rates:  # a layer of torch's own is no part of that
        raise NotStackable(SETS_RATE)
    network, why = tensor_dropout(network).to(task.device), None
    for writes in sorted({False, *(each.inplace for each in layers)}):
        for each in network.modules():
            if isinstance(each, RateDropout):
                each.writes = writes and each.inplace
        why = _why_other(task, network, example, expected)
        if why is None:
            return network.eval()
    raise NotStackable(why)


def padded_alike(
    task: Task, probe: nn.Module, padder: Padder, params: Params, example: Split, *, is_random: bool
) -> PaddedModule:
    """Return `probe`, which is changed, padded, in training mode.

    Raises NotStackable where it is `is_random`, so that its first step cannot be compared, and a choice of layers makes
    something else of it. What is padded besides is not stacked then anyway.
    """
    expected = given(task, probe, example, training=True) if is_random else None
    padded = padder(probe.train(), params)
    is_own = all(tuple(x.shape) == padded.shapes[n] for n, x in padded.own.items())
    if expected is None or not padded.has_choices or not is_own or padded.own.keys() != padded.shapes.keys():
        return padded
    try:
        other = differ(task, padded.module, given(task, padded.module, example, training=True), expected)
    except Exception as error:
        if isinstance(error, NotStackable) or is_out_of_memory(error):
            raise
        other = True
    if other:
        raise NotStackable("it draws random numbers in training, and others with what trials choose among its layers")
    return padded


def given(task: Task, network: nn.Module, example: Split, *, training: bool) -> Given:
    """Return what `network` gives, with dropout that scales: the same each time, and it is left as it is."""
    network.train(training)
    with _leaving(task, network):
        inputs = [x.clone() for x in example.inputs.values()]
        with torch.set_grad_enabled(training), task.autocast(), ScalingDropout():
            outputs = in_full(network(*inputs))
        some = [x for x in tree_leaves(outputs) if isinstance(x, Tensor) and not x.is_sparse and not x.is_nested]
        own = {name: x for name, x in network.named_buffers() if not is_control(network, name)}
        return Given([x.detach().clone() for x in some], {name: x.detach().clone() for name, x in own.items()})


def differ(task: Task, network: nn.Module, got: Given, expected: Given) -> bool:
    """Whether two networks, of which `network` is one, do not give the same outputs."""
    if len(got.outputs) != len(expected.outputs):
        return True
    pairs = zip(got.outputs, expected.outputs, strict=True)
    finite = [(one, other) for one, other in pairs if not other.numel() or torch.isfinite(other).any()]
    return unlike([a for a, _ in finite], [b for _, b in finite], rounding_of(network, task.precision)) is not None


def _why_other(task: Task, network: nn.Module, example: Split, expected: dict[str, Given]) -> str | None:
    """Return why `network`, whose dropout is in tensors, does not as it did before; None: it does."""
    for mode, training in _MODES.items():
        try:
            got = given(task, network, example, training=training)
        except NotStackable:
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise
            return f"its code does not take other layers in place of nn.Dropout ({type(error).__name__} in {mode})"
        as_buffers = [Given(list(each.buffers.values()), {}) for each in (got, expected[mode])]
        if differ(task, network, got, expected[mode]) or differ(task, network, *as_buffers):
            return f"what it gives in {mode} depends on its dropout layers being nn.Dropout itself, not one like it"
    return None


@contextmanager
def _leaving(task: Task, network: nn.Module) -> Iterator[None]:
    """Afterwards a network and all random numbers are what they were. Raises NotStackable."""
    before = {name: (tensor, tensor.detach().clone()) for name, tensor in tensors(network).items()}
    drawn, pythons, numpys = random_states(task.device), random.getstate(), np.random.get_state()
    try:
        yield
        require_layout(network, {name: value for name, (_, value) in before.items()})
    finally:
        set_random_states(drawn, task.device)
        random.setstate(pythons)
        np.random.set_state(numpys)
        _restore(network, before)


@torch.no_grad()
def _restore(network: nn.Module, before: dict[str, tuple[Tensor, Tensor]]) -> None:
    for name, now in tensors(network).items():
        if name not in before:
            continue
        tensor, value = before[name]
        if now is not tensor:
            path, _, last = name.rpartition(".")
            setattr(network.get_submodule(path), last, tensor)
        if tensor.shape != value.shape:
            tensor.data = value
        elif not _same(tensor, value):
            tensor.copy_(value)


def _same(a: Any, b: Any) -> bool:
    return bool(((a == b) | ((a != a) & (b != b))).all())
