"""One optimizer step of all members of a stack, written once as a plain function of tensors.

It runs as it is (`eager`, the reference), captured as a graph (`graph`), or compiled (`compiled`, where a C++ compiler
is found); on CUDA it is replayed from a CUDA graph besides. The same sums, in fewer calls.

Shapes: K slots, B rows of a batch; a weight (K, ...), a loss (K,).
"""

import shutil
import time
import warnings
from collections.abc import Collection, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.utils._pytree import tree_map

from hpo.stacks.alone import NotStackable, Rounding, rounding_of
from hpo.stacks.cost import note_compiled, records
from hpo.stacks.differing import Run, difference
from hpo.stacks.graph import CompiledStep, Graph
from hpo.stacks.plain_step import PlainStep
from hpo.stacks.recording import (
    CudaReplay,
    EpochReplay,
    ForwardReplay,
    NotRecorded,
    in_place,
    line,
    recorded,
    recorded_epoch,
    recorded_forward,
)
from hpo.stacks.state import StackState
from hpo.study.objective import Params
from hpo.training.batches import Batches
from hpo.training.evaluation import in_full
from hpo.training.loss_params import SharedParams, as_pythons
from hpo.training.memory import is_out_of_memory
from hpo.training.stack import Task

Execution = Literal["eager", "graph", "compiled"]
STEPS_AT_ONCE, _FEWEST_AT_ONCE = 16, 4
"""How many steps are one CUDA graph: so many that launching them takes no time, and a stop is heard soon enough."""

warnings.filterwarnings("ignore", message="There is a performance drop because we have not yet implemented")
"""Of LSTMs and other layers, many times; how fast a stack of them is, is measured."""


def has_compiler(device: torch.device) -> bool:
    """Whether torch finds what it compiles with: on a CPU a C++ compiler."""
    return device.type != "cpu" or shutil.which("c++") is not None


class _Prepared(NamedTuple):
    run: Run
    form: str
    why: tuple[str, ...] = ()
    """Why it is not a faster one."""

    @property
    def is_replayed(self) -> bool:
        return isinstance(self.run, CudaReplay)

    @property
    def path(self) -> str:
        replayed = ", replayed from a CUDA graph" if self.is_replayed else ""
        return "; ".join((self.form + replayed, *self.why))


