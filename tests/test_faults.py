"""Errors that end a trial and not its study: out of memory, an infeasible configuration, what `catch` names."""

from pathlib import Path

import pytest
import torch
from optuna.trial import TrialState

from hpo.errors import HpoError
from hpo.runner import custom as own
from hpo.training.faults import TrialFault, all_alike, fault_of
from tests.cli import invoke, refused, summary
from tests.databases import rows

FUNCTION = """
import optuna, os

def of(trial):
    x = trial.suggest_float("x", 0, 1)
    kind = os.environ["KINDS"].split()[trial.number % len(os.environ["KINDS"].split())]
    if kind == "memory":
        raise MemoryError("cannot allocate 9 TB")
    if kind == "torch":
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes")
    if kind == "value":
        raise ValueError(f"x is {x}")
    if kind == "other":
        raise ValueError(f"elsewhere {x}")
    if kind == "mine":
        raise Mine("of mine")
    if kind == "pruned":
        raise optuna.TrialPruned("too wide")
    return x

class Mine(ArithmeticError):
    pass
"""
OWN = """
import torch
from torchmetrics.regression import MeanSquaredError
from hpo.study.data import Data, Split
from hpo.study.objective import Objective
import f

class Trains(Objective):
    defaults = {"x": 0.5}
    space = {"x": {"type": "float", "low": 0, "high": 1}}

    def data(self):
        split = Split(inputs={"x": torch.zeros(4, 1)}, targets=torch.zeros(4, 1))
        return Data(train=split, valid=split, test=split)

    def metrics(self):
        return {"mse": MeanSquaredError()}

    def train(self, params, report):
        Trains.n = getattr(Trains, "n", -1) + 1

        class Trial:
            number = Trains.n
            suggest_float = staticmethod(lambda name, low, high: params["x"])

        report({"mse": f.of(Trial)})
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("f.py").write_text(FUNCTION)
    Path("own.py").write_text(OWN)
    import sys

    sys.modules.pop("f", None)


def run(monkeypatch, kinds, text="", objective="f.py:of", call=invoke, trials=4):
    monkeypatch.setenv("KINDS", kinds)
    Path("s.yaml").write_text(f"objective: {objective}\ntrials: {trials}\ntracking: off\nepochs: 2\n{text}")
    return call("run", "s.yaml", *([] if call is refused else ["--json"]))


def errors():
    query = "select value_json from trial_user_attributes where key = 'error' order by trial_id"
    return [error.strip('"') for (error,) in rows(query)]


@pytest.mark.parametrize("objective", ["f.py:of", "own.py"])
@pytest.mark.parametrize("kind", ["memory", "torch"])
def test_out_of_memory_fails_its_trial_and_the_study_continues(monkeypatch, kind, objective):
    result = summary(run(monkeypatch, f"good {kind}", objective=objective))
    assert result["trials"] == {"complete": 2, "pruned": 0, "failed": 2, "running": 0, "paused": 0, "waiting": 0}
    assert all("out of memory: " in error for error in errors())
    assert summary(run(monkeypatch, f"good {kind}", objective=objective))["trials"] == result["trials"]


@pytest.mark.parametrize("objective", ["f.py:of", "own.py"])
@pytest.mark.parametrize(("kind", "catch"), [("value", "ValueError"), ("mine", "ArithmeticError"), ("mine", "Mine")])
def test_what_catch_names_fails_its_trial_with_type_message_and_place(monkeypatch, objective, kind, catch):
    result = summary(run(monkeypatch, f"good {kind}", f"catch: [KeyError, {catch}]", objective))
    assert (result["trials"]["complete"], result["trials"]["failed"]) == (2, 2)
    assert all(error.startswith(("ValueError: x is", "Mine: of mine")) and "f.py:" in error for error in errors())


@pytest.mark.parametrize("objective", ["f.py:of", "own.py"])
def test_an_infeasible_configuration_is_pruned(monkeypatch, objective):
    result = summary(run(monkeypatch, "good pruned", objective=objective))
    assert (result["trials"]["complete"], result["trials"]["pruned"]) == (2, 2)


def test_an_exception_is_caught_by_the_name_it_is_imported_by() -> None:
    """torch.linalg.LinAlgError calls itself torch._C._LinAlgError."""
    error = torch.linalg.LinAlgError("singular")
    assert fault_of(error, ["torch.linalg.LinAlgError"], "here") == TrialFault(state="FAIL", text="here", caught=True)
    assert fault_of(error, ["numpy.linalg.LinAlgError", "torch.linalg", "linalg.LinAlgError", ""], "here") is None


@pytest.mark.parametrize("catch", ["", "catch: [KeyError]"])
def test_any_other_error_stops_the_study_with_its_traceback(monkeypatch, catch):
    with pytest.raises(ValueError, match="x is"):
        run(monkeypatch, "value", catch)
    states = [state for (state,) in rows("select state from trials order by number")]
    assert states == ["FAIL", *["WAITING"] * 4]  # trial 0 costs nothing: all four are still to do


def test_the_first_three_failing_alike_stop_it_whatever_their_params(monkeypatch):
    with pytest.raises(ValueError, match="x is"):
        run(monkeypatch, "value", "catch: [ValueError]", trials=9)
    assert len(errors()) == 3
    result = summary(run(monkeypatch, "good", "catch: [ValueError]", trials=9))
    assert (result["trials"]["complete"], result["trials"]["failed"]) == (6, 3)


def test_three_that_fail_differently_stop_nothing(monkeypatch):
    result = summary(run(monkeypatch, "value other mine value good", "catch: [ValueError, Mine]", trials=5))
    assert (result["trials"]["complete"], result["trials"]["failed"]) == (1, 4)


@pytest.mark.parametrize(
    ("catch", "said"),
    [
        ("[ValeuError]", "there is no exception 'ValeuError'; did you mean \"ValueError\"?"),
        ("[KeyboardInterrupt]", "must name an Exception, but KeyboardInterrupt is how a process is stopped"),
        ("[print]", "must name an exception, as Python shows it"),
        ("['a b']", "must name an exception"),
        ("ValueError", "catch"),
        ("[1]", "catch"),
    ],
)
def test_a_wrong_catch_is_refused(monkeypatch, catch, said):
    assert said in run(monkeypatch, "good", f"catch: {catch}", call=refused)


def test_what_stops_a_process_or_is_told_to_its_user_is_never_caught():
    from hpo.errors import InputError

    for error in (InputError("x"), KeyboardInterrupt(), SystemExit()):
        assert fault_of(error, ["Exception", "InputError", "HpoError"], "where") is None
    assert fault_of(ValueError("x"), ["Exception"], "where").caught


def test_alike_is_of_one_type_at_one_place():
    assert not all_alike(["ValueError: 1 (f.py:3)"] * 2)
    assert all_alike([f"ValueError: {n} (f.py:3)" for n in range(3)])
    assert not all_alike(["ValueError: 1 (f.py:3)", "ValueError: 1 (f.py:4)", "ValueError: 1 (f.py:3)"])
    assert not all_alike(["ValueError: 1 (f.py:3)"] * 3 + [None])


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_stalled_workers_function_lets_its_trial_go(monkeypatch, wrapped):
    """A peer ended the trial meanwhile: `Trial#0 has already finished` once ended the whole run."""
    first = own.CustomTraining._call

    def stalls(self, function, trial):
        if trial.member.number == 0:
            plain = function.call

            def call(optuna_trial):
                self._search.storage.set_trial_state_values(optuna_trial._trial_id, TrialState.FAIL)
                try:
                    return plain(optuna_trial)
                except Exception as error:
                    if wrapped:
                        raise RuntimeError("of the user's own") from error
                    raise

            function.call = call
            try:
                return first(self, function, trial)
            finally:
                function.call = plain
        return first(self, function, trial)

    monkeypatch.setattr(own.CustomTraining, "_call", stalls)
    out = run(monkeypatch, "good", trials=3)
    assert "another worker took this trial over" in out
    assert summary(out)["trials"]["complete"] == 2


NETWORK = """
import torch, optuna
from torch import nn
from torchmetrics.regression import MeanSquaredError
from hpo.study.data import Data, Split
from hpo.study.objective import Objective

