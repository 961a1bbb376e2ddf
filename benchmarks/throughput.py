"""Trials per hour: ours, stacked and one at a time, against the documented `DataLoader` loop, side by side in one run.

    python benchmarks/throughput.py [--what training study] [--only california widths fashion] [--stacks 4 16 64 256]

`california` is 8-24-24-1, batch 64, Adam; `widths` the same with both hidden widths drawn from 20 to 300; `fashion`
is 784-300-100-10, batch 32, SGD. Params, data and batches are equal. Each row has processes of its own, their threads
set; of compiled code they find only what torch tries the compiler with, as on a machine that has compiled before.

`training` is forward, backward and optimizer alone. Ours stacked goes through `hpo.stacks.pool`, compiled; a row of
`widths` is the mean over its members. The limit is 6 operations a weight and row (forward and backward, unpadded) at
the speed of a large float32 matrix product on as many cores. Where a process has one thread and a CPU, its time is CPU
time, so that others on the machine do not count; `busy` is the share of the time passed that this was. `MiB` is a
process's largest memory.

`study` is a whole study, from the first trial asked for until the last metric is in MLflow: random sampler, no pruner,
storage and tracking in SQLite. The documented one is plain Optuna over the DataLoader loop, `trial.report` and MLflow
after each epoch. Imports and making the databases are before the clock; compiling is not. Where the time goes: epochs
(steps, and metrics on validation), stacks (building, capturing, compiling), the rest (asking, reporting, logging).
"""

import argparse
import json
import logging
import multiprocessing
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import date
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from hpo.cli import commands
from hpo.cli.screen import ConsoleHandler
from hpo.log import shown_by
from hpo.runner.prepare import Plan, prepare
from hpo.runner.worker import work
from hpo.search.opening import open_search
from hpo.stacks.compiling import TIMED_STEPS
from hpo.stacks.padding import PaddingPlan
from hpo.stacks.pool import Pool
from hpo.stacks.vmap_stack import VmapStack
from hpo.stacks.vmap_step import VmapStep
from hpo.study.objective import Params
from hpo.tracking.opening import open_tracker
from hpo.training import loop as training
from hpo.training import optim
from hpo.training.batches import Batches
from hpo.training.loop_stack import LoopStack
from hpo.training.stack import Member, SingleStack, Stacks


@dataclass(frozen=True)
class Case:
    """Params `fixed` and `searched` (as a study file has them); `epochs` of a study's trials, and how many of those the
    documented study has, ours one at a time, and ours stacked at least.
    """

    objective: str
    fixed: dict[str, Any]
    searched: dict[str, dict[str, Any]]
    epochs: int
    trials: tuple[int, int, int]


WIDTH = {"type": "int", "low": 20, "high": 300}
RATE = {"learning_rate": {"type": "float", "low": 3e-4, "high": 1e-2, "log": True}}
ADAM, SGD = {"optimizer": "adam", "batch_size": 64}, {"optimizer": "sgd", "batch_size": 32}
CASES = {
    "california": Case("california_housing", ADAM | {"n_hidden1": 24, "n_hidden2": 24}, RATE, 50, (4, 8, 128)),
    "widths": Case("california_housing", ADAM, RATE | {"n_hidden1": WIDTH, "n_hidden2": WIDTH}, 50, (4, 4, 8)),
    "fashion": Case("fashion_mnist", SGD | {"n_hidden1": 300, "n_hidden2": 100}, RATE, 6, (3, 3, 8)),
}
N_ALONE = 16
"""Of how many members a row of `widths` is the mean where they are trained one at a time."""


def spec_of(name: str, device: str, trials: int = 1, stack: int = 1) -> dict[str, Any]:
    """Return a case's study, by study.yaml's keys."""
    case = CASES[name]
    spec = {"name": name, "objective": case.objective, "epochs": case.epochs, "trials": trials, "metric": "loss"}
    spec |= {"sampler": "random", "pruner": "none", "stack": stack, "device": device}
    return spec | {"params": case.fixed | case.searched}


def plan_of(name: str, device: str, trials: int = 1, stack: int = 1) -> Plan:
    """Return the plan of a case's study, in the current folder."""
    path = Path(f"study-{os.getpid()}.yaml")
    path.write_text(json.dumps(spec_of(name, device, trials, stack)))
    return prepare(path)


