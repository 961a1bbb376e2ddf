"""What `check` does besides steps: the machine, the feed, checkpoints, optimizers, studies, memory that runs out."""

import json
import os
import time
from collections.abc import Callable, Mapping
from contextlib import chdir
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torchmetrics
import torchvision
from gpu_items import ROOT, Card, Item, Seen, empty_cache, require, shown
from gpu_steps import CPU
from gpu_toys import (
    CASES,
    K,
    State,
    batches_of,
    members_of,
    not_recorded,
    require_close,
    stack_of,
    state_of,
    task_of,
    trained,
)
from hpo.objectives.models import ScalePixels
from torch import Tensor

import hpo
from hpo.runner.prepare import prepare
from hpo.stacks.alone import NotStackable
from hpo.study.data import Split
from hpo.study.spec import Loading
from hpo.training.batches import Batches, make_batches
from hpo.training.evaluation import evaluate
from hpo.training.loop_stack import LoopStack
from hpo.training.optim import optimizer_class
from hpo.training.stack import Member, Precision, Stack
from hpo.training.torch_settings import torch_settings

COPIED = 1 << 31
"""Bytes of the copy that the memory's speed is measured with."""
N_MATMUL = 8192
KEPT = CASES["BatchNorm1d"]
"""What checkpoints are made of: weights, buffers, the states of Adam."""


def versions(card: Card) -> Seen:
    """What runs here."""
    import optuna

    seen = (
        f"torchvision {torchvision.__version__}, torchmetrics {torchmetrics.__version__}, optuna {optuna.__version__}"
    )
    if not card.cuda:
        return seen
    import triton

    about = torch.cuda.get_device_properties(card.device)
    free, total = torch.cuda.mem_get_info(card.device)
    return (
        f"{about.name}, {about.multi_processor_count} SMs, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free, CUDA "
        f"{torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}, triton {triton.__version__}, {seen}"
    )


def ceilings(card: Card) -> Seen:
    """How fast the card copies and multiplies: what figures are to be seen beside."""
    x = torch.randint(0, 255, (COPIED,), dtype=torch.uint8, device=card.device)
    terabytes = 2 * COPIED / seconds_on(card, partial(torch.empty_like(x).copy_, x)) / 1e12
    del x
    speeds = {}
    for precision in ("float32", "tf32", "bf16"):
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        a, b, out = (torch.randn(N_MATMUL, N_MATMUL, device=card.device, dtype=dtype) for _ in range(3))
        with torch_settings(card.device, precision=precision):
            took = seconds_on(card, partial(torch.mm, a, b, out=out))
        speeds[precision] = 2 * N_MATMUL**3 / took / 1e12
    empty_cache(card.device)
    text = ", ".join(f"{name} {shown(speed)}" for name, speed in speeds.items())
    require(min(terabytes, *speeds.values()) > 0.1, f"{terabytes:.2f} TB/s, TFLOP/s {text}")
    return f"copy {terabytes:.2f} TB/s (read + written); matrix products in TFLOP/s: {text}"


def seconds_on(card: Card, run: Callable[[], Any], n: int = 10) -> float:
    """Return how long a call takes on the GPU, by its own clock."""
    for _ in range(3):
        run()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(n):
        run()
    end.record()
    card.wait()
    return start.elapsed_time(end) / 1000 / n


