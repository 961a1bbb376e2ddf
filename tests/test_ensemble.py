"""Several networks of the chosen params: their tests over seeds, and their mean exported as one model."""

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import hpo
from hpo.errors import InputError
from hpo.export.copying import copied
from hpo.export.ensemble import Ensemble, Link, link_of
from hpo.runner.opening import open_existing
from hpo.runner.prepare import prepare
from hpo.runner.several import over_seeds, seeds_of
from hpo.seeds import derive
from hpo.stacks.sizing import Sizing, StackSize
from tests.cli import invoke, refused, summary
from tests.conftest import LINEAR
from tests.test_own import OWN

TEXT = "epochs: 3\npruner: none\nstack: 1\n"
SEEDS = torch.Generator().manual_seed(0)
X = torch.randn(7, 4, generator=SEEDS)


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 2)

    def forward(self, x):
        return self.a(x), self.b(x)


@pytest.mark.parametrize(
    ("head", "n_outputs"),
    [
        (nn.Softmax(dim=-1), 3),
        (nn.Softmax(dim=1), 3),
        (nn.Sigmoid(), 1),
    ],
)
def test_the_head_gives_the_mean_of_probabilities(head, n_outputs):
    networks = [nn.Linear(4, n_outputs) for _ in range(3)]
    one = Ensemble(networks, link_of(head, max(2, n_outputs)))
    expected = torch.stack([head(network(X)) for network in networks]).mean(0)
    torch.testing.assert_close(head(one(X)), expected)
    assert not torch.allclose(head(torch.stack([network(X) for network in networks]).mean(0)), expected, atol=1e-4)


def test_losses_take_its_outputs_as_they_take_a_networks():
    networks = [nn.Linear(4, 3) for _ in range(3)]
    classes = torch.arange(7) % 3
    one = Ensemble(networks, link_of(nn.Identity(), 3, "softmax"))
    shares = torch.stack([network(X).softmax(1) for network in networks]).mean(0)
    torch.testing.assert_close(F.cross_entropy(one(X), classes), F.nll_loss(shares.log(), classes))
    two = Ensemble([nn.Linear(4, 1) for _ in range(2)], link_of(nn.Sigmoid(), 2))
    rate = torch.stack([network(X).sigmoid() for network in two.networks]).mean(0)
    target = (classes[:, None] > 1).float()
    torch.testing.assert_close(F.binary_cross_entropy_with_logits(two(X), target), F.binary_cross_entropy(rate, target))


def test_of_numbers_and_of_what_stands_beside_the_prediction_it_is_the_plain_mean():
    networks = [nn.Linear(4, 1) for _ in range(3)]
    assert link_of(nn.Linear(1, 1), 0) == Link("none")
    expected = torch.stack([network(X) for network in networks]).mean(0)
    torch.testing.assert_close(Ensemble(networks, Link("none"))(X), expected)
    several = [Two(), Two()]
    first, second = Ensemble(several, Link("softmax"))(X)
    torch.testing.assert_close(first.softmax(1), torch.stack([each.a(X).softmax(1) for each in several]).mean(0))
    torch.testing.assert_close(second, torch.stack([each.b(X) for each in several]).mean(0))


def test_sure_networks_are_no_hindrance():
    networks = [nn.Linear(1, 2), nn.Linear(1, 2)]
    for network, sign in zip(networks, (1, -1), strict=True):
        network.weight.data = torch.tensor([[sign * 1e4], [-sign * 1e4]])
    one = Ensemble(networks, Link("softmax"))(torch.ones(1, 1))
    torch.testing.assert_close(one.softmax(1), torch.tensor([[0.5, 0.5]]))
    assert torch.isfinite(Ensemble(networks[:1], Link("softmax"))(torch.ones(1, 1))).all()
    assert torch.isfinite(Ensemble(networks[:1], Link("sigmoid"))(torch.ones(1, 1))).all()


def test_a_head_of_another_kind_is_refused_for_classes():
    with pytest.raises(InputError, match="ensemble: no outputs are known that a Tanh takes to a mean of probabilities"):
        link_of(nn.Tanh(), 2)


def test_what_is_held_to_of_one_network_is_not_broken_by_several(study):
    limits = 'constraints: {n_parameters: "<= 1000000"}\n'
    with pytest.raises(
        InputError, match="ensemble: n_parameters is held to of a trial's one network, and 3 are exported"
    ):
        prepare(study(f"{limits}ensemble: 3\n"))
    assert prepare(study(limits)).spec.ensemble == 1


