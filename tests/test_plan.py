"""A study made ready: what comes from where, and everything that can be wrong before anything runs."""

import random
from pathlib import Path
from textwrap import dedent

import pytest
import torch
from torchmetrics import Metric

from hpo.errors import Faulty, InputError, SpecError
from hpo.runner.preflight import preflight
from hpo.runner.prepare import find_device, prepare

CHOOSY = '''
"""An objective with conditions in its default space, and faults on demand."""

import random

import torch
from torch import nn
from torch.nn import functional as F
from torchmetrics import MeanMetric
from torchmetrics.regression import R2Score

from hpo.study.data import Data, Split
from hpo.study.objective import Objective


class Choosy(Objective):
    defaults = {"batch_size": 4, "n_hidden": 8, "fault": "none"}
    space = {
        "optimizer": {"type": "categorical", "choices": ["sgd", "adam"]},
        "momentum": {"type": "float", "low": 0.0, "high": 0.9, "when": {"optimizer": "sgd"}},
        "beta1": {"type": "float", "low": 0.5, "high": 0.9, "when": {"optimizer": "adam"}},
        "n_hidden": {"type": "int", "low": 4, "high": 64},
    }

    def data(self):
        parts = [Split(inputs={"x": torch.randn(20, 3)}, targets=torch.zeros(20, 1)) for _ in range(3)]
        return Data(train=parts[0], valid=parts[1], test=parts[2])

    def build(self, params, info):
        if params["fault"] == "dice":
            return nn.Linear(3, 1) if random.random() < 0.5 else nn.Sequential(nn.Linear(3, 1))
        if params["fault"] == "lazy":
            return nn.Sequential(nn.Linear(3, 4), nn.LazyLinear(1))
        if params["fault"] == "seed":
            torch.manual_seed(7)
        if params["fault"] == "dtype":
            torch.set_default_dtype(torch.float64)
        if params["fault"] == "build" and params["n_hidden"] == 64:
            raise ValueError("64 is too wide")
        return nn.Sequential(nn.Linear(4 if params["fault"] == "forward" else 3, params["n_hidden"]),
                             nn.Linear(params["n_hidden"], 1))

    def loss(self, outputs, targets, params):
        if params["fault"] == "loss":
            return params["no_such"]
        if params["fault"] == "vector":
            return F.mse_loss(outputs, targets, reduction="none").squeeze(1)
        if params["fault"] == "number":
            return 0.5
        if params["fault"] == "detached":
            return F.mse_loss(outputs, targets).detach()
        return F.mse_loss(outputs, targets)

    def metrics(self):
        return {"r2": R2Score(), "mean": MeanMetric()} | self.more

    more = {}
'''


class Picky(Metric):
    """A metric for five classes."""

    def update(self, outputs, targets):
        if outputs.shape[1:] != (5,):
            raise ValueError("takes (B, 5) only")

    def compute(self):
        return torch.zeros(())


@pytest.fixture
def planned(study):
    """Return a function that prepares a study of the `Choosy` objective."""
    Path("choosy.py").write_text(CHOOSY)

    def make(text="", **overrides):
        return prepare(study("objective: choosy.py\n" + dedent(text)), overrides)

    return make


def faults(planned, text):
    with pytest.raises(SpecError) as caught:
        planned(text)
    return caught.value.lines


class TestParams:
    def test_what_torch_refuses_together_is_a_fault_with_its_line(self, planned):
        momentum = "momentum: {type: float, low: 0.5, high: 0.9, or: 0}"
        (line,) = faults(planned, f"params:\n  optimizer: sgd\n  {momentum}\n  nesterov: true\n")
        assert ": params.nesterov: sgd takes nesterov: true only with a momentum above 0" in line
        assert not line.startswith("study.yaml: ")
        (line,) = faults(planned, f"params:\n  optimizer: sgd\n  {momentum.replace('or: 0', 'or: -1')}\n")
        assert line.endswith("params.momentum: must be a number of at least 0, but got -1.0")

    def test_the_file_goes_before_the_objective_and_the_objective_before_the_engine(self, planned):
        plan = planned("params: {n_hidden: 16, optimizer: sgd}")
        assert plan.space.fixed == {
            "optimizer": "sgd",
            "learning_rate": 1e-3,
            "batch_size": 4,
            "n_hidden": 16,
            "fault": "none",
        }
        assert [d.name for d in plan.space.dimensions] == ["momentum"]

    def test_default_ranges_that_the_file_made_unreachable_are_dropped(self, planned):
        for optimizer, names in {"sgd": {"momentum", "n_hidden"}, "adam": {"beta1", "n_hidden"}}.items():
            plan = planned(f"params: {{optimizer: {optimizer}}}")
            assert {d.name for d in plan.space.dimensions} == names

    def test_without_params_the_default_space_is_searched(self, planned):
        names = [d.name for d in planned().space.dimensions]
        assert sorted(names) == ["beta1", "momentum", "n_hidden", "optimizer"]
        assert names.index("optimizer") < min(names.index("momentum"), names.index("beta1"))

    def test_a_range_of_the_files_own_is_the_whole_space(self, planned):
        plan = planned("params: {learning_rate: {type: float, low: 0.1, high: 0.2}}")
        assert [d.name for d in plan.space.dimensions] == ["learning_rate"]
        assert plan.space.fixed["optimizer"] == "adam"

    def test_every_fault_is_told_at_once_with_its_line(self, planned):
        lines = faults(
            planned,
            """
            params:
              n_hiden: 3
              momentum: 0.5
            sampler: {name: tpe, n_startup: 5}
            metric: maen
            device: cuda:99
        """,
        )
        text = "\n".join(lines)
        assert all("/study.yaml:" in line for line in lines)
        assert len(lines) == 4
        known = "neither the engine nor the objective has this parameter"
        assert f'params.n_hiden: {known}; did you mean "n_hidden"?' in text
        assert "metric: the objective has no metric 'maen'; did you mean \"mean\"?" in text
        assert "sampler.n_startup: unknown key of Optuna's TPESampler" in text
        assert "device: there is no device 'cuda:99' here; available: auto, " in text


