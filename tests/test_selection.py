"""The end of a study: refitted on train + validation for as long as was best, tested once, exported once."""

import json
import shutil

import pytest
import torch
from filelock import FileLock
from torch import nn
from torch.nn import functional as F

from hpo.errors import ExportError, Interrupted
from hpo.runner import checkpoints, turns
from hpo.runner.outcome import outcome
from hpo.runner.refit import bundle_folder, conclude, finish
from hpo.tracking.base import MemoryTracker
from hpo.training.loop import order
from tests.logged import recorded
from tests.searches import Told

EPOCHS = "epochs: 5\npruner: none\n"


@pytest.fixture
def told(study):
    """Return a function that tells trials (learning_rate, value, best epoch); it gives plan, data and search."""
    told = Told()

    def make(trials, text=EPOCHS):
        rates = ", ".join(f"{{learning_rate: {rate}}}" for rate, _, _ in trials)
        path = study(f"{text}trials: {max(1, len(trials))}\nstart_with: [{rates}]")
        ends = {rate: (value, epoch) for rate, value, epoch in reversed(trials)}  # the first of a rate
        return told(path, (lambda claim: ends[claim.params["learning_rate"]]) if trials else None)

    yield make
    told.close()


class Ending:
    """Calls `conclude` as `hpo run` does."""

    def __init__(self, plan, data, search):
        self.parts, self.tracker = (plan, data, search), MemoryTracker()

    def __call__(self, stopping=lambda: False):
        with recorded() as self.said:
            return conclude(*self.parts, self.tracker, stopping)


def n_tests(search):
    return len(search.attrs.get("hpo:test_evaluations", []))


def refitted(data, best, epochs, seed):
    """Train the best params on train + validation as anybody would with torch alone."""
    torch.manual_seed(best.seed)
    network = nn.Linear(4, 1)
    optimizer = torch.optim.Adam(network.parameters(), lr=best.params["learning_rate"])
    x = torch.cat([data.train.inputs["features"], data.valid.inputs["features"]])
    y = torch.cat([data.train.targets, data.valid.targets])
    for r in range(epochs):
        for rows in order(len(x), seed, r).split(best.params["batch_size"]):
            optimizer.zero_grad()
            F.mse_loss(network(x[rows]), y[rows]).backward()
            optimizer.step()
    return network


@pytest.mark.parametrize(("text", "epochs"), [(EPOCHS, 3), (EPOCHS + "value: last\n", 5)])
def test_the_best_params_are_trained_on_train_and_validation_for_the_best_epochs(told, text, epochs):
    plan, data, search = told([(0.02, 0.5, 0), (0.05, 0.9, 2)], text)
    ending = Ending(plan, data, search)
    done = ending()
    assert done.number == search.best().number == 1
    expected = refitted(data, search.best(), epochs, plan.spec.seed)
    saved = torch.load(done.bundle / "model.pt", weights_only=True)
    for name, weight in expected.state_dict().items():
        torch.testing.assert_close(saved["model_state_dict"][f"network.{name}"], weight, atol=1e-6, rtol=0)
    with torch.no_grad():
        outputs = expected(data.test.inputs["features"])
    residual = (outputs - data.test.targets).square()
    variance = (data.test.targets - data.test.targets.mean()).square().sum()
    assert done.test == {
        "loss": pytest.approx(residual.mean().item(), rel=1e-3),
        "r2": pytest.approx(1 - (residual.sum() / variance).item(), abs=1e-4),
    }
    assert ending.said[0] == f"training the params of trial 1 from scratch on train + validation, {epochs} epochs"
    about = json.loads((done.bundle / "bundle.json").read_text())
    assert (about["epochs"], about["trial"], about["trained_on"]) == (epochs, 1, ["train", "valid"])
    assert about["metrics"] == {"of_the_trial": {"valid_r2": 0.9}, "test": dict(done.test)}


def test_a_trial_that_ended_early_by_patience_is_trained_anew_for_as_long_as_it_was(told):
    """With `value: last` too: its value is that of its last epoch, of which it had fewer than `epochs`."""
    plan, data, search = told([(0.05, 0.9, 2)], EPOCHS + "value: last\npatience: 1\n")
    ending = Ending(plan, data, search)
    ending()
    assert ending.said[0] == "training the params of trial 0 from scratch on train + validation, 3 epochs"


class Two(nn.Module):
    """A prediction, and something beside it that only the loss takes."""

    def __init__(self):
        super().__init__()
        self.output, self.aside = nn.Linear(4, 1), nn.Linear(4, 2)

    def forward(self, x):
        return self.output(x), self.aside(x)


def test_of_several_outputs_the_bundle_predicts_the_first(told):
    plan, data, search = told([(0.05, 0.9, 1)])
    plan.objective.build = lambda params, info: Two()
    plan.objective.loss = lambda outputs, targets, params: F.mse_loss(outputs[0], targets) + outputs[1].square().mean()
    done = Ending(plan, data, search)()
    predictions = torch.jit.load(done.bundle / "model.torchscript.pt")(data.test.inputs["features"])
    assert predictions.shape == data.test.targets.shape