class Bench:
    """A case made ready in the process that measures it."""

    def __init__(self, name: str, device: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self.case, self.device = CASES[name], torch.device(device)
        self.clock = time.process_time if threads == 1 and device == "cpu" else time.perf_counter
        plan = plan_of(name, device)
        self.objective, self.space, data = plan.objective, plan.space, plan.load_data()
        preprocess = self.objective.preprocess(data.train)
        self.train, self.valid = data.train.through(preprocess), data.valid.through(preprocess)
        self.task = plan.task(data.info, len(data.train))

    def members(self, n: int) -> list[Member]:
        """Return n members. Widths are a Sobol sequence: any 4, 16, 64 or 256 have about the same mean."""
        points = torch.quasirandom.SobolEngine(2, scramble=True, seed=0).draw(n)
        widths = (WIDTH["low"] + points * (WIDTH["high"] - WIDTH["low"] + 1)).long().tolist()
        params = self.space.draw(n, 0)
        if "n_hidden1" in self.case.searched:
            params = [each | {"n_hidden1": a, "n_hidden2": b} for each, (a, b) in zip(params, widths, strict=True)]
        return [Member(number=i, seed=i, params=each) for i, each in enumerate(params)]

    def build(self, params: Params) -> nn.Module:
        return self.objective.build(params, self.task.info)

    def documented(self, params: Params) -> tuple[nn.Module, Callable[[Tensor, Tensor], None]]:
        """Return a network and its step as they are documented."""
        model = self.build(params).to(self.device)
        optimizer = optim.optimizer_class(params["optimizer"])(model.parameters(), lr=params["learning_rate"])

        def step(x: Tensor, y: Tensor) -> None:
            x, y = x.to(self.device), y.to(self.device)
            optimizer.zero_grad()
            loss = self.objective.loss(model(x), y, params)
            loss.backward()
            optimizer.step()

        return model, step

    def loader(self, split: Any, shuffle: bool = False) -> DataLoader[Any]:
        data = TensorDataset(*split.inputs.values(), split.targets)
        return DataLoader(data, batch_size=self.case.fixed["batch_size"], shuffle=shuffle)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def epoch(self, batches: Callable[[], Iterable[Any]], step: Callable[..., Any], seconds: float) -> float:
        """Return an epoch's time: the median of whole ones, or, where none fits, what its first batches say."""
        until, whole, n_steps = time.perf_counter() + seconds, [], self.task.steps_per_epoch(self.case.fixed)
        while not whole or time.perf_counter() < until:
            start = self.clock()
            for n, batch in enumerate(batches(), start=1):
                step(*batch)
                if not whole and n < n_steps and time.perf_counter() > until:
                    self.synchronize()
                    return (self.clock() - start) / n * n_steps
            self.synchronize()
            whole.append(self.clock() - start)
        return statistics.median(whole)


# What is measured: functions that run in a process of their own, or in several at once. They return a row's figures.


def train_documented(name: str, device: str, threads: int, n: int, seconds: float) -> dict[str, float]:
    """The documented loop, one of n members after the other."""
    bench = Bench(name, device, threads)
    members = bench.members(n)
    return _trained(bench, members, documented_epoch(bench, members, seconds))


def documented_epoch(bench: Bench, members: list[Member], seconds: float) -> Callable[[], float]:
    """Return what measures an epoch of the documented loop, of all members one after the other."""
    loader = bench.loader(bench.train, shuffle=True)
    steps = [bench.documented(member.params)[1] for member in members]
    return lambda: sum(bench.epoch(lambda: loader, each, seconds / len(members)) for each in steps)


def train_ours(name: str, device: str, n: int, seconds: float, padding: str | None) -> dict[str, float]:
    """Ours on one thread: n members one at a time (`padding` None), or at once."""
    bench = Bench(name, device, 1)
    rows, members, size = Batches(bench.train, bench.device), bench.members(n), bench.case.fixed["batch_size"]
    batches = partial(rows.epoch, size, torch.randperm(len(rows)))
    begin, stacks = time.perf_counter(), SingleStack(LoopStack(bench.task, n))
    if padding is not None:
        stacks: Stacks = Pool(
            bench.task, n, rows.head(8), PaddingPlan(bench.space, bench.build, padding), ahead=lambda: 10**9
        )
    stacks.join(members)
    assert sum(len(stack.members) for stack in stacks.active) == n, "some wait to be trained alone"
    (inputs, targets), last = next(iter(batches())), len(rows) % size or size
    for stack in stacks.active:
        if isinstance(stack, VmapStack):
            stack.compiling.waits = True  # for another process that compiles the same: only what is compiled is timed
        for n_rows in (*[size] * (TIMED_STEPS + 1), last):  # in the sixth it is compiled
            stack.step([x[:n_rows] for x in inputs], targets[:n_rows])
    bench.synchronize()
    begin, each = time.perf_counter() - begin, seconds / len(stacks.active)
    result = _trained(bench, members, lambda: sum(bench.epoch(batches, s.step, each) for s in stacks.active))
    for stack in stacks.active:
        stack.evaluate(Batches(bench.valid, bench.device))  # for the memory that it needs
    return result | {"begin": begin, "mib": _peak_mib()}


def _trained(bench: Bench, members: list[Member], measure: Callable[[], float]) -> dict[str, float]:
    built = [bench.build(member.params) for member in members]
    weights = sum(w.numel() for module in built for w in module.parameters() if w.ndim > 1) / len(members)
    _barrier.wait()
    cpu, start = time.process_time(), time.perf_counter()
    ms = measure() / len(members) * 1000
    busy = (time.process_time() - cpu) / (time.perf_counter() - start) / torch.get_num_threads()
    return {"ms": ms, "busy": busy, "operations": 6 * weights * len(bench.train), "begin": 0.0, "mib": _peak_mib()}


def _peak_mib() -> float:
    """Return the largest resident memory of this process (getrusage's is of the one it came from, where larger)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def matmul_speed(device: str) -> float:
    """Return how many operations a second a large float32 matrix product has, on one thread or on the GPU."""
    torch.set_num_threads(1)
    n, clock, times = (2048, time.process_time, []) if device == "cpu" else (8192, time.perf_counter, [])
    a, b, out = (torch.randn(n, n, device=device) for _ in range(3))
    _barrier.wait()
    for _ in range(20):
        start = clock()
        torch.mm(a, b, out=out)
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(clock() - start)
    return 2 * n**3 / min(times)


def study_documented(name: str, device: str, threads: int) -> dict[str, float]:
    """Plain Optuna over the documented loop, with MLflow."""
    import mlflow

    mlflow.set_tracking_uri("sqlite:///mlflow.db")
    mlflow.set_experiment(name)
    bench = Bench(name, device, threads)
    return documented_study(bench, bench.case.trials[0], bench.case.epochs, mlflow)


def documented_study(bench: Bench, n_trials: int, epochs: int, mlflow: Any) -> dict[str, float]:
    """Plain Optuna over the documented loop in the current folder; `mlflow` None: tracked nowhere."""
    import optuna

    device, spent = bench.device, {"epochs": 0.0}
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    metrics = {key: metric.to(device) for key, metric in bench.objective.metrics().items()}
    loader, valid_loader = bench.loader(bench.train, shuffle=True), bench.loader(bench.valid)

    def epoch(model: nn.Module, step: Callable[[Tensor, Tensor], None], params: Params) -> dict[str, float]:
        start, loss = time.perf_counter(), 0.0
        model.train()
        for x, y in loader:
            step(x, y)
        model.eval()
        with torch.no_grad():
            for x, y in valid_loader:
                x, y = x.to(device), y.to(device)
                out = model(x)
                loss += bench.objective.loss(out, y, params).item() * len(y)
                for metric in metrics.values():
                    metric.update(out, y)
        values = {key: metric.compute().item() for key, metric in metrics.items()}
        for metric in metrics.values():
            metric.reset()
        spent["epochs"] += time.perf_counter() - start
        return values | {"loss": loss / len(bench.valid)}

    def objective(trial: optuna.Trial) -> float:
        params = bench.space.suggest(trial)
        model, step = bench.documented(params)
        with mlflow.start_run(run_name=f"trial {trial.number}") if mlflow else nullcontext():
            if mlflow:
                mlflow.log_params(params)
            for i in range(epochs):
                values = epoch(model, step, params)
                if mlflow:
                    mlflow.log_metrics(values, step=i)
                trial.report(values["loss"], i)
        return values["loss"]

    storage, sampler, pruner = "sqlite:///optuna.db", optuna.samplers.RandomSampler(0), optuna.pruners.NopPruner()
    study = optuna.create_study(study_name="documented", storage=storage, sampler=sampler, pruner=pruner)
    start, cpu = time.perf_counter(), _cpu_seconds()
    study.optimize(objective, n_trials=n_trials)
    spent |= {"seconds": time.perf_counter() - start, "cpu": _cpu_seconds() - cpu}
    return spent | {"stacks": 0.0, "mib": _peak_mib()}


def study_ours(name: str, device: str, n: int, stack: int) -> dict[str, float]:
    """What `hpo run` does from its first trial to its last, in one process or in several at once."""
    torch.set_num_threads(1)
    plan = plan_of(name, device, n, stack)
    search = open_search(plan.spec, plan.space, plan.metric, maximize=plan.maximize)
    assert search is not None
    data, tracker = plan.load_data(), open_tracker(plan.spec.tracking, name, Path("unsent"))
    tracker.start_study({}, {})
    epochs, joins, compiles = _timed(training, "_epoch"), _timed(Pool, "join"), _timed(VmapStep, "prepare")
    _barrier.wait()
    start, cpu = time.perf_counter(), _cpu_seconds()
    aloud = logging.StreamHandler()
    aloud.setLevel(logging.WARNING)
    with open(os.devnull, "w") as nowhere, shown_by(aloud):
        out = Console(file=nowhere)
        with shown_by(ConsoleHandler(out)), commands._progress(plan, search, out) as progress:
            work(plan, data, search, tracker, progress)
    tracker.end_study("COMPLETE")
    spent = {"seconds": time.perf_counter() - start, "cpu": _cpu_seconds() - cpu}
    assert search.counts().complete == n
    search.close()
    spent |= {"epochs": epochs[0] - compiles[0], "stacks": joins[0] + compiles[0]}  # an epoch's first step compiles
    return spent | {"mib": _peak_mib()}


def _cpu_seconds() -> float:
    """Return the CPU time of this process and of the compilers it has run."""
    return sum(os.times()[:4])


def _timed(owner: Any, name: str) -> list[float]:
    """Have `owner`'s function of that name add the time it takes to the number that is returned in a list."""
    real, spent = getattr(owner, name), [0.0]

    def timed(*arguments: Any, **more: Any) -> Any:
        start = time.perf_counter()
        try:
            return real(*arguments, **more)
        finally:
            spent[0] += time.perf_counter() - start

    setattr(owner, name, timed)
    return spent


def try_compiler(folder: str) -> None:
    """Have torch find out what the compiler can do here, and keep that in `folder`."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
    torch.compile(lambda x: x * 2 + 1)(torch.zeros(64))


# Processes and tables.

_barrier: Any = None
"""Where processes that measure together wait for each other."""


def _begin(barrier: Any, folder: str, compiled: str) -> None:
    global _barrier
    _barrier = barrier
    os.chdir(folder)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache = tempfile.mkdtemp(dir=folder)
    if Path(compiled).exists():
        shutil.copytree(compiled, cache, dirs_exist_ok=True)


def together(compiled: str, n: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Return what `function` gives in n new processes at once, in a folder of their own."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        begin = {"initializer": _begin, "initargs": (context.Barrier(n), folder, compiled)}
        with ProcessPoolExecutor(n, context, **begin) as pool:
            return [future.result() for future in [pool.submit(function, *arguments) for _ in range(n)]]


Together = Callable[..., list[Any]]


def _add(table: Table, *cells: str) -> None:
    """Add a row, and say it at once: a table takes minutes."""
    table.add_row(*cells)
    print(*cells, sep=" | ", file=sys.stderr, flush=True)


def training_table(run: Together, name: str, device: str, cores: int, stacks: list[int], seconds: float) -> Table:
    widths = "n_hidden1" in CASES[name].searched
    n_alone = N_ALONE if widths else 1
    heads = ["ms per epoch and model", "x documented", "x one at a time", "of the limit", "begin, s", "busy", "MiB"]
    table = Table("training", *heads, title=f"{name}: training alone, {device}")
    speed = {n: sum(run(n, matmul_speed, device)) for n in {1, cores if device == "cpu" else 1}}
    first: list[float] = []

    def row(title: str, done: list[dict[str, float]], threads: int = 1) -> float:
        """Print the figures of processes that ran at once; their throughput adds up."""
        ms = 1 / sum(1 / each["ms"] for each in done)
        first.append(ms)
        ratios = [f"{first[0] / ms:.1f}", f"{first[n_plain] / ms:.1f}" if len(first) > n_plain else ""]
        limit = done[0]["operations"] / speed.get(threads, speed[1]) * 1000 / ms
        begin, busy, mib = max(e["begin"] for e in done), min(e["busy"] for e in done), max(e["mib"] for e in done)
        _add(table, title, f"{ms:.2f}", *ratios, f"{limit:.1%}", f"{begin:.1f}", f"{busy:.0%}", f"{mib:.0f}")
        return ms

    plain = {n: run(1, train_documented, name, device, n, n_alone, seconds) for n in {1, cores}}
    n_plain = len(plain)
    for n in sorted(plain, key=lambda n: plain[n][0]["ms"]):
        row(f"documented loop, {n} thread{'s' * (n > 1)}", plain[n], n)
    row("one at a time, not compiled", run(1, train_ours, name, device, n_alone, seconds, None))
    best = (float("inf"), 1, "fine")
    for padding, k in product(("fine", "coarse") if widths else ("fine",), sorted({1, *stacks})):
        ms = row(f"stack of {k}{f', {padding}' * widths}", run(1, train_ours, name, device, k, seconds, padding))
        best = min(best, (ms, k, padding))
    if cores > 1 and device == "cpu":
        done = run(cores, train_ours, name, device, best[1], seconds, best[2])
        row(f"{cores} workers, {best[1]}{f', {best[2]}' * widths} each", done, cores)
    return table


def study_table(run: Together, name: str, device: str, cores: int, stacks: list[int], trials: int) -> Table:
    n_documented, n_single, n_stacked = CASES[name].trials
    n_stacked = trials or n_stacked
    heads = ["trials", "s per trial", "CPU s per trial", "trials per hour", "x documented", "x in CPU s"]
    heads += ["epochs", "stacks", "the rest", "MiB"]
    table = Table("study", *heads, title=f"{name}: whole studies, {CASES[name].epochs} epochs a trial, {device}")
    first: list[tuple[float, float]] = []

    def row(title: str, n: int, done: list[dict[str, float]]) -> float:
        each, cpu, total = (f(e[k] for e in done) / n for f, k in ((max, "seconds"), (sum, "cpu"), (sum, "seconds")))
        first.append((each, cpu))
        shares = [sum(e[part] for e in done) / n / total for part in ("epochs", "stacks")]
        shown = [f"{share:.1%}" for share in (*shares, 1 - sum(shares))] + [f"{max(e['mib'] for e in done):.0f}"]
        ratios = f"{first[0][0] / each:.1f}", f"{first[0][1] / cpu:.1f}"
        _add(table, title, str(n), f"{each:.3f}", f"{cpu:.3f}", f"{3600 / each:.0f}", *ratios, *shown)
        return each

    plain = {n: run(1, train_documented, name, device, n, 1, 3.0)[0]["ms"] for n in {1, cores}}
    threads = min(plain, key=lambda n: plain[n])
    done = run(1, study_documented, name, device, threads)
    row(f"documented, {threads} thread{'s' * (threads > 1)}", n_documented, done)
    row("stack: 1", n_single, run(1, study_ours, name, device, n_single, 1))
    best = (float("inf"), 0, 1)
    for k in stacks:
        n = k * max(1, n_stacked // k)
        best = min(best, (row(f"stack: {k}", n, run(1, study_ours, name, device, n, k)), n, k))
    if cores > 1 and device == "cpu":
        _, n, k = best
        row(f"{cores} workers, stack: {k}", cores * n, run(cores, study_ours, name, device, cores * n, k))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--what", nargs="+", choices=["training", "study"], default=["training", "study"])
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--stacks", nargs="+", type=int, default=[4, 16, 64, 256])
    parser.add_argument("--trials", type=int, default=0, help="how many a stacked study has at least; 0: a few stacks")
    parser.add_argument("--seconds", type=float, default=8.0, help="how long a row of `training` is measured")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--cores", type=int, default=os.cpu_count(), help="how many workers there are on a CPU")
    given = parser.parse_args()
    gpu = torch.cuda.is_available()
    device = ("cuda" if gpu else "cpu") if given.device == "auto" else given.device
    out = Console(width=150, highlight=False)
    out.print(
        f"{date.today()}, {platform.machine()}, {os.cpu_count()} cores, {given.cores} used, 1 thread a process unless "
        f"said otherwise, torch {torch.__version__}, Python {platform.python_version()}"
    )
    out.print(f"GPU: {torch.cuda.get_device_name() if gpu else 'not measured'}")
    with tempfile.TemporaryDirectory() as folder:
        run = partial(together, f"{folder}/compiled")
        run(1, try_compiler, f"{folder}/compiled")
        for name in given.only:
            if "training" in given.what:
                out.print(training_table(run, name, device, given.cores, given.stacks, given.seconds))
            if "study" in given.what:
                out.print(study_table(run, name, device, given.cores, given.stacks, given.trials))


if __name__ == "__main__":
    main()
