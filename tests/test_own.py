"""An objective's own `train`, and plain Optuna objectives, through the command line."""

import json

import pytest
import torch

from hpo.errors import HpoError
from tests.cli import invoke, refused, summary
from tests.databases import MLFLOW, rows

OWN = """
import torch
from torch import nn
from torchmetrics.classification import MulticlassAccuracy
from hpo.study.objective import Objective
from hpo.study.data import Data, Split

class Own(Objective):
    '''Classes of the sign of a sum, learned by scikit-learn.'''

    defaults = {"alpha": 1e-4, "learning_rate": 0.1}
    space = {"alpha": {"type": "float", "low": 1e-5, "high": 1.0, "log": True}}

    def data(self):
        x = torch.randn(300, 4, generator=torch.Generator().manual_seed(0))
        y = (x.sum(1) > 0).long()
        parts = [Split(inputs={"x": x[i:j]}, targets=y[i:j]) for i, j in ((0, 200), (200, 250), (250, 300))]
        return Data(train=parts[0], valid=parts[1], test=parts[2], class_names=("minus", "plus"))

    def metrics(self):
        return {"accuracy": MulticlassAccuracy(2, average="micro")}

    def train(self, params, report):
        from sklearn.linear_model import SGDClassifier
        model = SGDClassifier(alpha=params["alpha"], learning_rate="constant", eta0=params["learning_rate"],
                              random_state=report.seed % 2**32)
        x, y = report.train.inputs["x"].numpy(), report.train.targets.numpy()
        for _ in range(report.epochs):
            model.partial_fit(x, y, classes=[0, 1])
            accuracy = model.score(report.valid.inputs["x"].numpy(), report.valid.targets.numpy())
            if not report({"accuracy": accuracy, "train_rows": len(y)}):
                break
        network = nn.Linear(4, 2)
        with torch.no_grad():
            network.weight.copy_(torch.tensor(model.coef_).float() * torch.tensor([[-1.0], [1.0]]))
            network.bias.copy_(torch.tensor(model.intercept_).float() * torch.tensor([-1.0, 1.0]))
        return network
"""
FUNCTION = """
import optuna

def f(trial):
    x = trial.suggest_float("x", -10, 10)
    for step in range(4):
        trial.report(abs(x - 2) + 4 - step, step)
        if trial.should_prune():
            raise optuna.TrialPruned()
    return abs(x - 2)

def stopping(trial):
    trial.study.stop()
    return 1.0

def pair(trial):
    return 1, 2

def endless(trial):
    return float("nan")

def best_is_one(trial):
    return trial.suggest_int("n", 0, 1)
"""


