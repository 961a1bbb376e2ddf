"""A study whose processes are killed with -9 and stopped beyond `grace`, beside the same study undisturbed.

    python benchmarks/chaos.py [--storage sqlite | postgres | URL] [--kills 100] [--workers 4] [--trials 40] [--halving]

Half of the kills come at random moments, one in ten of them to `hpo run` itself; the others at named ones (MOMENTS),
which the study's objective lies in wait for. MLflow is a server that is killed and started again, and so is PostgreSQL
where `--storage postgres` starts one (the `test` extra brings it). In between, a worker or `hpo run` itself is stopped
with SIGSTOP for longer than `grace`, and PostgreSQL so that it hangs. Whenever `hpo run` is gone it is run again, as a
person would. In the end there must be exactly as many trials done as asked for, none RUNNING in Optuna or MLflow, one
for each place of the budget, no two of the same params, every epoch of every one reported to both, and the same
params, curves and best as undisturbed. With `--halving`, which is for one worker (several decide by what each knows
then), trials are paused and resumed too, kills come at these moments as well, and every trial must have been trained
for as many epochs as undisturbed. Exit status 1 if not.
"""

import argparse
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "MLFLOW_DISABLE_TELEMETRY": "true"}
sys.path.insert(0, str(Path(__file__).parent.parent))

import psutil

from hpo.search.budget import holders
from hpo.search.storage import close_storage, open_storage
from tests.servers import MlflowServer, postgres

MOMENTS = ("claim", "lease", "epoch", "checkpoint", "tell", "told", "weights", "succession", "export")
"""Right after a claim; inside ask, before the params are drawn; mid-epoch; between a checkpoint's writing and
its taking effect; before and after the end is told; between a trial's end and `best.pt`; between a successor and its
predecessor's end; during export."""
HALVING_MOMENTS = ("pause", "resume")
"""Between a paused trial's checkpoint and its being told; after a resumed one's checkpoint was taken from memory."""
GRACE = 20
OBJECTIVE = """
import os
import random
import signal
import time
from pathlib import Path
import torch
from torch import nn
from torchmetrics.regression import R2Score
from hpo.runner import checkpoints, paused, trial
from hpo.export import bundle
from hpo.search import retrying, search
from hpo.study import space
from hpo.study.data import Data, Split
from hpo.study.objective import Objective

DICE = random.SystemRandom()

def moment(name):
    # Die if a kill is left for this moment: a file in the folder CHAOS.
    if "CHAOS" not in os.environ or DICE.random() > CHANCE.get(name, 0.3):
        return
    for file in Path(os.environ["CHAOS"]).glob(f"{name}.*"):
        try:
            file.rename(file.with_name(f"done-{file.name}"))
        except FileNotFoundError:
            continue
        os.kill(os.getpid(), signal.SIGKILL)

CHANCE = {"epoch": 0.003, "export": 1.0}

def before(owner, name, at):
    plain = getattr(owner, name)
    def watched(*args, **keys):
        moment(at)
        return plain(*args, **keys)
    setattr(owner, name, watched)

def after(owner, name, at):
    plain = getattr(owner, name)
    def watched(*args, **keys):
        result = plain(*args, **keys)
        moment(at)
        return result
    setattr(owner, name, watched)

after(retrying.RetryingStorage, "claim", "claim")
before(space.Space, "suggest", "lease")
before(trial.TrialRun, "tell", "tell")
before(trial.TrialRun, "told", "told")
after(retrying.RetryingStorage, "enqueue", "succession")
before(bundle, "parity_of", "export")
before(checkpoints, "settle_weights", "weights")
after(torch, "save", "checkpoint")
before(search.Search, "pause", "pause")
after(paused.PausedTrials, "take", "resume")

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
        moment("epoch")
        time.sleep(0.03)
        return super().loss(outputs, targets, params)

    def metrics(self):
        return {"r2": R2Score()}
"""
STUDY = """
objective: slow.py
sampler: random
pruner: none
stack: 1
grace: 20s
retries: 1000
checkpoint_every: 1s
outage: 5m
"""