class Wide(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.width = width

    def forward(self, x):
        if WHERE == "forward" and self.width > 4:
            raise ERROR(f"{self.width} is too wide")
        return x

class Lines(Objective):
    defaults = {"optimizer": "sgd", "learning_rate": 0.05, "batch_size": 8, "loss": "mse", "width": 4}
    space = {
        "width": {"type": "int", "low": 1, "high": 8},
        "learning_rate": {"type": "float", "low": 0.01, "high": 0.1},
    }

    def data(self):
        x = torch.linspace(-1, 1, 48)[:, None]
        parts = [Split(inputs={"x": x[i::3]}, targets=2 * x[i::3]) for i in range(3)]
        return Data(train=parts[0], valid=parts[1], test=parts[2])

    def build(self, params, info):
        if WHERE == "build" and params["width"] > 4:
            raise ERROR(f"{params['width']} is too wide")
        return nn.Sequential(Wide(params["width"]), nn.Linear(1, params["width"]), nn.Linear(params["width"], 1))

    def loss(self, outputs, targets, params):
        if WHERE == "loss" and params["width"] > 4:
            raise ERROR(f"{params['width']} is too wide")
        return super().loss(outputs, targets, params)

    def metrics(self):
        return {"mse": MeanSquaredError()}
"""


def network(where, error, stack, text="", call=invoke, trials=8):
    Path("net.py").write_text(NETWORK.replace("WHERE", repr(where)).replace("ERROR", error))
    Path("s.yaml").write_text(
        f"objective: net.py\ntrials: {trials}\ntracking: off\nepochs: 2\nstack: {stack}\nsampler: random\n{text}"
    )
    return call("run", "s.yaml", *([] if call is refused else ["--json"]))


@pytest.mark.parametrize(
    ("stack", "where"),
    [
        pytest.param(stack, where, marks=() if where in by_default else pytest.mark.slow)
        for stack, by_default in ((1, ["build"]), (4, ["forward", "loss"]), ("auto", ["forward"]))
        for where in ("build", "forward", "loss")
    ],
)
def test_a_configuration_that_build_or_loss_calls_infeasible_is_pruned(where, stack):
    out = network(where, "optuna.TrialPruned", stack)
    trials = summary(out)["trials"]
    assert (trials["failed"], trials["waiting"]) == (0, 0)
    assert trials["pruned"] == len(errors()) > 0
    assert trials["complete"] == 8 - trials["pruned"] > 0
    assert all("is too wide" in error for error in errors())


@pytest.mark.parametrize(
    ("stack", "where"),
    [
        pytest.param(stack, where, marks=() if where in by_default else pytest.mark.slow)
        for stack, by_default in ((1, ["build", "loss"]), (4, ["forward"]))
        for where in ("build", "forward", "loss")
    ],
)
def test_an_error_of_one_configuration_that_catch_names_fails_its_trial(where, stack):
    trials = summary(network(where, "ValueError", stack, "catch: [ValueError]"))["trials"]
    assert (trials["pruned"], trials["waiting"]) == (0, 0)
    assert trials["failed"] == len(errors()) > 0
    assert trials["complete"] == 8 - trials["failed"] > 0
    assert all(error.startswith("ValueError: ") and "net.py:" in error for error in errors())


def test_without_catch_it_is_said_before_anything_runs():
    message = network("build", "ValueError", 1, call=refused)
    assert "width=8 failed: ValueError: 8 is too wide" in message


def test_a_space_that_is_infeasible_as_a_whole_is_said():
    message = network("build", "optuna.TrialPruned", 1, "params: {width: {type: int, low: 5, high: 8}}\n", call=refused)
    assert "no extreme configuration of the space can be trained" in message


def test_three_networks_that_fail_alike_stop_the_study():
    text = "catch: [ValueError]\nparams: {width: {type: int, low: 1, high: 8}}\n"
    text += "start_with: [{width: 5}, {width: 6}, {width: 7}]\n"
    with pytest.raises(ValueError, match="is too wide"):
        network("build", "ValueError", 1, text)
    assert len(errors()) == 3


@pytest.mark.parametrize("where", ["build", "forward", "loss"])
def test_a_network_that_ends_the_process_is_said(where):
    text = "params: {width: {type: int, low: 1, high: 8}}\nstart_with: [{width: 2}, {width: 5}]\n"
    with pytest.raises(HpoError, match=r"SystemExit|sys\.exit"):
        network(where, "SystemExit", 1, text)