@pytest.fixture
def study(tmp_path, monkeypatch):
    """Return a function that writes a study and runs a command on it; it returns what that printed."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "f.py").write_text(FUNCTION)

    def run(text, command="run", call=invoke):
        (tmp_path / "s.yaml").write_text(text)
        return call(command, "s.yaml", *(["--json"] if command == "run" else []))

    return run


class TestOwnTraining:
    TEXT = "objective: own.py\nepochs: 5\ntrials: 6\npruner: {name: median, n_startup_trials: 2, n_warmup_steps: 0}\n"

    def test_it_is_searched_tested_and_exported(self, study, tmp_path):
        result = summary(study(self.TEXT))
        assert sum(result["trials"].values()) == 6
        assert result["test"].keys() == {"accuracy"}
        assert result["test"]["accuracy"] > 0.9
        model = torch.jit.load(tmp_path / result["bundle"] / "model.torchscript.pt")
        assert model(torch.tensor([[1.0, 1, 1, 1], [-1, -1, -1, -1]])).argmax(1).tolist() == [1, 0]
        about = json.loads((tmp_path / result["bundle"] / "bundle.json").read_text())
        assert about["trained_on"] == ["train", "valid"]
        logged = "select count(distinct step), max(value) from metrics where key = 'train_rows'"
        assert rows(logged, file=tmp_path / MLFLOW) == [(5, 200)]

    def test_of_a_function_it_is_not_known_what_pruning_has_saved(self, study):
        study("objective: f.py:f\nmetric: distance\ntrials: 3\nepochs: 50\npruner: none\n")
        effort = summary(study("objective: f.py:f\nmetric: distance\ntrials: 3\nepochs: 50\npruner: none\n"))["epochs"]
        assert (effort["epochs"], effort["without"]) == (12, 12)

    def test_a_second_run_costs_nothing(self, study):
        study(self.TEXT)
        assert "all 6 trials are done" in study(self.TEXT)

    def test_engine_params_are_not_known_to_it(self, study):
        done = study(self.TEXT + "params: {batch_size: 3}\n", call=refused)
        assert "params.batch_size: neither the engine nor the objective has this parameter" in done

    @pytest.mark.parametrize(
        ("old", "new", "said"),
        [
            ('report({"accuracy"', 'report({"acc"', "reported acc, train_rows, but the study's metric is accuracy"),
            ("if not report(", "if [] is report(", "continued after report returned False; return when it"),
            ("for _ in", "return None\n        for _ in", "train returned without having called report"),
            ("return network", "return 3", "train must return a network (nn.Module) or None, but got 3"),
            ('"accuracy": accuracy', '"accuracy": "high"', "must report numbers by name"),
            ("return network", "return nn.Linear(5, 2)", "given x (8, 4) float32"),
            ("return network", "return nn.Linear(4, 3)", "metric accuracy"),
        ],
    )  # fmt: skip
    def test_what_it_does_wrong_is_said(self, study, tmp_path, old, new, said):
        assert old in OWN
        (tmp_path / "own.py").write_text(OWN.replace(old, new))
        assert said in study(self.TEXT, call=refused)

    def test_a_stop_that_it_catches_ends_no_trial_and_what_it_has_trained_is_kept(self, study, tmp_path):
        catching = """
import os, signal
from pathlib import Path
import own

class Catching(own.Own):
    def train(self, params, report, resume=None):
        begun = 0 if resume is None else int(resume["epoch"])
        try:
            for epoch in range(begun, report.epochs):
                with Path("epochs").open("a") as file:
                    file.write(f"{epoch} ")
                if epoch == 2 and not Path("stopped").exists():
                    Path("stopped").touch()
                    os.kill(os.getpid(), signal.SIGTERM)
                if not report({"accuracy": 0.5}, {"epoch": epoch + 1}):
                    break
        except Exception:
            pass
        return torch.nn.Linear(4, 2)
