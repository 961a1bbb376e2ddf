"""A worker's share of a study: what becomes of each trial, and what storage, tracker, screen and disk hear of it."""

import math
from pathlib import Path

import pytest
import torch
from optuna.trial import TrialState

from hpo.errors import Interrupted
from hpo.runner.prepare import prepare
from hpo.runner.worker import work
from hpo.search.opening import open_search
from hpo.tracking.base import MemoryTracker
from tests.logged import recorded
from tests.screens import Screen
from tests.searches import StopWhen

KINDS = (
    "params: {{kind: {{type: categorical, choices: [good, nan, oom]}}}}\nstart_with: [{}]\ntrials: {}\npruner: none\n"
)

RISING = '''
"""One weight that grows by learning_rate each epoch, and is best at 2: its curve falls, then rises."""

import torch
from torch import nn
from torchmetrics.regression import MeanSquaredError

from hpo.study.data import Data, Split
from hpo.study.objective import Objective


class Weight(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return self.weight.expand(len(x), 1) * 1.0


class Rising(Objective):
    defaults = {"optimizer": "sgd", "learning_rate": 1.0, "batch_size": 8}

    def data(self):
        rows = Split(inputs={"x": torch.zeros(8, 1)}, targets=torch.full((8, 1), 2.0))
        return Data(train=rows, valid=rows, test=rows)

    def build(self, params, info):
        return Weight()

    def loss(self, outputs, targets, params):
        return -outputs.mean()

    def metrics(self):
        return {"mse": MeanSquaredError()}
'''


class Run:
    """One `hpo run` of a study file, without its command line."""

    def __init__(self, path):
        self.plan = prepare(path)
        plan = self.plan
        self.search = open_search(plan.spec, plan.space, plan.metric, maximize=plan.maximize)
        self.tracker, self.screen = MemoryTracker(), Screen()

    def work(self, **more):
        try:
            with recorded() as self.said:
                work(self.plan, self.plan.load_data(), self.search, self.tracker, self.screen, **more)
        finally:
            self.states = [trial.state.name for trial in self.search.study.get_trials()]
            self.attrs = [trial.user_attrs for trial in self.search.study.get_trials()]
        return self


@pytest.fixture
def run(study):
    """Return a function that writes a study file and makes a `Run` of it."""
    made = []
    Path("rising.py").write_text(RISING)

    def make(text=""):
        made.append(Run(study(text)))
        return made[-1]

    yield make
    for each in made:
        each.search.close()


def test_every_metric_of_every_epoch_reaches_storage_and_tracker(run):
    done = run("trials: 2\nepochs: 3\npruner: none").work()
    assert done.states == ["COMPLETE", "COMPLETE"]
    for trial in done.search.study.get_trials():
        curve = done.tracker.metrics[trial.number]
        assert [step for step, _ in curve] == [0, 1, 2]
        assert all(set(metrics) == {"train_loss", "valid_loss", "valid_r2"} for _, metrics in curve)
        assert trial.intermediate_values == {step: metrics["valid_r2"] for step, metrics in curve}
        best = max(range(3), key=lambda epoch: curve[epoch][1]["valid_r2"])
        assert trial.value == curve[best][1]["valid_r2"]
        assert trial.user_attrs["best_epoch"] == best
        assert trial.user_attrs["metrics"] == curve[best][1]
        assert trial.user_attrs["mlflow_run_id"] == f"run-{trial.number}"
        assert done.tracker.ended[trial.number] == ("COMPLETE", None)
        assert done.tracker.params[trial.number].items() >= {"kind": "good", "batch_size": 50, **trial.params}.items()
    assert [(number, set(params)) for number, params in done.screen.started] == [(n, {"learning_rate"}) for n in (0, 1)]
    assert done.screen.epochs == [(n, epoch, 3) for n in (0, 1) for epoch in (1, 2, 3)]
    assert [(n, state) for n, state, _, _ in done.screen.ended] == [(0, "COMPLETE"), (1, "COMPLETE")]


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("nan", "train_loss became nan in epoch 1"),
        ("oom", "out of memory on cpu: "),
    ],
)
def test_a_trial_fails_alone_and_says_why(run, kind, reason):
    done = run(KINDS.format(f"{{kind: good}}, {{kind: {kind}}}, {{kind: good}}", 3)).work()
    assert done.states == ["COMPLETE", "FAIL", "COMPLETE"]
    assert done.attrs[1]["error"].startswith(reason)
    assert done.tracker.ended[1] == ("FAIL", done.attrs[1]["error"])
    assert done.screen.ended[1] == (1, "FAIL", None, done.attrs[1]["error"])
    assert [epoch for n, epoch, _ in done.screen.epochs if n == 1] == [1]
    alone = run("name: alone\n" + KINDS.format("{kind: good}, {kind: good}, {kind: good}", 3)).work()
    assert [done.search.best(n).value for n in (0, 2)] == [alone.search.best(n).value for n in (0, 2)]


