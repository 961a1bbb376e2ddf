"""Seconds that whole commands take, from their start to their end, and CPU seconds of all their processes.

    python benchmarks/start.py [--rounds 5]

`hpo run` is of `studies/breast_cancer.yaml`, 20 trials of 50 epochs in an empty folder; beside it, in turn, a script
that does the same with plain Optuna, MLflow and PyTorch: the same data, network and epochs, each trial a run of MLflow,
the best trained again, tested and saved. `first line` and `first trial`: when it is printed, and when the first trial
has ended. `status` is of that study, and of one with 10,000 finished trials. Medians, with the smallest and largest.
"""

import argparse
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

ROOT = Path(__file__).parents[1]
STUDY = ROOT / "studies/breast_cancer.yaml"
PLAIN = """
import mlflow, optuna, torch
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import BinaryAccuracy

torch.set_num_threads(1)
mlflow.set_tracking_uri("sqlite:///mlflow.db")
mlflow.set_experiment("plain")
x, y = load_breast_cancer(return_X_y=True)
x, x_test, y, y_test = train_test_split(x, y, test_size=0.2, random_state=0, stratify=y)
x_train, x_valid, y_train, y_valid = train_test_split(x, y, test_size=0.2, random_state=0, stratify=y)


def tensors(of, x, y):
    x = (x - of.mean(0)) / of.std(0)
    return torch.tensor(x, dtype=torch.float32), torch.tensor(y, dtype=torch.float32)[:, None]


train, valid = tensors(x_train, x_train, y_train), tensors(x_train, x_valid, y_valid)
loss_of = nn.BCEWithLogitsLoss()


def fit(params, train, valid, report):
    n = params["n_hidden"]
    network = nn.Sequential(nn.Linear(30, n), nn.ReLU(), nn.Linear(n, n), nn.ReLU(), nn.Linear(n, 1))
    keys = {"lr": params["learning_rate"], "weight_decay": params["weight_decay"]}
    optimizer = torch.optim.Adam(network.parameters(), **keys)
    loader = DataLoader(TensorDataset(*train), batch_size=64, shuffle=True)
    accuracy = BinaryAccuracy()
    for epoch in range(50):
        network.train()
        for inputs, targets in loader:
            optimizer.zero_grad()
            loss = loss_of(network(inputs), targets)
            loss.backward()
            optimizer.step()
        network.eval()
        with torch.no_grad():
            outputs = network(valid[0])
        value = loss_of(outputs, valid[1]).item()
        accuracy.reset()
        accuracy.update(outputs, valid[1])
        report(epoch, {"train_loss": loss.item(), "valid_loss": value, "valid_accuracy": accuracy.compute().item()})
    return network, value


def objective(trial):
    params = {
        "learning_rate": trial.suggest_float("learning_rate", 3e-4, 5e-3, log=True),
        "weight_decay": trial.suggest_float("weight_decay", 1e-6, 0.1, log=True),
        "n_hidden": trial.suggest_int("n_hidden", 8, 64),
    }
    with mlflow.start_run(run_name=f"trial {trial.number}", nested=True):
        mlflow.log_params(params)

        def report(epoch, metrics):
            mlflow.log_metrics(metrics, step=epoch)
            trial.report(metrics["valid_loss"], epoch)
            if trial.should_prune():
                raise optuna.TrialPruned

        return fit(params, train, valid, report)[1]


pruner = optuna.pruners.MedianPruner(n_startup_trials=10, n_warmup_steps=10)
study = optuna.create_study(storage="sqlite:///optuna.db", pruner=pruner)
with mlflow.start_run():
    study.optimize(objective, n_trials=20)
    whole, test = tensors(x, x, y), tensors(x, x_test, y_test)
    network, value = fit(study.best_params, whole, test, lambda epoch, metrics: None)
    mlflow.log_metric("test_loss", value)
    torch.save(network.state_dict(), "model.pt")
    torch.jit.trace(network.eval(), test[0][:1]).save("model.torchscript.pt")
    mlflow.log_artifact("model.torchscript.pt")
"""
MANY = """
import sys
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState, create_trial
from hpo.runner.opening import open_or_make
from hpo.runner.prepare import prepare
from hpo.seeds import derive
from pathlib import Path

plan = prepare(Path("many.yaml"))
search = open_or_make(plan)
of = {"learning_rate": FloatDistribution(3e-4, 5e-3, log=True)}
trials = []
for slot in range(int(sys.argv[1])):
    curve = {epoch: 1.0 / (epoch + 1) + slot * 1e-6 for epoch in range(10)}
    attrs = {"place": slot, "seed": derive(1, "init", slot), "best_epoch": 9}
    params = {"learning_rate": 1e-3}
    of_trial = {"intermediate_values": curve, "user_attrs": attrs}
    trials.append(create_trial(value=curve[9], params=params, distributions=of, **of_trial))
search.study.add_trials(trials)
search.close()
"""
MANY_STUDY = """
objective: breast_cancer
metric: loss
epochs: 10
params:
  learning_rate: {type: float, low: 3e-4, high: 5e-3, log: true}
"""
HPO = (sys.executable, "-m", "hpo")


