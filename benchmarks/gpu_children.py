"""What `check` does in a process of its own: after a capture that failed, or on a full card, others would fail too.

    python benchmarks/gpu_children.py prefetching|forbidden|visible|full|large --device cuda:0

The last line printed is what was seen, as JSON; what is wrong is an exception.
"""

import argparse
import json
import os
from collections.abc import Callable, Sequence
from typing import Any
from unittest.mock import patch

import torch
from gpu_items import empty_cache, noting, require
from gpu_steps import CPU
from gpu_toys import CASES, K, batches_of, members_of, require_close, stack_of, task_of, trained, wanted_path
from torch import Tensor, nn
from torch.nn import functional as F

import hpo
from hpo.runner import worker
from hpo.runner.launch import _visible
from hpo.stacks import recording
from hpo.stacks.recording import NotRecorded, in_place, recorded
from hpo.stacks.sizing import Sizing
from hpo.study.data import Split
from hpo.study.objective import Objective
from hpo.study.spec import Loading
from hpo.training.batches import Batches, make_batches
from hpo.training.loop import train
from hpo.training.loop_stack import LoopStack
from hpo.training.memory import is_out_of_memory
from hpo.training.stack import SingleStack, Stack
from hpo.training.torch_settings import torch_settings

LEFT = 3 << 29
"""Bytes that are left free on a full card: 1.5 GiB."""
WIDTH = 1024
"""Units of each layer of a network of which few fit there: 8 MB of weights, some 100 while a stack records its step."""
ROW = 1 << 20
"""Bytes of a row of the data that takes much of the card."""


def prefetching(device: torch.device) -> str:
    """The first step of a streamed epoch is captured while a thread pins the next batches."""
    case = CASES["mlp"]
    workers, curves = 2 if device.type == "cuda" else 0, {}
    for kind in ("stack", "alone"):
        task, members = task_of(case, device), members_of(case)
        rows = case.rows(40 * case.batch_size, 1)
        split = Split(inputs={"x": rows.inputs["x"].float()}, targets=rows.targets.float())
        batches = Batches(split, device, resident=False, loading=Loading(resident=False, num_workers=workers))
        stack: Stack = stack_of(case, task) if kind == "stack" else LoopStack(task, K)
        queue = list(members)

        def ask(n: int, queue: list[Any] = queue) -> list[Any]:
            taken, queue[:] = queue[:n], queue[n:]
            return taken

        train(SingleStack(stack), batches, None, epochs=3, seed=1, ask=ask, report=lambda stack, results: results)
        curves[kind] = [[epoch["train_loss"] for epoch in member.history] for member in members]
        if kind == "stack":
            require(stack.path == wanted_path("graph", device), f"it runs {stack.path}")
            path = stack.path
    off = (torch.tensor(curves["stack"]) - torch.tensor(curves["alone"])).abs().max().item()
    require(off < 1e-4, f"its losses differ from those alone by {off:.1e}: {curves}")
    return f"{path}, {workers} loading processes, 3 epochs; losses as alone to {off:.0e}"


def forbidden(device: torch.device) -> str:
    """A capture that fails is an error that says so, and a second stack trains as it should."""
    case = CASES["mlp"]
    task = task_of(case, device, torch.float64)
    spoilt = stack_of(case, task, dtype=torch.float64)
    for member in members_of(case):
        spoilt.join(member)
    run = in_place(spoilt._opened.eager)

    def waits(state: Any, inputs: Sequence[Tensor], targets: Tensor) -> Any:
        trained, losses = run(state, inputs, targets)
        if torch.cuda.is_current_stream_capturing():  # what waits before is found before, and spoils nothing
            losses.sum().item()
        return trained, losses

    inputs, targets = batches_of(case, task, torch.float64)[0]
    why, stream = "it was recorded", torch.cuda.current_stream()
    try:
        recorded(waits, spoilt._slots.state, inputs, targets, 1e-9)
    except NotRecorded as error:
        why = str(error)
    require("captur" in why, f"a step that waits for the GPU: {why}")
    require(torch.cuda.current_stream() == stream, "after it the thread is on another stream")
    batches, members = batches_of(case, task, torch.float64), members_of(case)
    second = stack_of(case, task, dtype=torch.float64)
    got = trained(second, members, batches)
    expected = trained(LoopStack(task, K), members_of(case), batches)
    off = require_close(got, expected, 1e-9, "the second stack", all_of=False)
    given_up = bool(recording._given_up)
    require(given_up or second.path == wanted_path("graph", device), f"the second stack runs {second.path}")
    return f"{why}; the second stack, {second.path}: right to {off:.0e}"


