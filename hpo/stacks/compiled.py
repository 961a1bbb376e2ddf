"""A step compiled by TorchInductor, from its graph of plain operations.

`torch.compile` would have TorchDynamo trace the graph once more, which takes seconds, and look at every tensor of the
state before each step. A stack's state keeps its shapes, so that is done only where Inductor's own look at sizes and
strides finds others.
"""

import logging
from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from hpo.stacks.recording import Run
from hpo.stacks.state import StackState, Trained

_MOST_FORMS = 4


class CompiledStep:
    """`run` compiled for tensors like these. Raises what the compiler raises."""

    def __init__(self, run: Run, state: StackState, inputs: Sequence[Tensor], targets: Tensor) -> None:
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # "No CUDA runtime is found"
        self._run = run
        self._out: Any = None
        self._n_forms = 0
        self._compile((state, list(inputs), targets))

    def __call__(self, state: StackState, inputs: Sequence[Tensor], targets: Tensor) -> tuple[Trained, Tensor]:
        arguments = (state, list(inputs), targets)
        try:
            results = self._call(*tree_leaves(arguments))
        except AssertionError:  # before anything is computed: a tensor has another size or other strides
            if self._n_forms == _MOST_FORMS:
                raise
            self._compile(arguments)
            results = self._call(*tree_leaves(arguments))
        return cast(tuple[Trained, Tensor], tree_unflatten(list(results), self._out))

    def _compile(self, arguments: tuple[StackState, list[Tensor], Tensor]) -> None:
        import torch._inductor  # a second, and only where something is compiled

        leaves, structure = tree_flatten(arguments)

        def flat(*tensors: Tensor) -> list[Any]:
            results, self._out = tree_flatten(self._run(*tree_unflatten(list(tensors), structure)))
            return results

        with torch.no_grad():
            graph = make_fx(flat)(*tree_map(torch.clone, leaves))  # on copies: tracing runs it once
            self._call = torch._inductor.compile(graph, tree_map(torch.clone, leaves))
        self._n_forms += 1
