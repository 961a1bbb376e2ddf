"""Small networks of every kind that is trained in stacks, and what the items of `check` do with them.

Shapes: K members, B rows.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from gpu_items import require
from hpo.objectives.embeddings import Categories, deep, mean_of_numbers, of_members
from hpo.objectives.models import SmallConvNet
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten_with_path, tree_map

from hpo.stacks import vmap_step
from hpo.stacks.padding import Padder, PaddingPlan, unpadded
from hpo.stacks.vmap_stack import VmapStack
from hpo.stacks.vmap_step import Execution
from hpo.study.blocks import MLP
from hpo.study.data import DataInfo, Split
from hpo.study.objective import Objective, Params
from hpo.study.space import build as build_space
from hpo.study.spec import parse_param
from hpo.training.batches import Batch
from hpo.training.stack import Member, Precision, Stack, Task

K = 4
"""Slots of a stack."""
CLASSES = ("a", "b", "c")
COUNTS = (60, 30, 10)
N_CODES = 300
REPLAYED = ", replayed from a CUDA graph"


def numbers(n: int, seed: int) -> Split:
    """Return n rows of 8 numbers, in double precision; the target is the sine of their sum."""
    x = torch.randn(n, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return Split(inputs={"x": x}, targets=x.sum(1, keepdim=True).sin())


def classes(n: int, seed: int) -> Split:
    """Return rows of 8 numbers, of three classes."""
    x = numbers(n, seed).inputs["x"]
    return Split(inputs={"x": x}, targets=x[:, : len(CLASSES)].argmax(1))


def images(n: int, seed: int) -> Split:
    """Return n images (3, 8, 8); the target is the mean of their first channel."""
    x = torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return Split(inputs={"x": x}, targets=4 * x[:, 0].mean((1, 2)).unsqueeze(1))


def codes(n: int, seed: int) -> Split:
    """Return rows of 16 codes: a batch of 256 looks up more than 3,072 rows of a table, which is another kernel."""
    x = torch.randint(0, N_CODES, (n, 16), generator=torch.Generator().manual_seed(seed))
    return Split(inputs={"x": x}, targets=(x[:, :1] / N_CODES).double())


@dataclass(frozen=True, kw_only=True)
class Case:
    """A kind of network with its rows and params; `widths`: what members differ in, so that they are padded."""

    name: str
    build: Callable[[Params], nn.Module]
    rows: Callable[[int, int], Split] = numbers
    params: Mapping[str, Any] = field(default_factory=dict)
    widths: Mapping[str, Sequence[int]] = field(default_factory=dict)
    batch_size: int = 16


def _mlp(params: Params) -> nn.Module:
    return nn.Sequential(nn.Linear(8, 24), nn.Tanh(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 1))


def _batchnorm(params: Params) -> nn.Module:
    return nn.Sequential(nn.Linear(8, 24, bias=False), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 1))


def _layernorm(params: Params) -> nn.Module:
    return nn.Sequential(nn.Linear(8, 24), nn.LayerNorm(24), nn.GELU(), nn.Linear(24, 1))


def _embedding(params: Params) -> nn.Module:
    return nn.Sequential(Categories([N_CODES] * 16, 4), nn.Linear(64, 1))


def _tabm(params: Params) -> nn.Module:
    more = {"n_layers": 2, "n_hidden": 16, "ensemble": 4, "dropout": 0.0}
    return deep(8, 1, more, mean_of_numbers, embedded=False)


def _classifier(params: Params) -> nn.Module:
    return MLP(8, [24], len(CLASSES))


CASES = {
    case.name: case
    for case in (
        Case(name="mlp", build=_mlp),
        Case(
            name="padded widths",
            build=lambda params: MLP(8, [params["n_hidden"]], 1),
            widths={"n_hidden": (20, 7, 31, 32)},
        ),
        Case(name="dropout", build=lambda params: MLP(8, [32], 1, dropout=params["dropout"]), params={"dropout": 0.3}),
        Case(name="conv + BatchNorm", build=lambda params: SmallConvNet(4, 1), rows=images),
        Case(name="BatchNorm1d", build=_batchnorm),
        Case(name="LayerNorm", build=_layernorm),
        Case(name="embedding", build=_embedding, rows=codes, batch_size=256),
        Case(name="TabM", build=_tabm),
        Case(
            name="class weights",
            build=_classifier,
            rows=classes,
            params={"loss": "cross_entropy", "class_weights": "balanced"},
        ),
        Case(
            name="label smoothing",
            build=_classifier,
            rows=classes,
            params={"loss": "cross_entropy", "label_smoothing": 0.1},
        ),
        Case(
            name="schedule + clipping",
            build=_mlp,
            params={"schedule": "one_cycle", "max_grad_norm": 0.5},
        ),
    )
}
OPTIMIZERS = ("adam", "adamw", "sgd", "rmsprop", "adagrad")


class Toy(Objective):
    """A case's network, of numbers of one kind; its loss is the one that the params name."""

    def __init__(self, case: Case, dtype: torch.dtype) -> None:
        super().__init__()
        self._case, self._dtype = case, dtype
        self.info = DataInfo(inputs={}, input_dtypes={}, class_names=CLASSES, class_counts=COUNTS)

    def data(self) -> Any:
        raise AssertionError("a stack is given its data")

    def build(self, params: Params, info: DataInfo) -> nn.Module:
        return self._case.build(params).to(self._dtype)

    def loss(self, outputs: Any, targets: Tensor, params: Params) -> Tensor:
        return super().loss(*of_members(outputs, targets), params)

    def metrics(self) -> dict[str, Any]:
        return {}