@pytest.mark.parametrize("stack", [1, 4])
def test_an_ensemble_is_exported_as_one_model_and_tested_as_one(study, stack):
    path = study(TEXT.replace("stack: 1", f"stack: {stack}") + "ensemble: 3\n")
    first = summary(invoke("run", path, "--json"))
    plan = prepare(path)
    data = plan.load_data()
    state = torch.load("mlruns/bundles/study/model.pt", weights_only=True)["model_state_dict"]
    weights = [(state[f"network.networks.{i}.weight"], state[f"network.networks.{i}.bias"]) for i in range(3)]
    assert len({tuple(weight.ravel().tolist()) for weight, _ in weights}) == 3
    x, y = data.test.inputs["features"], data.test.targets
    expected = torch.stack([F.linear(x, *each) for each in weights]).mean(0)
    for file in ("model.torchscript.pt",):
        torch.testing.assert_close(torch.jit.load(f"mlruns/bundles/study/{file}")(x), expected)
    predicted = hpo.load_bundle("mlruns/bundles/study").predict({"features": x.numpy()})
    assert len(predicted) == 50
    r2 = 1 - (expected - y).square().sum() / (y - y.mean()).square().sum()
    assert first["test"]["r2"] == pytest.approx(float(r2), abs=1e-4)
    assert first["test_of_seeds"]["n"] == 3
    assert first["test_evaluations"] == 1
    about = json.loads(Path("mlruns/bundles/study/bundle.json").read_text())
    assert (about["networks"], about["n_parameters"]) == (3, 15)
    assert about["metrics"]["test_mean_of_seeds"] == pytest.approx(first["test_of_seeds"]["mean"])
    assert "the standard deviation over these networks: " in Path("mlruns/bundles/study/MODEL.md").read_text()


def test_refit_seeds_export_the_network_that_there_is_without_and_say_how_seeds_differ(study):
    alone = summary(invoke("run", study(TEXT + "name: alone\n"), "--json"))
    printed = invoke("run", study(TEXT + "refit_seeds: 3\n"), "--json")
    found = summary(printed)
    assert found["test"]["r2"] == pytest.approx(alone["test"]["r2"], abs=1e-4)
    assert found["test_of_seeds"]["n"] == 3
    assert 0 < found["test_of_seeds"]["std"]["r2"] < 1
    assert "mean of 3 seeds: " in printed
    assert "mean of 3 seeds: " in invoke("status", "study.yaml")
    invoke("report", "study.yaml", "--format", "md", "--out", "r.md")
    assert "of 3 seeds: loss" in Path("r.md").read_text()
    again = invoke("run", study(TEXT + "refit_seeds: 3\n"), "--json")
    assert summary(again) == found


class Keeping(nn.Module):
    """Keeps what it computes, for a loss, as hooks do that make a weight before each forward."""

    def __init__(self):
        super().__init__()
        with pytest.warns(FutureWarning, match="weight_norm"):
            self.layer = nn.utils.weight_norm(nn.Linear(4, 3))
        self.kept = []

    def forward(self, x):
        y = self.layer(x)
        self.kept = [y, {"mean": y.mean()}]
        return y


def test_a_network_is_copied_whatever_its_forward_has_left_in_it():
    network = Keeping()
    network(X).sum().backward()
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(network)
    made = copied(network)
    assert made.layer is not network.layer
    assert made.layer.weight_g is not network.layer.weight_g
    torch.testing.assert_close(dict(made.state_dict()), dict(network.state_dict()), rtol=0, atol=0)
    torch.testing.assert_close(made.kept[1]["mean"], network.kept[1]["mean"])
    torch.testing.assert_close(made(X), network(X), rtol=0, atol=0)
    with torch.no_grad():
        made.layer.weight_g.mul_(2)  # its own, by which it makes its weight
        torch.testing.assert_close(made(X) - made.layer.bias, 2 * (network(X) - network.layer.bias))
    torch.testing.assert_close(Ensemble([network], Link("none"))(X), network(X))


@pytest.mark.parametrize("keys", ["refit_seeds: 2", "ensemble: 2"])
def test_networks_whose_hooks_make_a_weight_are_trained_with_several_seeds(study, keys):
    path = study(TEXT + f"trials: 1\nbaseline: false\n{keys}\n")
    hooked = """import warnings
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch would rather have parametrizations.weight_norm
            return nn.utils.weight_norm(nn.Linear(info.n_features, 1))"""
    Path("linear.py").write_text(LINEAR.replace("return nn.Linear(info.n_features, 1)", hooked))
    found = summary(invoke("run", path, "--json"))
    assert found["test_of_seeds"]["n"] == 2
    state = torch.load("mlruns/bundles/study/model.pt", weights_only=True)["model_state_dict"]
    assert sum(name.endswith("weight_g") for name in state) == (2 if "ensemble" in keys else 1)


@pytest.mark.parametrize(
    "seeds",
    [
        3,
        {"n": 2, "mean": {"r2": "x"}, "std": {"r2": 1}},
        *(pytest.param(seeds, marks=pytest.mark.slow) for seeds in (None, {"n": 3}, {"mean": [1]})),
    ],
)
def test_what_others_wrote_of_seeds_into_the_storage_is_left_out(study, seeds):
    path = study(TEXT)
    invoke("run", path)
    plan = prepare(path)
    search = open_existing(plan, path)
    search.remember("hpo:result", {**search.attrs["hpo:result"], "seeds": seeds})
    search.close()
    assert summary(invoke("status", path, "--json"))["test_of_seeds"] is None


