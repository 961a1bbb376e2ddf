"""Milliseconds of bookkeeping that a trial costs: asking, reporting, telling, logging, with no training at all.

    python benchmarks/bookkeeping.py [--storage sqlite postgres] [--before 100 1000 10000] [--at-once 1 64]

A trial has 5 params, sampled by TPE, 10 epochs of 3 metrics, and the median pruner looks at it after each epoch; it is
never pruned. `before` so many finished trials are in the study, and as many runs in MLflow (SQLite), made in the same
way for both sides, which each start from a copy. `hpo` is the worker's own code (`hpo.runner.worker.work`), K trials
at once, over a stack that computes nothing; `plain` is Optuna's ask and tell, and MLflow's client, one trial after the
other. `ms` is the time that passes until the last trial is told; `sent` until all is in MLflow, which hpo sends beside
training; `CPU` is that of all processes, until all is sent. Each row has processes of its own, taking turns.
"""

import argparse
import json
import logging
import multiprocessing
import os
import platform
import shutil
import sqlite3
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, closing
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

PARAMS = "abcde"
EPOCHS = 10
TRACKING = "sqlite:///mlflow.db"
OBJECTIVE = f"""
import torch
from torch import nn
from torch.nn import functional as F
from torchmetrics.regression import MeanSquaredError
import hpo

class Nothing(hpo.Objective):
    space = {{name: {{"type": "float", "low": 0.0, "high": 1.0}} for name in {list(PARAMS)!r}}}
    defaults = {{"learning_rate": 0.1, "batch_size": 8}}
    def data(self):
        x = torch.zeros(8, 1)
        split = lambda: hpo.Split(inputs={{"x": x}}, targets=x)
        return hpo.Data(train=split(), valid=split(), test=split())
    def build(self, params, info):
        return nn.Linear(1, 1)
    def loss(self, outputs, targets, params):
        return F.mse_loss(outputs, targets)
    def metrics(self):
        return {{"mse": MeanSquaredError()}}
"""


def curve(params: dict[str, float]) -> list[float]:
    """Return a value for each epoch: the same for all trials, so that none is pruned, but for the last."""
    return [*(2.0 + EPOCHS - epoch for epoch in range(EPOCHS - 1)), sum((x - 0.3) ** 2 for x in params.values())]


def metrics_of(value: float) -> dict[str, float]:
    return {"train_loss": value, "valid_loss": value, "valid_mse": value}


# What both sides start from.


def plan_of(storage: str, trials: int, at_once: int) -> Any:
    from hpo.runner.prepare import prepare

    Path("nothing.py").write_text(OBJECTIVE)
    study = {"name": "s", "objective": "nothing.py", "storage": storage, "tracking": TRACKING, "seed": 1}
    study |= {"trials": trials, "epochs": EPOCHS, "stack": at_once, "device": "cpu", "sampler": "tpe"}
    Path("study.yaml").write_text(json.dumps(study))
    return prepare(Path("study.yaml"))


def make(storage: str, before: int, trials: int, at_once: int) -> None:
    """Make the study, with so many finished trials, and MLflow's database, with as many runs."""
    from optuna.distributions import FloatDistribution
    from optuna.trial import TrialState, create_trial

    from hpo.runner.opening import open_or_make
    from hpo.seeds import derive

    plan = plan_of(storage, before + trials, at_once)
    search = open_or_make(plan)
    draws = plan.space.draw(before, 0)
    distributions = {name: FloatDistribution(0.0, 1.0) for name in PARAMS}
    for slot, drawn in enumerate(draws):
        params = {name: drawn[name] for name in PARAMS}
        values = curve(params)
        search.study.add_trial(
            create_trial(
                state=TrialState.COMPLETE,
                value=values[-1],
                params=params,
                distributions=distributions,
                intermediate_values=dict(enumerate(values)),
                user_attrs={"place": slot, "seed": derive(1, "init", slot), "best_epoch": EPOCHS - 1},
            )
        )
    search.close()
    make_runs(before)


