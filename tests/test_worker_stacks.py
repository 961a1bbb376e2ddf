"""A worker with `stack: K`: the same study, each trial with the params and the value that it has one at a time."""

import gc
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient

from hpo.runner.prepare import prepare
from hpo.runner.worker import work
from hpo.search import schema
from hpo.search.away import StorageAway
from hpo.search.opening import open_search
from hpo.search.search import Search
from hpo.stacks.sizing import Sizing, StackSize
from hpo.stacks.vmap_stack import VmapStack
from hpo.tracking.base import MemoryTracker
from hpo.training import memory
from tests.cli import invoke, summary
from tests.screens import Screen

NETWORK = '''
"""Small networks of widths of their own, in double precision."""

import torch
from torch import nn
from torch.nn import functional as F
from torchmetrics.regression import MeanSquaredError

from hpo.study.data import Data, Split
from hpo.study.objective import Objective


class Network(Objective):
    defaults = {"optimizer": "adam", "learning_rate": 1e-2, "batch_size": 32, "width": 8, "kind": "mlp"}
    space = {
        "learning_rate": {"type": "float", "low": 1e-3, "high": 1e-1, "log": True},
        "width": {"type": "int", "low": 4, "high": 40},
    }

    def data(self):
        x = torch.randn(200, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        y = x.sum(1, keepdim=True) + x[:, :1] ** 2
        parts = [slice(0, 120), slice(120, 160), slice(160, 200)]
        train, valid, test = (Split(inputs={"x": x[p]}, targets=y[p]) for p in parts)
        return Data(train=train, valid=valid, test=test)

    def build(self, params, info):
        if params["kind"] == "lstm":
            class Last(nn.Module):
                def __init__(self):
                    super().__init__()
                    self.lstm, self.output = nn.LSTM(4, 3), nn.Linear(3, 1)

                def forward(self, x):
                    return self.output(self.lstm(x.unsqueeze(0))[0][0])

            return Last().double()
        w = params["width"]
        return nn.Sequential(nn.Linear(4, w), nn.ReLU(), nn.Linear(w, 1)).double()

    def loss(self, outputs, targets, params):
        loss = F.mse_loss(outputs, targets)
        return loss * float("nan") if params["kind"] == "nan" else loss

    def metrics(self):
        return {"mse": MeanSquaredError().set_dtype(torch.float64)}
'''


def values(study, name: str, text: str, screen: Screen | None = None) -> dict[int, tuple[str, dict, list[float]]]:
    """Run a study; return each trial's state, params and curve."""
    Path("network.py").write_text(NETWORK)
    plan = prepare(study(f"objective: network.py\nname: {name}\n{text}"))
    search = open_search(plan.spec, plan.space, plan.metric, maximize=plan.maximize)
    try:
        work(plan, plan.load_data(), search, MemoryTracker(), screen or Screen())
        return {
            t.number: (t.state.name, t.params, [v for _, v in sorted(t.intermediate_values.items())])
            for t in search.study.get_trials()
        }
    finally:
        search.close()


HONEST = "sampler: random\npruner: none\ntrials: 14\nepochs: 3\n"


@pytest.mark.parametrize("stack", [4, pytest.param(16, marks=pytest.mark.slow)])
def test_the_same_study_with_another_stack_has_the_same_params_and_values(study, stack: int) -> None:
    alone = values(study, "alone", HONEST)
    stacked = values(study, "stacked", f"{HONEST}stack: {stack}\n")
    assert set(alone) == set(stacked) == set(range(14))
    for number, (state, params, curve) in alone.items():
        assert stacked[number][:2] == (state, params)
        assert stacked[number][2] == pytest.approx(curve, abs=1e-9)


def test_optimizers_batch_sizes_and_widths_divide_a_study_into_stacks(study, said: list[str]) -> None:
    space = """
params:
  optimizer: {type: categorical, choices: [adam, sgd, adadelta]}
  batch_size: {type: categorical, choices: [32, 60]}
  width: {type: int, low: 4, high: 40}
  learning_rate: 0.01
"""
    alone = values(study, "alone", HONEST + space)
    stacked = values(study, "stacked", HONEST + space + "stack: 4\n")
    assert {n: t[:2] for n, t in alone.items()} == {n: t[:2] for n, t in stacked.items()}
    (text,) = [text for text in said if "one at a time" in text]
    assert "are trained one at a time: optimizer adadelta has no stacked form" in text


def test_members_that_are_pruned_leave_and_others_take_their_place(study) -> None:
    pruner = "pruner: {name: median, n_startup_trials: 3, n_warmup_steps: 1}\n"
    text = f"sampler: random\ntrials: 20\nepochs: 6\nstack: 4\n{pruner}"
    states = [state for state, _, _ in values(study, "pruned", text).values()]
    assert len(states) == 20
    assert set(states) == {"COMPLETE", "PRUNED"}