"""
        (tmp_path / "catching.py").write_text("import torch" + catching)
        text = "objective: catching.py\nepochs: 5\ntrials: 1\nbaseline: false\n"
        with pytest.raises(HpoError, match="interrupted") as stopped:
            study(text)
        assert stopped.value.exit_status == 130
        assert summary(study(text))["trials"]["complete"] == 1
        assert (tmp_path / "epochs").read_text().split()[:5] == ["0", "1", "2", "3", "4"]

    def test_a_state_that_could_not_be_read_back_is_refused_at_once(self, study, tmp_path):
        reports = 'report({"accuracy": accuracy, "train_rows": len(y)}'
        assert reports in OWN
        own = OWN.replace(reports, reports + ', {"model": nn.Linear(1, 1)}')
        (tmp_path / "own.py").write_text(
            own.replace("train(self, params, report)", "train(self, params, report, resume=None)")
        )
        said = "must report its state in tensors, numbers and texts, in mappings and lists, but 'model' is or holds"
        assert said in study(self.TEXT, call=refused)

    def test_data_that_it_changes_in_place_is_said(self, study, tmp_path):
        (tmp_path / "own.py").write_text(
            OWN.replace("x, y = report", "report.train.inputs['x'] /= 2\n        x, y = report")
        )
        assert 'train changes "report.train.inputs[' in study(self.TEXT, call=refused)

    def test_one_that_returns_early_is_complete(self, study, tmp_path):
        (tmp_path / "own.py").write_text(OWN.replace("range(report.epochs)", "range(2)"))
        result = summary(study(self.TEXT + "start_with: [{alpha: 0.001}]\n"))
        assert result["trials"]["complete"] >= 1
        assert sum(result["trials"].values()) == 6

    def test_without_a_network_there_is_nothing_to_test_or_export(self, study, tmp_path):
        (tmp_path / "own.py").write_text(OWN.replace("return network", "return None"))
        done = study(self.TEXT)
        assert "train returned no network" in done
        assert (summary(done)["test"], summary(done)["bundle"]) == ({}, None)
        assert "all 6 trials are done" in study(self.TEXT)

    def test_a_nan_in_the_first_epoch_fails_that_trial_alone(self, study, tmp_path):
        diverges = '"accuracy": accuracy if params["alpha"] < 0.5 else float("nan")'
        (tmp_path / "own.py").write_text(OWN.replace('"accuracy": accuracy', diverges))
        text = "objective: own.py\nepochs: 2\ntrials: 2\ntracking: off\nsampler: grid\n"
        result = summary(study(text + "params: {alpha: {type: categorical, choices: [0.1, 0.9]}}\n"))
        assert (result["trials"]["complete"], result["trials"]["failed"]) == (1, 1)

    @pytest.mark.parametrize(
        ("preview", "said"),
        [
            ("nn.Linear(4, 2)", None),
            ("None", None),
            ("nn.Linear(3, 2)", "forward failed: RuntimeError"),
            ("nn.Linear(4, 1)", "metric accuracy failed"),
            ("Odd()", "the network that train returns (Odd) cannot be exported: "),
            (
                "Stateful(4, 2)",
                "must be tensors, which checkpoints and bundles are made of, but get_extra_state of Stateful",
            ),
            ("3", "preview must return a torch.nn.Module, but returned 3"),
            ("nn.Linear(params['n'], 2)", "failed: KeyError: 'n'"),
        ],
    )
    def test_its_preview_is_tried_before_the_first_trial(self, study, tmp_path, preview, said):
        odd = """
class Odd(nn.Linear):
    def __init__(self):
        super().__init__(4, 2)

    def forward(self, x):
        return super().forward(x) + float(x.sum())

class Stateful(nn.Linear):
    def get_extra_state(self):
        return 1

