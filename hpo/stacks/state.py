"""What a stack holds as tensors: everything in which its members may differ, one row a slot.

Shapes: K slots; a weight, a buffer or an optimizer's state (K, ...), everything else (K,).
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from hpo.stacks.candidate import Candidate
from hpo.study.objective import Params
from hpo.training import schedules, stacked_optim
from hpo.training.optim import MAX_GRAD_NORM


class Trained(NamedTuple):
    """What a step changes."""

    weights: dict[str, Tensor]
    buffers: dict[str, Tensor]
    """Weights that are not trained, or that the loss does not depend on, among them."""
    optimizer: dict[str, stacked_optim.State]
    t: Tensor
    """How many steps each member has done."""

    def leaves(self) -> list[Tensor]:
        """Return its tensors in the order of torch's `tree_leaves`, which is many times slower."""
        optimizer = [x for state in self.optimizer.values() for x in state.values()]
        return [*self.weights.values(), *self.buffers.values(), *optimizer, self.t]

    def filled(self, leaves: Iterator[Tensor]) -> "Trained":
        """Return the same with other tensors, the next of `leaves`, in their order."""
        return Trained(
            {name: next(leaves) for name in self.weights},
            {name: next(leaves) for name in self.buffers},
            {name: {key: next(leaves) for key in state} for name, state in self.optimizer.items()},
            next(leaves),
        )


class StackState(NamedTuple):
    """What a step is given: `Trained`, and what stays as it is from a member's first step to its last."""

    weights: dict[str, Tensor]
    buffers: dict[str, Tensor]
    optimizer: dict[str, stacked_optim.State]
    t: Tensor
    hyper: dict[str, Tensor]
    """The hyperparameters of the optimizer, the schedule and the clipping."""
    loss_hyper: dict[str, Tensor]
    """The params that the loss reads as tensors."""
    masks: dict[str, Tensor]
    """1 where a weight is a member's own, 0 where it is padding; only of weights whose sizes differ in the study."""

    def leaves(self) -> list[Tensor]:
        """Return its tensors in the order of torch's `tree_leaves`: those that a step changes first."""
        return [*self.trained.leaves(), *self.hyper.values(), *self.loss_hyper.values(), *self.masks.values()]

    @property
    def trained(self) -> Trained:
        """The part that a step changes."""
        return Trained(self.weights, self.buffers, self.optimizer, self.t)

    def after(self, trained: Trained) -> "StackState":
        """Return the state in which a step has left it."""
        return StackState(*trained, hyper=self.hyper, loss_hyper=self.loss_hyper, masks=self.masks)

    @classmethod
    def without_networks(cls, capacity: int, device: torch.device) -> "StackState":
        """Return the state of a stack that knows no network yet."""
        return cls({}, {}, {}, torch.zeros(capacity, device=device), {}, {}, {})

    @classmethod
    def empty(cls, first: Candidate, capacity: int, device: torch.device) -> "StackState":
        """Return the state of `capacity` empty slots for members of `first`'s signature: zeros."""
        module, shapes, params = first.padded.module, first.padded.shapes, first.member.params

        def rows(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {n: torch.zeros((capacity, *shapes[n]), dtype=x.dtype, device=device) for n, x in named.items()}

        every = dict(module.named_parameters())
        weights = {name: w for name, w in every.items() if w.requires_grad and name not in first.untrained}
        frozen = {name: w for name, w in every.items() if name not in weights}
        dtype = next((w.dtype for w in weights.values()), torch.float32)

        def column() -> Tensor:
            return torch.zeros(capacity, dtype=dtype, device=device)

        stacked = rows(weights)
        return cls(
            weights=stacked,
            buffers=rows({**frozen, **dict(module.named_buffers())}),
            optimizer=stacked_optim.initial_state(
                stacked_optim.state_names(str(params["optimizer"]).lower(), params), stacked
            ),
            t=column(),
            hyper={name: column() for name in hyperparameters(params)},
            loss_hyper={name: column() for name in first.reads if type(params.get(name)) is float},
            masks=rows({name: w for name, w in weights.items() if name in first.padded.varied}),
        )


def hyperparameters(params: Params) -> dict[str, float]:
    """Return one member's hyperparameters that a step needs: the optimizer's, the schedule's, the largest norm."""
    values = stacked_optim.hyperparameters(str(params["optimizer"]).lower(), params)
    values |= schedules.hyperparameters(params) if "schedule" in params else {}
    return values | ({MAX_GRAD_NORM: float(params[MAX_GRAD_NORM])} if MAX_GRAD_NORM in params else {})
