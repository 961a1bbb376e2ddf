"""Synthetic binary data: the documented network by its names, and points that can be told apart."""

import torch
from hpo.objectives.models import BinaryClassifier
from hpo.objectives.synthetic_binary import Options, SyntheticBinary


def names(activation):
    return [name for name, _ in BinaryClassifier([5, 5, 3, 1], activation).named_children()]


def test_modules_have_the_documented_names():
    assert names("relu") == ["linear0", "relu0", "linear1", "relu1", "linear2"]
    assert names("tanh") == ["linear0", "tanh0", "linear1", "tanh1", "linear2"]
    assert names("relu_tanh") == ["linear0", "relu_tanh0", "linear1", "relu1", "linear2"]


def test_the_documented_network_is_the_default_of_blobs():
    objective = SyntheticBinary(Options(data="blobs"))
    info = objective.data().info
    shapes = {name: tuple(w.shape) for name, w in objective.build(objective.defaults, info).named_parameters()}
    assert shapes["linear0.weight"] == (5, 5)
    assert shapes["linear1.weight"] == (3, 5)
    assert shapes["linear2.weight"] == (1, 3)


def test_relu_and_tanh_of_the_first_hidden_layer_are_added():
    network = BinaryClassifier([2, 4, 3, 1], "relu_tanh")
    x = torch.randn(6, 2)
    first = network.linear0(x)
    second = network.linear1(torch.relu(first) + torch.tanh(first))
    torch.testing.assert_close(network(x), network.linear2(torch.relu(second)))


def test_classes_are_of_equal_size_and_no_line_separates_the_curves():
    for name in ("moons", "circles"):
        train = SyntheticBinary(Options(data=name)).data().train
        assert 0.45 < train.targets.mean() < 0.55
        x = torch.cat([train.inputs["features"], torch.ones(len(train), 1)], 1)
        line = torch.linalg.lstsq(x, 2 * train.targets - 1).solution
        assert ((x @ line > 0) == (train.targets > 0.5)).float().mean() < 0.95
