"""What `check` does with a step: how it runs, whether it is the step that a loop of plain modules does, its dropout."""

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from gpu_items import Card, Item, Seen, require, shown
from gpu_toys import (
    CASES,
    OPTIMIZERS,
    Case,
    State,
    batches_of,
    members_of,
    not_recorded,
    on,
    require_close,
    stack_of,
    state_of,
    task_of,
    trained,
    wanted_path,
)
from torch import Tensor, nn

from hpo.stacks.vmap_stack import VmapStack
from hpo.stacks.vmap_step import Execution
from hpo.study.data import Split
from hpo.training.batches import Batch, Batches
from hpo.training.loop import order
from hpo.training.loop_stack import LoopStack
from hpo.training.stack import Member, Precision, Stack
from hpo.training.torch_settings import torch_settings

CPU = torch.device("cpu")
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-5}
PRECISIONS: Sequence[Precision] = ("tf32", "bf16")
FORMS: Sequence[tuple[Execution, bool]] = (("graph", False), ("graph", True))
COMPILED: Sequence[tuple[Execution, bool]] = (("compiled", False), ("compiled", True))
"""How a step runs, and whether it may be recorded as a CUDA graph."""


def no_waiting(card: Card, execution: Execution) -> Seen:
    """Twenty steps, a slot being empty: none of them, nor what is between them, waits for the GPU.

    An epoch of many steps at once waits for its order of rows and its losses, an evaluation for its results.
    """
    case = CASES["mlp"]
    task = task_of(case, card.device)
    stack = stack_of(case, task, execution)
    for member in members_of(case, 3):
        stack.join(member)
    rows = case.rows(21 * case.batch_size, 1)
    float32 = Split(inputs={"x": rows.inputs["x"].float()}, targets=rows.targets.float())
    batches = Batches(float32, card.device)
    feed = batches.epoch(case.batch_size, torch.randperm(len(float32)))
    stack.step(*next(feed))  # recording waits, once
    card.wait()
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses = [stack.step(*batch) for batch in feed]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    require(len(losses) == 20, f"{len(losses)} steps")
    require(bool(torch.stack(losses).isfinite().all()), "a loss is not finite")
    rows = torch.randperm(len(float32))
    waits = {
        name: _waits(call)
        for name, call in (
            ("an epoch", lambda: stack.epoch(batches, rows, lambda: False)),
            ("an evaluation", lambda: stack.evaluate(batches)),
        )
    }
    require(waits["an epoch"] <= 2, f"an epoch waits {waits['an epoch']} times")
    said = ", ".join(f"{name} {n}" for name, n in waits.items())
    return {"seen": f"20 steps without a wait; {stack.path}; waits: {said}"}


def _waits(call: Callable[[], Any]) -> int:
    """Return how many times `call` waits for the GPU, the second time: at the first one it is recorded."""
    call()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(each.message) for each in caught)


def path(card: Card, case: Case, execution: Execution, optimizer: str, precision: Precision) -> Seen:
    """A step runs as it was asked to, and not slower; else the reason is what is wrong."""
    with torch_settings(card.device, precision=precision):
        task = task_of(case, card.device, precision=precision)
        stack = stack_of(case, task, execution)
        for member in members_of(case, 3, optimizer=optimizer):
            stack.join(member)
        inputs, targets = batches_of(case, task)[0]
        start = time.perf_counter()
        losses = stack.step(inputs, targets).tolist()
        seconds = time.perf_counter() - start
    require(stack.path == wanted_path(execution, card.device), f"it runs {stack.path}")
    require(all(loss == loss for loss in losses), f"its losses are {losses}")
    return f"{stack.path}; first step {seconds:.1f} s"


def equality(card: Card, case: Case, optimizer: str, forms: Sequence[tuple[Execution, bool]]) -> Seen:
    """Three steps, the last on a smaller batch, in every form, against a loop of plain modules here and on the CPU.

    With a large epsilon: of a gradient that is nothing but rounding Adam makes a whole step.
    """
    params: dict[str, Any] = {"optimizer": optimizer, "weight_decay": 0.01}
    params |= {"momentum": 0.9} if optimizer == "sgd" else {"eps": 1e-2}
    forms = [*{wanted(form, card): form for form in forms}.values()]  # without a GPU recorded or not is the same
    seen = []
    with torch_settings(card.device, precision="float32"):
        for dtype, tolerance in [*TOLERANCES.items()][: 1 if card.small else 2]:
            several = [*dict.fromkeys([card.device, CPU])]
            references = {device: _alone(case, device, dtype, params) for device in several}
            eager = _stacked(card, case, ("eager", False), dtype, params)
            worst = require_close(
                eager, references[CPU], tolerance, f"{dtype}: eager, from LoopStack on the CPU", all_of=False
            )
            for form in forms:
                got, name = _stacked(card, case, form, dtype, params), f"{dtype}: {wanted(form, card)}"
                worst = max(worst, require_close(got, eager, tolerance, f"{name}, from eager"))
                for device, reference in references.items():
                    what = f"{name}, from LoopStack on {device}"
                    worst = max(worst, require_close(got, reference, tolerance, what, all_of=False))
            seen.append(f"{str(dtype).removeprefix('torch.')}: {worst:.1e}")
    names = ", ".join(dict.fromkeys(wanted(form, card) for form in forms))
    return f"largest difference {', '.join(seen)}; eager, {names}, LoopStack on {' and '.join(map(str, several))}"


