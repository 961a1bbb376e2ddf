"""Is what `confirm` chooses better on new data than the search's own best, and does its interval hold?

    python benchmarks/selection.py [--trials 200] [--best 40] [--reruns 40] [--epochs 15] [--studies 20]
                                   [--of first | best] [--top 5] [--seeds 5] [--capacity 64] [--seed 0]
                                   [--resplit] [--keep FILE.npy]

California housing, the network of two hidden layers of 24. Of a random search of `trials` configurations in
stacks, its `best` (or as many of its first) are trained with `reruns` fresh seeds each, and validation and test R2 are
recorded, both at the epoch that was best on validation. A resampled study sees one of these results of each
configuration, picks the naive best, confirms its `top` with `seeds` others, and picks the best mean. The truth is the
mean of the results that study has not seen: of test R2 for the choice, of validation R2 for the interval, which speaks
of other seeds on that split.
"""

import argparse
import logging
import platform
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch

from hpo.runner.prepare import Plan, prepare_values
from hpo.search.certainty import chances_of_best, interval_of
from hpo.seeds import derive
from hpo.stacks.padding import PaddingPlan
from hpo.stacks.pool import Pool
from hpo.study.data import Data
from hpo.study.splits import resplit
from hpo.training.batches import make_batches
from hpo.training.loop import Results, train
from hpo.training.stack import Member, Stack

PARAMS = {
    "n_hidden1": 24,
    "n_hidden2": 24,
    "batch_size": 64,
    "learning_rate": {"type": "float", "low": 3e-4, "high": 3e-2, "log": True},
    "weight_decay": {"type": "float", "low": 1e-6, "high": 1e-2, "log": True, "or": 0},
}


def plan_of(options: argparse.Namespace) -> tuple[Plan, Data]:
    values = {"objective": "california_housing", "name": "selection", "metric": "r2", "params": PARAMS}
    values |= {"epochs": options.epochs, "trials": options.trials, "seed": options.seed, "tracking": "off"}
    plan = prepare_values("selection", values | {"device": "cpu"}, {})
    data = plan.load_data()
    assert data is not None
    return plan, data


def results_of(
    plan: Plan,
    data: Data,
    configurations: Sequence[Mapping[str, Any]],
    runs: Sequence[int],
    capacity: int,
    purpose: str,
) -> np.ndarray:
    """Train each configuration with each run's seed; return its best validation R2, and test R2 then: (K, R, 2)."""
    preprocess = plan.objective.preprocess(data.train)
    train_batches, valid, test = (
        make_batches(split, preprocess, plan.device, plan.spec.loading) for split in (data.train, data.valid, data.test)
    )
    task = plan.task(data.info, len(data.train))
    pool = Pool(task, capacity, train_batches.head(8), PaddingPlan(plan.space, task.network, "fine"))
    found = np.full((len(configurations), len(runs), 2), np.nan)
    of = {
        Member(number=i, seed=derive(plan.spec.seed, f"{purpose} {i}", run), params=params): (i, k)
        for k, run in enumerate(runs)
        for i, params in enumerate(configurations)
    }
    queue = list(of)

    def report(stack: Stack, results: Results) -> list[Member]:
        tests = stack.evaluate(test)
        for (member, metrics), at_test in zip(results.items(), tests, strict=True):
            i, k = of[member]
            if not metrics["valid_r2"] <= found[i, k, 0]:
                found[i, k] = metrics["valid_r2"], at_test["r2"]
        return list(results)

    train(
        pool,
        train_batches,
        valid,
        epochs=plan.spec.epochs,
        seed=derive(plan.spec.seed, f"{purpose} order", runs[0]),
        ask=lambda n: [queue.pop(0) for _ in range(min(n, len(queue)))],
        report=report,
    )
    return found


def resampled(
    results: np.ndarray, rng: np.random.Generator, top: int, seeds: int, resplits: np.ndarray | None = None
) -> dict[str, float]:
    """Return what one study, which sees some of the results (K, R, 2), makes of them.

    With `resplits`, results of as many other splits, it confirms on these: all configurations on the same ones.
    """
    n_configurations, n_runs, _ = results.shape
    order = np.array([rng.permutation(n_runs) for _ in range(n_configurations)])
    seen = results[np.arange(n_configurations), order[:, 0], 0]
    best = np.argsort(-seen)[:top]
    fresh = order[:, 1 : 1 + seeds]
    unseen = order[:, 1 + seeds :]
    confirmed = [results[i, fresh[i], 0].tolist() for i in best]
    overlap = 0.0
    valid, test = (results[np.arange(n_configurations)[:, None], unseen, kind].mean(1) for kind in range(2))
    naive_valid = valid
    if resplits is not None:
        splits, overlap = rng.permutation(resplits.shape[1]), 0.25
        confirmed = [resplits[i, splits[:seeds], 0].tolist() for i in best]
        valid = resplits[:, splits[seeds:], 0].mean(1)
    winner = int(np.argmax([np.mean(values) for values in confirmed]))
    interval = interval_of(confirmed[winner], maximize=True, picked_of=top, overlap=overlap)
    assert interval is not None
    chosen = best[winner]
    return {
        "naive test": test[best[0]],
        "confirmed test": test[chosen],
        "naive printed": seen[best[0]],
        "naive valid": naive_valid[best[0]],
        "printed": float(np.mean(confirmed[winner])),
        "valid": valid[chosen],
        "low": interval.low,
        "high": interval.high,
        "chance": chances_of_best(confirmed, maximize=True, overlap=overlap)[winner],
        "is best": float(valid[chosen] == valid[best].max()),
        "covers": float(interval.low <= valid[chosen] <= interval.high),
        "covers test": float(interval.low <= test[chosen] <= interval.high),
    }


