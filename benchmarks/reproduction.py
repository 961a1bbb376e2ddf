"""A documented figure beside ours over several seeds, and the training that gives ours.

Each seed is an initialisation and an order of the rows; the split of the data stays the documented one. Seeds are
trained one after the other, since the members of a stack share the order of the rows, and here each is to have its own.
"""

import math
import os
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from hpo.study.data import Data, Split
from hpo.study.loading import load
from hpo.study.objective import Objective
from hpo.training import optim
from hpo.training.batches import Batches, make_batches
from hpo.training.evaluation import evaluate
from hpo.training.loop import Results, train
from hpo.training.loop_stack import LoopStack
from hpo.training.stack import Member, SingleStack, Stack, Task

torch.set_num_threads(1)
CPU = torch.device("cpu")
ROOT = Path(__file__).parent.parent
SEED = 42
"""The documents' own, where they name one."""
LEARNED = 0.9
"""To what share of its first epoch's the training loss of a network must fall that has learned."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One documented figure, as it is printed there, and ours: one for each seed.

    `better`: 1, more is; -1, less is; 0: it is to be the same for every seed. `documented` None: the model is only said
    to train, and `learned` says of each seed whether it did; neither is given: the figure is told and not judged.
    """

    name: str
    ours: Sequence[float]
    documented: str | None = None
    better: int = 1
    exact: bool = False
    learned: Sequence[bool] = ()

    @property
    def rounding(self) -> float:
        """Half a unit of the documented figure's last printed digit; 0 for one that is `exact`."""
        return 0.0 if self.exact else float(Decimal(5).scaleb(int(Decimal(self.documented).as_tuple().exponent) - 1))

    @property
    def as_good(self) -> int:
        """How many seeds are at least as good as the documented figure; of a model that only trains, how many do."""
        if self.documented is None:
            return sum(self.learned)
        differences = [ours - float(self.documented) for ours in self.ours]
        allowed = self.rounding + 1e-12
        if self.better == 0:
            return sum(abs(each) <= allowed for each in differences)
        return sum(self.better * each >= -allowed for each in differences)  # never true of a NaN

    @property
    def _numbers(self) -> list[float]:
        return [ours for ours in self.ours if not math.isnan(ours)]

    @property
    def verdict(self) -> str:
        """Return "yes" or "worse" by the rule in `documented.py`; "" for a figure that is only told."""
        if len(self._numbers) < len(self.ours):
            return "worse"
        if self.documented is None:
            return "" if not self.learned else "yes" if 2 * self.as_good > len(self.learned) else "worse"
        needed = len(self.ours) if self.better == 0 else 1
        return "yes" if self.as_good >= needed else "worse"

    @property
    def place(self) -> str:
        """Return where the documented figure lies among ours."""
        n = len(self.ours)
        if len(self._numbers) < n:
            return f"{n - len(self._numbers)} of {n} are NaN"
        if self.documented is None:
            return f"{self.as_good} of {n} learn" if self.learned else ""
        if self.better == 0:
            return f"the same in {self.as_good} of {n}"
        worst = min(self.better * (ours - float(self.documented)) for ours in self.ours)
        if worst > self.rounding or not self.as_good:
            return f"all {n} are better" if self.as_good else f"all {n} are worse"
        return f"{self.as_good} of {n} as good"

    def cells(self) -> list[str]:
        """Return its cells of the table: name, documented, median, range, seeds, place, verdict."""
        said = ("trains" if self.learned else "") if self.documented is None else self.documented
        numbers = self._numbers or [math.nan]
        median, low, high = statistics.median(numbers), min(numbers), max(numbers)
        span = f"{low:.4g} to {high:.4g}" if len(self.ours) > 1 else ""
        return [self.name, said, f"{median:.4g}", span, str(len(self.ours)), self.place, self.verdict]


@dataclass(kw_only=True)
class Padder:
    """A network that was trained on `data.train`; `losses` are the means over each epoch's batches."""

    objective: Objective
    data: Data
    network: torch.nn.Module
    params: Mapping[str, Any]
    losses: list[float]
    batches_of: Mapping[str, Batches]
    task: Task
    after: list[Any] = field(default_factory=list)

    def metric(self, name: str, split: str) -> float:
        metrics = {key: each for key, each in self.objective.metrics().items() if key == name}
        return evaluate(self.task, self.network, self.batches_of[split], self.params, metrics)[name]

    @property
    def learned(self) -> bool:
        """Whether its training loss fell by a tenth at the least."""
        return self.losses[-1] < LEARNED * self.losses[0]


