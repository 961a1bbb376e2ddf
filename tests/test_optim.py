"""The engine's own params: torch.optim by name, which argument each one is, and what is refused."""

import pytest
import torch
from torch import nn

from hpo.study.space import build
from hpo.study.spec import parse_param
from hpo.training import optim

GOOD = {"optimizer": ["adam"], "learning_rate": [1e-3], "batch_size": [64]}


def made(**params):
    return optim.make({"learning_rate": 0.1, "batch_size": 4, **params}, nn.Linear(2, 1).parameters())


def messages(**values):
    return [(fault.path, fault.message) for fault in optim.faults({**GOOD, **values})]


@pytest.mark.parametrize(
    ("name", "cls"),
    [
        ("adam", torch.optim.Adam),
        ("AdamW", torch.optim.AdamW),
        ("ADAMW", torch.optim.AdamW),
        ("sgd", torch.optim.SGD),
        ("SGD", torch.optim.SGD),
        ("rmsprop", torch.optim.RMSprop),
        ("NAdam", torch.optim.NAdam),
    ],
)
def test_an_optimizer_is_found_in_any_case(name, cls):
    assert optim.optimizer_class(name) is cls
    assert type(made(optimizer=name)) is cls
    assert not messages(optimizer=[name])


class OnCpuOnly(torch.optim.Adagrad):
    """As torch 2.11's Adagrad on CUDA: it takes `fused`, and refuses it in its first step."""

    def step(self, closure=None):
        if any(group["fused"] for group in self.param_groups):
            raise RuntimeError("`fused=True` requires all the params to be floating point Tensors of supported devices")
        return super().step(closure)


def test_a_fused_step_is_used_where_torch_has_one_and_no_other_is_tried(monkeypatch):
    assert made(optimizer="adagrad").defaults["fused"] is True
    optim._works_fused.cache_clear()
    monkeypatch.setattr(torch.optim, "Adagrad", OnCpuOnly)
    try:
        got = made(optimizer="adagrad")
        assert got.defaults["fused"] is None
        (weight, _) = got.param_groups[0]["params"]
        weight.grad = torch.ones_like(weight)
        got.step()
    finally:
        optim._works_fused.cache_clear()


@pytest.mark.parametrize("layer", [nn.Embedding(9, 2, sparse=True), nn.EmbeddingBag(9, 2, sparse=True, mode="sum")])
def test_sparse_gradients_are_taken_by_an_optimizer_that_can(layer):
    network = nn.Sequential(layer)
    assert optim.gives_sparse(network)
    assert not optim.gives_sparse(nn.Sequential(nn.Embedding(9, 2), nn.Linear(2, 1)))
    before = layer.weight.detach().clone()
    optimizer = optim.make({"optimizer": "sgd", "learning_rate": 0.5}, network.parameters(), sparse=True)
    network(torch.tensor([[1, 3]])).sum().backward()
    assert layer.weight.grad.is_sparse
    optim.step(optimizer)
    expected = before.clone()
    expected[[1, 3]] -= 0.5
    assert torch.equal(layer.weight, expected)


def test_an_optimizer_whose_step_needs_a_closure_is_refused():
    why = "LBFGS computes the loss several times in a step, which hpo does not do; choose another one"
    assert messages(optimizer=["adam", "LBFGS"]) == [(("params", "optimizer"), why)]


@pytest.mark.parametrize("name", ["optimizer", "adm", "lr_scheduler", "", 3, None])
def test_what_is_no_optimizer_is_not_found(name):
    assert optim.optimizer_class(name) is None


def test_an_unknown_optimizer_is_a_fault_with_a_hint():
    assert messages(optimizer=["adam", "AdamV"]) == [
        (("params", "optimizer"), "there is no torch.optim class 'AdamV'; did you mean \"adam\"?")
    ]
    [(_, message)] = messages(optimizer=["zzz"])
    assert message.startswith("there is no torch.optim class 'zzz'; known: ")
    assert "adamw" in message


def test_an_argument_that_no_optimizer_takes_is_a_fault():
    hint = "remove it, or choose an optimizer that does; an objective's own needs another name"
    assert messages(momentum=[0.9]) == [(("params", "momentum"), f"adam takes no momentum; {hint}")]
    assert messages(optimizer=["adam", "adamw"], momentum=[0, 0.9], rho=[0.9]) == [
        (("params", "momentum"), f"adam and adamw takes no momentum; {hint}"),
        (("params", "rho"), f"adam and adamw takes no rho; {hint}"),
    ]
    assert messages(optimizer=["sgd"], beta1=[0.9]) == [(("params", "beta1"), f"sgd takes no betas; {hint}")]