class VmapStep:
    """The step, and the forward pass, of the members of one signature.

    `template` is the network whose code all of them run, on their own weights; `params` are those of one of them, of
    which the loss `reads` some.
    """

    def __init__(self, task: Task, template: nn.Module, params: Params, reads: Collection[str]) -> None:
        self.params, self.reads = params, frozenset(reads)
        self._task, self._template = task, template
        plain = PlainStep(task, template, params, self.reads)
        self.gradients, self.eager = plain.gradients, plain.eager
        self._prepared: dict[tuple[int, int, Execution], _Prepared] = {}
        self._epochs: dict[tuple[int, int, Execution], EpochReplay | None] = {}
        self._forwards: dict[tuple[int, int], ForwardReplay | str] = {}
        """The evaluation's forward pass of so many slots and rows, recorded, or why it is not."""
        self._forms: dict[tuple[int, int, Execution], _Prepared] = {}
        """What is recorded: compiled, if it is to be; it outlives its recordings, which each hold a whole state."""
        self._graphs: list[Graph] = []
        self._compiled: dict[Graph, CompiledStep | str] = {}
        """The graphs that are compiled, or why they are not."""

    def __call__(
        self, state: StackState, inputs: Sequence[Tensor], targets: Tensor, execution: Execution
    ) -> tuple[StackState, Tensor]:
        """Do one step, prepared at the first batch of its size; return the state after it and the losses (K,).

        The state given is not changed, but by a CUDA graph: that has tensors of its own, the state returned.
        """
        key = (len(state.t), len(targets), execution)
        prepared = self._prepared.get(key)
        if prepared is None:
            prepared = self._prepared[key] = self.prepare(state, inputs, targets, execution)
        run = prepared.run
        with torch.no_grad():
            trained, losses = run(state, inputs, targets)
        return run.state if isinstance(run, CudaReplay) else state.after(trained), losses

    def epoch(self, state: StackState, batches: Batches, order: Tensor, execution: Execution) -> EpochReplay | None:
        """Return many steps as one CUDA graph, to be started with `order` (batches, B); None where there is none.

        There is one if a step of B rows is replayed, and `state` is in the tensors that this one changes.
        """
        key = (len(state.t), order.shape[1], execution)
        n_steps = min(STEPS_AT_ONCE, 1 << (len(order).bit_length() - 1)) if len(order) else 0
        prepared = self._prepared.get(key)
        if n_steps < _FEWEST_AT_ONCE or prepared is None or not isinstance(prepared.run, CudaReplay):
            return None
        if prepared.run.state is not state:
            return None
        if key not in self._epochs:
            run = self._forms[key].run
            try:
                self._epochs[key] = recorded_epoch(run, state, batches, order, n_steps, self._tolerance(1e-4))
            except NotRecorded as error:
                self._epochs[key] = None
                self._prepared[key] = prepared._replace(why=(*prepared.why, f"step by step: {error}"))
        return self._epochs[key]

    def is_compiled(self, capacity: int) -> bool:
        """Whether there is a compiled step for so many slots."""
        if records(self._task.device):
            return (capacity, self._n_rows, "compiled") in self._forms
        several = self._compiled.values()
        return any(isinstance(step, CompiledStep) and step.fits(capacity, self._n_rows) for step in several)

    @property
    def is_general(self) -> bool:
        """Whether what is traced and compiled is so for other numbers of slots too."""
        return any(graph.is_general for graph in self._graphs)

    def path(self, capacity: int, execution: Execution) -> str | None:
        """Return how steps of so many slots run, and why not faster, for a person; None: there was none yet."""
        prepared = self._prepared.get((capacity, self._n_rows, execution))
        if prepared is None or not prepared.is_replayed:
            return None if prepared is None else prepared.path
        sizes = {rows: each for (n, rows, how), each in self._prepared.items() if (n, how) == (capacity, execution)}
        slower = [f"batches of {n}: {each.path}" for n, each in sizes.items() if not each.is_replayed]
        slower += sorted({f"evaluated as it is: {why}" for why in self._forwards.values() if isinstance(why, str)})
        return "; ".join((prepared.path, *slower))

    @property
    def rounding(self) -> Rounding:
        """How the sums of its networks are rounded."""
        return rounding_of(self._template, self._task.precision)

    @property
    def _n_rows(self) -> int:
        """How many rows all batches of an epoch have but the last."""
        return min(int(self.params["batch_size"]), self._task.n_rows)

    def forget(self) -> None:
        """Let go of what is recorded, and with it of the tensors of its state."""
        self._prepared = {key: each for key, each in self._prepared.items() if not isinstance(each.run, CudaReplay)}
        self._epochs.clear()
        self._forwards.clear()

    def try_out(self, state: StackState, inputs: Sequence[Tensor], targets: Tensor, execution: Execution) -> None:
        """Raise what torch.func raises where it has no rule for the network or the loss, in training or evaluation."""
        self._graphs.clear()  # of a state that was tried before, with other numbers for the loss
        outputs = self.forward(state, inputs)  # first: tracing a step takes seconds, and an LSTM's can be, but not this
        self.losses_when_evaluated(outputs, targets.clone(), state)
        if execution == "eager":
            with torch.no_grad():
                self.eager(*tree_map(torch.clone, (state, inputs, targets)))
        else:
            self._graph(state, inputs, targets)

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

    @torch.no_grad()
    def losses_when_evaluated(self, outputs: Any, targets: Tensor, state: StackState) -> Tensor:
        """Return the losses (K,) as an evaluation has them (`Measuring`); a loss may be another one there."""

        def loss_of(outputs: Any, numbers: dict[str, Tensor]) -> Tensor:
            with as_pythons(numbers):
                return self._task.objective.loss(outputs, targets, SharedParams(self.params, numbers, self.reads))

        losses: Tensor = vmap(loss_of, randomness="different")(outputs, state.loss_hyper)
        if losses.ndim != 1:
            raise NotStackable(f"its loss has the shape {tuple(losses.shape[1:])} in evaluation, not ()")
        return losses

    def evaluation(self, state: StackState, inputs: Sequence[Tensor], execution: Execution) -> Any:
        """Return what `forward` does: replayed from a CUDA graph, where steps on `state` are."""
        prepared = self._prepared.get((len(state.t), self._n_rows, execution))
        if prepared is None or not isinstance(prepared.run, CudaReplay) or prepared.run.state is not state:
            return self.forward(state, inputs)
        key = (len(state.t), len(inputs[0]))
        if key not in self._forwards:
            try:
                self._forwards[key] = recorded_forward(self.forward, state, inputs, self._tolerance(1e-4))
            except NotRecorded as error:
                self._forwards[key] = str(error)
        replay = self._forwards[key]
        if isinstance(replay, str) or replay.state is not state:
            return self.forward(state, inputs)
        return replay(inputs)

    def prepare(self, state: StackState, inputs: Sequence[Tensor], targets: Tensor, execution: Execution) -> _Prepared:
        """Return the step for batches of this size, captured or compiled as `execution` says, recorded on CUDA.

        What cannot be compiled or recorded, or gives something else so, is left out, and the path says why.
        """
        self._template.train()
        if execution == "eager":
            return _Prepared(self.eager, "eager")
        batch = (state, inputs, targets)
        compiles = execution == "compiled"
        if not records(self._task.device):
            return self._fastest(self._graph(*batch), compiles, *batch)
        key = (len(state.t), len(targets), execution)
        if key not in self._forms:
            self._forms[key] = self._fastest(Graph(in_place(self.eager), *batch), compiles, *batch)
        form = self._forms[key]
        if form.form == "eager":
            return form
        try:
            return form._replace(run=recorded(form.run, *batch, self._tolerance(1e-4)))
        except NotRecorded as error:
            # what writes in place must not run out of memory midway: a replay's is its own, a plain step's is not
            form = self._fastest(self._graph(*batch), compiles, *batch)
            return form._replace(why=(*form.why, f"not replayed from a CUDA graph: {error}"))

    @property
    def n_operations(self) -> int:
        """How many operations a step has, as it was captured last; 0: none was."""
        return len(self._graphs[-1].module.graph.nodes) if self._graphs else 0

    @property
    def code(self) -> str:
        """What a step computes, as it was captured last; empty: it was not."""
        return str(self._graphs[-1].module.code) if self._graphs else ""

    def _graph(self, state: StackState, inputs: Sequence[Tensor], targets: Tensor) -> Graph:
        """Return the step as a graph of plain operations, for batches of this size: one traced before, if it fits."""
        for graph in self._graphs:
            if graph.fits(len(state.t), len(targets)):
                return graph
        any_size = (
            not records(self._task.device)
            and len(state.t) > 1  # one slot or one row is broadcast: what is traced with it is for it alone
            and len(targets) > 1
            and all(graph.is_general or not graph.any_size for graph in self._graphs)  # else the next is for one too
        )
        graph = Graph(self.eager, state, inputs, targets, any_size=any_size)
        self._graphs.append(graph)
        return graph

    def _fastest(
        self, graph: Graph, compiles: bool, state: StackState, inputs: Sequence[Tensor], targets: Tensor
    ) -> _Prepared:
        """Return `graph` compiled, if it `compiles` and that gives the same; else as it is, and why.

        One whose sizes depend on the data is for one batch only: then it is the step as it is. For an epoch's last,
        smaller batch it is not compiled, but what is compiled may fit that too.
        """
        if graph.depends_on_data:
            return _Prepared(self.eager, "eager", ("not captured: its sizes depend on the data",))
        step = self._compiled.get(graph)
        fits = isinstance(step, CompiledStep) and step.fits(len(state.t), len(targets))
        if not compiles or (len(targets) != self._n_rows and not fits):
            return _Prepared(graph, "captured")
        if not isinstance(step, str):
            try:
                return _Prepared(self._compile(graph, state, inputs, targets), "compiled")
            except Exception as error:  # a compiler's errors have no common base
                if is_out_of_memory(error):
                    raise
                step = self._compiled[graph] = line(error)
        return _Prepared(graph, "captured", (f"not compiled: {step}",))

    def _compile(self, graph: Graph, state: StackState, inputs: Sequence[Tensor], targets: Tensor) -> Run:
        """Return `graph` compiled. Raises what the compiler raises, ValueError where it gives something else."""
        if not has_compiler(self._task.device):
            raise ValueError("no C++ compiler was found")
        step, n_steps, start = self._compiled.get(graph), 1, time.perf_counter()  # of another size it is the same code
        if is_new := not isinstance(step, CompiledStep):
            step, n_steps = CompiledStep(graph, state, inputs, targets), 2
        with torch.no_grad():
            step(*tree_map(torch.clone, (state, list(inputs), targets)))
        if is_new and records(self._task.device):
            note_compiled(self._task.device, time.perf_counter() - start, len(graph.module.graph.nodes))
        why = difference(graph, step, state, inputs, targets, self._tolerance(1e-3), n_steps)
        if why is not None:
            raise ValueError(f"compiled it differs in {why}")
        self._compiled[graph] = step
        return step

    def _tolerance(self, single: float) -> float:
        """Return how much two forms of a step may differ, from what it is in single precision."""
        if self._task.precision != "float32":
            return 50 * single
        return single if all(w.dtype != torch.float64 for w in self._template.parameters()) else 1e-6 * single
