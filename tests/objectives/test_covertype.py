"""Covertype: every row in one split, each class in equal shares, and the numbers apart from what is 0 or 1."""

from pathlib import Path

import pytest
import torch

from hpo.study.data import data_home
from hpo.study.loading import load

FILE = data_home() / "sklearn/covertype/samples_py3"
pytestmark = pytest.mark.skipif(not FILE.exists(), reason=f"there is no {FILE}")


@pytest.fixture(scope="module")
def objective():
    objective, faults = load("covertype", {"embedding": "periodic"}, Path())
    assert not faults
    return objective


@pytest.fixture(scope="module")
def data(objective):
    return objective.data()


def test_every_row_is_in_a_split_and_each_class_in_its_share(data):
    assert [len(split) for split in data.splits.values()] == [371_847, 92_963, 116_202]
    counts = [torch.bincount(split.targets, minlength=7) for split in data.splits.values()]
    total = sum(counts)
    assert total.tolist() == [211_840, 283_301, 35_754, 2_747, 9_493, 17_367, 20_510]
    for count, share in zip(counts, (0.64, 0.16, 0.2), strict=True):
        torch.testing.assert_close(count / total, torch.full((7,), share), atol=5e-4, rtol=0)


def test_numbers_are_scaled_and_what_is_0_or_1_stays(objective, data):
    prepared = data.valid.through(objective.preprocess(data.train)).inputs["features"]
    assert torch.equal(prepared[:, 10:], data.valid.inputs["features"][:, 10:])
    assert set(prepared[:, 10:].unique().tolist()) == {0.0, 1.0}
    assert prepared[:, :10].mean(0).abs().max() < 0.1
    assert (prepared[:, :10].std(0) - 1).abs().max() < 0.3


@pytest.mark.parametrize("ensemble", [0, 4])
def test_networks_give_logits_of_seven_classes(objective, data, ensemble):
    params = {**objective.defaults, "ensemble": ensemble}
    outputs = objective.build(params, data.info)(torch.rand(5, 54))
    if ensemble:
        outputs, members = outputs
        assert members.shape == (5, 4, 7)
        torch.testing.assert_close(outputs.exp(), members.softmax(-1).mean(1))
    assert outputs.shape == (5, 7)