def test_an_argument_that_one_of_the_optimizers_takes_is_none():
    assert not messages(optimizer=["adam", "sgd"], momentum=[0.9], beta1=[0.9], weight_decay=[0, 0.1])


def test_what_an_unknown_optimizer_takes_is_not_judged():
    assert [path for path, _ in messages(optimizer=["zzz"], momentum=[0.9])] == [("params", "optimizer")]


def test_a_param_of_the_objective_is_not_judged():
    assert not messages(n_hidden=[-3], dropout=["lots"])


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("batch_size", 0, "a whole number of at least 1"),
        ("batch_size", 1.5, "a whole number of at least 1"),
        ("batch_size", True, "a whole number of at least 1"),
        ("learning_rate", 0, "a number above 0"),
        ("learning_rate", "1e-3x", "a number above 0"),
        ("learning_rate", float("nan"), "a number above 0"),
        ("weight_decay", -0.1, "a number of at least 0"),
        ("momentum", -1, "a number of at least 0"),
        ("beta1", 1, "a number in [0, 1)"),
        ("beta2", -0.5, "a number in [0, 1)"),
        ("schedule", "cosin", "one of constant, cosine, one_cycle, step"),
        ("schedule", None, "one of constant, cosine, one_cycle, step"),
        ("schedule_pct_start", 0, "a number in (0, 1)"),
        ("schedule_pct_start", 1, "a number in (0, 1)"),
        ("schedule_step_size", 0, "a number of epochs above 0"),
        ("schedule_gamma", 0, "a number above 0"),
        ("max_grad_norm", -1, "a number of at least 0 (0: no clipping)"),
        ("max_grad_norm", "none", "a number of at least 0 (0: no clipping)"),
    ],
)
def test_a_value_out_of_bounds_is_a_fault(name, value, rule):
    good = {"batch_size": 1, "schedule": "cosine"}.get(name, 0.5)
    found = messages(optimizer=["adam", "sgd"], **{name: [good, value]})
    assert found == [(("params", name), f"must be {rule}, but got {value!r}")]


def test_all_faults_come_at_once():
    found = messages(optimizer=["adma"], batch_size=[0], learning_rate=[-1], weight_decay=["x"])
    assert [path[1] for path, _ in found] == ["optimizer", "batch_size", "learning_rate", "weight_decay"]


def test_params_become_the_optimizers_arguments():
    optimizer = made(optimizer="sgd", weight_decay=0.01, momentum=0.9, nesterov=True)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["weight_decay"], group["momentum"], group["nesterov"]) == (0.1, 0.01, 0.9, True)


@pytest.mark.parametrize(
    ("params", "betas"),
    [
        ({}, (0.9, 0.999)),
        ({"beta1": 0.5}, (0.5, 0.999)),
        ({"beta2": 0.99}, (0.9, 0.99)),
        ({"beta1": 0.5, "beta2": 0.99}, (0.5, 0.99)),
    ],
)
def test_betas_are_two_params(params, betas):
    assert made(optimizer="adam", **params).param_groups[0]["betas"] == betas


def test_what_this_optimizer_does_not_take_is_left_out():
    adam = made(optimizer="adam", momentum=0.9, rho=0.5, n_hidden=8).param_groups[0]
    assert not {"momentum", "rho", "n_hidden"} & set(adam)
    assert "betas" not in made(optimizer="sgd", beta1=0.5).param_groups[0]


def test_what_is_not_given_is_torchs_own_default():
    ours = made(optimizer="adamw").param_groups[0]
    torchs = torch.optim.AdamW(nn.Linear(2, 1).parameters()).param_groups[0]
    names = ("weight_decay", "eps", "betas", "amsgrad")
    assert [ours[name] for name in names] == [torchs[name] for name in names]


@pytest.mark.parametrize(("name", "fused"), [("adam", True), ("adamw", True), ("sgd", True), ("rmsprop", None)])
def test_an_optimizer_is_fused_where_torch_has_it(name, fused):
    assert made(optimizer=name).param_groups[0].get("fused") is fused