def visible(device: torch.device) -> str:
    """Where one GPU is visible, it is cuda:0, is the current device of a study, and steps are recorded on it."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    require(torch.cuda.device_count() == 1, f"{torch.cuda.device_count()} are visible of {named}")
    require(_visible(0) == named, f"a worker would be given {_visible(0)}")
    case = CASES["mlp"]
    with torch_settings(device):
        require(torch.cuda.current_device() == 0, f"the current device is {torch.cuda.current_device()}")
        task, members = task_of(case, device), members_of(case)
        stack = stack_of(case, task)
        got = trained(stack, members, batches_of(case, task))
    require(stack.path == wanted_path("graph", device), f"it runs {stack.path}")
    alone = task_of(case, CPU)
    expected = trained(LoopStack(alone, K), members_of(case), batches_of(case, alone))
    off = require_close(got, expected, 1e-3, "from the CPU", all_of=False)
    return f"CUDA_VISIBLE_DEVICES {named}: {torch.cuda.get_device_name(0)}, {stack.path}, as on the CPU to {off:.0e}"


class Wide(Objective):
    """Networks of which few fit into what is left of a full card."""

    defaults = {"optimizer": "adam", "learning_rate": 1e-3, "batch_size": 64}
    space = {"learning_rate": {"type": "float", "low": 1e-4, "high": 1e-2, "log": True}}

    def data(self) -> Any:
        x = torch.randn(512, WIDTH, generator=torch.Generator().manual_seed(0))
        parts = [slice(0, 256), slice(256, 384), slice(384, 512)]
        splits = [Split(inputs={"x": x[p]}, targets=x[p].mean(1, keepdim=True)) for p in parts]
        return hpo.Data(train=splits[0], valid=splits[1], test=splits[2])

    def build(self, params: Any, info: Any) -> nn.Module:
        layers = nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 1)
        return nn.Sequential(*layers)

    def loss(self, outputs: Any, targets: Tensor, params: Any) -> Tensor:
        return F.mse_loss(outputs, targets)

    def metrics(self) -> dict[str, Any]:
        from torchmetrics.regression import MeanSquaredError

        return {"mse": MeanSquaredError()}


def full(device: torch.device, trials: int = 64) -> str:
    """On a full card stacks are halved until one fits, no trial is lost, and memory is given back at the end."""
    cuda, errors = device.type == "cuda", list[str]()

    def noted(error: BaseException) -> bool:
        errors.append(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:80]}")
        return is_out_of_memory(error)

    filler = None
    if cuda:
        torch.zeros(1, device=device)
        filler = torch.empty(torch.cuda.mem_get_info(device)[0] - LEFT, dtype=torch.uint8, device=device)
    study = {"stack": trials, "trials": trials, "epochs": 2, "sampler": "random", "pruner": "none"}
    # memory itself is to say that there is none, not the estimate of how many fit
    no_estimate = patch.object(Sizing, "_room_for", lambda self, groups: trials)
    with no_estimate, patch.object(worker, "is_out_of_memory", noted), noting() as said:
        done = hpo.run(Wide, quiet=True, tracking="off", device=str(device), **study)
    halved = [text.partition("from now on ")[2] for text in said if "out of memory: from now on" in text]
    require(bool(halved), f"no stack was halved: {said} {errors}")
    require(done.counts.complete == trials, f"{done.counts}: {halved}")
    sizes = ", ".join(text.partition(" ")[0] for text in halved)
    seen = [f"stacks of {trials}, then {sizes}; {trials} trials complete", *dict.fromkeys(errors)]
    if filler is not None:
        empty_cache(device)
        kept, free = torch.cuda.memory_allocated(device) - filler.nbytes, torch.cuda.mem_get_info(device)[0]
        require(kept < 100 << 20, f"{kept / 2**20:.0f} MiB are still held after the study")
        seen.append(f"held after it: {kept / 2**20:.0f} MiB, free {free / 2**20:.0f} of {LEFT / 2**20:.0f} MiB")
    return "; ".join([*seen, *(text for text in said if "stacks run " in text)])


def large(device: torch.device, size: int | None = None) -> str:
    """Data of 40% of the card lies there, and an epoch of it, in a new order, takes hardly more memory."""
    total = size or int(0.4 * torch.cuda.mem_get_info(device)[0])
    n = total // ROW
    x = torch.empty(n, ROW, dtype=torch.uint8)
    x[:, :8] = torch.arange(n).unsqueeze(1).view(torch.uint8)  # the rest is never read
    split = Split(inputs={"x": x}, targets=torch.arange(n).unsqueeze(1))
    batches = make_batches(split, nn.Identity(), device)
    require(batches._resident, "it is streamed")
    seen = 0
    for inputs, targets in batches.epoch(64, torch.randperm(n)):
        numbers = inputs[0][:, :8].contiguous().view(torch.int64)
        require(torch.equal(numbers, targets), "a row has the target of another")
        seen += len(targets)
    require(seen == n, f"{seen} of {n} rows")
    if device.type != "cuda":
        return f"{n} rows"
    peak = torch.cuda.max_memory_reserved(device)
    require(peak < 1.15 * total, f"{peak / 2**30:.1f} GiB for {total / 2**30:.1f} GiB of data")
    return f"{total / 2**30:.1f} GiB of data, {peak / 2**30:.1f} GiB reserved at most"


CHILDREN: dict[str, Callable[[torch.device], str]] = {
    "prefetching": prefetching,
    "forbidden": forbidden,
    "visible": visible,
    "full": full,
    "large": large,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=list(CHILDREN))
    parser.add_argument("--device", type=torch.device, required=True)
    given = parser.parse_args()
    print(json.dumps({"seen": CHILDREN[given.what](given.device)}))


if __name__ == "__main__":
    main()