def task_of(
    case: Case, device: torch.device, dtype: torch.dtype = torch.float32, precision: Precision = "float32"
) -> Task:
    """Return what the members of a case share; an epoch has three batches, the last of half the size."""
    objective = Toy(case, dtype)
    n_rows = 2 * case.batch_size + case.batch_size // 2
    return Task(objective=objective, info=objective.info, device=device, n_rows=n_rows, epochs=4, precision=precision)


def members_of(case: Case, n: int = K, **params: Any) -> list[Member]:
    """Return n members of a case, each with a learning rate, and where it has any, widths of its own."""
    base = {"optimizer": "adam", "batch_size": case.batch_size, "loss": "mse", "label_smoothing": 0.0}
    base |= {"class_weights": "none", **case.params, **params}
    return [
        Member(
            number=i,
            seed=i,
            params={"learning_rate": 0.002 * (i + 1)}
            | base
            | {name: widths[i % len(widths)] for name, widths in case.widths.items()},
        )
        for i in range(n)
    ]


def on(split: Split, device: torch.device, dtype: torch.dtype) -> Split:
    """Return rows on a device, their numbers (not codes, not classes) of that kind."""
    inputs, targets = tree_map(
        lambda x: x.to(device, dtype) if x.is_floating_point() else x.to(device), (dict(split.inputs), split.targets)
    )
    return Split(inputs=inputs, targets=targets)


def batches_of(case: Case, task: Task, dtype: torch.dtype = torch.float32, n_epochs: int = 1) -> list[Batch]:
    """Return the batches of n epochs, on the task's device."""
    taken: list[Batch] = []
    for epoch in range(n_epochs):
        rows = on(case.rows(task.n_rows, 1 + epoch), task.device, dtype)
        x = rows.inputs["x"]
        parts = zip(torch.split(x, case.batch_size), torch.split(rows.targets, case.batch_size), strict=True)
        taken += [([inputs], targets) for inputs, targets in parts]
    return taken


def stack_of(
    case: Case,
    task: Task,
    execution: Execution = "graph",
    capacity: int = K,
    dtype: torch.dtype = torch.float32,
) -> VmapStack:
    """Return an empty stack for the members of a case."""
    return VmapStack(task, capacity, on(case.rows(8, 0), task.device, dtype), execution, padder_of(case, task))


def padder_of(case: Case, task: Task) -> Padder:
    """Return what pads the members of a case to one size, where they have widths of their own."""
    if not case.widths:
        return unpadded
    ranges = {name: {"type": "int", "low": min(each), "high": max(each)} for name, each in case.widths.items()}
    fixed = {name: value for name, value in members_of(case, 1)[0].params.items() if name not in ranges}
    space, faults = build_space(fixed | {name: parse_param(value) for name, value in ranges.items()}, [])
    require(not faults, str(faults))
    return PaddingPlan(space, task.network, "coarse").loosest


def wanted_path(execution: Execution, device: torch.device) -> str:
    """Return what `Stack.path` is to say of steps that run as fast as they can."""
    if execution == "eager":
        return execution
    form = "captured" if execution == "graph" else execution
    return form + (REPLAYED if vmap_step.records(device) else "")


@contextmanager
def not_recorded() -> Iterator[None]:
    """Within it no step is recorded as a CUDA graph."""
    real = vmap_step.records
    vmap_step.records = lambda device: False
    try:
        yield
    finally:
        vmap_step.records = real


State = dict[str, Any]
"""All that training changes of several members: their losses at each step, and their checkpoints."""


def trained(stack: Stack, members: Sequence[Member], batches: Sequence[Batch]) -> State:
    """Have members join and train on batches; return all that this changes, on the CPU."""
    for member in members:
        stack.join(member)
        require(member.fault is None, f"member {member.number}: {member.fault}")
    losses = [stack.step(inputs, targets).double().cpu() for inputs, targets in batches]
    return state_of(stack, members) | {"losses": torch.stack(losses)}


def state_of(stack: Stack, members: Sequence[Member]) -> State:
    """Return the weights, buffers, optimizer states and counts of steps of members, on the CPU."""
    kept = {}
    for member in members:
        each = stack.checkpoint(member)
        kept[member.number] = {name: each[name] for name in ("model", "optimizer", "steps")}
    return kept


def difference(got: State, expected: State, *, all_of: bool = True) -> tuple[float, str]:
    """Return the largest difference of two states, of 1 or a number's own size where that is more, and where it is.

    `all_of` False: what only `got` has is not compared, as a momentum that an optimizer alone does not keep.
    """
    ours, theirs = _leaves(got), _leaves(expected)
    missing = theirs.keys() - ours.keys() if not all_of else theirs.keys() ^ ours.keys()
    require(not missing, f"only one of two has {', '.join(sorted(missing)[:3])}")
    largest, where = 0.0, ""
    for name, other in theirs.items():
        one, two = (torch.as_tensor(x).double().cpu() for x in (ours[name], other))
        require(one.shape == two.shape, f"{name} is {tuple(one.shape)}, not {tuple(two.shape)}")
        if not one.numel():
            continue
        each = float(((one - two).abs() / two.abs().clamp(min=1)).max())
        require(each == each, f"{name} is not a number")
        if each >= largest:
            largest, where = each, name
    return largest, where


def _leaves(state: State) -> dict[str, Any]:
    return {"".join(map(str, path)): leaf for path, leaf in tree_flatten_with_path(state)[0] if leaf is not None}


def require_close(got: State, expected: State, tolerance: float, what: str, *, all_of: bool = True) -> float:
    """Raise Wrong where two states differ by more than `tolerance`; return by how much they do."""
    largest, where = difference(got, expected, all_of=all_of)
    require(largest <= tolerance, f"{what}: {where} differs by {largest:.1e}, allowed is {tolerance:.0e}")
    return largest