def test_weights_that_are_not_floating_are_not_fused():
    weights = [nn.Parameter(torch.zeros(2, dtype=torch.complex64))]
    assert not optim.make({"optimizer": "adam", "learning_rate": 0.1}, weights).param_groups[0]["fused"]


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd", "adagrad"])
def test_a_fused_step_is_torchs_plain_step(name):
    """The plain implementation is the slow obvious version; the fused one must match it."""

    def weight_after(make):
        weight = nn.Parameter(torch.linspace(-1, 1, 6))
        optimizer = make([weight])
        for _ in range(3):
            optimizer.zero_grad()
            (weight**2).sum().backward()
            optimizer.step()
        return weight.detach()

    fused = weight_after(lambda w: optim.make({"optimizer": name, "learning_rate": 0.1, "weight_decay": 0.01}, w))
    plain = weight_after(lambda w: optim.optimizer_class(name)(w, lr=0.1, weight_decay=0.01, foreach=False))
    torch.testing.assert_close(fused, plain, rtol=1e-6, atol=1e-7)


def test_betas_are_floats_though_one_is_written_as_a_whole_number():
    assert made(optimizer="adam", beta1=0, beta2=0.9).defaults["betas"] == (0.0, 0.9)
    assert made(optimizer="adam", beta1=0).defaults["betas"] == (0.0, 0.999)


@pytest.mark.parametrize(
    ("name", "value"),
    [("eps", -1), ("alpha", -0.1), ("rho", 1.1), ("dampening", "much"), ("nesterov", "yes"), ("amsgrad", 0.5)],
)
def test_what_torch_refuses_is_a_fault_of_the_file(name, value):
    [(path, message)] = messages(optimizer=["adam", "sgd", "rmsprop", "adadelta"], **{name: [value]})
    assert path == ("params", name)
    assert message.endswith(f", but got {value!r}")


RULE = "sgd takes nesterov: true only with a momentum above 0 and no dampening, but "
HINT = "; let it have no other, or make one depend on another (`when`)"
SGD = {"optimizer": "sgd", "learning_rate": 0.1, "batch_size": 4, "nesterov": True, "momentum": 0.9}
FLOAT = {"type": "float", "low": 0.5, "high": 0.9}


def choices(*several):
    return {"type": "categorical", "choices": list(several)}


@pytest.mark.parametrize(
    ("params", "got"),
    [
        ({"momentum": 0}, "momentum can be 0"),
        ({"momentum": FLOAT | {"or": 0}}, "momentum can be 0"),
        ({"momentum": FLOAT | {"low": 0}}, "momentum can be 0"),
        ({"momentum": choices(0.9, 0)}, "momentum can be 0"),
        ({"momentum": FLOAT | {"when": {"warm": ["yes"]}}, "warm": choices("yes", "no")}, "there can be none"),
        ({"dampening": 0.1}, "dampening can be 0.1"),
        ({"dampening": FLOAT}, "dampening can be 0.5"),
        ({"nesterov": choices(True, False), "momentum": FLOAT | {"or": 0}}, "momentum can be 0"),
        ({"optimizer": choices("adam", "SGD"), "momentum": 0}, "momentum can be 0"),
        (
            {
                "layers": {"type": "int", "low": 1, "high": 9},
                "momentum": FLOAT | {"or": 0},
                "nesterov": choices(True) | {"when": {"layers": 4}},
            },
            "momentum can be 0",
        ),
    ],
)
def test_nesterov_that_torch_refuses_in_some_trial_is_a_fault_of_the_file(params, got):
    assert together(params) == [(("params", "nesterov"), RULE + got + HINT)]


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"momentum": FLOAT, "dampening": 0},
        {"nesterov": False, "momentum": 0, "dampening": 0.1},
        {"nesterov": choices(True, False), "dampening": FLOAT | {"when": {"nesterov": False}}},
        {"optimizer": choices("adam", "sgd"), "momentum": FLOAT | {"when": {"optimizer": "sgd"}}},
        {
            "optimizer": choices("rmsprop", "sgd"),
            "momentum": 0,
            "nesterov": choices(True) | {"when": {"optimizer": "rmsprop"}},
        },
        {"momentum": "lots"},
    ],
)
def test_nesterov_that_torch_takes_in_every_trial_is_none(params):
    assert together(params) == []


def together(params):
    space, faults = build({name: parse_param(entry) for name, entry in (SGD | params).items()}, ())
    assert not faults
    return [(fault.path, fault.message) for fault in optim.faults_together(space.combinations(optim.TOGETHER))]
