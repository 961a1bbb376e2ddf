"""A step as a graph of plain operations, and compiled from it by TorchInductor.

The numbers of slots and of rows are symbols in a graph wherever torch can trace the step so: a stack that loses or wins
members, and the last, smaller batch of an epoch, are neither traced nor compiled again. What was traced may still hold
for some numbers only (a loss that branches on them): torch keeps these conditions, and they are looked up. Many of
vmap's rules (for convolutions, normalisation, `cat`, GELU) take the numbers as they are: such a graph is for one size.

`torch.compile` would have TorchDynamo trace the graph once more, which takes seconds, and look at every tensor of the
state before each step. A stack's state keeps its strides, so that is done only where Inductor's own look at them finds
others.
"""

import logging
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from hpo.log import silenced
from hpo.stacks.differing import Run
from hpo.stacks.state import StackState, Trained

_TRACES = "torch._subclasses.fake_tensor"
"""The logger that prints a traceback of each operation for which there is no rule for symbols."""
_MOST_FORMS = 4
"""For how many kinds of sizes and strides a step is compiled; for others it is run as it is."""
_MOST_FUSED = 30
"""What takes more operations than this is computed once, not again by each that reads it: torch's own number, but for a
CPU from 2.14 on, which is 50. With that the hashes that draw dropout's masks, where each step reads the one before
twice, made a step of 784-300-100-10 take 104 s of CPU to compile; with 30 it is 15, the step as fast (2026-12-01)."""


class Graph:
    """`run` as a graph of plain operations on tensors like these; `any_size`: of other numbers of slots and rows too.

    It holds no tensors. Raises what tracing raises.
    """

    def __init__(
        self, run: Run, state: StackState, inputs: Sequence[Tensor], targets: Tensor, *, any_size: bool = False
    ) -> None:
        self.run, self.any_size = run, any_size
        leaves, structure = tree_flatten((state, list(inputs), targets))

        def flat(*arguments: Any) -> list[Any]:
            # a plain function, since make_fx counts a method's self as a tensor
            trained, losses = run(*tree_unflatten(list(arguments[-len(leaves) :]), structure))
            self._names = tree_map(lambda x: None, trained)
            return [*trained.leaves(), losses]

        self._traced_for = _sizes_of(state, targets)
        self._sizes: _Sizes | None = None
        self._fits: dict[tuple[int, int], bool] = {}
        with torch.no_grad():
            if any_size:
                with suppress(Exception), silenced(_TRACES):  # of many kinds: an operation without a rule for symbols
                    sizes = _Sizes(leaves, len(tree_leaves(state)))
                    self.module = make_fx(flat, tracing_mode="symbolic", _allow_non_fake_inputs=True)(*sizes.examples)
                    del self.module.shape_env  # what cannot be pickled has no place in Inductor's cache
                    self._sizes = sizes
            if self._sizes is None:
                self.module = make_fx(flat)(*tree_map(torch.clone, leaves))  # on copies: tracing runs it once
        self.depends_on_data = any(map(_depends_on_data, self.module.graph.nodes))
        """Whether how large a result is depends on the data: the graph, its gradients above all, is for one batch."""
        self.is_general = self.fits(len(state.t) + 1, len(targets) + 1)
        """Whether it is for other numbers of slots and rows too."""

    def fits(self, n_slots: int, n_rows: int) -> bool:
        """Whether it is the step of so many slots and rows."""
        key = (n_slots, n_rows)
        if self._sizes is None:
            return key == self._traced_for
        if key not in self._fits:
            self._fits[key] = self._sizes.hold(*key)
        return self._fits[key]

    def __call__(self, state: StackState, inputs: Sequence[Tensor], targets: Tensor) -> tuple[Trained, Tensor]:
        return self.results(self.module(*self.arguments(state, inputs, targets)))

    def arguments(self, state: StackState, inputs: Sequence[Tensor], targets: Tensor) -> tuple[Any, ...]:
        """Return what the graph takes: the sizes that are symbols in it, and the tensors in their order."""
        sizes = () if self._sizes is None else self._sizes.symbols_of(*_sizes_of(state, targets))
        return (*sizes, *state.leaves(), *inputs, targets)

    def results(self, flat: Iterable[Tensor]) -> tuple[Trained, Tensor]:
        """Return what the step returns, from its tensors in their order."""
        leaves = iter(flat)
        return self._names.filled(leaves), next(leaves)

    def compiled(self, state: StackState, inputs: Sequence[Tensor], targets: Tensor) -> Any:
        """Return it compiled, as a function of its `arguments`. Raises what the compiler raises."""
        import torch._inductor  # a second, and only where something is compiled

        examples: list[Any]
        if self._sizes is None:
            examples = tree_map(torch.clone, tree_leaves((state, list(inputs), targets)))
        else:
            examples = self._sizes.examples
        with torch.no_grad(), torch._inductor.config.patch(realize_opcount_threshold=_MOST_FUSED):
            call = torch._inductor.compile(self.module, examples)
        self._fits.clear()  # the compiler may have set conditions of its own
        return call