def test_a_pruned_trial_is_pruned_everywhere(run):
    done = run("trials: 1\nepochs: 5\npruner: {name: threshold, lower: 2.0, n_warmup_steps: 1}").work()
    assert done.states == ["PRUNED"]
    assert done.tracker.ended == {0: ("PRUNED", None)}
    assert len(done.tracker.metrics[0]) == 2
    ((_, state, value, reason),) = done.screen.ended
    assert (state, reason) == ("PRUNED", None)
    assert value == max(metrics["valid_r2"] for _, metrics in done.tracker.metrics[0])
    assert not Path("mlruns/checkpoints/study/best.pt").exists()


def test_after_its_last_epoch_a_trial_is_complete_whatever_the_pruner_says(run):
    done = run("trials: 1\nepochs: 3\npruner: {name: threshold, lower: 2.0, n_warmup_steps: 2}").work()
    assert done.states == ["COMPLETE"]


@pytest.mark.parametrize(("which", "value", "epoch", "weight"), [("best", 0.0, 1, 2.0), ("last", 4.0, 3, 4.0)])
def test_a_trials_value_and_its_kept_weights_are_those_of_its_best_or_last_epoch(run, which, value, epoch, weight):
    done = run(f"objective: rising.py\ntrials: 1\nepochs: 4\npruner: none\nvalue: {which}").work()
    best = done.search.best()
    assert [m["valid_mse"] for _, m in done.tracker.metrics[0]] == [1.0, 0.0, 1.0, 4.0]
    assert (best.value, best.epoch, best.metrics["valid_mse"]) == (value, epoch, value)
    kept = torch.load("mlruns/checkpoints/study/best.pt", weights_only=True)
    assert kept["model_state_dict"]["weight"].item() == weight
    assert (kept["trial"], kept["value"], kept["epoch"]) == (0, value, epoch)
    assert kept["model_hyperparameters"] == best.params


@pytest.mark.parametrize(("patience", "epochs"), [(1, 3), (2, 4), (4, 6), (6, 7)])
@pytest.mark.parametrize("which", ["best", "last"])
def test_a_trial_ends_complete_once_its_patience_is_over(run, which, patience, epochs):
    """Its curve is 1, 0, 1, 4, 9, ...: the second epoch is the best, and the last that improves anything."""
    text = f"objective: rising.py\ntrials: 1\nepochs: 7\npruner: none\nvalue: {which}\npatience: {patience}"
    done = run(text).work()
    best = done.search.best()
    assert done.states == ["COMPLETE"]
    assert done.tracker.ended == {0: ("COMPLETE", None)}
    assert [m["valid_mse"] for _, m in done.tracker.metrics[0]] == [1.0, 0.0, 1.0, 4.0, 9.0, 16.0, 25.0][:epochs]
    expected = (0.0, 1) if which == "best" else ((epochs - 2.0) ** 2, epochs - 1)
    assert (best.value, best.epoch) == expected
    kept = torch.load("mlruns/checkpoints/study/best.pt", weights_only=True)
    assert kept["model_state_dict"]["weight"].item() == best.epoch + 1


def test_without_patience_and_while_it_improves_a_trial_has_all_its_epochs(run):
    rising = run("objective: rising.py\ntrials: 1\nepochs: 7\npruner: none").work()
    assert len(rising.tracker.metrics[0]) == 7
    better = run("name: better\ntrials: 1\nepochs: 7\npruner: none\npatience: 1").work()  # r2 is maximized
    curve = [metrics["valid_r2"] for _, metrics in better.tracker.metrics[0]]
    assert curve == sorted(curve)
    assert len(curve) == 7


