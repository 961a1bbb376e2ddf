"""California housing as documented: its splits, its two inputs, the auxiliary output; and its study from end to end."""

from pathlib import Path

import pytest
import torch
from sklearn.datasets import fetch_california_housing
from sklearn.model_selection import train_test_split
from torch.nn import functional as F

from hpo.study import losses
from hpo.study.data import data_home, prediction
from hpo.study.loading import load
from tests.conftest import ROOT, run_hpo

FILE = data_home() / "sklearn/cal_housing_py3.pkz"
pytestmark = pytest.mark.skipif(not FILE.exists(), reason=f"there is no {FILE}")


def make(**options):
    objective, faults = load("california_housing", options, Path())
    assert not faults
    objective.info = objective.data().info
    return objective


def network(objective, **params):
    params = {**objective.defaults, **params}
    torch.manual_seed(0)
    return objective.build(params, objective.info), params


def test_a_quarter_is_sklearns_own_split_twice():
    bunch = fetch_california_housing(data_home=str(FILE.parent), download_if_missing=False)
    rest, test, y_rest, y_test = train_test_split(bunch.data, bunch.target, random_state=42)
    train, valid, y_train, y_valid = train_test_split(rest, y_rest, random_state=42)
    assert (len(train), len(valid), len(test)) == (11_610, 3_870, 5_160)
    splits = make(split="quarter").data().splits.values()
    for split, x, y in zip(splits, (train, valid, test), (y_train, y_valid, y_test), strict=True):
        assert torch.equal(split.inputs["features"], torch.from_numpy(x).float())
        assert torch.equal(split.targets[:, 0], torch.from_numpy(y).float())


def test_a_quarter_is_scaled_by_torchs_own_deviation():
    objective = make(split="quarter")
    features = objective.data().train.inputs["features"]
    scale = objective.preprocess(objective.data().train)
    torch.testing.assert_close(scale.std, features.double().std(0).float(), rtol=1e-6, atol=0)


def test_two_inputs_have_the_first_five_and_the_last_six_features():
    one, two = make().data(), make(inputs="two").data()
    features = one.train.inputs["features"]
    assert list(two.train.inputs) == ["wide", "deep"]
    assert torch.equal(two.train.inputs["wide"], features[:, 0:5])
    assert torch.equal(two.train.inputs["deep"], features[:, 2:8])
    assert two.feature_names == one.feature_names[0:5] + one.feature_names[2:8]


@pytest.mark.parametrize("inputs", ["one", "two"])
def test_the_linear_output_sees_the_deep_stacks_output_and_the_raw_wide_input(inputs):
    objective = make(model="wide_and_deep", inputs=inputs, auxiliary=True)
    module, _ = network(objective)
    wide, deep = torch.randn(4, 5), torch.randn(4, 6)
    given = [wide, deep] if inputs == "two" else [torch.randn(4, 8)]
    hidden = given[-1]
    for layer in (module.hidden1, module.hidden2):
        hidden = layer(hidden).relu()
    assert hidden.shape == (4, 40)
    main, auxiliary = module(*given)
    torch.testing.assert_close(main, module.output(torch.cat([given[0], hidden], 1)))
    torch.testing.assert_close(auxiliary, module.auxiliary(hidden))


@pytest.mark.parametrize("loss", ["mse", "quartic", "huber"])
def test_the_auxiliary_output_has_its_share_of_the_loss(loss):
    objective = make(model="wide_and_deep", auxiliary=True)
    main, auxiliary, targets = torch.randn(3, 7, 1).unbind()
    params = {"loss": loss, "auxiliary_weight": 0.3}
    parts = [losses.BY_NAME[loss](each, targets, params, ()) for each in (main, auxiliary)]
    torch.testing.assert_close(objective.loss((main, auxiliary), targets, params), 0.7 * parts[0] + 0.3 * parts[1])
    assert prediction((main, auxiliary)) is main


@pytest.mark.parametrize("model", ["linear", "mlp", "deep", "wide_and_deep"])
@pytest.mark.parametrize("embedding", ["none", "piecewise", "periodic"])
@pytest.mark.parametrize("inputs", ["one", "two"])
def test_any_model_takes_any_inputs_embeddings_and_losses(model, embedding, inputs):
    objective = make(model=model, embedding=embedding, inputs=inputs)
    module, params = network(objective, loss="quartic")
    given = [torch.randn(6, *shape) for shape in objective.info.inputs.values()]
    outputs = module(*given)
    assert outputs.shape == (6, 1)
    objective.loss(outputs, torch.randn(6, 1), params).backward()
    assert all(weight.grad is not None for weight in module.parameters())


def test_an_ensemble_predicts_the_mean_of_its_members_and_each_learns_alone():
    objective = make(model="deep", embedding="piecewise")
    module, params = network(objective, ensemble=4)
    targets = torch.randn(6, 1)
    mean, members = module(torch.randn(6, 8))
    torch.testing.assert_close(mean, members.mean(1))
    expected = torch.stack([F.mse_loss(members[:, k], targets) for k in range(4)]).mean()
    torch.testing.assert_close(objective.loss((mean, members), targets, params), expected)


def test_only_wide_and_deep_has_an_auxiliary_output():
    objective, faults = load("california_housing", {"auxiliary": True}, Path())
    assert objective is None
    assert "auxiliary is an output of model: wide_and_deep" in faults[0].message


def test_the_study_of_two_inputs_and_an_auxiliary_output_exports_what_predicts_by_their_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    study = ROOT / "studies/wide_and_deep.yaml"
    short = (f"--set={each}" for each in ("trials=2", "epochs=2", "tracking=off", "stack=1", "baseline=false"))
    done = run_hpo("run", study, *short)
    assert done.returncode == 0, done.stderr
    model = torch.jit.load(tmp_path / "mlruns/bundles/wide_and_deep/model.torchscript.pt")
    wide, deep = torch.rand(3, 5), torch.rand(3, 6)
    assert model(wide=wide, deep=deep).shape == (3, 1)
    torch.testing.assert_close(model(deep=deep, wide=wide), model(wide, deep))
