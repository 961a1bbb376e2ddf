"""One optimizer step of all members of a stack, written once as a plain function of tensors.

It runs as it is (`eager`, the reference), captured as a graph (`graph`), or compiled (`compiled`, where a C++ compiler
is found); on CUDA it is replayed from a CUDA graph besides. The same sums, in fewer calls.

Shapes: K slots, B rows of a batch; a weight (K, ...), a loss (K,).
"""

import logging
import shutil
from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves, tree_map

from hpo.stacks.state import StackState, Trained
from hpo.stacks.tensor_modules import RateDropout
from hpo.study.objective import Params
from hpo.training import schedules, stacked_optim
from hpo.training.evaluation import in_full
from hpo.training.memory import is_out_of_memory
from hpo.training.metrics import shared_params
from hpo.training.optim import MAX_GRAD_NORM
from hpo.training.stack import Task

Execution = Literal["eager", "graph", "compiled"]
Run = Callable[[StackState, Sequence[Tensor], Tensor], tuple[Trained, Tensor]]
"""A step: from the state, a batch's inputs (B, ...) and targets (B, ...), the state after it and the losses (K,)."""


def has_compiler(device: torch.device) -> bool:
    """Whether torch finds what it compiles with: on a CPU a C++ compiler."""
    return device.type != "cpu" or shutil.which("c++") is not None


class VmapStep:
    """The step, and the forward pass, of the members of one signature.

    `template` is the network whose code all of them run, on their own weights; `params` are those of one of them.
    """

    def __init__(self, task: Task, template: nn.Module, params: Params) -> None:
        self.params = params
        self._task, self._template = task, template
        self._optimizer = str(params["optimizer"]).lower()
        self._prepared: dict[tuple[int, int, Execution], Run] = {}

    def __call__(
        self, state: StackState, inputs: Sequence[Tensor], targets: Tensor, execution: Execution
    ) -> tuple[Trained, Tensor]:
        """Do one step, prepared at the first batch of its size. The state given is not changed, but by a CUDA graph."""
        key = (len(state.t), len(targets), execution)
        run = self._prepared.get(key)
        if run is None:
            run = self._prepared[key] = self.prepare(state, inputs, targets, execution)
        with torch.no_grad():
            return run(state, inputs, targets)

    def is_compiled(self, capacity: int) -> bool:
        """Whether there is a compiled step for so many slots."""
        return (capacity, self.params["batch_size"], "compiled") in self._prepared

    def try_out(self, state: StackState, inputs: Sequence[Tensor], targets: Tensor, execution: Execution) -> None:
        """Raise what torch.func raises where it has no rule for the network or the loss."""
        if execution == "eager":
            with torch.no_grad():
                self.eager(*tree_map(torch.clone, (state, inputs, targets)))
        else:
            self.captured(state, inputs, targets)
        self.forward(state, inputs)

    def forward(self, state: StackState, inputs: Sequence[Tensor]) -> Any:
        """Return the outputs of all slots, (K, B, ...), in evaluation mode."""
        self._template.eval()

        def outputs_of(weights: dict[str, Tensor], buffers: dict[str, Tensor], inputs: Sequence[Tensor]) -> Any:
            return functional_call(self._template, {**weights, **buffers}, tuple(inputs))

        try:
            with torch.no_grad(), self._task.autocast():
                return in_full(vmap(outputs_of, in_dims=(0, 0, None))(state.weights, state.buffers, list(inputs)))
        finally:
            self._template.train()

    def prepare(self, state: StackState, inputs: Sequence[Tensor], targets: Tensor, execution: Execution) -> Run:
        """Return the step for batches of this size, captured or compiled as `execution` says."""
        self._template.train()
        if execution == "eager":
            return self.eager
        run = self.captured(state, inputs, targets)
        common = len(targets) == self.params["batch_size"]  # an epoch's last, smaller batch is not worth compiling
        if execution == "compiled" and common and has_compiler(self._task.device):
            run = self._compiled(run, state, inputs, targets)
        if self._task.device.type == "cuda":
            return self.recorded(run, state, inputs, targets)
        return run

    def eager(self, state: StackState, inputs: Sequence[Tensor], targets: Tensor) -> tuple[Trained, Tensor]:
        """The step as it is. Nothing is changed in place."""

        def loss_of(
            weights: dict[str, Tensor],
            buffers: dict[str, Tensor],
            loss_hyper: dict[str, Tensor],
            inputs: Sequence[Tensor],
            targets: Tensor,
        ) -> tuple[Tensor, dict[str, Tensor]]:
            buffers = {name: b.clone() for name, b in buffers.items()}  # BatchNorm changes its own in place
            with self._task.autocast():
                outputs = functional_call(self._template, {**weights, **buffers}, tuple(inputs))
            params = shared_params(self.params, loss_hyper)
            return self._task.objective.loss(in_full(outputs), targets, params), buffers

        batched = vmap(grad_and_value(loss_of, has_aux=True), in_dims=(0, 0, 0, None, None), randomness="different")
        gradients, (losses, buffers) = batched(state.weights, state.buffers, state.loss_hyper, list(inputs), targets)
        gradients |= {name: gradients[name] * mask for name, mask in state.masks.items()}
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

    def captured(self, state: StackState, inputs: Sequence[Tensor], targets: Tensor) -> Run:
        """Return the step as a graph of plain operations, for batches of this size."""
        copies = tree_map(torch.clone, (state, list(inputs), targets))
        with torch.no_grad():
            # on copies: tracing runs BatchNorm once; a plain function, since make_fx counts a method's self as a tensor
            return cast(Run, make_fx(lambda *arguments: self.eager(*arguments))(*copies))

    def _compiled(self, run: Run, state: StackState, inputs: Sequence[Tensor], targets: Tensor) -> Run:
        """Return `run` compiled; as it is, where the compiler does not work."""
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # "No CUDA runtime is found"
        compiled = torch.compile(run, dynamic=False)
        try:
            with torch.no_grad():
                compiled(*tree_map(torch.clone, (state, list(inputs), targets)))
        except Exception as error:  # a compiler's errors have no common base
            if is_out_of_memory(error):
                raise
            return run
        return compiled

    def recorded(self, run: Run, state: StackState, inputs: Sequence[Tensor], targets: Tensor) -> Run:
        """Return `run` recorded as a CUDA graph; as it is, where that fails or gives something else than `run`."""
        before = tree_map(torch.clone, state.trained)
        try:
            replay = CudaReplay(run, state, inputs, targets)
            with torch.no_grad():
                _, losses = run(*tree_map(torch.clone, (state, list(inputs), targets)))
                _, replayed = replay(state, inputs, targets)
            random = any(isinstance(module, RateDropout) for module in self._template.modules())
            good = random or torch.allclose(losses, replayed, rtol=1e-3, atol=1e-5, equal_nan=True)
        except Exception as error:  # whatever CUDA cannot record
            if is_out_of_memory(error):
                raise
            good = False
        finally:
            with torch.no_grad():
                for now, then in zip(tree_leaves(state.trained), tree_leaves(before), strict=True):
                    now.copy_(then)  # nothing was trained yet
        return replay if good else run


