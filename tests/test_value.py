"""What a trial's value is: its best epoch's metric, its last one's, or a mean over its last few."""

from contextlib import closing

import pytest
import torch

from hpo.errors import Interrupted
from hpo.runner.confirm import result_of
from hpo.runner.prepare import prepare
from hpo.runner.worker import work
from hpo.search.curves import where
from hpo.search.halving import Halving, HalvingPruner
from hpo.search.opening import open_search
from hpo.stopping import StopToken
from hpo.study.value import averaged, value_of
from hpo.tracking.base import MemoryTracker
from hpo.training.stack import Member
from tests.screens import Screen
from tests.searches import StopWhen
from tests.test_halving import trial
from tests.test_worker import RISING

CURVE = [3.0, 1.0, 2.0, 6.0]


@pytest.mark.parametrize(
    ("value", "maximize", "expected"),
    [
        ("best", False, (1.0, 1)),
        ("best", True, (6.0, 3)),
        ("last", False, (6.0, 3)),
        ("mean_of_2", False, (4.0, 3)),
        ("mean_of_3", True, (3.0, 3)),
        ("mean_of_4", True, (3.0, 3)),
        ("mean_of_100", True, (3.0, 3)),
    ],
)
def test_the_value_of_a_curve_and_the_epoch_whose_weights_are_kept(value, maximize, expected):
    assert value_of(CURVE, value, maximize=maximize) == expected


def test_of_equal_epochs_the_first_is_the_best():
    assert value_of([1.0, 2.0, 2.0], "best", maximize=True) == (2.0, 1)
    assert value_of([1.0], "mean_of_3", maximize=True) == (1.0, 0)


def test_what_others_have_stored_as_a_value_is_no_mean():
    assert [averaged(text) for text in ("mean_of_3", "mean_of_12", "mean_of_", "mean_of_x", "mean_of_³", "")] == [
        *(3, 12, None, None, None, None)
    ]
    assert [where(text, 4) for text in ("best", "last", "mean_of_3", "mean_of_9", "mean_of_x")] == [
        *("epoch 5", "epoch 5", "mean of epochs 3 to 5", "mean of epochs 1 to 5", "epoch 5")
    ]
    assert where("mean_of_3", 0) == "epoch 1"


class Study:
    """One weight that grows by 1 an epoch and is best at 2: the metric is (epoch - 2) ** 2."""

    def __init__(self, study, text):
        path = study(f"objective: rising.py\ntrials: 1\npruner: none\ndevice: cpu\n{text}")
        (path.parent / "rising.py").write_text(RISING)
        self.plan = prepare(path)

    def work(self, stop: StopToken | None = None):
        plan, self.screen = self.plan, Screen()
        with closing(open_search(plan.spec, plan.space, plan.metric, maximize=plan.maximize)) as search:
            try:
                work(plan, plan.load_data(), search, MemoryTracker(), self.screen, stop)
            finally:
                self.trials = search.trials()
                self.best = search.best()
        return self


PARAMS = "params: {learning_rate: 1.0}\n"


@pytest.mark.parametrize("stack", [1, 2])
@pytest.mark.parametrize(
    ("text", "value", "epoch"),
    [
        ("value: best\nepochs: 5\n", 0.0, 1),
        ("value: last\nepochs: 5\n", 9.0, 4),
        ("value: mean_of_2\nepochs: 5\n", 6.5, 4),
        ("value: mean_of_5\nepochs: 5\n", 3.0, 4),
        ("value: mean_of_3\nepochs: 5\npatience: 1\n", pytest.approx(2 / 3), 2),  # epochs 1 to 3: 1, 0, 1
        ("value: mean_of_5\nepochs: 5\npatience: 1\n", pytest.approx(2 / 3), 2),  # there are no more than these
    ],
)
def test_a_trial_has_it_with_the_weights_of_that_epoch(study, text, value, epoch, stack):
    done = Study(study, f"{PARAMS}{text}stack: {stack}\n").work()
    assert (done.best.value, done.best.epoch) == (value, epoch)
    assert done.best.metrics["valid_mse"] == pytest.approx((epoch + 1 - 2) ** 2)
    kept = torch.load("mlruns/checkpoints/study/best.pt", weights_only=True)
    assert (kept["value"], kept["epoch"]) == (value, epoch)
    assert kept["model_state_dict"]["weight"].item() == pytest.approx(epoch + 1)


def test_an_interrupted_trial_has_the_mean_that_it_would_have_had(study):
    text = f"{PARAMS}value: mean_of_4\nepochs: 6\nstack: 1\ncheckpoint_every: 0.001\n"
    stopped = Study(study, text)
    with pytest.raises(Interrupted):
        stopped.work(StopWhen(lambda: len(stopped.screen.epochs) == 4, in_time=True))
    done = stopped.work()
    assert [len(t.intermediate_values) for t in done.trials] == [6]
    assert len(done.screen.epochs) == 2  # of which the epochs before are no part
    assert done.best.value == pytest.approx((1 + 4 + 9 + 16) / 4)


@pytest.mark.parametrize(
    ("text", "history", "expected"),
    [
        ("value: mean_of_2\nepochs: 3\n", [4.0, 1.0], None),
        ("value: mean_of_2\nepochs: 3\n", [4.0, 1.0, 2.0], (1.5, 2)),
        ("value: mean_of_3\nepochs: 9\npatience: 1\n", [1.0, 2.0], (1.5, 1)),
        ("value: last\nepochs: 2\n", [1.0, 2.0], (2.0, 1)),
        ("value: best\nepochs: 2\n", [1.0, 2.0], (1.0, 0)),
    ],
)
def test_a_training_with_fresh_seeds_has_it_by_the_same_rule(study, text, history, expected):
    plan, member = Study(study, f"{PARAMS}{text}").plan, Member(number=0, seed=0, params={})
    member.history[:] = [{"valid_mse": x, "train_loss": 0.0, "valid_loss": 0.0} for x in history]
    result = result_of(plan, member)
    assert (None if result is None else (result.value, result.epoch)) == expected


@pytest.mark.parametrize(("value", "score"), [("best", 1.0), ("last", 1.0), ("mean_of_2", 4.0), ("mean_of_9", 3.0)])
def test_halving_compares_by_it_at_a_rung(value, score):
    rule = Halving(HalvingPruner(16), 1, maximize=False, value=value)
    assert rule.score(trial(0, "W", CURVE), 4) == score
    assert rule.score(trial(1, "W", [*CURVE, 100.0]), 4) == score  # what comes after the rung is no part of it
    upward = Halving(HalvingPruner(16), 1, maximize=True, value=value)
    assert upward.score(trial(0, "W", [-x for x in CURVE]), 4) == score
    assert rule.score(trial(2, "F", CURVE), 4) == float("inf")