def test_a_network_that_cannot_be_stacked_runs_alone_and_says_why_once(study, said: list[str]) -> None:
    done = values(study, "lstm", "params: {kind: lstm}\ntrials: 4\nstack: 3\n")
    assert [state for state, _, _ in done.values()] == ["COMPLETE"] * 4
    (text,) = [text for text in said if "one at a time" in text]
    assert "torch.func cannot batch it" in text


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let there be memory for stacks of two, and for none larger; return how many members each retreat found left."""
    real = VmapStack.step

    def step(self: VmapStack, inputs, targets):
        if self.capacity > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, inputs, targets)

    monkeypatch.setattr(VmapStack, "step", step)
    left: list[int] = []
    real_free = memory.free_all

    def free(device):
        real_free(device)
        left.append(sum(len(each.members) for each in gc.get_objects() if type(each) is VmapStack))

    monkeypatch.setattr("hpo.runner.worker.free_all", free)
    return left


def test_a_stack_that_does_not_fit_is_halved_and_loses_no_trial(
    study, little_memory: list[int], said: list[str]
) -> None:
    text = "trials: 6\nepochs: 2\nsampler: random\nparams: {learning_rate: {type: float, low: 0.01, high: 0.1}}\n"
    done = values(study, "oom", f"{text}stack: 8\n")
    assert sorted(state for state, _, _ in done.values()).count("COMPLETE") == 6
    assert "out of memory: from now on 4 trials at once; running trials restart from scratch" in said
    assert "out of memory: from now on 2 trials at once; running trials restart from scratch" in said
    assert little_memory == [0, 0]  # the stack that did not fit is gone before the next is made
    curves = {str(params): curve for state, params, curve in done.values() if state == "COMPLETE"}
    alone = {str(params): curve for _, params, curve in values(study, "alone", text).values()}
    assert curves.keys() == alone.keys()
    for params, curve in alone.items():
        assert curves[params] == pytest.approx(curve, abs=1e-9)


@pytest.mark.slow
def test_why_trials_are_not_stacked_is_said_once_though_the_stacks_are_halved(
    study, little_memory: list[int], said: list[str]
) -> None:
    rates = [f"{{optimizer: {o}, learning_rate: 0.0{n}}}" for o in ("adam", "adadelta") for n in (1, 2, 3, 4)]
    space = "params: {learning_rate: {type: float, low: 0.01, high: 0.1}, "
    space += "optimizer: {type: categorical, choices: [adam, adadelta]}}\n"
    values(study, "oom", f"trials: 8\nepochs: 1\nstack: 8\nstart_with: [{', '.join(rates)}]\n{space}")
    halved = [place for place, text in enumerate(said) if text.startswith("out of memory: ")]
    (alone,) = [place for place, text in enumerate(said) if "optimizer adadelta has no stacked form" in text]
    assert alone < halved[0]


def test_torchs_settings_are_as_before_once_a_study_has_run(study, monkeypatch: pytest.MonkeyPatch) -> None:
    n_threads, during = torch.get_num_threads(), []
    monkeypatch.setattr(Sizing, "choose", lambda self: StackSize(threads=n_threads + 1, why="because"))
    torch.manual_seed(3)
    before = torch.get_rng_state()
    screen = Screen(lambda number, epoch: during.append(torch.get_num_threads()))
    values(study, "threads", "trials: 2\nstack: auto\nsampler: random\n", screen)
    assert set(during) == {n_threads + 1}
    assert torch.get_num_threads() == n_threads
    assert torch.equal(torch.get_rng_state(), before)


def test_a_nan_fails_alone_in_a_stack(study) -> None:
    space = "params: {kind: {type: categorical, choices: [mlp, nan]}, learning_rate: 0.01}\n"
    done = values(study, "nan", f"trials: 8\nepochs: 2\nstack: 4\nsampler: random\npruner: none\n{space}")
    assert {params["kind"]: state for state, params, _ in done.values()} == {"mlp": "COMPLETE", "nan": "FAIL"}


def test_how_stacks_run_is_said_once_tagged_and_in_the_status(study) -> None:
    text = "trials: 6\nepochs: 2\nstack: 3\nsampler: random\ntracking: sqlite:///mlruns/mlflow.db\n"
    path = study(f"name: paths\n{text}params: {{learning_rate: {{type: float, low: 0.01, high: 0.1}}}}\n")
    assert invoke("run", path).count("stacks run captured") == 1
    said = invoke("status", path, "--json")
    assert "stacks run captured\n" in said
    assert summary(said)["stacks"] == ["captured"]
    client = MlflowClient("sqlite:///mlruns/mlflow.db")
    (parent,) = client.search_runs(
        [client.get_experiment_by_name("paths").experiment_id], "tags.`hpo.stack_path` != ''"
    )
    assert parent.data.tags["hpo.stack_path"] == "captured"


def test_a_storage_that_is_away_then_does_not_hold_up_training(study, monkeypatch: pytest.MonkeyPatch) -> None:
    """How stacks run is stored as soon as the storage is back."""
    real, refused = Search.remember, []

    def remember(self: Search, key: str, value: object) -> None:
        if key == schema.STACK_PATHS and len(refused) < 2:
            assert self.storage.in_a_hurry(), "it would be waited for"
            refused.append(key)
            raise StorageAway("just now")
        real(self, key, value)

    monkeypatch.setattr(Search, "remember", remember)
    path = study("trials: 4\nepochs: 4\nstack: 4\nsampler: random\npruner: none\n")
    invoke("run", path)
    assert len(refused) == 2
    assert summary(invoke("status", path, "--json"))["stacks"] == ["captured"]