def test_the_test_set_is_read_once_and_counted_however_often_a_study_is_concluded(told):
    plan, data, search = told([(0.05, 0.9, 1)])
    first = Ending(plan, data, search)
    done = first()
    assert n_tests(search) == 1
    assert search.attrs["hpo:test_evaluations"] == [{"number": 0, "test": done.test}]
    curve, (step, ending) = first.tracker.metrics[None]
    assert curve == (1, {"best_valid_r2": 0.9})
    told_of = {"test_loss": done.test["loss"], "test_r2": done.test["r2"], "trials_complete": 1}
    assert step == 1
    assert told_of.items() <= ending.items()
    assert first.tracker.best == 0
    assert first.tracker.folders == [bundle_folder(plan)]

    before = (done.bundle / "bundle.json").stat().st_mtime_ns
    again = Ending(plan, data, search)
    assert again() == done
    assert n_tests(search) == 1
    assert again.said == []
    assert again.tracker.metrics == first.tracker.metrics  # told again: whoever concluded may have been killed before
    assert again.tracker.folders == first.tracker.folders
    assert (done.bundle / "bundle.json").stat().st_mtime_ns == before


def test_a_bundle_that_was_deleted_is_exported_anew_and_that_is_counted(told):
    plan, data, search = told([(0.05, 0.9, 1)])
    ending = Ending(plan, data, search)
    done = ending()
    shutil.rmtree(done.bundle)
    assert outcome(search, search.best()) is None
    assert ending() == done
    assert n_tests(search) == 2
    assert json.loads((done.bundle / "bundle.json").read_text())["n_test_evaluations"] == 2


def test_what_a_peer_has_finished_since_the_study_was_seen_is_not_undone(told):
    _, _, search = told([(0.05, 0.9, 1)])
    seen = search.view()
    plan, data, search = told([(0.05, 0.9, 1), (0.09, 0.95, 0)])
    newer = Ending(plan, data, search)()
    assert conclude(plan, data, search, MemoryTracker(), lambda: False, seen) == newer
    assert newer.number == 1
    assert n_tests(search) == 1


def test_another_best_trial_is_another_outcome(told):
    plan, data, search = told([(0.05, 0.9, 1)])
    assert Ending(plan, data, search)().number == 0
    plan, data, search = told([(0.05, 0.9, 1), (0.09, 0.95, 0)])
    done = Ending(plan, data, search)()
    assert done.number == 1
    assert n_tests(search) == 2
    assert outcome(search, search.best()) == done
    assert json.loads((done.bundle / "bundle.json").read_text())["trial"] == 1


def test_without_a_complete_trial_there_is_no_outcome(told):
    plan, data, search = told([])
    search.fail(search.ask().number, "train_loss became nan in epoch 1")
    ending = Ending(plan, data, search)
    assert ending() is None
    assert (n_tests(search), ending.said) == (0, [])


def test_an_interrupted_refit_leaves_nothing_and_reads_no_test(told):
    plan, data, search = told([(0.05, 0.9, 1)])
    ending = Ending(plan, data, search)
    with pytest.raises(Interrupted):
        ending(stopping=lambda: True)
    assert n_tests(search) == 0
    assert not bundle_folder(plan).exists()
    assert ending().number == 0


def held(folder):
    """Return the lock of a study's folder as another process holds it."""
    return FileLock(folder.with_name(f".{folder.name}.lock"))


def test_while_another_process_refits_that_is_said_once_and_a_stop_ends_the_wait(told, monkeypatch):
    monkeypatch.setattr(turns, "_LOOK_SECONDS", 0.02)
    monkeypatch.setattr(turns, "_SAY_SECONDS", 0.0)
    plan, data, search = told([(0.05, 0.9, 1)])
    ending, asked = Ending(plan, data, search), iter([False, False, False, True])
    bundle_folder(plan).parent.mkdir(parents=True)
    with held(bundle_folder(plan)), pytest.raises(Interrupted, match="while another process refits and exports"):
        ending(stopping=lambda: next(asked))
    assert ending.said == ["another process refits and exports the best trial of this study; waiting until it is done"]
    assert list(asked) == []
    assert ending().number == 0
    assert "another process" not in " ".join(ending.said)


def test_a_stop_ends_the_wait_for_the_best_weights_and_leaves_them_to_the_next_run(told, monkeypatch):
    monkeypatch.setattr(turns, "_LOOK_SECONDS", 0.02)
    plan, _, search = told([(0.05, 0.9, 1)])
    folder = checkpoints.folder_of(plan)
    content = {"trial": 0, "study": search.making}
    checkpoints.write(folder / "best-0.pt", content)
    search.storage.interrupt = lambda: True
    with held(folder):
        assert checkpoints.settle_weights(plan, search).best().number == 0
    assert [file.name for file in folder.iterdir()] == ["best-0.pt"]
    checkpoints.settle_weights(plan, search)
    assert [file.name for file in folder.iterdir()] == ["best.pt"]


@pytest.mark.parametrize(
    ("kind", "reason"), [("nan", "train_loss became nan in epoch 1"), ("oom", "out of memory on cpu: ")]
)
def test_a_refit_that_fails_says_so_and_reads_no_test(told, tmp_path, kind, reason):
    params = f"params: {{kind: {kind}, learning_rate: {{type: float, low: 0.01, high: 0.1}}}}\n"
    plan, data, search = told([(0.05, 0.9, 1)], EPOCHS + params)
    with pytest.raises(ExportError, match=f"^trial 0, trained from scratch on train \\+ validation, failed: {reason}"):
        finish(plan, data, search, search.best(), tmp_path / "b", lambda: False)
    assert n_tests(search) == 0
    assert not (tmp_path / "b").exists()


def test_a_refit_whose_network_does_not_fit_says_so(told, tmp_path):
    plan, data, search = told([(0.05, 0.9, 1)])
    best = search.best()
    plan.objective.build = lambda params, info: torch.empty(10**14)
    message = r"^trial 0, trained from scratch on train \+ validation, failed: out of memory on cpu: "
    with pytest.raises(ExportError, match=message):
        finish(plan, data, search, best, tmp_path / "b", lambda: False)