def wanted(form: tuple[Execution, bool], card: Card) -> str:
    """Return the path that a form is to have."""
    if form[1]:
        return wanted_path(form[0], card.device)
    with not_recorded():
        return wanted_path(form[0], card.device)


def _alone(case: Case, device: torch.device, dtype: torch.dtype, params: dict[str, Any]) -> State:
    task, members = task_of(case, device, dtype), members_of(case, **params)
    return trained(LoopStack(task, len(members)), members, batches_of(case, task, dtype))


def _stacked(card: Card, case: Case, form: tuple[Execution, bool], dtype: torch.dtype, params: dict[str, Any]) -> State:
    task, members = task_of(case, card.device, dtype), members_of(case, **params)
    stack = stack_of(case, task, form[0], dtype=dtype)
    if form[1]:
        got = trained(stack, members, batches_of(case, task, dtype))
    else:
        with not_recorded():
            got = trained(stack, members, batches_of(case, task, dtype))
    require(stack.path == wanted(form, card), f"{dtype}: it runs {stack.path}")
    return got


def comings_and_goings(card: Card, case: Case, execution: Execution) -> Seen:
    """Members that leave and join, and a stack that shrinks and grows again, train as each does alone."""
    states = {}
    for name, device in (("stack", card.device), ("alone", card.device), ("alone on the CPU", CPU)):
        task = task_of(case, device, torch.float64)
        stack = stack_of(case, task, execution, dtype=torch.float64) if name == "stack" else LoopStack(task, 9)
        states[name] = _scenario(stack, members_of(case, 7), batches_of(case, task, torch.float64, n_epochs=5))
        if isinstance(stack, VmapStack):
            require(stack.path == wanted_path(execution, device), f"it runs {stack.path}")
    worst = max(
        require_close(states["stack"], states[name], 1e-9, f"from {name}", all_of=False) for name in list(states)[1:]
    )
    return f"largest difference {worst:.1e}"


def whole_epochs(card: Card, case: Case) -> Seen:
    """Two epochs of rows that lie on the device, and their evaluations, as training does them. They are as alone."""
    n_rows, states, path = 19 * case.batch_size + case.batch_size // 2, {}, ""
    for name in ("stack", "alone"):
        task = replace(task_of(case, card.device, torch.float64), n_rows=n_rows)
        members = members_of(case, eps=1e-2)
        stack: Stack = stack_of(case, task, dtype=torch.float64) if name == "stack" else LoopStack(task, len(members))
        for member in members:
            stack.join(member)
        rows = Batches(on(case.rows(n_rows, 1), card.device, torch.float64), card.device)
        losses, measured = [], []
        for number in range(2):
            losses.append(stack.epoch(rows, order(n_rows, 1, number), lambda: False))
            measured.append([each["loss"] for each in stack.evaluate(rows)])
        states[name] = state_of(stack, members) | {
            "losses": torch.tensor(losses, dtype=torch.float64),
            "measured": torch.tensor(measured, dtype=torch.float64),
        }
        path = path or str(stack.path)
    require(path == wanted_path("graph", card.device), f"it runs {path}")
    worst = require_close(states["stack"], states["alone"], 1e-9, "from LoopStack", all_of=False)
    return f"{path}; largest difference {worst:.1e}"


def _scenario(stack: Stack, members: Sequence[Member], batches: Sequence[Batch]) -> State:
    """Train seven members, who come and go; return the state of each when it leaves, and all losses."""
    left, losses, feed = {}, [], iter(batches)

    def step(n: int) -> None:
        for _ in range(n):
            inputs, targets = next(feed)
            losses.append(
                dict(zip([m.number for m in stack.members], stack.step(inputs, targets).tolist(), strict=True))
            )

    def leave(*numbers: int) -> None:
        for number in numbers:
            left.update(state_of(stack, [members[number]]))
            stack.leave(members[number])

    def resize(capacity: int) -> None:
        if isinstance(stack, VmapStack):
            stack.resize(capacity)

    for member in members[:4]:
        stack.join(member)
    step(3)
    leave(1)
    stack.join(members[4])  # takes the slot of another
    step(2)
    leave(0, 3)
    resize(2)
    step(3)
    resize(8)
    for member in members[5:]:
        stack.join(member)
    step(3)
    resize(4)
    step(3)
    leave(2, 4, 5, 6)
    return {**left, "losses": losses}


