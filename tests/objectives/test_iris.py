"""Iris: the documented figures, to the last digit, and what is exported is scikit-learn's perceptron."""

import pytest
import torch
from hpo.objectives.iris import Iris, Options
from sklearn.datasets import load_iris
from sklearn.linear_model import Perceptron
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler


class Reports:
    def __init__(self, objective, data, epochs):
        preprocess = objective.preprocess(data.train)
        self.train, self.valid, self.test = (each.through(preprocess) for each in data.splits.values())
        self.epochs, self.seed, self.metrics = epochs, 0, []

    def __call__(self, metrics):
        self.metrics.append(dict(metrics))
        return len(self.metrics) < self.epochs


def accuracy(network, split):
    return float((network(split.inputs["features"]).argmax(1) == split.targets).float().mean())


def test_perceptron_with_its_defaults_has_the_documented_figures_on_train_and_validation_together():
    objective = Iris(Options(fit="whole"))
    report = Reports(objective, objective.data().for_refit(), epochs=1)
    network = objective.train(objective.defaults, report)
    assert len(report.train) == 112
    assert report.metrics[0]["train_accuracy"] == pytest.approx(0.92857, abs=5e-6)
    assert accuracy(network, report.test) == pytest.approx(0.84211, abs=5e-6)


def test_the_network_scores_as_the_perceptron_that_scikit_learn_documents():
    objective = Iris(Options(fit="whole"))
    report = Reports(objective, objective.data().for_refit(), epochs=1)
    scores = objective.train(objective.defaults, report)(report.test.inputs["features"])
    iris = load_iris()
    train, test, classes, _ = train_test_split(iris.data, iris.target, random_state=0)
    scale = StandardScaler().fit(train)
    expected = Perceptron().fit(scale.transform(train), classes).decision_function(scale.transform(test))
    torch.testing.assert_close(scores.double(), torch.from_numpy(expected), atol=1e-3, rtol=1e-3)


def test_epochs_go_on_until_the_report_says_no_each_in_an_order_of_its_own():
    objective = Iris()
    first, longer = (Reports(objective, objective.data(), epochs) for epochs in (3, 6))
    networks = [objective.train(objective.defaults, report) for report in (first, longer)]
    assert len(first.metrics) == 3
    assert longer.metrics[:3] == first.metrics
    assert not torch.equal(networks[0].weight, networks[1].weight)


def test_params_that_do_not_apply_may_be_left_out():
    objective = Iris()
    report = Reports(objective, objective.data(), epochs=2)
    given = objective.train({"penalty": "none", "fit_intercept": False}, report)
    assert given.bias.abs().sum() == 0