def table(rows: Sequence[Mapping[str, float]]) -> None:
    print(
        "| study | test R2 of the search's best | of the confirmed | difference | search printed | confirmed printed |"
    )
    print("|---" * 6 + "|")
    for i, row in enumerate(rows):
        gain = row["confirmed test"] - row["naive test"]
        print(
            f"| {i} | {row['naive test']:.4f} | {row['confirmed test']:.4f} | {gain:+.4f} | "
            f"{row['naive printed']:.4f} (in truth {row['naive valid']:.4f}) | "
            f"{row['printed']:.4f}, {row['low']:.4f} to {row['high']:.4f} (in truth {row['valid']:.4f}) |"
        )


def summed(rows: Sequence[Mapping[str, float]], what: str) -> None:
    """Print a line of a table of what many resampled studies came to."""
    gains = np.array([row["confirmed test"] - row["naive test"] for row in rows])
    mean = {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}
    flattery = mean["naive printed"] - mean["naive valid"], mean["printed"] - mean["valid"]
    print(
        f"| {what} | {(gains > 0).mean():.0%}, {(gains == 0).mean():.0%}, {(gains < 0).mean():.0%} | "
        f"{gains.mean():+.4f} ({gains.min():+.4f} to {gains.max():+.4f}) | {flattery[0]:+.4f} | {flattery[1]:+.4f} | "
        f"{mean['covers']:.0%} | {mean['covers test']:.0%} | {mean['chance']:.0%} | {mean['is best']:.0%} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("trials", 200), ("best", 40), ("reruns", 40), ("epochs", 15), ("studies", 20)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, default in (("top", 5), ("seeds", 5), ("capacity", 64), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--of", choices=("first", "best"), default="first")
    parser.add_argument("--resplit", action="store_true", help="confirm on other splits, another one for each seed")
    parser.add_argument("--keep", help="a file (.npy) for the recorded results; read where it is there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("hpo").setLevel(logging.ERROR)
    started = time.monotonic()
    results, resplits = recorded(options, False), recorded(options, True) if options.resplit else None
    print(f"{datetime.now(UTC):%Y-%m-%d}, {platform.processor() or platform.machine()}, {options}\n")
    rng = np.random.default_rng(options.seed)
    rows = [resampled(results, rng, options.top, options.seeds, resplits) for _ in range(options.studies)]
    table(rows)
    print(
        "\n| studies | better, same, worse | gain of test R2 | the search flatters by | the confirmed mean by ", end=""
    )
    print("| interval covers its truth | test R2 | said chance of the best | so in |\n" + "|---" * 9 + "|")
    summed(rows, f"{options.studies}, {options.seeds} seeds")
    for seeds in (options.seeds, 2 * options.seeds, 4 * options.seeds):
        more = [resampled(results, rng, options.top, seeds, resplits) for _ in range(1000)]
        summed(more, f"1000, {seeds} seeds")
    print(f"\n{time.monotonic() - started:.0f} s")


def recorded(options: argparse.Namespace, on_resplits: bool) -> np.ndarray:
    """Return the results of the reruns of the search's configurations, (K, R, 2); of each run on a split of its own."""
    file = options.keep and options.keep.replace(".npy", "-resplit.npy" if on_resplits else ".npy")
    if file:
        try:
            kept: np.ndarray = np.load(file)
            return kept
        except FileNotFoundError:
            pass
    plan, data = plan_of(options)
    drawn = plan.space.draw(options.trials, options.seed)
    if options.of == "first":
        best = np.arange(options.best)
    else:
        searched = results_of(plan, data, drawn, [0], options.capacity, "search")[:, 0, 0]
        best = np.argsort(-searched)[: options.best]
        print(f"search: best validation R2 {searched[best[0]]:.4f}, the {options.best}th {searched[best[-1]]:.4f}")
    configurations = [drawn[i] for i in best]
    each = []
    for run in range(options.reruns):  # one has an order of rows of its own, as it has in a confirmation
        part = resplit(data, derive(options.seed, "confirm split", run)) if on_resplits else data
        each.append(
            results_of(plan, part, configurations, [run], options.capacity, "resplit" if on_resplits else "rerun")
        )
    results = np.concatenate(each, axis=1)
    if file:
        np.save(file, results)
    return results


if __name__ == "__main__":
    main()