class Share(nn.Module):
    """Dropout of ones: its output says what share of them was kept."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.weight, self.dropout = nn.Parameter(torch.ones(1)), nn.Dropout(rate)

    def forward(self, x: Tensor) -> Tensor:
        return (self.dropout(torch.ones_like(x) * self.weight) != 0).to(x.dtype).mean() + 0 * self.weight.sum()


RATES = (0.1, 0.3, 0.5, 0.9)
N_KEPT = 4096


def dropout(card: Card, execution: Execution) -> Seen:
    """Each step has masks of its own, and each member; a seed gives the same again; the rate is a member's own."""

    def rows(n: int, seed: int) -> Split:
        return Split(inputs={"x": torch.zeros(n, N_KEPT)}, targets=torch.zeros(n, 1))

    case = Case(name="masks", build=lambda params: Share(params["dropout"]), rows=rows)
    task = task_of(case, card.device)
    task.objective.loss = lambda outputs, targets, params: outputs  # type: ignore[method-assign]
    inputs, targets = batches_of(case, task)[0]

    def shares(seed: int) -> Tensor:
        stack = stack_of(case, task, execution)
        for member, rate in zip(members_of(case), RATES, strict=True):
            stack.join(Member(number=member.number, seed=seed, params={**member.params, "dropout": rate}))
        kept = torch.stack([stack.step(inputs, targets) for _ in range(8)]).double().cpu()
        require(stack.path == wanted_path(execution, card.device), f"it runs {stack.path}")
        return kept

    first, again, other = shares(3), shares(3), shares(4)
    for rate, kept in zip(RATES, first.T, strict=True):
        require(len(kept.unique()) > 4, f"rate {rate}: replays draw the same masks, their shares are {kept.tolist()}")
    require(torch.equal(first, again), "members of the same seed have other masks")
    require(not torch.equal(first, other), "members of another seed have the same masks")
    expected = 1 - torch.tensor(RATES, dtype=torch.float64)
    deviation = (expected * (1 - expected) / (len(first) * N_KEPT * case.batch_size)).sqrt()
    off = ((first.mean(0) - expected) / deviation).abs().max().item()
    require(off < 5, f"{shown(off)} deviations off: {first.mean(0).tolist()} were kept, not {expected.tolist()}")
    return f"rates {RATES}, kept {[round(x, 4) for x in first.mean(0).tolist()]}, {off:.1f} deviations off at most"


def _path_items(execution: Execution) -> list[Item]:
    kinds: list[tuple[str, str, Precision]] = [(name, "adam", "float32") for name in CASES]
    kinds += [("mlp", optimizer, "float32") for optimizer in OPTIMIZERS[1:]]
    kinds += [(name, "adam", precision) for name in ("mlp", "conv + BatchNorm") for precision in PRECISIONS]
    compiles = execution == "compiled"
    return [
        Item(
            name=f"path, {execution}: {name}, {optimizer}, {precision}",
            run=partial(path, case=CASES[name], execution=execution, optimizer=optimizer, precision=precision),
            seconds=90.0 if compiles else 30.0,
            needs=10.0 if compiles else 3.0,
            cuda_only=precision == "tf32" or (precision, name) == ("bf16", "conv + BatchNorm"),  # no rule on a CPU
            heavy=compiles,
        )
        for name, optimizer, precision in kinds
    ]


def _equality_items(forms: Sequence[tuple[Execution, bool]], names: Sequence[tuple[str, str]]) -> list[Item]:
    compiles = forms == COMPILED
    return [
        Item(
            name=f"equal{', compiled' * compiles}: {name}, {optimizer}",
            run=partial(equality, case=CASES[name], optimizer=optimizer, forms=forms),
            seconds=120.0 if compiles else 40.0,
            needs=20.0 if compiles else 5.0,
            heavy=compiles,
        )
        for name, optimizer in names
    ]


PATHS, PATHS_COMPILED = _path_items("graph"), _path_items("compiled")
EQUAL = [
    *_equality_items(FORMS, [("mlp", "adam"), ("conv + BatchNorm", "adam")]),
    *_equality_items(
        FORMS[1:],
        [
            *(("mlp", optimizer) for optimizer in OPTIMIZERS[1:]),
            *((name, "adam") for name in CASES if name not in ("mlp", "conv + BatchNorm", "dropout")),
        ],
    ),
]
EQUAL_COMPILED = _equality_items(COMPILED, [("mlp", "adam"), ("conv + BatchNorm", "adam"), ("mlp", "sgd")])
WAITING = [
    Item(
        name=f"no wait in a step, {execution}",
        run=partial(no_waiting, execution=execution),
        cuda_only=True,
        seconds=90.0,
    )
    for execution in ("graph", "compiled")
]
COMINGS = [
    Item(name=f"leave, join, resize: {name}", run=partial(comings_and_goings, case=CASES[name], execution="graph"))
    for name in ("mlp", "padded widths", "BatchNorm1d")
]
EPOCHS = [
    Item(name=f"whole epochs: {name}", run=partial(whole_epochs, case=CASES[name]))
    for name in ("mlp", "conv + BatchNorm", "padded widths")
]
DROPOUT = [
    Item(
        name=f"dropout, {execution}",
        run=partial(dropout, execution=execution),
        seconds=90.0,
        heavy=execution == "compiled",
    )
    for execution in ("graph", "compiled")
]