class TestMetric:
    @pytest.mark.parametrize(
        ("text", "name", "maximize"), [("", "r2", True), ("metric: r2", "r2", True), ("metric: loss", "loss", False)]
    )
    def test_its_direction_is_its_own(self, planned, text, name, maximize):
        plan = planned(text)
        assert (plan.metric, plan.maximize, plan.metric_key) == (name, maximize, f"valid_{name}")

    def test_one_without_a_direction_cannot_be_searched_for(self, planned):
        (line,) = faults(planned, "metric: mean")
        assert line.endswith(
            "metric: mean does not say in which direction it is better (higher_is_better); write a `direction`, or "
            "choose one of r2, mean, loss"
        )
        assert planned("metric: mean\ndirection: maximize\n").maximize
        assert not planned("metric: mean\ndirection: minimize\n").maximize

    def test_a_direction_that_the_metric_contradicts_is_a_fault(self, planned):
        (line,) = faults(planned, "metric: r2\ndirection: minimize\n")
        assert line.endswith("direction: of r2 more is better; remove `direction`")


class TestTrials:
    GRID = "params: {n_hidden: {type: int, low: 1, high: 3}, batch_size: {type: categorical, choices: [2, 4]}}\n"

    @pytest.mark.parametrize("sampler", ["grid", "brute_force"])
    def test_a_space_with_an_end_caps_the_budget_and_says_so(self, planned, sampler, said):
        plan = planned(f"{self.GRID}sampler: {sampler}\ntrials: 50\n")
        assert plan.spec.trials == 6
        assert said == ["the space has 6 configurations in all: trials is 6, not 50"]

    @pytest.mark.parametrize("text", ["sampler: grid\ntrials: 4", "sampler: tpe\ntrials: 50"])
    def test_else_the_budget_is_what_the_file_says(self, planned, text, said):
        plan = planned(f"{self.GRID}{text}\n")
        assert plan.spec.trials == int(text.split()[-1])
        assert said == []


class TestDevice:
    @pytest.fixture
    def has(self, monkeypatch):
        """Return a function that says which devices this machine is to have."""

        def make(n_cuda=0, mps=False):
            monkeypatch.setattr(torch.cuda, "is_available", lambda: n_cuda > 0)
            monkeypatch.setattr(torch.cuda, "device_count", lambda: n_cuda)
            monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)

        return make

    @pytest.mark.parametrize(
        ("n_cuda", "mps", "expected"), [(2, False, "cuda:0"), (0, True, "mps"), (0, False, "cpu"), (1, True, "cuda:0")]
    )
    def test_auto_is_the_fastest_there_is(self, has, n_cuda, mps, expected):
        has(n_cuda, mps)
        assert find_device("auto") == torch.device(expected)

    @pytest.mark.parametrize(("name", "expected"), [("cpu", "cpu"), ("cuda", "cuda:0"), ("cuda:1", "cuda:1")])
    def test_one_that_is_there(self, has, name, expected):
        has(n_cuda=2)
        assert find_device(name) == torch.device(expected)

    @pytest.mark.parametrize("name", ["cuda:2", "mps", "gpu", "cuda:x", "meta"])
    def test_one_that_is_not_there(self, has, name):
        has(n_cuda=2)
        with pytest.raises(Faulty) as caught:
            find_device(name)
        (fault,) = caught.value.faults
        assert fault.path == ("device",)
        assert fault.message == f"there is no device {name!r} here; available: auto, cuda:0, cuda:1, cpu"