def make_runs(n: int) -> None:
    """Have MLflow make its database and one run, and copy that run's rows n - 1 times."""
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param

    client = MlflowClient(TRACKING)
    experiment = client.create_experiment("s", artifact_location="artifacts")
    run = client.create_run(experiment, tags={"hpo.study": "s", "hpo.trial": "0"}, run_name="trial 0").info.run_id
    rows = [Metric(key, 0.5, 0, epoch) for epoch in range(EPOCHS) for key in metrics_of(0.5)]
    client.log_batch(run, rows, [Param(name, "0.5") for name in PARAMS])
    client.set_terminated(run)
    with closing(sqlite3.connect("mlflow.db")) as db, db:
        for table in ("runs", "metrics", "latest_metrics", "params", "tags"):
            columns = [name for _, name, *_ in db.execute(f"pragma table_info({table})")]
            source = db.execute(f"select {', '.join(columns)} from {table} where run_uuid = ?", [run]).fetchall()
            at, marks = columns.index("run_uuid"), ", ".join("?" * len(columns))
            for i in range(1, n):
                new = uuid.uuid5(uuid.NAMESPACE_OID, str(i)).hex
                copies = [[new if c == at else x for c, x in enumerate(row)] for row in source]
                if table == "tags":
                    key, value = columns.index("key"), columns.index("value")
                    copies = [
                        [str(i) if c == value and row[key] == "hpo.trial" else x for c, x in enumerate(row)]
                        for row in copies
                    ]
                db.executemany(f"insert into {table} values ({marks})", copies)


# The two sides: each returns seconds until the last trial is told, until all is sent, and of CPU.


def ours(storage: str, before: int, trials: int, at_once: int) -> tuple[float, float, float]:
    import torch

    from hpo.log import shown_by
    from hpo.runner import worker
    from hpo.runner.opening import open_or_make
    from hpo.runner.progress import NoProgress
    from hpo.runner.tracked import tracker_of
    from hpo.tracking.mlflow import MlflowTracker
    from hpo.training.stack import SingleStack, Stack

    class Nothing(Stack):
        """A stack that computes nothing."""

        capacity = at_once

        def __init__(self) -> None:
            self._members: list[Any] = []

        @property
        def members(self) -> Any:
            return tuple(self._members)

        def join(self, member: Any) -> None:
            self._members.append(member)

        def leave(self, member: Any) -> None:
            self._members.remove(member)

        def step(self, inputs: Any, targets: Any) -> Any:
            raise NotImplementedError

        def epoch(self, batches: Any, rows: Any, stopping: Any) -> list[float]:
            return [curve({name: m.params[name] for name in PARAMS})[m.epoch] for m in self._members]

        def evaluate(self, batches: Any) -> list[dict[str, float]]:
            return [{"loss": value, "mse": value} for value in self.epoch(None, None, None)]

        def module(self, member: Any) -> Any:
            return weights

        def checkpoint(self, member: Any) -> dict[str, Any]:
            return {}

    weights = torch.nn.Linear(1, 1)
    worker._Worker._new_stacks = lambda self: SingleStack(Nothing())  # type: ignore[method-assign]
    torch.set_num_threads(1)
    plan = plan_of(storage, before + trials, at_once)
    search = open_or_make(plan)
    data, tracker = plan.load_data(), tracker_of(plan, search)
    tracker.start_study({}, {})
    while isinstance(tracker, MlflowTracker) and not tracker._run_ids:
        time.sleep(0.1)  # MLflow is imported before the clock starts, as for `plain`
    start, cpu = time.perf_counter(), cpu_seconds()
    with shown_by(logging.StreamHandler()):
        worker.work(plan, data, search, tracker, NoProgress())
        told = time.perf_counter() - start
        assert tracker.end_study("COMPLETE"), "not all was sent"
    result = told, time.perf_counter() - start, cpu_seconds() - cpu
    assert search.counts().complete == before + trials
    search.close()
    return result


