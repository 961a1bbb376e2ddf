"""In what two forms of a stack's step differ: captured, compiled, replayed, each is to be the step itself."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from hpo.stacks.state import StackState, Trained
from hpo.training.torch_settings import random_states, set_random_states

Run = Callable[[StackState, Sequence[Tensor], Tensor], tuple[Trained, Tensor]]
"""A step: from the state, a batch's inputs (B, ...) and targets (B, ...), the state after it and the losses (K,)."""
PROBED: Mapping[str, float] = {"learning_rate": 0.1, "eps": 1.0}
"""Hyperparameters with which two forms of a step are compared: an update is then as large as its gradient, where
Adam's own would be as large as the learning rate even of a gradient that is nothing but rounding."""


def difference(
    reference: Run,
    other: Run,
    state: StackState,
    inputs: Sequence[Tensor],
    targets: Tensor,
    tolerance: float,
    n_steps: int = 2,
) -> str | None:
    """Return in what two forms of a step differ, over all that a step changes and its losses; None: in nothing.

    Both do `n_steps` from equal states, of other hyperparameters and rows each time, and draw the same random numbers.
    Neither is given `state` itself. What each member's updates differ by is measured by its largest one.
    """
    state = state._replace(hyper=probed(state.hyper))
    for _ in range(n_steps):
        generators = random_states(targets.device)
        with torch.no_grad():
            expected, losses = reference(*tree_map(torch.clone, (state, list(inputs), targets)))
            set_random_states(generators, targets.device)
            got, other_losses = other(*tree_map(torch.clone, (state, list(inputs), targets)))
            why = different(state.trained, expected, got, tolerance)
            if why is None and not close(losses, other_losses, tolerance * (1 + losses.abs())):
                why = "the losses"
        if why is not None:
            return why
        halved = {name: x / 2 if name in PROBED else x for name, x in state.hyper.items()}
        state = tree_map(torch.clone, state.after(expected)._replace(hyper=halved))
        inputs, targets = [x.flip(0) for x in inputs], targets.flip(0)
    return None


def probed(hyper: Mapping[str, Tensor], n_steps: int = 1) -> dict[str, Tensor]:
    """Return hyperparameters as `PROBED` has them, the learning rate a part of it where many steps are compared.

    With a large one each step would amplify what the one before was rounded by.
    """
    probed = {**PROBED, "learning_rate": PROBED["learning_rate"] / n_steps}
    return {name: torch.full_like(x, probed[name]) if name in probed else x for name, x in hyper.items()}


def different(before: Trained, expected: Trained, got: Trained, tolerance: float) -> str | None:
    """Return which part of a state two forms have left otherwise; None: none, but for the tolerance and rounding.

    The tolerance is a share of each slot's largest update from `before` to `expected`.
    """
    for part in Trained._fields:
        old, new, other = (tree_leaves(getattr(each, part)) for each in (before, expected, got))
        pairs = [(o, n, x) for o, n, x in zip(old, new, other, strict=True) if n.numel()]
        if not pairs:
            continue
        largest = torch.stack([_largest(n.double() - o.double()) for o, n, _ in pairs]).amax(0)  # masks have no -
        for _, n, x in pairs:
            rounding = 8 * torch.finfo(n.dtype).eps * _largest(n.double()) if n.is_floating_point() else 0.0
            bound = (tolerance * largest + rounding).view(-1, *[1] * (n.ndim - 1))
            if not close(n.double(), x.double(), bound):
                return f"the {part}" if part != "t" else "the count of steps"
    return None


def _largest(x: Tensor) -> Tensor:
    """Return each slot's largest finite number, (K,)."""
    return x.abs().nan_to_num(0.0, 0.0, 0.0).reshape(len(x), -1).amax(1)


def close(expected: Tensor, got: Tensor, bound: Tensor) -> bool:
    """Whether two tensors differ by at most `bound`; what is not a number, or infinite, is so in both."""
    same = (expected == got) | (expected.isnan() & got.isnan())
    return bool((same | ((expected - got).abs() <= bound)).all())