class Study:
    """One study in a folder: `hpo run`, begun again whenever it was killed."""

    def __init__(self, folder: Path, name: str, storage: str, tracking: str, given: argparse.Namespace) -> None:
        self.folder, self.name, self.storage, self.tracking = folder, name, storage, tracking
        self.workers, self._runs = given.workers, 0
        (folder / "slow.py").write_text(OBJECTIVE)
        keys = {"storage": storage, "tracking": tracking, "trials": given.trials, "epochs": given.epochs}
        if given.halving:
            keys["pruner"] = "halving"
        study = STUDY.replace("pruner: none\n", "") if given.halving else STUDY
        (folder / f"{name}.yaml").write_text(study + "".join(f"{key}: {value}\n" for key, value in keys.items()))

    def start(self, environ: Mapping[str, str]) -> psutil.Popen:
        self._runs += 1
        with self.log.open("a") as log:
            return psutil.Popen(
                [sys.executable, "-m", "hpo", "run", f"{self.name}.yaml", "--workers", str(self.workers)],
                cwd=self.folder,
                env=os.environ | environ,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def was_refused(self) -> bool:
        """Whether `hpo run` ended since PostgreSQL was away when it started: that is for the person to see."""
        return "cannot be opened" in self.log.read_text().splitlines()[-1]

    @property
    def log(self) -> Path:
        return self.folder / f"{self.name}.log"

    def trials(self) -> list[Any]:
        before = Path.cwd()
        os.chdir(self.folder)  # relative addresses are from there
        try:
            opened = open_storage(self.storage)
            found = opened.get_all_trials(opened.get_study_id_from_name(self.name))
            close_storage(opened)
            return found
        finally:
            os.chdir(before)

    def trial_of_best_weights(self) -> int:
        """Return the number of the trial whose weights `best.pt` holds."""
        import torch

        return torch.load(self.folder / "mlruns/checkpoints" / self.name / "best.pt", weights_only=True)["trial"]

    def runs(self) -> list[Any]:
        """Return MLflow's runs, of the study and of its trials."""
        import mlflow

        client = mlflow.MlflowClient(self.tracking)
        experiment = client.get_experiment_by_name(self.name)
        return client.search_runs([experiment.experiment_id], max_results=5000)

    def steps(self, run: Any) -> set[int]:
        import mlflow

        history = mlflow.MlflowClient(self.tracking).get_metric_history(run.info.run_id, "valid_r2")
        return {point.step for point in history}


class Killer:
    """Kills a study's processes, and stops its servers, until so many kills are done."""

    def __init__(
        self, study: Study, kills: int, database: Any, tracking: MlflowServer, seed: int, moments: Sequence[str]
    ) -> None:
        self._study, self._database, self._tracking = study, database, tracking
        self._draw = random.Random(seed)
        self._folder = study.folder / "kills"
        self._folder.mkdir()
        for n in range(kills // 2):
            (self._folder / f"{moments[n % len(moments)]}.{n}").touch()
        self._left = kills - kills // 2
        self.done: Counter[str] = Counter()
        self._stops = 1
        self._stopped: list[tuple[float, psutil.Process]] = []

    def watch(self) -> None:
        """Run the study to its end. Raises SystemExit where it fails by itself."""
        environ = {"CHAOS": str(self._folder)}
        process = self._study.start(environ)
        while True:
            time.sleep(self._draw.uniform(0.2, 2.5))
            self._let_stopped_ones_continue()
            status = process.poll()
            if status == 0 and not self._stopped:
                break
            if status == 0:
                continue  # who is stopped comes back to a study that is done
            if status is not None and status > 0 and not self._study.was_refused():
                sys.exit(f"hpo run failed with status {status}:\n{self._study.log.read_text()[-5000:]}")
            if status is not None:
                process = self._study.start(environ)
            elif self._left:
                self._kill(process)
            if sum(self.done.values()) + self._at_moments() >= 10 * self._stops:
                self._stops += 1
                self._stop_a_server()
                self._stop_for_longer_than_grace(process)
        for file in self._folder.glob("done-*"):
            self.done[file.name.removeprefix("done-").partition(".")[0]] += 1

    def _at_moments(self) -> int:
        return len(list(self._folder.glob("done-*")))

    def _kill(self, process: psutil.Popen) -> None:
        with suppress(psutil.NoSuchProcess):
            # an age, so that those that still start and those that train are hit as often
            age = self._draw.uniform(0.0, 30.0)
            alone = self._study.workers == 1  # its only child sends to MLflow
            if alone and time.time() - process.create_time() < age:
                return
            workers = [w for w in process.children() if time.time() - w.create_time() > age]
            if alone or self._draw.random() < 0.1:
                process.kill()
                self.done["hpo run"] += 1
            elif workers:
                self._draw.choice(workers).kill()
                self.done["a worker"] += 1
            else:
                return
            self._left -= 1

    def _stop_for_longer_than_grace(self, process: psutil.Popen) -> None:
        """Stop a worker, or `hpo run` with it: its trials are taken over while it is away, and then it is back."""
        with suppress(psutil.NoSuchProcess):
            workers = process.children() if self._study.workers > 1 else [process]
            if not workers:
                return
            stopped = {self._draw.choice(workers), *([process] if self._draw.random() < 0.3 else [])}
            for each in stopped:
                each.suspend()
                self._stopped.append((time.monotonic() + GRACE * self._draw.uniform(1.1, 1.5), each))
                self.done["(hpo run, for a while)" if each is process else "(a worker, beyond grace)"] += 1

    def _let_stopped_ones_continue(self) -> None:
        for due, each in self._stopped[:]:
            if time.monotonic() >= due:
                self._stopped.remove((due, each))
                with suppress(psutil.NoSuchProcess):
                    each.resume()

    def _stop_a_server(self) -> None:
        """Kill PostgreSQL for some seconds, or MLflow's server, in turn."""
        server = self._tracking if self._database is None or self._stops % 2 else self._database
        if server is self._database and self._stops % 4 == 0:
            server.hang()
            time.sleep(self._draw.uniform(5.0, 25.0))
            server.resume()
            self.done["(PostgreSQL, hanging)"] += 1
            return
        server.stop()
        time.sleep(self._draw.uniform(0.5, 8.0))
        server.start()
        self.done["(MLflow's server)" if server is self._tracking else "(PostgreSQL)"] += 1


def check(calm: Study, chaos: Study, given: argparse.Namespace) -> dict[str, tuple[Any, Any]]:
    """Return what must be so: what it is, and what it must be."""
    expected = {t.user_attrs["place"]: t for t in holders(calm.trials())}
    everything = chaos.trials()
    got = {t.user_attrs["place"]: t for t in holders(everything)}
    every_run = chaos.runs()
    runs = {run.data.tags["hpo.trial"]: run for run in every_run}
    n = given.trials
    whole = {place: set(t.intermediate_values) for place, t in expected.items()}
    if not given.halving:
        assert all(epochs == set(range(given.epochs)) for epochs in whole.values())
    same = [(got[place], trial) for place, trial in expected.items() if place in got]
    return {
        "trials done": (sum(t.state.name in ("COMPLETE", "PRUNED") for t in holders(everything)), n),
        "complete": tuple(sum(t.state.name == "COMPLETE" for t in each.values()) for each in (got, expected)),
        "places of the budget taken": (len(got), n),
        "different params": (len({tuple(t.params.items()) for t in got.values()}), n),
        "RUNNING or WAITING in Optuna": (sum(not t.state.is_finished() for t in everything), 0),
        "RUNNING in MLflow": (sum(run.info.status in ("RUNNING", "SCHEDULED") for run in every_run), 0),
        "trials whose every epoch is in Optuna": (
            sum(set(t.intermediate_values) == whole[place] for place, t in got.items()),
            n,
        ),
        "trials whose every epoch is in MLflow": (
            sum(chaos.steps(runs[str(t.number)]) == whole[p] for p, t in got.items() if str(t.number) in runs),
            n,
        ),
        "params as undisturbed": (sum(ours.params == theirs.params for ours, theirs in same), n),
        "curves as undisturbed, bit for bit": (
            sum(ours.intermediate_values == theirs.intermediate_values for ours, theirs in same),
            n,
        ),
        "best value": tuple(max(map(_rank, each.values()))[0] for each in (got, expected)),
        "the best trial's place": tuple(max(each.values(), key=_rank).user_attrs["place"] for each in (got, expected)),
        "best.pt is the best trial's": (chaos.trial_of_best_weights(), max(got.values(), key=_rank).number),
        "runs of one trial in MLflow twice": (len(every_run) - len(runs), 0),
        "attempts lost and taken up again": (len(everything) - len(got), None),
    }


def _rank(trial: Any) -> tuple[float, int]:
    return (trial.value if trial.state.name == "COMPLETE" else -math.inf), -trial.user_attrs["place"]


@contextmanager
def addresses(storage: str, folder: Path) -> Iterator[tuple[str, str, Any]]:
    """Give the storages of both studies, and a server to stop, if it is ours."""
    if storage == "sqlite":
        yield "sqlite:///calm.db", "sqlite:///chaos.db", None
    elif storage == "postgres":
        with postgres(folder / "postgres" / "data") as server:
            yield server.database(), server.database(), server
    else:
        yield storage, storage, None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--storage", default="sqlite")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--halving", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name, ExitStack() as stack:
        folder = Path(name)
        calm_storage, chaos_storage, database = stack.enter_context(addresses(given.storage, folder))
        tracking = MlflowServer(folder / "tracking")
        stack.callback(tracking.stop)
        calm = Study(folder, "calm", calm_storage, "off", given)
        chaos = Study(folder, "chaos", chaos_storage, tracking.address, given)
        begun = time.monotonic()
        if calm.start({}).wait():
            sys.exit(calm.log.read_text())
        calm_seconds, begun = time.monotonic() - begun, time.monotonic()
        moments = (*MOMENTS, *(HALVING_MOMENTS if given.halving else ()))
        killer = Killer(chaos, given.kills, database, tracking, given.seed, moments)
        killer.watch()
        seconds = time.monotonic() - begun
        checks = check(calm, chaos, given)
    kills = {what: n for what, n in sorted(killer.done.items()) if not what.startswith("(")}
    print(
        f"{given.storage.partition(':')[0]}: {sum(kills.values())} kills ("
        f"{', '.join(f'{what} {n}' for what, n in kills.items())}), servers stopped: "
        f"{', '.join(f'{what} {n}' for what, n in killer.done.items() if what.startswith('(')) or 'none'}; "
        f"{given.workers} workers, {given.trials} trials of {given.epochs} epochs; {seconds:.0f} s, undisturbed "
        f"{calm_seconds:.0f} s\n"
    )
    print("| what | got | expected |\n|---|---|---|")
    for what, (ours, wanted) in checks.items():
        print(
            f"| {what} | {ours} | {'any' if wanted is None else wanted}{'' if wanted in (None, ours) else ' **no**'} |"
        )
    sys.exit(0 if all(wanted in (None, ours) for ours, wanted in checks.values()) else 1)


if __name__ == "__main__":
    main()
