"""Configurations drawn from a study's space, looked at before its first trial: which of them can share a stack.

Most spaces have numbers of which a network knows nothing, the learning rate first. Of configurations that differ in
such ones only, one is built and tried.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from hpo.stacks.alone import NotStackable
from hpo.stacks.candidate import Candidate, candidate
from hpo.stacks.padding import Padder
from hpo.study.data import Split
from hpo.study.objective import Params
from hpo.training.faults import TrialError
from hpo.training.loss_params import RecordingParams
from hpo.training.memory import TO_LOOK_AT, Within, free_bytes, is_out_of_memory, most_to_look_at, n_bytes
from hpo.training.optim import ACCUMULATION
from hpo.training.stack import Member, Task

_OF_THE_ENGINE = {"batch_size", ACCUMULATION}
"""The numbers that decide on a stack although neither the network nor the loss reads them."""


def grouped(
    task: Task, draws: Sequence[Params], padder: Padder, example: Split
) -> tuple[dict[Hashable, list[Candidate]], list[str]]:
    """Return those of the `draws` that can be stacked, by their signature, and why others cannot."""
    groups: dict[Hashable, list[Candidate]] = {}
    reasons = []
    tried = _Tried(task, padder, example)
    for i, params in enumerate(draws):
        try:
            each = tried.of(Member(number=-1 - i, seed=i, params=params))
            groups.setdefault(each.signature, []).append(each)
        except (NotStackable, TrialError) as error:
            reasons.append(str(error))
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            reasons.append(f"out of memory: {str(error).partition(chr(10))[0]}")
    return groups, reasons


@dataclass(frozen=True, kw_only=True)
class _SeenTask(Task):
    """A task that keeps which params its networks read: as they are built, and in what they do with them later."""

    seen: list[RecordingParams] = field(default_factory=list)

    def own(self, params: Params) -> dict[str, Any]:
        """See `Task.own`."""
        self.seen.append(RecordingParams(params))
        return self.seen[-1]


class _Tried:
    """Candidates, of those that differ in nothing that was read of them only one."""

    def __init__(self, task: Task, padder: Padder, example: Split) -> None:
        self._task, self._padder, self._example = task, padder, example
        self._known: dict[frozenset[str], dict[Hashable, Candidate]] = {}
        """By the params that were read, and then by all that counts of a configuration."""
        self._reasons: set[str] = set()
        """Why some cannot be stacked, which is not that their params are watched."""

    def of(self, member: Member) -> Candidate:
        """Return `member` as `hpo.stacks.candidate.candidate` does, and raise what that raises."""
        for read, known in self._known.items():
            if (found := known.get(_what_counts(member.params, read))) is not None:
                return replace(found, member=member)
        task = _SeenTask(**vars(self._task))
        try:
            made = candidate(task, member, self._padder, self._example)
        except NotStackable as error:
            if str(error) in self._reasons:
                raise
            return self._unwatched(member)
        read = frozenset(made.reads).union(*(each.names for each in task.seen))
        self._known.setdefault(read, {})[_what_counts(member.params, read)] = made
        return made

    def _unwatched(self, member: Member) -> Candidate:
        """Return `member` with its params as they are: that they were watched may be why it was refused."""
        try:
            return candidate(self._task, member, self._padder, self._example)
        except NotStackable as error:
            self._reasons.add(str(error))
            raise


def _what_counts(params: Params, read: frozenset[str]) -> Hashable:
    """Return `params` without the values of numbers that were not read."""

    def is_free(name: str, value: Any) -> bool:
        return type(value) in (int, float) and name not in read and name not in _OF_THE_ENGINE

    return tuple((name, None if is_free(name, value) else repr(value)) for name, value in sorted(params.items()))


def looked_at(
    several: Sequence[Mapping[str, Any]], build: Callable[[Mapping[str, Any]], nn.Module]
) -> tuple[list[Mapping[str, Any]], int]:
    """Return the first of `several` configurations whose networks may be held at once to be inspected, at least two.

    And how many of those before the last of them are too large for that.
    """
    limit, most = TO_LOOK_AT * free_bytes(torch.device("cpu")), most_to_look_at()
    held: list[Mapping[str, Any]] = []
    n_too_large, taken = 0, 0
    for params in several:
        try:
            with Within(most):
                size = n_bytes(build(params))
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            n_too_large += 1
            continue
        except TrialError:  # infeasible: such trials take no time
            continue
        taken += size
        if taken > limit and len(held) >= 2:
            break
        held.append(params)
    return held, n_too_large
