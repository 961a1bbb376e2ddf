"""Whether a long study slows down: how fast its trials are at several places from trial 100 to trial 5,000.

    python benchmarks/long.py [--trials 5100] [--epochs 10] [--stack 64] [--samplers random tpe]

One study of `california_housing`, 8-24-24-1, with storage and tracking in SQLite, in a process of its own for each
sampler; short trials, so that what grows with the number of trials shows most. A window is 500 trials; seconds are CPU
time of the process that trains, so that others on the machine do not count, and those that passed. It must not fall by
more than 15%.
"""

import argparse
import multiprocessing
import os
import platform
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from datetime import date

WINDOW = 500


def ends(sampler: str, trials: int, epochs: int, stack: int) -> list[tuple[float, float]]:
    """Return of each trial's end, in their order, the CPU time of this process and the time."""
    import torch

    import hpo
    from hpo.search.search import Search

    found: list[tuple[float, float]] = []
    real = Search._finish

    def finish(*arguments: object) -> bool:
        found.append((time.process_time(), time.perf_counter()))
        return real(*arguments)  # type: ignore[arg-type]

    Search._finish = finish  # type: ignore[assignment, method-assign]
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        hpo.run(
            {"objective": "california_housing"},
            name="long",
            trials=trials,
            epochs=epochs,
            stack=stack,
            sampler=sampler,
            pruner="none",
            seed=0,
            params={
                "n_hidden1": 24,
                "n_hidden2": 24,
                "learning_rate": {"type": "float", "low": 1e-4, "high": 1e-1, "log": True},
                "weight_decay": {"type": "float", "low": 1e-6, "high": 1e-1, "log": True},
            },
            storage=f"sqlite:///{folder}/optuna.db",
            tracking=f"sqlite:///{folder}/mlflow.db",
            output=folder,
            device="cpu",
            quiet=True,
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=5100)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--stack", type=int, default=64)
    parser.add_argument("--samplers", nargs="+", choices=("random", "tpe"), default=["random", "tpe"])
    given = parser.parse_args()
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    print(f"{date.today()}, {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    print("| sampler | trials | ms of CPU a trial | ms a trial | pace, of the first |\n|---|---|---|---|---|")
    for sampler in given.samplers:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            found = pool.submit(ends, sampler, given.trials, given.epochs, given.stack).result()
        first = None
        for start in (100, *range(1000, given.trials - WINDOW + 1, 1000), given.trials - WINDOW - 1):
            (cpu, wall), (cpu_end, wall_end) = found[start], found[start + WINDOW]
            took = 1000 * (cpu_end - cpu) / WINDOW
            first = first or took
            span = f"{start:,} to {start + WINDOW:,}"
            print(f"| {sampler} | {span} | {took:.1f} | {1000 * (wall_end - wall) / WINDOW:.1f} | {first / took:.2f} |")


if __name__ == "__main__":
    main()
