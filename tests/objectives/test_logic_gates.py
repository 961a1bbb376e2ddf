"""Logic gates: the documented weights make no error, and what counts errors counts them all."""

import pytest
import torch
from hpo.objectives.logic_gates import INPUTS, OUTPUTS, Errors, LogicGates, Options

from hpo.study.data import Split


class Once:
    """A report of one epoch."""

    def __init__(self, valid: Split) -> None:
        self.valid, self.metrics = valid, {}

    def __call__(self, metrics):
        self.metrics = dict(metrics)
        return False


def trained(gate, **params):
    gates = LogicGates(Options(gate))
    report = Once(gates.data().valid)
    return gates.train({**gates.defaults, **params}, report), report.metrics


@pytest.mark.parametrize("gate", OUTPUTS)
def test_the_documented_weights_make_no_error(gate):
    network, metrics = trained(gate)
    assert metrics == {"errors": 0.0, "accuracy": 1.0}
    assert network(INPUTS).ravel().tolist() == OUTPUTS[gate]


def test_weights_that_are_whole_numbers_are_weights_too():
    assert trained("or", weight1=1, weight2=1, bias=-1)[1] == {"errors": 2.0, "accuracy": 0.5}


def test_errors_are_counted_over_all_batches():
    errors = Errors()
    zeros = torch.zeros(3, 1)
    errors.update(zeros, torch.tensor([[0.0], [1.0], [1.0]]))
    errors.update(zeros, torch.tensor([[1.0], [0.0], [0.0]]))
    assert errors.compute() == 3


def test_nothing_has_a_gradient():
    assert not any(weight.requires_grad for weight in trained("xor")[0].parameters())