class CudaReplay:
    """A step recorded as a CUDA graph, for the tensors it is given: they are changed in place from then on.

    A replay costs one launch for all of the step's kernels. Source: PyTorch's notes on CUDA graphs.
    """

    def __init__(self, run: Run, state: StackState, inputs: Sequence[Tensor], targets: Tensor) -> None:
        self._state = state
        self._inputs, self._targets = [x.clone() for x in inputs], targets.clone()
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch does not annotate it
        side.wait_stream(torch.cuda.current_stream())
        with torch.no_grad(), torch.cuda.stream(side):
            for _ in range(2):  # what is set up at a first call must not be recorded; on copies, so nothing is trained
                run(*tree_map(torch.clone, (state, self._inputs, self._targets)))
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(self._graph):
            trained, self._losses = run(state, self._inputs, self._targets)
            for old_tensor, new_tensor in zip(tree_leaves(state.trained), tree_leaves(trained), strict=True):
                old_tensor.copy_(new_tensor)

    def __call__(self, state: StackState, inputs: Sequence[Tensor], targets: Tensor) -> tuple[Trained, Tensor]:
        for own, now in zip(tree_leaves(self._state), tree_leaves(state), strict=True):
            if own is not now:
                own.copy_(now)  # another batch size's graph has tensors of its own
        for own, now in zip(self._inputs, inputs, strict=True):
            own.copy_(now)
        self._targets.copy_(targets)
        self._graph.replay()
        return self._state.trained, self._losses.clone()
