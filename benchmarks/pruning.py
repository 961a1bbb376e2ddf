"""What pruning saves and what it loses, on recorded learning curves, through the real search.

    python benchmarks/pruning.py [--part rules | sampler] [--curves FOLDER] [--streams 20] [--trials 20 50 100]
                                 [--stacks 1 16 64] [--workers 1 8] [--rules NAME ...] [--seeds 10]

`rules`: random orders of recorded configurations; for each rule the share of the epochs without pruning, the mean
regret (0: the best configuration of the order, 1: the median one), and how often the very best one is found. `sampler`:
TPE with each rule at an equal budget of 20 full trials' epochs, over the seeds: the mean regret, and Wilcoxon's signed
rank test of halving against each. The curves are those that `benchmarks/curves.py` has written, or any of that form.
"""

import argparse
import logging
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import optuna
from curves import FOLDER
from replay import Task, play, regret, streams
from scipy.stats import wilcoxon

from hpo.study.spec import Plugin

FULL_TRIALS = 20
"""How many trials' epochs the budget of part `sampler` is."""
SHARE = 0.28
"""What share of the epochs halving takes: so many more trials it is given, since cohorts follow from their number."""


RULES: Mapping[str, Plugin] = {
    "none": Plugin(name="none"),
    "median(5, 0)": Plugin(name="median", n_startup_trials=5, n_warmup_steps=0),
    "median(10, E/5)": Plugin(name="median"),
    "hyperband": Plugin(name="hyperband", reduction_factor=3),
    "sha": Plugin(name="successive_halving", reduction_factor=4),
    "halving": Plugin(name="halving"),
    "halving, first 2": Plugin(name="halving", first=2),
}


def compare_rules(tasks: Sequence[Task], options: argparse.Namespace) -> None:
    print("| trials | stack | workers | rule | epochs | regret | found | resumed a trial |\n" + "|---" * 8 + "|")
    for n in options.trials:
        for workers in options.workers:
            for stack in options.stacks:
                for name in options.rules:
                    rows = [
                        _against_the_best(task, order[:n], name, stack, workers)
                        for task in tasks
                        for order in streams(task, options.streams)
                    ]
                    share, lost, found, resumed = np.mean(rows, axis=0)
                    print(
                        f"| {n} | {stack} | {workers} | {name} | {share:.0%} | {lost:.4f} | {found:.0%} | "
                        f"{resumed:.2f} |",
                        flush=True,
                    )


def _against_the_best(
    task: Task, order: Sequence[int], rule: str, stack: int, workers: int
) -> tuple[float, float, float, float]:
    done = play(task, RULES[rule], trials=len(order), stack=stack, workers=workers, stream=order)
    ends = task.ends[list(order)]
    return (
        done.epochs / (len(order) * task.epochs),
        regret(done.value, ends),
        float(done.value <= ends.min()),
        done.resumed / len(order),
    )


def compare_samplers(tasks: Sequence[Task], options: argparse.Namespace) -> None:
    sides = {
        "random": ("random", "none"),
        "TPE": ("tpe", "none"),
        "TPE, median(10, E/5)": ("tpe", "median(10, E/5)"),
        "TPE, hyperband": ("tpe", "hyperband"),
        "random, halving, first 2": ("random", "halving, first 2"),
        "TPE, halving": ("tpe", "halving"),
        "TPE, halving, first 2": ("tpe", "halving, first 2"),
    }
    regrets: dict[str, np.ndarray] = {}
    print("| side | " + " | ".join(task.name for task in tasks) + " | mean |\n" + "|---" * (len(tasks) + 2) + "|")
    for side, (sampler, rule) in sides.items():
        rows = [[_regret(task, sampler, rule, seed) for seed in range(options.seeds)] for task in tasks]
        regrets[side] = np.array(rows)
        means = " | ".join(f"{np.mean(row):.4f}" for row in rows)
        print(f"| {side} | {means} | {regrets[side].mean():.4f} |", flush=True)
    for ours in ("TPE, halving", "TPE, halving, first 2"):
        for other in ("TPE", "TPE, median(10, E/5)", "TPE, hyperband"):
            p = wilcoxon(regrets[ours].ravel(), regrets[other].ravel(), alternative="less").pvalue
            print(f"{ours} better than {other}: p = {p:.2g} (Wilcoxon, {regrets[ours].size} pairs)")


def _regret(task: Task, sampler: str, rule: str, seed: int) -> float:
    budget = FULL_TRIALS * task.epochs
    trials = round(FULL_TRIALS / SHARE) if rule.startswith("halving") else 20 * FULL_TRIALS
    done = play(
        task,
        RULES[rule],
        trials=trials,
        stack=1,
        sampler=Plugin(name=sampler),
        seed=seed,
        budget=budget,
    )
    return regret(done.value, task.ends)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("rules", "sampler"), default="rules")
    parser.add_argument("--curves", type=Path, default=FOLDER)
    parser.add_argument("--streams", type=int, default=20)
    parser.add_argument("--trials", type=int, nargs="+", default=[20, 50, 100])
    parser.add_argument("--stacks", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rules", nargs="+", choices=list(RULES), default=list(RULES))
    parser.add_argument("--seeds", type=int, default=10)
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    logging.getLogger("hpo").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    tasks = [Task.read(file) for file in sorted(options.curves.glob("*.json"))]
    print(f"{', '.join(f'{task.name} ({len(task.curves)} x {task.epochs})' for task in tasks)}\n")
    started = time.monotonic()
    (compare_rules if options.part == "rules" else compare_samplers)(tasks, options)
    print(f"\n{time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