class CompiledStep:
    """A graph compiled for tensors like these. Raises what the compiler raises."""

    def __init__(self, graph: Graph, state: StackState, inputs: Sequence[Tensor], targets: Tensor) -> None:
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # "No CUDA runtime is found"
        self._n_forms = 0
        self._compile(graph, state, inputs, targets)

    def fits(self, n_slots: int, n_rows: int) -> bool:
        """Whether so many slots and rows need not be compiled for."""
        return self._graph.fits(n_slots, n_rows)

    def __call__(self, state: StackState, inputs: Sequence[Tensor], targets: Tensor) -> tuple[Trained, Tensor]:
        try:
            if not self._graph.fits(*_sizes_of(state, targets)):
                raise AssertionError("other sizes")
            results = self._call(*self._graph.arguments(state, inputs, targets))
        except AssertionError:  # before anything is computed: a tensor has another size or other strides
            graph, batch = self._graph, (state, list(inputs), targets)
            if self._n_forms == _MOST_FORMS:
                return graph.run(*batch)
            self._compile(Graph(graph.run, *batch, any_size=graph.any_size), *batch)
            results = self._call(*self._graph.arguments(*batch))
        return self._graph.results(results)

    def _compile(self, graph: Graph, state: StackState, inputs: Sequence[Tensor], targets: Tensor) -> None:
        self._graph, self._call = graph, graph.compiled(state, inputs, targets)
        self._n_forms += 1


def _depends_on_data(node: torch.fx.Node) -> bool:
    """Whether a node's size follows from numbers in its arguments: what a mask picks, for example."""
    if torch.Tag.dynamic_output_shape not in getattr(node.target, "tags", ()):
        return False
    if node.target is not torch.ops.aten.index.Tensor:
        return True
    indices = [each for each in cast(Sequence[Any], node.args[1]) if each is not None]
    return any(each.meta["tensor_meta"].dtype in (torch.bool, torch.uint8) for each in indices)


def _sizes_of(state: StackState, targets: Tensor) -> tuple[int, int]:
    return len(state.t), len(targets)


class _Sizes:
    """Stand-ins for tensors, `examples`, whose numbers of slots and of rows are symbols; and what was assumed of these.

    The first `n_state` tensors have a row a slot, the others one a row of a batch. The symbols come first, as
    arguments of their own: Inductor's cache keeps what it assumed of a size only for a graph that is given that size.
    """

    def __init__(self, leaves: Sequence[Tensor], n_state: int) -> None:
        # this imports SymPy: half a second, and only where a stack's step is recorded
        from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

        self._env = ShapeEnv()
        mode = FakeTensorMode(shape_env=self._env, allow_non_fake_inputs=True)

        def example(x: Tensor, first: Any) -> Any:
            sizes = [first, *[DimDynamic.STATIC] * (x.ndim - 1)]
            return mode.from_tensor(x.detach().clone(), symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes))

        tensors = [example(x, DimDynamic.DUCK) for x in leaves[:n_state]]  # equal ones are one symbol
        tensors += [example(x, DimDynamic.DYNAMIC) for x in leaves[n_state:]]
        self._slots, self._rows = tensors[0].shape[0], [x.shape[0] for x in tensors[n_state:]]
        for n in self._rows[1:]:
            torch._check(n == self._rows[0])
        self.examples = [*self.symbols_of(self._slots, self._rows[0]), *tensors]

    def symbols_of(self, slots: Any, rows: Any) -> tuple[Any, ...]:
        """Return of the two numbers those that are symbols."""
        return tuple(n for size, n in ((self._slots, slots), (self._rows[0], rows)) if not isinstance(size, int))

    def hold(self, n_slots: int, n_rows: int) -> bool:
        """Whether what was assumed holds for so many slots and rows."""
        values = {}
        for size, n in ((self._slots, n_slots), *((rows, n_rows) for rows in self._rows)):
            if isinstance(size, int):
                if size != n:
                    return False
                continue
            symbol = size.node._expr
            bounds = self._env.var_to_range[symbol]
            if not bounds.lower <= n <= bounds.upper:
                return False
            values[symbol] = n
        return all(guard.expr.subs(values) == True for guard in self._env.guards)  # noqa: E712  # sympy's own true
