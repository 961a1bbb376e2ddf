"""Each stacked optimizer against torch.optim, per member: 50 steps in float64, equal to 1e-6 and in fact to 1e-12."""

import pytest
import torch

from hpo.training import stacked_optim
from hpo.training.optim import make

SHAPES = {"a": (3, 4), "b": (4,), "c": ()}
MEMBERS = {
    "sgd": [
        {},
        {"momentum": 0.9},
        {"momentum": 0.9, "nesterov": True},
        {"weight_decay": 0.1},
        {"momentum": 0.5, "dampening": 0.3, "weight_decay": 0.01},
    ],
    "adam": [{}, {"beta1": 0.8}, {"beta2": 0.9, "eps": 1e-6}, {"weight_decay": 0.1}],
    "adamw": [{}, {"beta1": 0.8}, {"beta2": 0.9, "eps": 1e-6}, {"weight_decay": 0.1}, {"weight_decay": 0.0}],
    "rmsprop": [{}, {"alpha": 0.9}, {"momentum": 0.9}, {"weight_decay": 0.1, "eps": 1e-5}],
    "adagrad": [{}, {"eps": 1e-6}, {"weight_decay": 0.1}],
}


@pytest.mark.parametrize("optimizer", MEMBERS)
def test_equal_to_torch_optim_member_by_member(optimizer: str) -> None:
    torch.manual_seed(0)
    members = [{"optimizer": optimizer, "learning_rate": 0.01 * (i + 1), **m} for i, m in enumerate(MEMBERS[optimizer])]
    k = len(members)
    alone = [
        {
            "a": torch.nn.Parameter(torch.randn(3, 4, dtype=torch.float64)),
            "b": torch.nn.Parameter(torch.randn(4, dtype=torch.float64)),
        }
        for _ in members
    ]
    stacked = {name: torch.stack([each[name].detach().clone() for each in alone]) for name in ("a", "b")}
    reference = [make(m, list(each.values())) for m, each in zip(members, alone, strict=True)]
    each_hyper = [stacked_optim.hyperparameters(optimizer, m) for m in members]
    hyper = {key: torch.tensor([h[key] for h in each_hyper], dtype=torch.float64) for key in each_hyper[0]}
    state = stacked_optim.initial_state(stacked_optim.STATE[optimizer], stacked)
    for t in range(1, 51):
        gradients = {name: torch.randn_like(w) for name, w in stacked.items()}
        stacked, state = stacked_optim.step(optimizer, stacked, gradients, state, hyper, torch.full((k,), float(t)))
        for index, (each, torch_optimizer) in enumerate(zip(alone, reference, strict=True)):
            for name, weight in each.items():
                weight.grad = gradients[name][index].clone()
            torch_optimizer.step()
    for index, each in enumerate(alone):
        for name, weight in each.items():
            torch.testing.assert_close(stacked[name][index], weight.detach(), rtol=0, atol=1e-12)


def test_sgd_of_members_that_all_have_no_momentum_keeps_nothing() -> None:
    torch.manual_seed(0)
    members = [{"learning_rate": 0.01, "weight_decay": 0.1}, {"learning_rate": 0.1}]
    hyper = {
        key: torch.tensor([stacked_optim.hyperparameters("sgd", m)[key] for m in members], dtype=torch.float64)
        for key in stacked_optim.HYPERPARAMETERS["sgd"]
    }
    assert stacked_optim.state_names("sgd", members[0]) == ()
    assert stacked_optim.state_names("sgd", {"momentum": 0.0}) == ("momentum_buffer",)  # a peer may have some
    both = [{"w": torch.randn(2, 3, dtype=torch.float64)}] * 2
    states = [stacked_optim.initial_state(names, both[0]) for names in ((), stacked_optim.STATE["sgd"])]
    for t in range(1, 5):
        gradients = {"w": torch.randn(2, 3, dtype=torch.float64)}
        done = [
            stacked_optim.step("sgd", *each, hyper, torch.full((2,), float(t)))
            for each in ((both[0], gradients, states[0]), (both[1], gradients, states[1]))
        ]
        both, states = [each[0] for each in done], [each[1] for each in done]
        assert states[0] == {"w": {}}
        torch.testing.assert_close(*both, rtol=0, atol=0)


