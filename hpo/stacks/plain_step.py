"""The step of all members of a stack as it is, a plain function of tensors: the reference for its faster forms.

Shapes: K slots, B rows of a batch; a weight (K, ...), a loss (K,).
"""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from hpo.stacks.state import StackState, Trained
from hpo.stacks.tensor_modules import masks_of_a_step, step_buffers
from hpo.study.objective import Params
from hpo.training import schedules, stacked_optim
from hpo.training.evaluation import in_full
from hpo.training.loss_params import SharedParams, as_pythons
from hpo.training.optim import MAX_GRAD_NORM
from hpo.training.stack import Task


class PlainStep:
    """The step of the members of one signature.

    It knows nothing of what is captured or recorded of it: that holds the step, and would be in a circle with it, whose
    memory is free only when Python looks for circles. A GPU may be full before.
    """

    def __init__(self, task: Task, template: nn.Module, params: Params, reads: Collection[str]) -> None:
        self.params, self._reads = params, reads
        self._task, self._template, self._counts = task, template, step_buffers(template)
        self._optimizer = str(params["optimizer"]).lower()

    def gradients(
        self, state: StackState, inputs: Sequence[Tensor], targets: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
        """Return the gradients of all members, their buffers after a step, and their losses."""

        def loss_of(
            weights: dict[str, Tensor],
            buffers: dict[str, Tensor],
            loss_hyper: dict[str, Tensor],
            inputs: Sequence[Tensor],
            targets: Tensor,
        ) -> tuple[Tensor, dict[str, Tensor]]:
            # BatchNorm changes its own in place; of one that is assigned, torch writes into `named` what it is then
            named = {**weights, **{name: b.clone() for name, b in buffers.items()}}
            with self._task.autocast(), masks_of_a_step():
                outputs = functional_call(self._template, named, tuple(inputs))
            params = SharedParams(self.params, loss_hyper, self._reads)
            with as_pythons(loss_hyper):
                loss = self._task.objective.loss(in_full(outputs), targets, params)
            return loss, {n: named[n] for n in buffers}

        batched = vmap(grad_and_value(loss_of, has_aux=True), in_dims=(0, 0, 0, None, None), randomness="different")
        before = state.buffers | dict.fromkeys(self._counts, state.t.long())
        gradients, (losses, buffers) = batched(state.weights, before, state.loss_hyper, list(inputs), targets)
        # not a product: the gradient of what is padded may be no number
        gradients |= {name: torch.where(mask != 0, gradients[name], 0.0) for name, mask in state.masks.items()}
        return gradients, buffers, losses

    def eager(self, state: StackState, inputs: Sequence[Tensor], targets: Tensor) -> tuple[Trained, Tensor]:
        """The step as it is. Nothing is changed in place."""
        gradients, buffers, losses = self.gradients(state, inputs, targets)
        if MAX_GRAD_NORM in self.params:
            gradients = stacked_optim.clipped(gradients, state.hyper[MAX_GRAD_NORM])
        hyper = self._scheduled(state)
        t = state.t + 1
        weights, optimizer = stacked_optim.step(self._optimizer, state.weights, gradients, state.optimizer, hyper, t)
        return Trained(weights, buffers, optimizer, t), losses

    def _scheduled(self, state: StackState) -> dict[str, Tensor]:
        """Return the hyperparameters with the learning rates that the members' schedules give for this step."""
        if "schedule" not in self.params:
            return state.hyper
        factor = schedules.factor(state.hyper, state.t, self._task.steps_per_epoch(self.params), self._task.epochs)
        return {**state.hyper, "learning_rate": state.hyper["learning_rate"] * factor}
