"""What an objective's code keeps, or changes, beyond its own trial: said, or trained one at a time."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hpo.errors import InputError
from hpo.stacks.kept import kept_in_objective
from hpo.study.data import Split
from hpo.training.batches import Batches
from hpo.training.evaluation import measure, outputs_of
from hpo.training.stack import Task
from tests.cli import invoke
from tests.stacking import CPU, INFO, Toy, sines

PENALTY = """
import torch
from torch import nn
from torch.nn import functional as F
from torchmetrics.regression import MeanSquaredError
import hpo

class Penalty(hpo.Objective):
    space = {"penalty": {"type": "float", "low": 0.0, "high": 1.0}}
    defaults = {"learning_rate": 0.1, "batch_size": 16, "optimizer": "sgd"}

    def data(self):
        x = torch.randn(96, 3, generator=torch.Generator().manual_seed(0))
        y = x.sum(1, keepdim=True)
        parts = [hpo.Split(inputs={"x": x[i:j]}, targets=y[i:j]) for i, j in ((0, 48), (48, 72), (72, 96))]
        return hpo.Data(train=parts[0], valid=parts[1], test=parts[2])

    def build(self, params, info):
        self.params = params
        return nn.Linear(3, 1)

    def loss(self, outputs, targets, params):
        return F.mse_loss(outputs, targets) + self.params["penalty"] * outputs.abs().mean()

    def metrics(self):
        return {"mse": MeanSquaredError()}
"""


WEIGHTS = {"penalty": 0.0}


class Counts:
    def __init__(self) -> None:
        self.n = 0


class Outer:
    def __init__(self) -> None:
        self.inner = Counts()


class Keeping(Toy):
    """A regression that keeps something as `how` says."""

    factor = 1.0

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.seen, self.calls = how, torch.zeros(1), 0
        self.held, self.options, self.space_ = nn.HuberLoss(), {"delta": [1.0]}, SimpleNamespace(delta=1.0)
        self.outer = Outer()

    def build(self, params: Any, info: Any) -> nn.Module:
        if self.how == "number":
            self.weight = 2 * params["learning_rate"]
        if self.how == "module":
            self.criterion = nn.HuberLoss(delta=params["learning_rate"])
        if self.how == "constant":
            self.constant = 3.0
        if self.how == "in a module":
            self.held.delta = params["learning_rate"]
        if self.how == "in a dict":
            self.options["delta"][0] = params["learning_rate"]
        if self.how == "in an object":
            self.space_.delta = params["learning_rate"]
        if self.how == "in the class":
            type(self).factor = params["learning_rate"]
        if self.how == "in a global":
            WEIGHTS["penalty"] = params["learning_rate"]
        return nn.Linear(6, 1).double()

    def loss(self, outputs: Any, targets: Any, params: Any) -> Any:
        loss = F.mse_loss(outputs, targets) + WEIGHTS["penalty"]
        if self.how == "tensor":
            self.average = loss.detach()
        if self.how == "tensor in place":
            self.seen += 1
        if self.how == "count":
            self.calls += 1
        if self.how == "count in an object within one":
            self.outer.inner.n += 1
        if self.how == "count in training" and outputs.requires_grad:
            self.options["delta"][0] += 1
        return loss


@pytest.mark.parametrize(
    ("how", "kept"),
    [
        ("number", ["self.weight"]),
        ("module", ["self.criterion"]),
        ("tensor", ["self.average"]),
        ("tensor in place", ["self.seen"]),
        ("count", ["self.calls"]),
        ("count in training", ["self.options"]),
        ("count in an object within one", ["self.outer"]),
        ("in a module", ["self.held"]),
        ("in a dict", ["self.options"]),
        ("in an object", ["self.space_"]),
        ("in the class", ["Keeping.factor"]),
        ("in a global", ["Keeping.build", "Keeping.loss"]),
        ("constant", []),
        ("nothing", []),
    ],
)
def test_what_trials_would_share_is_found_and_the_objective_is_as_before(how: str, kept: list[str]) -> None:
    task = Task(objective=Keeping(how), info=INFO, device=CPU, n_rows=8, epochs=1)
    before = set(vars(task.objective))
    assert kept_in_objective(task, {"learning_rate": 0.1}, {"learning_rate": 0.2}, sines(8)) == kept
    assert set(vars(task.objective)) == before
    assert Keeping.factor == 1.0


def test_trials_of_an_objective_that_keeps_its_params_train_one_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("penalty.py").write_text(PENALTY)
    curves = []
    for stack in (1, 4):
        text = f"name: s{stack}\nobjective: penalty.py\ntrials: 4\nepochs: 3\nstack: {stack}\nsampler: random\n"
        Path("s.yaml").write_text(text + "pruner: none\ntracking: off\nstorage: sqlite:///o.db\nbaseline: false\n")
        done = invoke("run", "s.yaml")
        assert ("one trial at a time: the objective's build or loss keeps self.params" in done) == (stack == 4)
        curves.append(
            sorted(line.partition("mse ")[2].split(";")[0] for line in done.splitlines() if "complete: mse" in line)
        )
    assert curves[0] == curves[1]
    assert len(curves[0]) == 4


class InPlace(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x /= 2
        return x


def test_data_that_is_changed_in_place_is_said() -> None:
    task = Task(objective=Keeping("nothing"), info=INFO, device=CPU, n_rows=8, epochs=1)
    with pytest.raises(InputError, match="preprocess changes 'x' in place"):
        sines(8).through(InPlace())
    with pytest.raises(InputError, match="the network's forward changes 'x' in place"):
        outputs_of(task, InPlace(), Batches(sines(8), CPU))

    class Shifting(Keeping):
        def loss(self, outputs: Any, targets: Any, params: Any) -> Any:
            targets -= 0.1
            return F.mse_loss(outputs, targets)

    rows: Split = sines(8)
    with pytest.raises(InputError, match="the loss or a metric changes 'targets' in place"):
        measure(Shifting("nothing"), rows.targets.clone(), rows.targets, {}, {})