class Own("""
        method = f"    def preview(self, params, report):\n        return {preview}\n\n    def train("
        (tmp_path / "own.py").write_text(OWN.replace("    def train(", method).replace("\nclass Own(", odd))
        if said is None:
            assert "nothing is wrong" in study(self.TEXT, "check")
        else:
            assert said in study(self.TEXT, "check", call=refused)
            assert said in study(self.TEXT, call=refused)

    def test_a_bug_costs_no_trial(self, study, tmp_path):
        (tmp_path / "own.py").write_text(OWN.replace("network = nn.Linear(4, 2)", "raise KeyError('mine')"))
        with pytest.raises(KeyError, match="mine"):
            study(self.TEXT)
        (tmp_path / "own.py").write_text(OWN)
        assert sum(summary(study(self.TEXT))["trials"].values()) == 6

    def test_an_objective_without_build_or_train_is_refused(self, study, tmp_path):
        (tmp_path / "own.py").write_text(OWN.replace("def train(", "def fit("))
        assert "own.py:Own does not define build (or train)" in study(self.TEXT, call=refused)

    @pytest.mark.parametrize(
        ("was", "defined", "said"),
        [
            (
                "def train(self, params, report)",
                "def train(self, params)",
                "Own.train must take params, report, but takes",
            ),
            (
                "def train(self, params, report)",
                "def train(self, params, report, x)",
                "missing a required argument: 'x'",
            ),
            ("def train(self, params, report)", "def train(self, params, report, *, x)", "missing a required"),
            ("def metrics(self)", "def metrics(self, info)", "Own.metrics must take nothing, but takes (info)"),
            ("def data(self)", "def data()", "Own.data must take nothing besides self, but does not take self"),
        ],
    )
    def test_what_cannot_be_called_as_the_engine_does_is_refused(self, study, tmp_path, was, defined, said):
        (tmp_path / "own.py").write_text(OWN.replace(was, defined))
        assert said in study(self.TEXT, call=refused)

    @pytest.mark.parametrize("takes", ["*what", "params, report, x=1", "params, /, report, **more"])
    def test_what_can_be_called_is_not(self, study, tmp_path, takes):
        first = "\n        params, report = what" if takes == "*what" else ""
        (tmp_path / "own.py").write_text(OWN.replace("(self, params, report):", f"(self, {takes}):{first}"))
        assert sum(summary(study(self.TEXT))["trials"].values()) == 6


class TestFunction:
    TEXT = "objective: f.py:f\ntrials: 12\npruner: {name: median, n_startup_trials: 3, n_warmup_steps: 0}\n"

    @pytest.mark.filterwarnings("ignore:Fixed parameter")
    def test_a_start_that_it_does_not_ask_for_is_said(self, study, said):
        study(self.TEXT + "start_with: [{x: 7000.0}, {zz: 1}, {x: 2.5}]\n")
        lines = [line for line in said if line.startswith("start_with: ")]
        assert lines[0].startswith("start_with: trial 0 has x = 7000.0, but the function asks for FloatDistribution(")
        assert lines[1:] == [
            "start_with: trial 1 has zz = 1, which the function does not ask for: it is without effect"
        ]

    def test_it_runs_as_it_is_with_pruning_tracking_and_an_exact_budget(self, study, tmp_path):
        result = summary(study(self.TEXT + "start_with: [{x: 2.5}]\n"))
        assert result["trials"]["complete"] + result["trials"]["pruned"] == 12
        assert result["trials"]["pruned"] > 0
        assert result["best"]["value"] <= 0.5
        assert result["best"]["params"].keys() == {"x"}
        database = tmp_path / MLFLOW
        assert rows("select count(*) from params where key = 'x'", file=database) == [(12,)]
        assert rows("select max(step) from metrics where key = 'value'", file=database) == [(3,)]

    def test_it_goes_on_to_more_trials(self, study):
        study(self.TEXT)
        assert sum(summary(study(self.TEXT.replace("12", "14")))["trials"].values()) == 14

    def test_its_direction_is_the_studys(self, study):
        text = "objective: f.py:best_is_one\ntrials: 6\ntracking: off\n"
        assert summary(study(text + "direction: maximize\n"))["best"]["value"] == 1
        assert summary(study(text + "name: other\n"))["best"]["value"] == 0

    @pytest.mark.parametrize("sampler", ["random", "brute_force", "qmc"])
    def test_it_takes_other_samplers(self, study, sampler):
        text = f"objective: f.py:best_is_one\ntrials: 2\ntracking: off\nsampler: {sampler}\n"
        assert sum(summary(study(text))["trials"].values()) == 2

    def test_check_and_status_know_it(self, study):
        assert "the function suggests its own" in study(self.TEXT, "check")
        study(self.TEXT)
        assert "12 of 12 trials done" in study(self.TEXT, "status")

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("objective: f.py:stopping", "f.py:stopping: calls study.stop(), which is Optuna's for its own loop"),
            ("objective: f.py:pair", "must return one number, a trial's value (of several metrics: name them"),
            ("objective: f.py:ff", "f.py has no objective and no function 'ff'; did you mean \"f\"?"),
            ("objective: f.py", "or write f.py:function for a plain Optuna objective"),
            ("objective: f.py:f\nparams: {x: 1}", "params.x: a function suggests its own params; remove this"),
            ("objective: f.py:f\noptions: {a: 1}", "options.a: a function has no options"),
            ("objective: f.py:f\nsampler: grid", "a function suggests its own; use brute_force"),
        ],
    )
    def test_bad_input_is_said(self, study, text, said):
        assert said in study(text, call=refused)

    def test_nan_fails_the_trial(self, study):
        with pytest.raises(HpoError, match="value became nan"):
            study("objective: f.py:endless\ntrials: 2\ntracking: off\n")

    def test_there_is_no_model_to_export(self, study):
        study(self.TEXT)
        done = study(self.TEXT, "export", call=refused)
        assert "is a function: it has no model to export" in done