@pytest.mark.parametrize(("rates", "number"), [((1.0, 0.3), 0), ((0.3, 1.0), 1), ((1.0, 2.0), 0)])
def test_the_kept_weights_are_the_best_trials(run, rates, number):
    starts = ", ".join(f"{{learning_rate: {rate}}}" for rate in rates)
    done = run(
        "objective: rising.py\ntrials: 2\nepochs: 4\npruner: none\n"
        f"params: {{learning_rate: {{type: float, low: 0.1, high: 2}}}}\nstart_with: [{starts}]"
    ).work()
    kept = torch.load("mlruns/checkpoints/study/best.pt", weights_only=True)
    assert done.search.best().number == kept["trial"] == number
    assert kept["model_state_dict"]["weight"].item() == 2.0
    assert [path.name for path in Path("mlruns/checkpoints/study").iterdir()] == ["best.pt"]


def test_when_the_time_is_over_the_running_trial_is_given_back_and_no_other_begun(run, monkeypatch):
    monkeypatch.setenv("LINEAR_SECONDS", "0.02")
    first = run("epochs: 1000\ntimeout: 0.5\npruner: none\nstack: 1").work()
    assert first.screen.ended == [(0, "INTERRUPTED", None, "the study's time was over")]
    assert first.tracker.ended == {0: ("INTERRUPTED", "the study's time was over")}
    note = "the study's time (0.5 s) is over: no new trial is started; raise `timeout` to train more"
    assert first.said == [note]
    assert first.search.counts().waiting == 3

    again = run("epochs: 1000\ntimeout: 0.5\npruner: none\nstack: 1").work()
    assert (again.screen.started, again.said) == ([], [note])


def test_a_stop_gives_the_running_trial_back_with_its_params_and_seed(run):
    stopped = run("trials: 2\npruner: none")
    with pytest.raises(Interrupted, match="the running trials were given back, run the same command again to resume"):
        stopped.work(stop=StopWhen(lambda: len(stopped.screen.epochs) == 3))
    assert stopped.tracker.ended == {0: ("COMPLETE", None), 1: ("INTERRUPTED", "interrupted")}
    assert stopped.attrs[1]["error"] == "interrupted"
    again = run("trials: 2\npruner: none").work()
    assert again.states == ["COMPLETE", "FAIL", "COMPLETE"]
    assert again.tracker.params[2] == stopped.tracker.params[1]
    assert again.tracker.metrics[2][0] == stopped.tracker.metrics[1][0]


def test_a_stop_before_the_first_trial_begins_none(run):
    stopped = run()
    with pytest.raises(
        Interrupted, match="interrupted; the running trials were given back, run the same command again to resume"
    ):
        stopped.work(stop=StopWhen(lambda: True))
    assert (stopped.states, stopped.screen.started) == ([], [])


def test_a_bug_is_raised_and_its_trial_given_back(run, monkeypatch):
    monkeypatch.setenv("LINEAR_BUG", "1")
    broken = run("stack: 1")  # with `auto`, a bug shows while it is measured, before there is a trial
    with pytest.raises(KeyError, match="a bug"):
        broken.work()
    assert broken.tracker.ended == {0: ("INTERRUPTED", "KeyError: 'a bug'")}
    assert broken.search.counts().waiting == 3


def test_a_trial_that_a_peer_took_over_is_let_go_and_the_study_goes_on(run, monkeypatch):
    monkeypatch.setattr("hpo.search.retrying.EPOCH_SECONDS", 0.0)
    mine = run("trials: 2\npruner: none\nepochs: 4")

    def steal(number, epoch):
        if (number, epoch) == (0, 2):
            (trial,) = [t for t in mine.search.study.get_trials() if t.number == 0]
            mine.search.storage.inner.set_trial_state_values(trial._trial_id, TrialState.FAIL)

    mine.screen = Screen(steal)
    left = Path("mlruns/checkpoints/study/place-0.pt.elsewhere-1-2.part")  # by a worker that was killed as it wrote
    left.parent.mkdir(parents=True)
    left.touch()
    mine.work()
    assert not left.exists()
    reason = "another worker took this trial over, since this one was not heard of for too long"
    assert mine.tracker.ended == {0: ("INTERRUPTED", reason), 1: ("COMPLETE", None)}
    assert [epoch for n, epoch, _ in mine.screen.epochs if n == 0] == [1, 2]
    assert torch.load("mlruns/checkpoints/study/best.pt", weights_only=True)["trial"] == 1


@pytest.mark.parametrize("stack", [1, 4, "auto"])
def test_a_finished_study_trains_nothing(run, stack):
    run(f"trials: 1\nstack: {stack}").work()
    again = run(f"trials: 1\nstack: {stack}").work()
    assert (again.screen.started, again.said, again.tracker.ended) == ([], [], {})
    assert math.isfinite(again.search.best().value)
