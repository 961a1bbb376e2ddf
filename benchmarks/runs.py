"""What a trial's run costs in MLflow's SQLite file: written straight into its tables, and by MLflow's client.

    python benchmarks/runs.py [--runs 50] [--epochs 50]

A run has 6 params, 5 metrics an epoch and an end, given as one item to what sends (`hpo.tracking.runs.Runs`). `new`:
nobody else can have made it; `looked for`: a peer may have. Both sides take turns in one process, with a database each.
"""

import argparse
import os
import platform
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"

from hpo.tracking.runs import Runs
from hpo.tracking.sender import quiet

METRICS = ("train_loss", "valid_loss", "valid_rmse", "valid_mae", "learning_rate")


def item_of(trial: int, epochs: int, *, is_new: bool) -> dict[str, Any]:
    now = int(time.time() * 1000)
    rows = [[key, 1.0 / (epoch + 1), now, epoch] for epoch in range(epochs) for key in METRICS]
    params, tags = {f"p{i}": "0.1" for i in range(6)}, {"hpo.state": "COMPLETE", "mlflow.runName": f"trial {trial}"}
    what = {"params": params, "rows": rows, "tags": tags, "status": "FINISHED", "is_new": is_new}
    return {"do": "end", "trial": trial, "time": now, "ended": now, **what}


def sender(folder: Path, *, straight: bool) -> Runs:
    runs = Runs(f"sqlite:///{folder}/mlflow.db", "study", making="m")
    runs.connect()
    if not straight:
        runs._tables = None
    assert runs.attempt({"do": "start", "trial": None, "time": 1, "status": "RUNNING"}).sent
    return runs


def spent(runs: Runs, trials: range, epochs: int, *, is_new: bool) -> tuple[float, float]:
    """Return the milliseconds of CPU, and those that passed, of a run."""
    cpu, start = time.process_time(), time.perf_counter()
    for trial in trials:
        assert runs.attempt(item_of(trial, epochs, is_new=is_new)).sent
    ms = 1000 / len(trials)
    return (time.process_time() - cpu) * ms, (time.perf_counter() - start) * ms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--epochs", type=int, default=50)
    given = parser.parse_args()
    print(f"{date.today()}, {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    print("| run | side | CPU, ms | ms | x client, CPU |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name, quiet():
        sides = {}
        for straight, title in ((False, "MLflow's client"), (True, "one transaction")):
            (folder := Path(name) / title[:3]).mkdir()
            sides[title] = sender(folder, straight=straight)
        first = 0
        for is_new in (True, False):
            client = 0.0
            for title, runs in sides.items():
                spent(runs, range(first, first + 3), given.epochs, is_new=is_new)  # what is compiled at first use
                cpu, ms = spent(runs, range(first + 3, first + 3 + given.runs), given.epochs, is_new=is_new)
                client = client or cpu
                print(f"| {'new' if is_new else 'looked for'} | {title} | {cpu:.1f} | {ms:.1f} | {client / cpu:.1f} |")
            first += 3 + given.runs


if __name__ == "__main__":
    main()
