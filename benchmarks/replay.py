"""Recorded learning curves in place of training: the real search, sampler and pruner, over curves of known ends.

A task is what `benchmarks/curves.py` writes. Trials of a stream take its configurations in a given order; trials of a
sampler get the curve of the nearest one. Workers and their slots are played one epoch after the other, in a
time of their own in which each epoch takes about as long as any other.
"""

import heapq
import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import optuna

from hpo.search.claim import Claim
from hpo.search.opening import open_search
from hpo.search.pruning import settle_pruner
from hpo.search.search import Search
from hpo.study.space import build
from hpo.study.spec import Plugin, StudySpec, parse_param

NO_LOCK = "grpc://in-memory:1"
"""The address of a storage for which no lock is taken; the storage itself is one in memory."""
INDEX = "configuration"


@dataclass
class Task:
    """Recorded curves (n, E) of n configurations, less being better."""

    name: str
    space: Mapping[str, Any]
    configurations: Sequence[Mapping[str, Any]]
    curves: np.ndarray
    points: np.ndarray = field(init=False)
    """The configurations in a space in which each param goes from 0 to 1, (n, d)."""

    def __post_init__(self) -> None:
        self.points = np.array([self._point(params) for params in self.configurations])
        self.ends = self.curves.min(axis=1)
        """The value of each configuration: its best."""

    @classmethod
    def read(cls, file: Path) -> "Task":
        content = json.loads(file.read_text())
        sign = -1 if content["maximize"] else 1
        return cls(file.stem, content["space"], content["configurations"], sign * np.array(content["curves"]))

    @property
    def epochs(self) -> int:
        return int(self.curves.shape[1])

    @property
    def searched(self) -> dict[str, Mapping[str, Any]]:
        return {name: entry for name, entry in self.space.items() if isinstance(entry, Mapping)}

    def _point(self, params: Mapping[str, Any]) -> list[float]:
        point = []
        for name, entry in self.searched.items():
            value = params[name]
            if entry["type"] == "categorical":
                point.append(entry["choices"].index(value) / max(1, len(entry["choices"]) - 1))
                continue
            scale = math.log if entry.get("log") else float
            low, high = scale(entry["low"]), scale(entry["high"])
            point.append((scale(value) - low) / (high - low))
        return point

    def nearest(self, params: Mapping[str, Any]) -> np.ndarray:
        """Return the curve (E,) of the recorded configuration that is nearest."""
        distances = np.linalg.norm(self.points - np.array(self._point(params)), axis=1)
        curve: np.ndarray = self.curves[int(distances.argmin())]
        return curve


def regret(value: float, ends: np.ndarray) -> float:
    """Return by how much a value is worse than the best of `ends`, the median of them being worse by 1."""
    best, median = ends.min(), np.median(ends)
    return float((value - best) / (median - best))


@dataclass
class Played:
    """What a study has come to: how many epochs it took, the value that it ends with, how often trials were resumed."""

    epochs: int
    value: float
    resumed: int


class _Slots:
    """A worker: up to `capacity` trials, an epoch of each in turn."""

    def __init__(self, search: Search, task: Task, capacity: int) -> None:
        self._search, self._task, self._capacity = search, task, capacity
        self._active: dict[int, tuple[Claim, np.ndarray, int]] = {}
        self.epochs = self.resumed = 0

    def curve(self, claim: Claim) -> np.ndarray:
        if INDEX in claim.params:
            row: np.ndarray = self._task.curves[claim.params[INDEX]]
            return row
        return self._task.nearest(claim.params)

    def fill(self) -> bool:
        """Claim trials for the free slots; return whether any slot has one."""
        for claim in self._search.ask_up_to(self._capacity - len(self._active), wait=not self._active):
            self._active[claim.number] = claim, self.curve(claim), claim.n_reported
            self.resumed += claim.is_resumed
        return bool(self._active)

    def epoch(self) -> None:
        """Train all trials for an epoch and report it."""
        halving, last = self._search.halving, self._task.epochs
        with self._search.together():
            for claim, curve, done in list(self._active.values()):
                self.epochs += 1
                self._active[claim.number] = claim, curve, done + 1
                go_on = self._search.report(claim.number, done, float(curve[done]))
                if done + 1 == last:
                    self._search.complete(claim.number, float(curve.min()))
                elif not go_on:
                    self._search.prune(claim.number)
                elif halving is not None and done + 1 == halving.next_pause(claim.paused_at):
                    self._search.pause(claim.number)
                else:
                    continue
                del self._active[claim.number]


