"""A member on its way into a stack: its network built, padded, and tried alone; or why it cannot be stacked."""

import inspect
import math
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from hpo.errors import HpoError, said
from hpo.stacks.alone import OUTSIDE, Alone, NotStackable, evaluating, step_alone
from hpo.stacks.cost import records
from hpo.stacks.padding import Padder, PaddingPlan
from hpo.stacks.replaced import padded_alike, with_tensor_dropout
from hpo.stacks.rows import mixes_rows
from hpo.stacks.structure import PaddedModule, own_state, tensors
from hpo.stacks.tensor_modules import dropout_writes, tensor_dropout, with_masks_of
from hpo.study.data import Split
from hpo.study.objective import Params
from hpo.training import stacked_optim
from hpo.training.evaluation import in_full
from hpo.training.faults import TrialError
from hpo.training.loss_params import RecordingParams
from hpo.training.memory import is_of_the_machine, is_out_of_memory
from hpo.training.optim import ACCUMULATION, ARGUMENTS, MAX_GRAD_NORM, gives_sparse, make, optimizer_class
from hpo.training.stack import Member, Task
from hpo.training.torch_settings import has_drawn, random_states

_TO_RECORD = 4
"""How many copies of a stack's state there are besides while its step is recorded and compared."""
_CHANGES_PARAMS = "the loss changes its params, which alone the next step finds changed"


@dataclass(frozen=True, kw_only=True, eq=False)
class Candidate:
    """A member with its network padded, before it joins a stack.

    `padded` is on the CPU, whence many are copied at once. `probe`, on the device, is the same network with other
    weights, padded too; `outputs` is what it gave alone on the stack's example, `loss` that of an evaluation there
    (None: one that draws random numbers), `alone` its first step there: an initialisation may hide what padding does to
    a network (a last layer of zeros hides all that is before it).
    `reads` are the params that the loss reads there, `activations` the bytes that all layers give for one row.
    `mixes_rows`: its outputs of a row depend on the rows that are evaluated with it.
    """

    member: Member
    padded: PaddedModule
    probe: PaddedModule
    outputs: Any
    loss: Tensor | None
    alone: Alone
    reads: Sequence[str]
    activations: int
    mixes_rows: bool
    padder: Padder

    def bytes_in_a_stack(self) -> int:
        """Return about how much memory this member needs there, training a batch: weights and what is kept of them,
        gradients, and what lies between layers (forward and backward)."""
        params, module, shapes = self.member.params, self.padded.module, self.padded.shapes
        n_states = len(stacked_optim.state_names(str(params["optimizer"]).lower(), params))
        copies = 5 + 2 * n_states  # old, new, the best, gradient, mask; each state old and new
        if any(records(w.device) for w in self.probe.module.parameters()):
            copies += _TO_RECORD * (1 + n_states)
        weights = sum(math.prod(shapes[n]) * w.element_size() for n, w in module.named_parameters())
        batch_size: int = params["batch_size"]
        return copies * weights + 3 * batch_size * self.activations

    @property
    def signature(self) -> Hashable:
        """What members of one stack have in common."""
        params = self.member.params
        engine = tuple(name in params for name in ("schedule", MAX_GRAD_NORM, "momentum"))
        untrained = tuple(sorted(self.untrained))
        return str(params["optimizer"]).lower(), params["batch_size"], engine, self.padded.signature, untrained

    @property
    def is_padded(self) -> bool:
        """Whether some of its tensors are smaller than those of the stack, or there are none of them."""
        own = {name: tuple(tensor.shape) for name, tensor in self.padded.own.items()}
        return own != dict(self.padded.shapes)

    @property
    def untrained(self) -> frozenset[str]:
        """The weights on which the loss does not depend, by the structure's names."""
        return frozenset(self.padded.names[name] for name in self.alone.untrained)


def candidate(task: Task, member: Member, padder: Padder, example: Split) -> Candidate:
    """Build `member`'s network and try it on `example`, a few rows as they are trained on.

    Raises NotStackable for an optimizer that has no stacked form, or a module that holds state outside of tensors;
    TrialError where the objective's code says that the configuration is at fault. What else fails here is to fail, or
    not, where the member is trained alone, whose own error is then raised: NotStackable too.
    """
    try:
        return _tried(task, member, padder, example)
    except (NotStackable, TrialError, HpoError):
        raise
    except Exception as error:  # user's code, and torch's, run otherwise than in training
        if is_out_of_memory(error):
            raise
        raise NotStackable(f"trying it for a stack failed ({type(error).__name__}: {said(error)})") from error