def plain(storage: str, before: int, trials: int, at_once: int) -> tuple[float, float, float]:
    import mlflow
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    mlflow.set_tracking_uri(TRACKING)
    mlflow.set_experiment("s")
    pruner = optuna.pruners.MedianPruner(n_startup_trials=10, n_warmup_steps=2)
    sampler = optuna.samplers.TPESampler(seed=1)
    study = optuna.load_study(study_name="s", storage=storage, sampler=sampler, pruner=pruner)
    start, cpu = time.perf_counter(), cpu_seconds()
    for _ in range(trials):
        trial = study.ask()
        params = {name: trial.suggest_float(name, 0.0, 1.0) for name in PARAMS}
        with mlflow.start_run(run_name=f"trial {trial.number}"):
            mlflow.log_params(params)
            for epoch, value in enumerate(curve(params)):
                mlflow.log_metrics(metrics_of(value), step=epoch)
                trial.report(value, epoch)
                assert not trial.should_prune()
        study.tell(trial, curve(params)[-1])
    seconds = time.perf_counter() - start
    return seconds, seconds, cpu_seconds() - cpu


def cpu_seconds() -> float:
    """Return the CPU time of this process and of those that it has waited for."""
    return sum(os.times()[:4])


# Processes and the table.


def in_a_process(folder: Path, function: Callable[..., Any], *arguments: Any) -> Any:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=_begin, initargs=(folder,)) as pool:
        return pool.submit(function, *arguments).result()


def _begin(folder: Path) -> None:
    os.chdir(folder)
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"


def measure(
    side: Callable[..., Any], template: Path, storage: str, server: Any, numbers: Sequence[int]
) -> tuple[float, float, float]:
    """Return a side's ms a trial, in a copy of `template`."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(template, folder, dirs_exist_ok=True)
        if server is not None:
            storage = server.copy(storage)
        done = in_a_process(folder, side, storage, *numbers)
    return tuple(1000 * seconds / numbers[1] for seconds in done)  # type: ignore[return-value]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--storage", nargs="+", choices=("sqlite", "postgres"), default=["sqlite", "postgres"])
    parser.add_argument("--before", nargs="+", type=int, default=[100, 1000, 10000])
    parser.add_argument("--at-once", nargs="+", type=int, default=[1, 64])
    parser.add_argument("--trials", type=int, nargs=2, default=[16, 128], help="at K = 1 and plain; above")
    parser.add_argument("--rounds", type=int, default=1)
    given = parser.parse_args()
    print(f"{date.today()}, {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    print("| storage | trials before | side | ms a trial | sent | CPU | x plain |\n|---|---|---|---|---|---|---|")
    few, many = given.trials
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        server = None
        if "postgres" in given.storage:
            from tests.servers import postgres

            server = stack.enter_context(postgres(Path(name) / "postgres" / "data"))
        for kind in given.storage:
            for before in given.before:
                template = Path(name) / f"{kind}-{before}"
                template.mkdir()
                used = server if kind == "postgres" else None
                address = used.database().replace("postgresql:", "postgresql+psycopg:") if used else "sqlite:///o.db"
                in_a_process(template, make, address, before, many, 64)
                sides = [("plain", plain, few, 1)]
                sides += [(f"hpo, {k} at once", ours, few if k == 1 else many, k) for k in given.at_once]
                figures: dict[str, list[tuple[float, float, float]]] = {}
                for _ in range(given.rounds):
                    for title, side, n, k in sides:
                        done = measure(side, template, address, used, (before, n, k))
                        figures.setdefault(title, []).append(done)
                first = median(done[0] for done in figures["plain"])
                for title, each in figures.items():
                    ms, sent, cpu = (median(column) for column in zip(*each, strict=True))
                    cells = [kind, before, title, f"{ms:.1f}", f"{sent:.1f}", f"{cpu:.1f}", f"{first / ms:.1f}"]
                    print("|", " | ".join(map(str, cells)), "|", flush=True)


if __name__ == "__main__":
    main()