def feed(card: Card) -> Seen:
    """The same batches, whether the rows lie on the device, prepared or as bytes, or stream."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (410, 1, 28, 28), dtype=torch.uint8, generator=generator)
    split = Split(inputs={"pixels": pixels}, targets=torch.arange(410).unsqueeze(1).float())
    loading = Loading(resident=False, num_workers=2 if card.cuda else 0)
    scale = ScalePixels().eval()
    ways = {
        "resident, as bytes": Batches(split, card.device, scale),
        "resident, prepared": Batches(split.through(scale), card.device),
        "streamed": make_batches(split, scale, card.device, loading),
        "as it fits": make_batches(split, scale, card.device),
    }
    expected, order = split.through(scale), torch.randperm(410, generator=generator)
    for name, batches in ways.items():
        for _ in range(2):  # epochs
            got = [(inputs[0].cpu(), targets.cpu()) for inputs, targets in batches.epoch(64, order)]
            x, y = (torch.cat(each) for each in zip(*got, strict=True))
            require(torch.equal(y, split.targets[order]), f"{name}: its targets are other rows'")
            require((x - expected.inputs["pixels"][order]).abs().max().item() <= 1e-7, f"{name}: its inputs differ")
    return f"{', '.join(ways)}: the same, in two epochs; streamed by {loading.num_workers} processes"


def checkpoint(card: Card) -> Seen:
    """What is kept of members on the device resumes there and on the CPU, in a stack and alone, as if never stopped."""
    worst, case = 0.0, KEPT
    task = task_of(case, card.device, torch.float64)
    batches = batches_of(case, task, torch.float64, n_epochs=2)
    for kind in ("stack", "alone"):
        stack = _made(kind, card.device)
        members = members_of(case)
        trained(stack, members, batches[:3])
        kept = {member.number: stack.checkpoint(member) for member in members}
        for inputs, targets in batches[3:]:
            stack.step(inputs, targets)
        expected = state_of(stack, members)
        for place in dict.fromkeys([card.device, CPU]):
            for into in ("stack", "alone"):
                got = _resumed(into, place, kept)
                what = f"kept of {kind}, resumed in {into} on {place}"
                worst = max(worst, require_close(got, expected, 1e-9, what, all_of=False))
    return f"largest difference {worst:.1e}"


def _made(kind: str, device: torch.device) -> Stack:
    task = task_of(KEPT, device, torch.float64)
    return stack_of(KEPT, task, dtype=torch.float64) if kind == "stack" else LoopStack(task, K)


def _resumed(kind: str, device: torch.device, kept: Mapping[int, Any]) -> State:
    stack, task = _made(kind, device), task_of(KEPT, device, torch.float64)
    members = [
        Member(number=each.number, seed=each.seed, params=each.params, epoch=1, resume=kept[each.number])
        for each in members_of(KEPT)
    ]
    trained(stack, members, batches_of(KEPT, task, torch.float64, n_epochs=2)[3:])
    return state_of(stack, members)


def optimizers(card: Card) -> Seen:
    """Every optimizer of torch.optim does one step here as the plain one on the CPU, or fails as that does."""
    names = [
        name.lower()
        for name, value in vars(torch.optim).items()
        if isinstance(value, type) and issubclass(value, torch.optim.Optimizer) and value is not torch.optim.Optimizer
    ]
    failing, worst = {}, 0.0
    for name in names:
        here, there = _one_step(name, card.device), _plain_step(name)
        if isinstance(here, str) or isinstance(there, str):
            require(here == there, f"{name}: here {_outcome(here)}, on the CPU {_outcome(there)}")
            failing[name] = str(here)
        else:
            worst = max(worst, require_close(here, there, 1e-5, name))
    ended = ", ".join(f"{name} ({why})" for name, why in failing.items())
    return f"{len(names) - len(failing)} as plain ones on the CPU to {worst:.1e}; fail on both: {ended or 'none'}"


def _one_step(name: str, device: torch.device) -> State | str:
    """Return the weights after a step of the engine, or what it fails with."""
    case, members = CASES["mlp"], _one_member(name)
    task = task_of(case, device)
    try:
        state = trained(LoopStack(task), members, batches_of(case, task)[:1])
    except Exception as error:  # some take no dense gradients, no vectors, or want a closure
        return type(error).__name__
    return {"model": state[0]["model"]}


def _plain_step(name: str) -> State | str:
    """Return the weights after a step of torch.optim as it comes, one weight after the other, on the CPU."""
    case, [member] = CASES["mlp"], _one_member(name)
    task = task_of(case, CPU)
    module, (inputs, targets) = task.build(member), batches_of(case, task)[0]
    task.objective.loss(module(*inputs), targets, member.params).backward()
    try:
        optimizer_class(name)(module.parameters(), lr=member.params["learning_rate"]).step()
    except Exception as error:
        return type(error).__name__
    return {"model": module.state_dict()}


def _one_member(name: str) -> list[Member]:
    return members_of(CASES["mlp"], 1, optimizer=name)


def _outcome(of: State | str) -> str:
    return of if isinstance(of, str) else "it trains"


def convolutions(card: Card, precision: Precision) -> Seen:
    """Networks of convolutions are taken into a stack: grouped they are another algorithm, which rounds otherwise."""
    case, n = CASES["conv + BatchNorm"], 4 if card.small else 16
    with torch_settings(card.device, precision=precision):
        stack = stack_of(case, task_of(case, card.device, precision=precision), capacity=n)
        refused = []
        for member in members_of(case, n):
            try:
                stack.join(member)
            except NotStackable as error:
                refused.append(str(error))
    require(not refused, f"{len(refused)} of {n} were refused: {refused[:1]}")
    return f"{n} of {n} were taken"


def study(card: Card, name: str, workers: int = 1) -> Seen:
    """A committed study to its end; the exported network has on the CPU the test metrics that it had here."""
    trials, epochs = (4, 3) if card.small else (16, 10)
    folder = card.folder / f"{name}-{workers}"
    folder.mkdir()
    path, device = ROOT / "studies" / f"{name}.yaml", card.device.type
    start = time.perf_counter()
    with chdir(folder):
        done = hpo.run(
            path, workers=workers, quiet=True, trials=trials, epochs=epochs, stack=4, tracking="off", device=device
        )
        seconds = time.perf_counter() - start
        counts, best = done.counts, done.best
        require(counts.finished == trials and not counts.failed, f"{counts}")
        require(best is not None and done.bundle is not None, "nothing was exported")
        parity = json.loads((done.bundle / "bundle.json").read_text())["parity"]
        again, test = _tested_on_the_cpu(path, best.params, done.bundle), done.test
        places = set(done.trials["worker"])
    off = max(abs(test[key] - value) for key, value in again.items())
    require(off <= 1e-4, f"its test metrics here are {test}, on the CPU {again}")
    apart = max(each["max_difference"] for each in parity.values())
    return (
        f"{trials} trials by {len(places)} worker(s) in {seconds:.1f} s, best {done.metric} {best.value:.4g}; "
        f"refitted, test metrics as on the CPU to {off:.0e}, exported with parity {apart:.0e}"
    )


def _tested_on_the_cpu(path: Path, params: Mapping[str, Any], bundle: Path) -> dict[str, float]:
    plan = prepare(path, {"device": "cpu"})
    data = plan.load_data()
    require(data is not None, "there is no data")
    network = plan.objective.build(params, data.info)
    prefix, state = "network.", torch.load(bundle / "model.pt", weights_only=True)["model_state_dict"]
    network.load_state_dict({k.removeprefix(prefix): x for k, x in state.items() if k.startswith(prefix)})
    preprocess = plan.objective.preprocess(data.for_refit().train).eval()
    batches = Batches(data.test.through(preprocess), CPU)
    return evaluate(plan.task(data.info, len(data.train)), network, batches, params, plan.objective.metrics())


def generator_after_recording(card: Card) -> Seen:
    """torch's generator on the device is as it was after a step was recorded: what is drawn later is the same."""
    case = CASES["dropout"]

    def drawn() -> Tensor:
        task = task_of(case, card.device)
        stack = stack_of(case, task)
        for member in members_of(case):
            stack.join(member)
        torch.manual_seed(11)
        stack.step(*batches_of(case, task)[0])
        return torch.rand(4, device=card.device).cpu()

    with torch_settings(card.device):
        first = drawn()
        with not_recorded():
            second = drawn()
    require(torch.equal(first, second), f"{first.tolist()} after recording, {second.tolist()} without")
    return "the next numbers drawn are those without recording"