def _tried(task: Task, member: Member, padder: Padder, example: Split) -> Candidate:
    """Return `member` as `candidate` does. Raises whatever its code or torch raises, too."""
    _require_stacked_form(member.params)
    example = _of_its_own(example)
    probe = task.build(member).to(task.device).eval()
    if any(isinstance(each, torch.jit.ScriptModule) for each in probe.modules()):
        raise NotStackable("torch.func cannot batch what torch.jit has made")
    with torch.no_grad():
        for weight in probe.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    probe = with_tensor_dropout(task, probe, example)
    own = {id(tensor) for tensor in tensors(probe).values()}
    if not all(id(value) in own for value in probe.state_dict(keep_vars=True).values()):
        raise NotStackable("its state_dict has what is neither a weight nor a buffer (get_extra_state)")
    if gives_sparse(probe):
        raise NotStackable("torch.func cannot batch the sparse gradients of its embeddings")
    reads = RecordingParams(member.params)
    before = own_state(probe)
    with torch.no_grad(), _counting(probe) as given, task.guarding():
        with evaluating(task, probe), task.autocast():
            outputs = in_full(probe(*_of_its_own(example).inputs.values()))
        # of a copy: what it changes in place is no part of what the network gives
        drawn = random_states(task.device)
        loss = task.objective.loss(tree_map(_copy, outputs), example.targets, reads)
        is_random = has_drawn(drawn, task.device)
    mixing = mixes_rows(task, probe, example)
    if own_state(probe) != before:
        raise NotStackable(OUTSIDE)
    if reads.changes:  # here too: the next call may fail for want of what this one has deleted
        raise NotStackable(_CHANGES_PARAMS)
    alone = step_alone(task, probe, reads, _of_its_own(example))
    if reads.changes:
        raise NotStackable(_CHANGES_PARAMS)
    network = tensor_dropout(task.drawn(member).train(), writes=dropout_writes(probe))
    padded = padder(network, member.params)
    with_masks_of(padded.module, member.seed)
    return Candidate(
        member=member,
        padded=padded,
        probe=padded_alike(task, probe, padder, member.params, example, is_random=alone.is_random),
        outputs=outputs,
        loss=None if is_random else loss,
        alone=alone,
        reads=sorted(reads.names),
        activations=sum(given) // len(example),
        mixes_rows=mixing,
        padder=padder,
    )


def candidates(task: Task, member: Member, plan: PaddingPlan, example: Split) -> Iterator[Candidate]:
    """Yield `member` with each padding of `plan`, loosest first: that with which the most members share a stack.

    Raises NotStackable where there is no padding left, or none that memory has room for (a network that the machine has
    no memory for may fail, but alone). A GPU may be full of others, which raises: stacks are to be smaller.
    """
    why: Exception | None = None
    for padder in plan:
        try:
            yield candidate(task, member, padder, example)
            why = None
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error) or not (task.device.type == "cpu" or is_of_the_machine(error)):
                raise
            why = error
    if why is not None:
        raise NotStackable("memory has no room to try its network in a stack") from why


def _of_its_own(example: Split) -> Split:
    """Return a copy of some rows, which may be the study's own: a forward may write into them."""
    inputs = {name: x.clone() for name, x in example.inputs.items()}
    return Split(inputs=inputs, targets=example.targets.clone())


def _copy(x: Any) -> Any:
    return x.clone() if isinstance(x, Tensor) else x


@contextmanager
def _counting(module: nn.Module) -> Iterator[list[int]]:
    """Yield a list that collects the bytes of what each layer of `module` outputs."""
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
    make(params, [nn.Parameter(torch.zeros(1))])  # which raises where torch refuses them
    takes = inspect.signature(cls).parameters
    for key, value in params.items():
        if value is False:  # as without it: what is stacked is torch's default
            continue
        if key in ARGUMENTS and key not in stacked_optim.HYPERPARAMETERS[name] and ARGUMENTS[key] in takes:
            raise NotStackable(f"{name} with {key} has no stacked form")