def test_another_number_of_networks_is_another_end(study):
    invoke("run", study(TEXT))
    found = summary(invoke("run", study(TEXT + "ensemble: 2\n"), "--json"))
    assert found["test_evaluations"] == 2
    assert json.loads(Path("mlruns/bundles/study/bundle.json").read_text())["networks"] == 2


def test_an_objective_that_trains_itself_gives_an_ensemble_too(study, tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    invoke("run", study(f"{TEXT}objective: own.py\nensemble: 2\n"))
    state = torch.load("mlruns/bundles/study/model.pt", weights_only=True)["model_state_dict"]
    assert {name for name in state if name.endswith("weight")} == {f"network.networks.{i}.weight" for i in range(2)}


OF_CLASSES = LINEAR.replace("y = x.sum(1, keepdim=True)", "y = (x.sum(1) > 0).long()").replace(
    "R2Score()", "Accuracy()"
)
OF_CLASSES = OF_CLASSES.replace("return nn.Linear(info.n_features, 1)", "return nn.Linear(info.n_features, 2)")
OF_CLASSES = OF_CLASSES.replace("F.mse_loss(outputs, targets)", "F.nll_loss(F.log_softmax(outputs, 1), targets)")
OF_CLASSES = OF_CLASSES.replace("r2", "accuracy").replace("from torchmetrics.regression import R2Score", "")
OF_CLASSES = OF_CLASSES.replace("Accuracy()", "torchmetrics.Accuracy(task='multiclass', num_classes=2)")
OF_CLASSES = OF_CLASSES.replace("import torch\n", "import torch\nimport torchmetrics\n", 1)


def test_of_logits_that_only_an_own_loss_knows_as_such_the_probabilities_have_the_mean(study, tmp_path):
    (tmp_path / "classes.py").write_text(OF_CLASSES)
    invoke("run", study(f"{TEXT}objective: classes.py\nensemble: 3\n"))
    state = torch.load("mlruns/bundles/study/model.pt", weights_only=True)["model_state_dict"]
    weights = [(state[f"network.networks.{i}.weight"], state[f"network.networks.{i}.bias"]) for i in range(3)]
    expected = torch.stack([F.linear(X, *each).softmax(1) for each in weights]).mean(0)
    got = torch.jit.load("mlruns/bundles/study/model.torchscript.pt")(X).softmax(1)
    torch.testing.assert_close(got, expected)


def test_each_network_has_a_seed_of_its_own_and_the_first_that_of_the_trial(study):
    plan = prepare(study("ensemble: 4\n"))

    class Trial:
        seed = 5

    assert seeds_of(plan, Trial()) == [5, *(derive(42, "refit", i) for i in (1, 2, 3))]


def test_how_many_to_train_at_once_is_not_measured_at_the_end_of_a_studys_time(study, monkeypatch):
    """Each size is compiled for that, which took minutes where the study had seconds left."""
    asked = []
    monkeypatch.setattr(Sizing, "choose", lambda self: asked.append(self) or StackSize(why="not measured"))
    invoke("run", study("ensemble: 3\npruner: none\ntime: 60s\ntrials: 2\nepochs: 3\n"))
    assert [sizing.n_trials for sizing in asked] == [3, 1], "the ensemble, and the default configuration"
    assert all(sizing.seconds < 60 for sizing in asked)
    assert all(1 <= sizing.task.epochs <= 3 for sizing in asked), "those of the refit"


def test_an_objectives_pace_may_name_an_ensemble_where_the_time_is_long_enough(study, tmp_path):
    (tmp_path / "linear.py").write_text(LINEAR + '    pace = {"epochs": 7, "ensemble": 5}\n')

    def paced(text):
        spec = prepare(study(text)).spec
        return spec.epochs, spec.ensemble

    assert paced("time: 3m\n") == (2, 5), "the study file names its epochs"
    assert paced("time: 2m\n")[1] == 5
    assert paced("time: 90s\n")[1] == 1
    assert paced('time: 3m\nconstraints: {latency: "<= 1s"}\n')[1] == 1, "an ensemble takes five times as long"
    assert paced("time: 3m\nensemble: 2\n")[1] == 2
    assert paced("time: 3m\nrefit_seeds: 2\n")[1] == 1
    assert paced("timeout: 3m\n")[1] == 1


def test_over_seeds_gives_mean_and_standard_deviation():
    assert over_seeds([{"r2": 0.5}]) == {}
    assert over_seeds([{"r2": 0.5}, {"r2": 0.7}]) == {
        "n": 2,
        "mean": {"r2": pytest.approx(0.6)},
        "std": {"r2": pytest.approx(0.1414213562)},
    }


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("ensemble: 0", "ensemble: must be greater than or equal to 1, but got 0"),
        ("refit_seeds: 1.5", "refit_seeds: must be an integer, but got 1.5"),
        ("refit_seeds: 2\nensemble: 3", "refit_seeds: the test metrics of an ensemble's 3 networks are given as those"),
    ],
)
def test_what_is_wrong_is_said_before_the_first_trial(study, keys, message):
    assert message in refused("check", study(f"{keys}\n"))
