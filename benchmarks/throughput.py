"""Training alone: milliseconds per epoch and model, ours stacked against the documented `DataLoader` loop.

    python benchmarks/throughput.py [--only california fashion widths] [--stacks 1 4 16 64 256] [--seconds 4]

Side by side in one run, on one thread, at equal params, batches and data: (a) the documented loop of
`benchmarks/training.py`; (b) ours one trial at a time (LoopStack, K = 1); (c) ours stacked (VmapStack), captured as a
graph and compiled, for every K. `california` is 8-24-24-1, batch 64; `widths` the same with both widths drawn from 129
to 256, one bucket of padding; `fashion` is 784-300-100-10, batch 32. Compilation is not counted (its seconds are
shown); nor is search, storage, tracking.
"""

import argparse
import platform
import random
import time
from datetime import date
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, TensorDataset

from hpo import objective as objectives
from hpo import optim
from hpo.data import Split
from hpo.objective import Objective
from hpo.stack import LoopStack, Member, Stack
from hpo.training import batches, order
from hpo.vmap_stack import Padding, VmapStack, padding

CPU = torch.device("cpu")
CASES = {
    "california": ("california_housing", {"n_hidden1": 24, "n_hidden2": 24, "batch_size": 64, "learning_rate": 1e-3}),
    "widths": ("california_housing", {"batch_size": 64, "learning_rate": 1e-3}),
    "fashion": ("fashion_mnist", {"batch_size": 32, "learning_rate": 0.05}),
}


def documented(objective: Objective, info: object, split: Split, params: dict, seconds: float) -> float:
    """Return milliseconds per epoch of the documented loop, from as many batches as `seconds` allow."""
    torch.manual_seed(0)
    model = objective.build(params, info)
    cls = optim.optimizer_class(params["optimizer"])
    optimizer = cls(model.parameters(), lr=params["learning_rate"])
    (inputs,) = split.inputs.values()
    loader = DataLoader(TensorDataset(inputs, split.targets), batch_size=params["batch_size"], shuffle=True)
    start, n = time.perf_counter(), 0
    while True:
        for x, y in loader:
            optimizer.zero_grad()
            loss = objective.loss(model(x), y, params)
            loss.backward()
            optimizer.step()
            n += 1
            if time.perf_counter() - start > seconds:
                return (time.perf_counter() - start) / n * len(loader) * 1000


def stacked(stack: Stack, split: Split, members: list[Member], seconds: float) -> tuple[float, float]:
    """Return milliseconds per epoch and model of training `members` in `stack`, and the seconds before that."""
    begun = time.perf_counter()
    for member in members:
        stack.join(member)
    all_batches = list(batches(split, members[0].params["batch_size"], order(len(split), 0, 0)))[:-1]
    stack.step(*all_batches[0])
    stack.step(*all_batches[1])
    begun = time.perf_counter() - begun
    start, n = time.perf_counter(), 0
    while True:
        for inputs, targets in all_batches:
            stack.step(inputs, targets)
            n += 1
            if time.perf_counter() - start > seconds:
                per_step = (time.perf_counter() - start) / n
                return per_step * (len(all_batches) + 1) / len(members) * 1000, begun


def members_of(case: str, params: dict, n: int) -> list[Member]:
    """Return n members, each with its own seed; in `widths`, all of one bucket (129 to 256) where n > 1."""
    draw = random.Random(0)
    out = []
    for number in range(n):
        own = {"n_hidden1": draw.randint(129, 256), "n_hidden2": draw.randint(129, 256)} if case == "widths" else {}
        out.append(Member(number=number, seed=number, params=params | own))
    return out


def widest_of(case: str, objective: Objective, params: dict, info: object) -> Padding:
    if case != "widths":
        return {}
    return padding([objective.build(params | {"n_hidden1": w, "n_hidden2": w}, info) for w in (20, 300)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--stacks", nargs="+", type=int, default=[4, 16, 64, 256])
    parser.add_argument("--seconds", type=float, default=4.0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    out = Console(width=130)
    out.print(
        f"{date.today()}, {platform.machine()}, 1 thread, torch {torch.__version__}, "
        f"Python {platform.python_version()}; "
        "GPU: not measured",
        highlight=False,
    )
    for case in arguments.only:
        name, own = CASES[case]
        objective, faults = objectives.load(name, {}, Path())
        assert objective is not None, faults
        params = {**optim.DEFAULTS, **objective.defaults, **own}
        data = objective.data()
        split = data.train.through(objective.preprocess(data.train))
        example = Split(inputs={n: x[:8] for n, x in split.inputs.items()}, targets=split.targets[:8])
        widest = widest_of(case, objective, params, data.info)
        table = Table(
            "training",
            "ms per epoch and model",
            "times the documented loop",
            "times one at a time",
            "begin, s",
            title=f"{case}: {len(split)} rows, batch {params['batch_size']}",
        )
        first = members_of(case, params, 1)
        base = documented(objective, data.info, split, first[0].params, arguments.seconds)
        alone, begun = stacked(LoopStack(objective, data.info, CPU), split, first, arguments.seconds)
        table.add_row("documented DataLoader loop", f"{base:.1f}", "1.0", "", "")
        table.add_row("hpo, one at a time", f"{alone:.1f}", f"{base / alone:.1f}", "1.0", f"{begun:.1f}")
        for how in ("graph", "compiled"):
            for k in [1, *arguments.stacks]:
                stack = VmapStack(objective, data.info, CPU, k, example, how, widest)
                each, begun = stacked(stack, split, members_of(case, params, k), arguments.seconds)
                table.add_row(
                    f"hpo, stack of {k}, {how}",
                    f"{each:.2f}",
                    f"{base / each:.1f}",
                    f"{alone / each:.1f}",
                    f"{begun:.1f}",
                )
        out.print(table)


if __name__ == "__main__":
    main()