Seeds = tuple[int, ...]
Rows = Iterator[Figure]
Look = Callable[[torch.nn.Module, Mapping[str, Batches]], Any]


def objective_of(name: str, **options: Any) -> Objective:
    objective, faults = load(name, options, ROOT)
    if not isinstance(objective, Objective):
        raise SystemExit("\n".join(fault.message for fault in faults))
    return objective


def fits(
    objective: Objective,
    epochs: int,
    seeds: Sequence[int],
    *,
    whole: bool = False,
    each: Look | None = None,
    **params: Any,
) -> list[Padder]:
    """Train the objective's network through the engine's own loop, once for each seed, with an order of its own.

    `whole`: on train + validation, as the document. `each` looks at the network after each epoch.
    """
    data = objective.data()
    data = data.for_refit() if whole else data
    objective.info = data.info
    params = {**optim.DEFAULTS, **objective.defaults, **params}
    preprocess = objective.preprocess(data.train)
    batches_of = {name: make_batches(split, preprocess, CPU) for name, split in data.splits.items()}
    if params["batch_size"] == "all":
        params["batch_size"] = len(data.train)
    task = Task(objective=objective, info=data.info, device=CPU, n_rows=len(data.train), epochs=epochs)
    done = []
    for seed in seeds:
        network, losses, after = _trained(task, batches_of, Member(number=0, seed=seed, params=params), each)
        done.append(
            Padder(
                objective=objective,
                data=data,
                network=network,
                params=params,
                losses=losses,
                batches_of=batches_of,
                task=task,
                after=after,
            )
        )
    return done


def _trained(
    task: Task, batches_of: Mapping[str, Batches], member: Member, each: Look | None
) -> tuple[torch.nn.Module, list[float], list[Any]]:
    """Return the network, its training loss by epoch, and what `each` saw."""
    queue, looked, networks = [member], [], []

    def report(stack: Stack, results: Results) -> Results:
        networks[:] = [stack.module(member)]
        if each is not None:
            looked.append(each(stack.module(member).eval(), batches_of))
            stack.module(member).train()
        return results  # one with a fault leaves anyway

    train(
        SingleStack(LoopStack(task)),
        batches_of["train"],
        None,
        epochs=task.epochs,
        seed=member.seed,
        ask=lambda n: [queue.pop()] if queue and n else [],
        report=report,
    )
    if member.fault is not None:
        raise SystemExit(member.fault)
    return networks[0], [metrics["train_loss"] for metrics in member.history], looked


def trained_by_itself(objective: Objective, epochs: int) -> tuple[torch.nn.Module, Data]:
    """Return the network of an objective that brings its own `train`, and its prepared data, train + validation."""
    data = objective.data().for_refit()
    preprocess = objective.preprocess(data.train)
    prepared = Data(**{name: split.through(preprocess) for name, split in data.splits.items()})
    report = _Alone(prepared.train, prepared.valid, epochs)
    network = objective.train(objective.defaults, report)
    return network, prepared


class _Alone:
    """A report that nobody hears."""

    def __init__(self, train: Split, valid: Split, epochs: int) -> None:
        self.train, self.valid, self.epochs, self.seed, self._done = train, valid, epochs, SEED, 0

    def __call__(self, metrics: Mapping[str, float]) -> bool:
        self._done += 1
        return self._done < self.epochs


# Figures of fits


def metrics(done: Sequence[Padder], metric: str, split: str) -> list[float]:
    return [each.metric(metric, split) for each in done]


def loss(name: str, documented: str, ours: Sequence[float]) -> Figure:
    return Figure(name=name, documented=documented, ours=ours, better=-1)


def same(name: str, documented: str, ours: float, exact: bool = False) -> Figure:
    return Figure(name=name, documented=documented, ours=[ours], better=0, exact=exact)


def trains(name: str, done: Sequence[Padder], metric: str, split: str = "valid") -> Figure:
    """A figure of a model that is only said to train."""
    return Figure(name=name, ours=metrics(done, metric, split), learned=[each.learned for each in done])


def accuracies(done: Sequence[Padder], metric: str, **documented: str) -> Rows:
    for split, figure in documented.items():
        yield Figure(name=f"{metric}, {split}", documented=figure, ours=metrics(done, metric, split))