def in_a_child(card: Card, name: str, seconds: float, **environ: str) -> Seen:
    """Run what may spoil a process in one of its own."""
    seen: str = card.child(name, seconds, **environ)["seen"]
    return seen


def visible(card: Card, seconds: float = 60.0) -> Seen:
    """Have a process see one GPU: the first that this one sees, which may not have been named."""
    first = (os.environ.get("CUDA_VISIBLE_DEVICES") or "0").split(",")[0]
    return in_a_child(card, "visible", seconds, CUDA_VISIBLE_DEVICES=first)


def _child(name: str, what: str, seconds: float = 60.0) -> Item:
    run = partial(in_a_child, name=what, seconds=seconds)
    return Item(name=name, run=run, seconds=seconds, needs=12.0, cuda_only=True, heavy=True)


FIRST = [
    Item(name="versions", run=versions),
    Item(name="ceilings", run=ceilings, cuda_only=True),
]
FEED = [
    Item(name="feed: resident or streamed", run=feed),
    Item(name="checkpoint: resumed here and on the CPU", run=checkpoint, seconds=60.0),
    Item(name="every optimizer of torch.optim", run=optimizers, seconds=60.0),
    Item(name="convolutions stack, float32", run=partial(convolutions, precision="float32")),
    Item(name="convolutions stack, tf32", run=partial(convolutions, precision="tf32"), cuda_only=True),
    Item(name="convolutions stack, bf16", run=partial(convolutions, precision="bf16"), cuda_only=True),
    Item(name="the generator after recording", run=generator_after_recording, cuda_only=True),
]
STUDIES = [
    Item(name="hpo run: breast_cancer", run=partial(study, name="breast_cancer"), seconds=90.0, needs=10.0, heavy=True),
    Item(
        name="hpo run: synthetic_moons",
        run=partial(study, name="synthetic_moons"),
        seconds=90.0,
        needs=10.0,
        heavy=True,
    ),
    Item(
        name="hpo run --workers 2: breast_cancer",
        run=partial(study, name="breast_cancer", workers=2),
        seconds=120.0,
        needs=25.0,
        heavy=True,
    ),
]
CHILDREN = [
    _child("captured while a loader pins memory", "prefetching"),
    _child("a capture that fails, then a second stack", "forbidden"),
    Item(name="cuda:0 under CUDA_VISIBLE_DEVICES", run=visible, seconds=60.0, needs=12.0, cuda_only=True, heavy=True),
    _child("a full card: stacks are halved", "full", 90.0),
    _child("data of 40% of the card", "large", 90.0),
]
