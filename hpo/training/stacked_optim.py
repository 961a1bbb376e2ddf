"""torch.optim's elementwise optimizers over stacked weights: one step updates all K members at once.

Every hyperparameter is a (K,) tensor, so members of one stack differ in any of them. Each optimizer is written as the
plain formula of torch.optim's page and must equal torch.optim per member (`tests/test_stacked_optim.py`); which of
them a member has is structural. Idea: HFTA (Wang et al., MLSys 2021).

Shapes: K members; a weight `w` is (K, ...), a hyperparameter (K,), the step count `t` (K,).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

State = dict[str, Tensor]
"""One weight's optimizer state by name, each (K, ...)."""
Rule = Callable[[Tensor, Tensor, State, Mapping[str, Tensor]], tuple[Tensor, State]]

HYPERPARAMETERS: Mapping[str, Mapping[str, float]] = {
    "sgd": {"learning_rate": 1e-3, "momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0, "nesterov": 0.0},
    "adam": {"learning_rate": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0},
    "adamw": {"learning_rate": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 1e-2},
    "rmsprop": {"learning_rate": 1e-2, "alpha": 0.99, "eps": 1e-8, "weight_decay": 0.0, "momentum": 0.0},
    "adagrad": {"learning_rate": 1e-2, "eps": 1e-10, "weight_decay": 0.0},
}
"""The hyperparameters of each optimizer and torch.optim's defaults; a member that names any other is not stacked."""
STATE: Mapping[str, tuple[str, ...]] = {
    "sgd": ("momentum_buffer",),
    "adam": ("exp_avg", "exp_avg_sq"),
    "adamw": ("exp_avg", "exp_avg_sq"),
    "rmsprop": ("square_avg", "momentum_buffer"),
    "adagrad": ("sum",),
}
"""What each optimizer keeps of every weight."""


def state_names(optimizer: str, params: Mapping[str, Any]) -> tuple[str, ...]:
    """Return what `optimizer` keeps of every weight of members that have `params`: SGD without momentum nothing."""
    return () if optimizer == "sgd" and "momentum" not in params else STATE[optimizer]


def initial_state(names: Sequence[str], weights: Mapping[str, Tensor]) -> dict[str, State]:
    """Return an optimizer's state before its first step, for every weight: all zeros."""
    return {name: {key: torch.zeros_like(w) for key in names} for name, w in weights.items()}


def hyperparameters(optimizer: str, params: Mapping[str, Any]) -> dict[str, float]:
    """Return one member's hyperparameters, torch.optim's defaults for those that `params` do not hold.

    And 1 - alpha, 1 - beta, log(beta), of which little would be left in single precision where these are near 1.
    """
    values = {name: float(params.get(name, default)) for name, default in HYPERPARAMETERS[optimizer].items()}
    decays = {name: values[name] for name in ("alpha", "beta1", "beta2") if name in values}
    of_new = {f"new_{name}": 1 - decay for name, decay in decays.items()}
    return values | of_new | {f"log_{name}": _log(decay) for name, decay in decays.items() if name != "alpha"}


def _log(x: float) -> float:
    return math.log(x) if x > 0 else -math.inf


def step(
    optimizer: str,
    weights: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
    state: Mapping[str, State],
    hyper: Mapping[str, Tensor],
    t: Tensor,
) -> tuple[dict[str, Tensor], dict[str, State]]:
    """Return the weights and the state after step number `t` (K,), counted from 1. Nothing is changed in place."""
    rule = _RULES[optimizer]
    hyper = {**hyper, **_OF_A_STEP[optimizer](hyper, t)}
    new_weights, new_state = {}, {}
    for name, w in weights.items():
        spread = {key: value.view(-1, *[1] * (w.ndim - 1)) for key, value in hyper.items()}
        new_weights[name], new_state[name] = rule(w, gradients[name], state[name], spread)
    return new_weights, new_state


def _once(x: Tensor, t: Tensor) -> Tensor:
    """Return `x` (K,) such that a compiled step computes it once, not again for every eight weights it is used for.

    On a CPU Inductor keeps what is used several times if there is an exp or sigmoid in it, say. This sigmoid is 1.
    """
    return x * torch.sigmoid(t + 1000)


def _sgd(w: Tensor, g: Tensor, s: State, h: Mapping[str, Tensor]) -> tuple[Tensor, State]:
    g = g + h["weight_decay"] * w
    if not s:
        return w - h["learning_rate"] * g, {}
    # torch.optim's first buffer is the gradient itself, undampened
    fresh = torch.where(h["is_first"], g, (1 - h["dampening"]) * g)
    buffer = h["momentum"] * s["momentum_buffer"] + fresh
    d = torch.where(h["nesterov"] > 0, g + h["momentum"] * buffer, torch.where(h["momentum"] == 0, g, buffer))
    return w - h["learning_rate"] * d, {"momentum_buffer": buffer}


def _adam(w: Tensor, g: Tensor, s: State, h: Mapping[str, Tensor]) -> tuple[Tensor, State]:
    g = g + h["weight_decay"] * w
    return _adam_update(w, g, s, h)


def _adamw(w: Tensor, g: Tensor, s: State, h: Mapping[str, Tensor]) -> tuple[Tensor, State]:
    return _adam_update(w * (1 - h["learning_rate"] * h["weight_decay"]), g, s, h)


def _adam_update(w: Tensor, g: Tensor, s: State, h: Mapping[str, Tensor]) -> tuple[Tensor, State]:
    average = torch.lerp(s["exp_avg"], g, h["new_beta1"])
    square = h["beta2"] * s["exp_avg_sq"] + h["new_beta2"] * g * g
    root = square.sqrt() / h["correction"] + h["eps"]
    return w - h["step_size"] * average / root, {"exp_avg": average, "exp_avg_sq": square}


def _rmsprop(w: Tensor, g: Tensor, s: State, h: Mapping[str, Tensor]) -> tuple[Tensor, State]:
    g = g + h["weight_decay"] * w
    square = h["alpha"] * s["square_avg"] + h["new_alpha"] * g * g
    buffer = h["momentum"] * s["momentum_buffer"] + g / (square.sqrt() + h["eps"])
    return w - h["learning_rate"] * buffer, {"square_avg": square, "momentum_buffer": buffer}


def _adagrad(w: Tensor, g: Tensor, s: State, h: Mapping[str, Tensor]) -> tuple[Tensor, State]:
    g = g + h["weight_decay"] * w
    total = s["sum"] + g * g
    return w - h["learning_rate"] * g / (total.sqrt() + h["eps"]), {"sum": total}


_RULES: Mapping[str, Rule] = {"sgd": _sgd, "adam": _adam, "adamw": _adamw, "rmsprop": _rmsprop, "adagrad": _adagrad}


def _corrections(hyper: Mapping[str, Tensor], t: Tensor) -> dict[str, Tensor]:
    # 1 - beta ** t
    corrections = [-torch.expm1(hyper[name] * t) for name in ("log_beta1", "log_beta2")]
    needed = {"step_size": hyper["learning_rate"] / corrections[0], "correction": corrections[1].sqrt()}
    return {name: _once(x, t) for name, x in needed.items()}


_OF_A_STEP: Mapping[str, Callable[[Mapping[str, Tensor], Tensor], dict[str, Tensor]]] = {
    "sgd": lambda hyper, t: {"is_first": t == 1},
    "adam": _corrections,
    "adamw": _corrections,
    "rmsprop": lambda hyper, t: {},
    "adagrad": lambda hyper, t: {},
}
"""What a rule needs besides, each (K,), from the hyperparameters and the number of the step: once, not per weight."""


def clipped(gradients: Mapping[str, Tensor], max_norm: Tensor) -> dict[str, Tensor]:
    """Return each member's gradients scaled to a norm of at most `max_norm` (K,); 0: as they are.

    As torch.nn.utils.clip_grad_norm_: the norm is that of all of a member's gradients together.
    """
    norm = sum(g.reshape(g.shape[0], -1).square().sum(1) for g in gradients.values()).sqrt()  # type: ignore[union-attr]
    scale = torch.where(max_norm > 0, (max_norm / (norm + 1e-6)).clamp(max=1.0), torch.ones_like(norm))
    return {name: g * scale.view((-1,) + (1,) * (g.ndim - 1)) for name, g in gradients.items()}
