"""Seconds per epoch of our single-trial training against the documented `DataLoader` loop, on California Housing.

    python benchmarks/training.py [--epochs 10] [--repeats 5]

Both train the same network (8-24-24-1) from the same initial weights on the same batches in the same order, with Adam
1e-3 and batch 64, and both measure MSE and R2 on validation after each epoch: side by side, in turn, on one thread.
(a) is the documented loop: a DataLoader, `optimizer.step()` as it comes, TorchMetrics updated batch by batch. (b) is
`hpo.training.loop` with a LoopStack of one member. (c) is the documented loop with torch's own default of threads.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Sampler, TensorDataset
from torchmetrics.regression import R2Score

from hpo.study import loading as objectives
from hpo.study.data import Data, DataInfo, Split
from hpo.study.objective import Objective
from hpo.training.batches import Batches
from hpo.training.loop import order, train
from hpo.training.loop_stack import LoopStack
from hpo.training.stack import Member, SingleStack, Task

SEED = 42
PARAMS = {"optimizer": "adam", "learning_rate": 1e-3, "batch_size": 64, "n_hidden1": 24, "n_hidden2": 24}


class OurOrder(Sampler[int]):
    """The rows in the order in which `hpo.training.loop` takes them, so that both loops see the same batches."""

    def __init__(self, n_rows: int) -> None:
        self.n_rows, self.epoch = n_rows, 0

    def __iter__(self) -> Iterator[int]:
        rows = order(self.n_rows, SEED, self.epoch).tolist()
        self.epoch += 1
        return iter(rows)

    def __len__(self) -> int:
        return self.n_rows


def documented(
    objective: Objective, info: DataInfo, train_split: Split, valid: Split, epochs: int
) -> tuple[float, list[float]]:
    """Return (seconds, validation MSE by epoch) of the documented loop."""
    torch.manual_seed(SEED)
    model: nn.Module = objective.build(PARAMS, info)
    optimizer = torch.optim.Adam(model.parameters(), lr=PARAMS["learning_rate"])
    train_set = TensorDataset(train_split.inputs["features"], train_split.targets)
    loader = DataLoader(train_set, batch_size=64, sampler=OurOrder(len(train_set)))
    valid_loader = DataLoader(TensorDataset(valid.inputs["features"], valid.targets), batch_size=64)
    metric, curve = R2Score(), []
    start = time.perf_counter()
    for _ in range(epochs):
        model.train()
        for x, y in loader:
            optimizer.zero_grad()
            loss = F.mse_loss(model(x), y)
            loss.backward()
            optimizer.step()
        model.eval()
        metric.reset()
        squared = 0.0
        with torch.no_grad():
            for x, y in valid_loader:
                out = model(x)
                squared += F.mse_loss(out, y, reduction="sum").item()
                metric.update(out, y)
        metric.compute()
        curve.append(squared / len(valid))
    return time.perf_counter() - start, curve


def ours(
    objective: Objective, info: DataInfo, train_split: Split, valid: Split, epochs: int
) -> tuple[float, list[float]]:
    """Return (seconds, validation MSE by epoch) of `hpo.training.loop.train`."""
    device, member = torch.device("cpu"), Member(number=0, seed=SEED, params=PARAMS)
    task = Task(objective=objective, info=info, device=device, n_rows=len(train_split), epochs=epochs)
    queue = [member]
    start = time.perf_counter()
    train(
        SingleStack(LoopStack(task)),
        Batches(train_split, device),
        Batches(valid, device),
        epochs=epochs,
        seed=SEED,
        ask=lambda n: [queue.pop()] if queue and n else [],
        report=lambda stack, results: results,
    )
    return time.perf_counter() - start, [row["valid_loss"] for row in member.history]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    objective, faults = objectives.load("california_housing", {}, Path())
    assert objective is not None, faults
    data: Data = objective.data()
    preprocess = objective.preprocess(data.train)
    splits = data.train.through(preprocess), data.valid.through(preprocess)
    default_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    documented(objective, data.info, *splits, 1)
    ours(objective, data.info, *splits, 1)
    rounds = []
    for _ in range(arguments.repeats):  # in turn, so that a machine that changes its speed changes it for all
        torch.set_num_threads(1)
        a = documented(objective, data.info, *splits, arguments.epochs)
        b = ours(objective, data.info, *splits, arguments.epochs)
        torch.set_num_threads(default_threads)
        c = documented(objective, data.info, *splits, arguments.epochs)
        rounds.append((a, b, c))
    names = [
        "documented loop, 1 thread",
        "hpo, one trial, 1 thread",
        f"documented loop, {default_threads} threads (torch's default)",
    ]
    table = Table(
        "loop", "ms per epoch (median)", "min .. max", "times faster than the documented loop (median of pairs)"
    )
    for index, name in enumerate(names):
        ms = [1000 * each[index][0] / arguments.epochs for each in rounds]
        ratio = statistics.median(each[0][0] / each[index][0] for each in rounds)
        table.add_row(name, f"{statistics.median(ms):.1f}", f"{min(ms):.1f} .. {max(ms):.1f}", f"{ratio:.2f}")
    curves = [next(each[index][1] for each in rounds) for index in (0, 1)]
    difference = max(abs(x - y) / x for x, y in zip(*curves, strict=True))
    out = Console(width=140)
    out.print(
        f"{date.today()}, {platform.machine()}, {torch.get_num_threads()} cores, torch {torch.__version__}, "
        f"Python {platform.python_version()}; {len(splits[0])} x 8, batch 64, Adam 1e-3, {arguments.epochs} epochs, "
        f"{arguments.repeats} rounds",
        highlight=False,
    )
    out.print(table)
    out.print(f"validation MSE by epoch, documented: {' '.join(f'{x:.4f}' for x in curves[0])}", highlight=False)
    out.print(f"validation MSE by epoch, hpo:        {' '.join(f'{x:.4f}' for x in curves[1])}", highlight=False)
    out.print(f"largest relative difference between the two curves: {difference:.1e}", highlight=False)


if __name__ == "__main__":
    main()