@dataclass(frozen=True)
class Spent:
    """Seconds of a command: in all, of all its processes' CPU, until its first line, until its first trial's end."""

    wall: float
    cpu: float
    first_line: float | None
    first_trial: float | None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--trials", type=int, default=10_000, help="of the large study")
    options = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        many, done = folder / "many", folder / "done"
        many.mkdir()
        (many / "many.yaml").write_text(f"{MANY_STUDY}trials: {options.trials}\n")
        subprocess.run([sys.executable, "-c", MANY, str(options.trials)], cwd=many, check=True)
        (folder / "plain.py").write_text(PLAIN)
        run = (*HPO, "run", str(STUDY))
        spent(run, done)  # what is read for the first time comes from the disk
        rows: dict[str, tuple[Sequence[str], Path | None]] = {
            "`hpo run` of breast_cancer": (run, None),
            "a plain script of the same": ((sys.executable, str(folder / "plain.py")), None),
            "`hpo status`": ((*HPO, "status", str(STUDY)), done),
            f"`hpo status`, {options.trials:,} trials": ((*HPO, "status", "many.yaml"), many),
            "`hpo check`": ((*HPO, "check", str(STUDY)), done),
            "`hpo objectives`": ((*HPO, "objectives"), done),
            "`hpo --help`": ((*HPO, "--help"), done),
        }
        times: dict[str, list[Spent]] = {row: [] for row in rows}
        for _ in range(options.rounds):
            for row, (command, where) in rows.items():
                times[row].append(spent(command, where or Path(tempfile.mkdtemp(dir=folder))))
    print(f"{date.today()}, {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    print("| command | seconds | CPU seconds | first line | first trial |")
    print("|---|---|---|---|---|")
    for row, of in times.items():
        print(f"| {row} | {' | '.join(shown(of, name) for name in ('wall', 'cpu', 'first_line', 'first_trial'))} |")


def spent(command: Sequence[str], folder: Path) -> Spent:
    """Run a command in `folder` to its end."""
    folder.mkdir(exist_ok=True)
    before, start = cpu_of_children(), time.perf_counter()
    first_line = first_trial = None
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder)
    assert process.stdout is not None
    assert process.stderr is not None
    for line in process.stdout:
        now = time.perf_counter() - start
        first_line = first_line or now
        first_trial = first_trial or (now if "trial 0 complete" in line else None)
    errors = process.stderr.read()
    if process.wait() != 0:
        raise SystemExit(f"{' '.join(command)} failed:\n{errors}")
    return Spent(time.perf_counter() - start, cpu_of_children() - before, first_line, first_trial)


def cpu_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def shown(times: Sequence[Spent], name: str) -> str:
    """Return the median, the smallest and the largest."""
    values = [value for each in times if (value := getattr(each, name)) is not None]
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})" if values else ""


if __name__ == "__main__":
    main()
