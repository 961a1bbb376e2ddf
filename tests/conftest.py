"""What all tests share. Small models are many times slower with torch's own default of threads, so: one."""

import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"

import pytest
import torch

from hpo.cli import commands
from hpo.export import parity
from hpo.export.formats import ALWAYS, formats_of
from hpo.runner import launch, refit
from hpo.stacks import cost
from hpo.tracking import process
from tests import warm
from tests.logged import recorded
from tests.mlflows import empty_database, mlflow, no_warning, through_client, tracking_server  # noqa: F401 (fixtures)

torch.set_num_threads(1)

for each in (process, launch, parity):
    each.subprocess = warm.FORKING

ROOT = Path(__file__).parent.parent
FRESH = {"PYTHONPATH": os.environ.get("PYTHONPATH", "")}
"""For `start_hpo` and `run_hpo`: Python itself is started, where it matters that nothing is imported yet."""

LINEAR = '''
"""A line through 300 points: the smallest whole objective."""

import os
import time

import torch
from torch import nn
from torch.nn import functional as F
from torchmetrics.regression import R2Score

from hpo.study.data import Data, Split
from hpo.study.objective import Objective


class Linear(Objective):
    defaults = {"kind": "good", "learning_rate": 0.05, "batch_size": 50}
    space = {"learning_rate": {"type": "float", "low": 1e-3, "high": 1e-1, "log": True}}

    def data(self):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(300, 4, generator=generator)
        y = x.sum(1, keepdim=True)
        if os.environ.get("LINEAR_DATA") == "nan":
            x[7, 2] = float("nan")
        if os.environ.get("LINEAR_DATA") == "other":
            y = y + 1
        parts = [slice(0, 200), slice(200, 250), slice(250, 300)]
        train, valid, test = (Split(inputs={"features": x[p]}, targets=y[p]) for p in parts)
        return Data(train=train, valid=valid, test=test)

    def build(self, params, info):
        return nn.Linear(info.n_features, 1)

    def loss(self, outputs, targets, params):
        time.sleep(float(os.environ.get("LINEAR_SECONDS", "0")))
        if os.environ.get("LINEAR_BUG") and outputs.requires_grad and len(targets) == 50:
            raise KeyError("a bug")
        loss = F.mse_loss(outputs, targets)
        if params["kind"] == "nan" and outputs.requires_grad and len(targets) == 50:
            return loss * float("nan")
        if params["kind"] == "oom" and outputs.requires_grad and len(targets) == 50:
            torch.empty(10**14)
        return loss

    def metrics(self):
        return {"r2": R2Score()}
'''
"""Its faults strike in training only (batches of 50 with gradient), not when `hpo.runner.preflight` tries 8 rows."""


@pytest.fixture(scope="session")
def server():
    """Return a PostgreSQL server, `tests.servers.Postgres`."""
    from tests.servers import postgres

    # not in pytest's own folder: that is for its owner only, and PostgreSQL is another user where we are root
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, postgres(Path(folder) / "data") as made:
        yield made


@pytest.fixture(autouse=True)
def _nothing_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """What compiling took in one test, on a busy machine or of a stand-in, decides nothing in the next."""
    monkeypatch.setattr(cost, "_compiled", {})
    monkeypatch.setattr(cost, "_saved", {})


@pytest.fixture(autouse=True)
def without_pt2(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out of bundles what takes as long as a small study; where it is looked at, a module has its own fixture."""
    for module in (commands, refit):
        monkeypatch.setattr(module, "formats_of", lambda text: ALWAYS if text is None else formats_of(text))


@pytest.fixture
def said() -> Iterator[list[str]]:
    """Give the list of what is logged during the test."""
    with recorded() as texts:
        yield texts


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Return a function that writes study.yaml (and the Linear objective beside it) into the current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "linear.py").write_text(LINEAR)

    def write(text: str = "", name: str = "study.yaml") -> Path:
        path = tmp_path / name
        base = "objective: linear.py\ntrials: 3\nepochs: 2\ntracking: off\n"
        text = textwrap.dedent(text)
        keys = {line.partition(":")[0] for line in text.splitlines()}
        lines = [line for line in base.splitlines() if line.partition(":")[0] not in keys]
        path.write_text("\n".join([*lines, text]))
        return path

    return write


def start_hpo(*arguments: object, **environ: str) -> "subprocess.Popen[str]":
    """Start `hpo ...` in the current folder as a process of its own, as `python -m hpo` where imports are looked at."""
    if "PYTHONPATH" not in environ:
        return warm.Popen(*arguments, environ=environ)
    return subprocess.Popen(
        [sys.executable, "-m", "hpo", *map(str, arguments)],
        env=os.environ | environ,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def interrupt_after(line: str, path: object) -> None:
    """Run a study of `linear.py`, slowly, and interrupt it in the trial after that which `line` is printed of."""
    running = start_hpo("run", path, LINEAR_SECONDS="0.05")
    assert running.stdout is not None
    for each in running.stdout:
        if line in each:
            break
    time.sleep(0.4)
    running.send_signal(signal.SIGINT)
    running.communicate(timeout=60)


def run_hpo(*arguments: object, **environ: str) -> "subprocess.CompletedProcess[str]":
    """Run `python -m hpo ...` in the current folder to its end."""
    process = start_hpo(*arguments, **environ)
    out, err = process.communicate(timeout=200)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)