@contextmanager
def in_memory(
    spec: StudySpec, params: Mapping[str, Any], workers: int = 1
) -> Iterator[tuple[optuna.storages.InMemoryStorage, list[Search]]]:
    """Open a study that is minimized, in a storage in memory, once for each of its workers."""
    space, faults = build({name: parse_param(entry) for name, entry in params.items()}, spec.start_with)
    assert not faults, faults
    inner = optuna.storages.InMemoryStorage()
    with ExitStack() as end, patch("hpo.search.opening.open_patiently", lambda *_: inner):
        searches = []
        for _ in range(workers):
            search = open_search(spec, space, "value", maximize=False)
            assert search is not None
            end.callback(search.close)
            searches.append(search)
        yield inner, searches


def play(
    task: Task,
    pruner: Plugin,
    *,
    trials: int,
    stack: int,
    workers: int = 1,
    stream: Sequence[int] | None = None,
    sampler: Plugin | None = None,
    seed: int = 0,
    budget: float = math.inf,
) -> Played:
    """Play a study of `trials`: of the configurations of a `stream`, or of a `sampler` over the task's own space.

    It ends when its trials are done, or after `budget` epochs; the value is the best seen then.
    """
    params: Mapping[str, Any] = task.searched
    starts: tuple[dict[str, Any], ...] = ()
    if stream is not None:
        params = {INDEX: {"type": "int", "low": 0, "high": len(task.curves) - 1}}
        starts = tuple({INDEX: int(index)} for index in stream[:trials])
    spec = StudySpec(
        name=f"{task.name}-{seed}",
        objective="replay",
        storage=NO_LOCK,
        trials=trials,
        epochs=task.epochs,
        seed=seed,
        sampler=sampler or Plugin(name="random"),
        pruner=pruner,
        start_with=starts,
    )
    with in_memory(spec, params, workers) as (inner, searches):
        for search in searches:
            settle_pruner(search, stack * workers, stacked=stack > 1)
        slots = [_Slots(search, task, stack) for search in searches]
        _run(slots, random.Random(seed), budget)
        finished = [trial for trial in inner.get_all_trials(0, deepcopy=False) if trial.intermediate_values]
    if budget == math.inf:
        finished = [trial for trial in finished if trial.state == optuna.trial.TrialState.COMPLETE]
    return Played(
        epochs=sum(each.epochs for each in slots),
        value=min(min(trial.intermediate_values.values()) for trial in finished),
        resumed=sum(each.resumed for each in slots),
    )


def _run(slots: Sequence[_Slots], draw: random.Random, budget: float) -> None:
    """Let workers train beside each other until none has anything to do: an epoch takes each 0.8 to 1.2."""
    queue = [(draw.random(), place) for place in range(len(slots))]
    idle = 0
    while queue and idle < 2 * len(slots) and sum(each.epochs for each in slots) < budget:
        now, place = heapq.heappop(queue)
        if slots[place].fill():
            slots[place].epoch()
            idle = 0
        else:
            idle += 1
        heapq.heappush(queue, (now + draw.uniform(0.8, 1.2), place))


def streams(task: Task, n: int, seed: int = 0) -> Iterator[list[int]]:
    """Give `n` random orders of a task's configurations."""
    draw = random.Random(seed)
    for _ in range(n):
        order = list(range(len(task.curves)))
        draw.shuffle(order)
        yield order