@pytest.mark.parametrize("spread", [1e-3, 1.0, 1e3])
def test_clipping_is_torchs_member_by_member(spread: float) -> None:
    """By the norm of all of a member's gradients together; 0 leaves them as they are, and so does a NaN's neighbour."""
    torch.manual_seed(0)
    norms = torch.tensor([0.0, 0.1, 1.0, 5.0, 1.0], dtype=torch.float64)
    gradients = {name: spread * torch.randn(5, *shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    gradients["a"][4, 0, 0] = torch.nan
    got = stacked_optim.clipped(gradients, norms)
    for k, norm in enumerate(norms.tolist()):
        weights = [torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for shape in SHAPES.values()]
        for name, weight in zip(SHAPES, weights, strict=True):
            weight.grad = gradients[name][k].clone()
        if norm:
            torch.nn.utils.clip_grad_norm_(weights, norm)
        for name, weight in zip(SHAPES, weights, strict=True):
            torch.testing.assert_close(got[name][k], weight.grad, rtol=1e-12, atol=0, equal_nan=True)


def test_a_member_with_nan_touches_no_other() -> None:
    weights = {"w": torch.ones(3, 2)}
    hyper = {key: torch.full((3,), value) for key, value in stacked_optim.hyperparameters("adam", {}).items()}
    gradients = {"w": torch.tensor([[1.0, 1.0], [float("nan"), 1.0], [1.0, 1.0]])}
    new, _ = stacked_optim.step(
        "adam",
        weights,
        gradients,
        stacked_optim.initial_state(stacked_optim.STATE["adam"], weights),
        hyper,
        torch.ones(3),
    )
    assert torch.isfinite(new["w"][[0, 2]]).all()
    assert torch.isnan(new["w"][1, 0])


def test_defaults_are_torch_optims() -> None:
    for optimizer, defaults in stacked_optim.HYPERPARAMETERS.items():
        group = make({"optimizer": optimizer}, [torch.nn.Parameter(torch.zeros(1))]).param_groups[0]
        names = {"learning_rate": "lr"}
        for name, value in defaults.items():
            real = group["betas"][int(name[-1]) - 1] if name.startswith("beta") else group[names.get(name, name)]
            assert float(real) == value, (optimizer, name)


NEAR_ONE = {"adam": {"beta1": 0.9999, "beta2": 0.99999}, "adamw": {"beta2": 0.999999}, "rmsprop": {"alpha": 0.99999}}


@pytest.mark.parametrize("optimizer", NEAR_ONE)
def test_decays_near_one_keep_their_digits_in_single_precision(optimizer: str) -> None:
    torch.manual_seed(0)
    params = {"optimizer": optimizer, "learning_rate": 0.01, **NEAR_ONE[optimizer]}
    weight = torch.nn.Parameter(torch.randn(50))
    stacked, reference = {"w": weight.detach().clone()[None]}, make(params, [weight])
    first = weight.detach().clone()
    hyper = {key: torch.tensor([h]) for key, h in stacked_optim.hyperparameters(optimizer, params).items()}
    state = stacked_optim.initial_state(stacked_optim.STATE[optimizer], stacked)
    for t in range(1, 31):
        gradients = {"w": torch.randn(1, 50)}
        stacked, state = stacked_optim.step(optimizer, stacked, gradients, state, hyper, torch.full((1,), float(t)))
        weight.grad = gradients["w"][0].clone()
        reference.step()
    moved, by_torch = stacked["w"][0] - first, weight.detach() - first
    torch.testing.assert_close(moved, by_torch, rtol=2e-5, atol=2e-6 * float(by_torch.abs().max()))
