"""Seconds until a search has a value within 1% of the best without pruning: stacks with each pruner, plain Optuna.

    python benchmarks/early_stopping.py [--only california fashion] [--trials 64] [--stack 64] [--rows N]
                                        [--without-plain]

The cases of `benchmarks/throughput.py`, with wider ranges, the same configurations on every side, storage and tracking
in SQLite; random sampler. Plain Optuna is the documented `DataLoader` loop with Optuna's own MedianPruner, one trial at
a time, an MLflow run a trial. Seconds begin with the first trial; `found` is when the value was first reported, `all`
when the study's trials were done. One process, one side after the other; ratios are those of `found`. With `--rows` all
sides train on the first N rows only.
"""

import argparse
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "MLFLOW_DISABLE_TELEMETRY": "true"}

import mlflow
import optuna
import torch
from throughput import CASES, Bench

from hpo.runner.prepare import prepare
from hpo.runner.progress import NoProgress
from hpo.runner.worker import work
from hpo.search.opening import open_search
from hpo.study.data import Split
from hpo.tracking.opening import open_tracker

RATES = {"type": "float", "low": 1e-4, "high": 1e-1, "log": True}
PRUNERS = ("none", "median", "halving")


class Seen(NoProgress):
    """Notes when each new best value was reported."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.best: list[tuple[float, float]] = []
        self.n_epochs = 0

    def add(self, value: float) -> None:
        self.n_epochs += 1
        if not self.best or value < self.best[-1][1]:
            self.best.append((time.perf_counter() - self.start, value))

    def epoch_ended(self, number: int, epoch: int, epochs: int, metrics: Mapping[str, float]) -> None:
        self.add(metrics["valid_loss"])

    def found(self, value: float) -> float:
        """Return after how many seconds a value as good was there; infinite: never."""
        return next((seconds for seconds, each in self.best if each <= value), math.inf)


def spec_of(name: str, pruner: str, trials: int, stack: int) -> dict[str, Any]:
    case = CASES[name]
    params = case.fixed | {key: RATES if key == "learning_rate" else of for key, of in case.searched.items()}
    return {
        "name": f"{name}-{pruner}",
        "objective": case.objective,
        "metric": "loss",
        "epochs": 50 if name != "fashion" else 20,
        "trials": trials,
        "sampler": "random",
        "pruner": pruner,
        "stack": stack,
        "device": "cpu",
        "params": params,
    }


def first(n: int | None, split: Split) -> Split:
    """Return the first `n` rows of a split, or all."""
    return Split(inputs={key: x[:n] for key, x in split.inputs.items()}, targets=split.targets[:n])


def stacked(
    name: str, pruner: str, trials: int, stack: int, rows: int | None
) -> tuple[Seen, float, list[dict[str, Any]]]:
    """Run a study; return what was seen, how long it took, and its trials' params."""
    path = Path(f"{name}-{pruner}.yaml")
    path.write_text(json.dumps(spec_of(name, pruner, trials, stack)))
    plan = prepare(path)
    search = open_search(plan.spec, plan.space, plan.metric, maximize=plan.maximize)
    assert search is not None
    data, tracker = plan.load_data(), open_tracker(plan.spec.tracking, plan.spec.name, Path("unsent"))
    data = replace(data, train=first(rows, data.train))
    tracker.start_study({}, {})
    seen = Seen()
    work(plan, data, search, tracker, seen)
    seconds = time.perf_counter() - seen.start
    tracker.end_study("COMPLETE")
    params = [dict(trial.params) for trial in search.trials()]
    search.close()
    return seen, seconds, params


def plain(name: str, epochs: int, several: list[dict[str, Any]], rows: int | None) -> tuple[Seen, float]:
    """Run plain Optuna over the same configurations."""
    mlflow.set_tracking_uri("sqlite:///plain-mlflow.db")
    mlflow.set_experiment(name)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    bench = Bench(name, "cpu", 1)
    loader, valid_loader = bench.loader(first(rows, bench.train), shuffle=True), bench.loader(bench.valid)
    seen = Seen()

    def objective(trial: optuna.Trial) -> float:
        params = bench.case.fixed | {key: trial.suggest_float(key, -1e9, 1e9) for key in several[0]}
        params = {key: value if key == "learning_rate" else _whole(value) for key, value in params.items()}
        params |= {key: value for key, value in bench.objective.defaults.items() if key not in params}
        model, step = bench.documented(params)
        with mlflow.start_run(run_name=f"trial {trial.number}"):
            mlflow.log_params(params)
            for epoch in range(epochs):
                model.train()
                for x, y in loader:
                    step(x, y)
                model.eval()
                with torch.no_grad():
                    total = sum(bench.objective.loss(model(x), y, params).item() * len(y) for x, y in valid_loader)
                value = total / len(bench.valid)
                mlflow.log_metrics({"loss": value}, step=epoch)
                trial.report(value, epoch)
                seen.add(value)
                if trial.should_prune():
                    raise optuna.TrialPruned
        return value

    study = optuna.create_study(storage="sqlite:///plain.db", pruner=optuna.pruners.MedianPruner())
    for params in several:
        study.enqueue_trial(params)
    seen.start = time.perf_counter()
    study.optimize(objective, n_trials=len(several))
    return seen, time.perf_counter() - seen.start


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=("california", "widths", "fashion"), default=["california"])
    parser.add_argument("--trials", type=int, default=64)
    parser.add_argument("--stack", type=int, default=64)
    parser.add_argument("--rows", type=int)
    parser.add_argument("--without-plain", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| case | side | epochs | found, s | all, s | best loss | x no pruning | x plain |\n" + "|---" * 8 + "|")
    for name in options.only:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            before = Path.cwd()
            os.chdir(folder)
            stacked(name, "none", 4, options.stack, options.rows)  # imports, and what torch tries the compiler with
            shutil.rmtree("mlruns")
            sides: dict[str, tuple[Seen, float]] = {}
            several: list[dict[str, Any]] = []
            for pruner in PRUNERS:
                *sides[f"stack of {options.stack}, {pruner}"], several = stacked(
                    name, pruner, options.trials, options.stack, options.rows
                )
            unpruned = next(iter(sides.values()))[0]
            if not options.without_plain:
                epochs = spec_of(name, "none", 1, 1)["epochs"]
                sides["plain Optuna, MedianPruner"] = plain(name, epochs, several, options.rows)
            os.chdir(before)
        best = unpruned.best[-1][1]
        found = {side: seen.found(best * 1.01) for side, (seen, _) in sides.items()}
        none, loop = next(iter(found.values())), found.get("plain Optuna, MedianPruner", math.nan)
        for side, (seen, seconds) in sides.items():
            print(
                f"| {name} | {side} | {seen.n_epochs} | {found[side]:.1f} | {seconds:.1f} | {seen.best[-1][1]:.4f} | "
                f"{none / found[side]:.2f} | {loop / found[side]:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
