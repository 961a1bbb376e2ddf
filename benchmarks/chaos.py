"""A study whose workers are killed with -9 at random moments, beside the same study undisturbed.

    python benchmarks/chaos.py [--storage sqlite | postgres | URL] [--kills 100] [--workers 4] [--trials 40]

`postgres` starts a server of its own (the `test` extra brings it), and restarts it after every tenth kill. In the end
there must be exactly as many trials done as asked for, none RUNNING in Optuna or MLflow, one for each place of the
budget, every epoch of every one reported, and the same params, curves and best as undisturbed. Exit status 1 if not.
"""

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "MLFLOW_DISABLE_TELEMETRY": "true"}
sys.path.insert(0, str(Path(__file__).parent.parent))

import psutil

from hpo.budget import places
from hpo.storage import close_storage, open_storage

OBJECTIVE = """
import time
import torch
from torch import nn
from torchmetrics.regression import R2Score
from hpo.data import Data, Split
from hpo.objective import Objective

class Slow(Objective):
    defaults = {"loss": "mse", "learning_rate": 0.05, "batch_size": 50, "dropout": 0.1}
    space = {"learning_rate": {"type": "float", "low": 1e-3, "high": 1e-1, "log": True}}

    def data(self):
        x = torch.randn(300, 4, generator=torch.Generator().manual_seed(0))
        parts = [slice(0, 200), slice(200, 250), slice(250, 300)]
        train, valid, test = (Split(inputs={"x": x[p]}, targets=x[p].sum(1, keepdim=True)) for p in parts)
        return Data(train=train, valid=valid, test=test)

    def build(self, params, info):
        return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(params["dropout"]), nn.Linear(8, 1))

    def loss(self, outputs, targets, params):
        time.sleep(0.03)
        return super().loss(outputs, targets, params)

    def metrics(self):
        return {"r2": R2Score()}
"""
EPOCHS = 40
STUDY = f"""
objective: slow.py
epochs: {EPOCHS}
sampler: random
pruner: none
stack: 1
grace: 20s
retries: 1000
checkpoint_every: 1s
outage: 5m
"""


@contextmanager
def addresses(storage: str, folder: Path) -> Iterator[tuple[str, str, Any]]:
    """Give the storages of both studies, and a server to restart, if it is ours."""
    if storage == "sqlite":
        yield "sqlite:///calm.db", "sqlite:///chaos.db", None
    elif storage == "postgres":
        from tests.servers import postgres

        with postgres(folder / "postgres" / "data") as server:
            yield server.database(), server.database(), server
    else:
        yield storage, storage, None


def start(folder: Path, name: str, storage: str, workers: int, trials: int) -> "subprocess.Popen[str]":
    (folder / "slow.py").write_text(OBJECTIVE)
    (folder / f"{name}.yaml").write_text(f"{STUDY}trials: {trials}\nstorage: {storage}\n")
    return subprocess.Popen(
        [sys.executable, "-m", "hpo", "run", f"{name}.yaml", "--workers", str(workers)],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def disturb(process: "subprocess.Popen[str]", kills: int, server: Any, seed: int) -> tuple[int, int]:
    """Kill workers of `process` at random moments until it ends; return how many, and how often the server stopped."""
    draw, done, restarts = random.Random(seed), 0, 0
    while process.poll() is None:
        time.sleep(draw.uniform(0.2, 2.5))
        if done >= kills:
            continue
        try:
            victims = psutil.Process(process.pid).children()
            old = [v for v in victims if time.time() - v.create_time() > draw.uniform(0.0, 30.0)]
            if old:
                draw.choice(old).kill()
                done += 1
                if server is not None and done % 10 == 0:
                    server.stop()
                    time.sleep(draw.uniform(0.5, 4.0))
                    server.start()
                    restarts += 1
        except psutil.NoSuchProcess:
            continue
    return done, restarts


def trials_of(storage: str, name: str, folder: Path) -> list[Any]:
    before = Path.cwd()
    os.chdir(folder)  # relative addresses are from there
    try:
        opened = open_storage(storage)
        study = opened.get_study_id_from_name(name)
        found = opened.get_all_trials(study)
        close_storage(opened)
        return found
    finally:
        os.chdir(before)


def open_runs(folder: Path, name: str) -> int:
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{folder}/mlruns/mlflow.db")
    experiment = client.get_experiment_by_name(name)
    return len(client.search_runs([experiment.experiment_id], "attributes.status = 'RUNNING'", max_results=5000))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--storage", default="sqlite")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with addresses(given.storage, folder) as (calm, chaos, server):
            begun = time.monotonic()
            quiet = start(folder, "calm", calm, given.workers, given.trials)
            out, _ = quiet.communicate()
            if quiet.returncode:
                sys.exit(out)
            calm_seconds, begun = time.monotonic() - begun, time.monotonic()
            process = start(folder, "chaos", chaos, given.workers, given.trials)
            log = folder / "log"
            with log.open("w") as file:
                reader = subprocess.Popen(["cat"], stdin=process.stdout, stdout=file)
                kills, restarts = disturb(process, given.kills, server, given.seed)
                reader.wait()
            if process.returncode:
                sys.exit(log.read_text()[-3000:])
            seconds = time.monotonic() - begun
            expected = {t.user_attrs["place"]: t for t in places(trials_of(calm, "calm", folder))}
            everything = trials_of(chaos, "chaos", folder)
            got = places(everything)
            by_place = {t.user_attrs["place"]: t for t in got}
            curves = sum(by_place[p].intermediate_values == t.intermediate_values for p, t in expected.items())
            checks = {
                "trials done": (len([t for t in got if t.state.name == "COMPLETE"]), given.trials),
                "places of the budget taken": (len(by_place), given.trials),
                "RUNNING or WAITING in Optuna": (sum(not t.state.is_finished() for t in everything), 0),
                "RUNNING in MLflow": (open_runs(folder, "chaos"), 0),
                "with the params of the undisturbed": (
                    sum(by_place[p].params == t.params for p, t in expected.items()),
                    given.trials,
                ),
                "epochs reported": (sum(len(t.intermediate_values) for t in got), given.trials * EPOCHS),
                "curves equal to the undisturbed, bit for bit": (curves, given.trials),
                "best value": (max(t.value for t in got), max(t.value for t in expected.values())),
            }
    kind = given.storage.partition(":")[0]
    print(
        f"{kind}: {kills} kills, {restarts} restarts of the server, {given.workers} workers, {given.trials} trials of "
        f"{EPOCHS} epochs; {seconds:.0f} s, undisturbed {calm_seconds:.0f} s; "
        f"{len(everything) - len(got)} attempts were lost and taken up again\n"
    )
    print("| what | got | expected |\n|---|---|---|")
    for what, (ours, wanted) in checks.items():
        print(f"| {what} | {ours} | {wanted}{'' if ours == wanted else ' **no**'} |")
    sys.exit(0 if all(ours == wanted for ours, wanted in checks.values()) else 1)


if __name__ == "__main__":
    main()