class TestTryOut:
    def test_a_good_objective_gives_the_first_corners_network(self, planned):
        plan = planned()
        network, infeasible = preflight(plan, plan.load_data())
        assert sum(p.numel() for p in network.parameters()) == 4 * 4 + 5
        assert network.training
        assert infeasible == []

    @pytest.mark.parametrize(
        ("fault", "text"),
        [
            (
                "vector",
                r"loss must return one number \(a tensor of no dimensions\), but got a tensor of shape \(8,\); "
                r"take its mean",
            ),
            ("number", r"loss must return one number \(a tensor of no dimensions\), but got 0.5; take its mean"),
            ("lazy", r"build must return a network whose weights are there, .* of 1 \(LazyLinear\); give the layer"),
            ("build", r"build with .*n_hidden=64.* failed: ValueError: 64 is too wide \(.*choosy.py:\d+\)"),
            ("forward", r"forward.* failed: RuntimeError: .*mat1 and mat2 shapes cannot be multiplied"),
            ("loss", r"loss.* failed: KeyError: 'no_such' \(.*choosy.py:\d+\)"),
        ],
    )
    def test_what_would_fail_in_training_fails_here(self, planned, fault, text):
        plan = planned(f"params: {{fault: {fault}}}")
        with pytest.raises(InputError, match=f"^objective choosy.py: {text}"):
            preflight(plan, plan.load_data())

    @pytest.mark.parametrize(
        ("fault", "text"),
        [
            ("dice", "build gives another network each time for the same params and seed"),
            ("seed", "build sets torch's seed itself, so all trials would begin with the same weights"),
            ("dtype", "build changes torch's default dtype from torch.float32 to torch.float64; set it back"),
        ],
    )
    def test_code_that_reaches_beyond_its_own_trial_is_refused(self, planned, fault, text):
        random.seed(0)  # whose next numbers are 0.84 and 0.76, 0.42: the second network is another one
        random.random()
        random.random()
        plan = planned(f"params: {{fault: {fault}}}")
        try:
            with pytest.raises(InputError, match=f"^objective choosy.py: {text}"):
                preflight(plan, plan.load_data())
        finally:
            torch.set_default_dtype(torch.float32)

    def test_a_metric_that_cannot_take_the_outputs_is_refused(self, planned):
        plan = planned()
        plan.objective.more = {"picky": Picky()}
        message = r"^objective choosy.py: metric picky failed: ValueError: takes \(B, 5\) only \("
        with pytest.raises(InputError, match=message):
            preflight(plan, plan.load_data())

    def test_a_loss_without_a_gradient_is_refused(self, planned):
        plan = planned("params: {fault: detached}")
        message = r"^objective choosy.py: loss.backward failed: RuntimeError: .*does not require grad"
        with pytest.raises(InputError, match=message):
            preflight(plan, plan.load_data())

    def test_a_preprocessing_that_fails_is_refused(self, planned):
        plan = planned()
        plan.objective.preprocess = lambda train: torch.nn.Linear(7, 7).requires_grad_(False)
        with pytest.raises(InputError, match=r"^objective choosy.py: preprocess failed: RuntimeError: "):
            preflight(plan, plan.load_data())


class TestLosses:
    @pytest.fixture
    def named(self, tmp_path):
        """Return a function that plans a study of an objective that leaves its loss to its params."""
        (tmp_path / "named.py").write_text(NAMED)

        def plan(text):
            path = tmp_path / "study.yaml"
            path.write_text(f"objective: named.py\n{text}")
            return prepare(path)

        return plan

    def test_a_name_or_several_to_search(self, named):
        assert named("").space.fixed["loss"] == "mse"
        plan = named("params: {loss: {type: categorical, choices: [l1, 'named.py:cubic']}}\n")
        assert set(plan.objective.own_losses) == {"named.py:cubic"}
        outputs, targets = torch.tensor([2.0]), torch.tensor([0.0])
        assert plan.objective.loss(outputs, targets, {"loss": "named.py:cubic"}) == 8
        assert plan.objective.loss(outputs, targets, {"loss": "l1"}) == 2

    @pytest.mark.parametrize(
        ("params", "said"),
        [
            ("{loss: mes}", "params.loss: there is no loss 'mes'; did you mean \"mse\"?"),
            ("{loss: 'named.py:cubik'}", "params.loss: named.py has no function 'cubik'; did you mean \"cubic\"?"),
            ("{loss: 'nam.py:cubic'}", "params.loss: no such file"),
            ("{class_weights: even}", "params.class_weights: must be none, balanced, or a number"),
            ("{label_smoothing: {type: float, low: 0, high: 1}}", "params.label_smoothing: must be a number in [0, 1)"),
            ("{accumulation_steps: 0}", "params.accumulation_steps: must be a whole number of at least 1"),
        ],
    )
    def test_what_is_wrong_is_said(self, named, params, said):
        with pytest.raises(SpecError) as caught:
            named(f"params: {params}\n")
        assert said in str(caught.value)

    def test_one_that_is_nowhere_is_said(self, tmp_path):
        (tmp_path / "named.py").write_text(NAMED.replace('"loss": "mse", ', ""))
        (tmp_path / "s.yaml").write_text("objective: named.py")
        with pytest.raises(SpecError, match="does not define loss; or let its defaults name one: l1, mse"):
            prepare(tmp_path / "s.yaml")


NAMED = """
from torch import nn
from torchmetrics.regression import R2Score
from hpo.study.objective import Objective

def cubic(outputs, targets):
    return (outputs - targets).abs().pow(3).mean()

class Named(Objective):
    defaults = {"loss": "mse", "label_smoothing": 0.0, "class_weights": "none"}
    def data(self): ...
    def build(self, params, info): return nn.Linear(2, 1)
    def metrics(self): return {"r2": R2Score()}
"""
