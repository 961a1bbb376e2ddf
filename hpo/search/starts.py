"""The entries of `start_with`: which of them trials have had, wherever these stand in the list by now.

The list may change while a study is resumed, so an entry is known by what it says: by the params that its trial was
queued with, which the storage has. An entry that is there twice is had by two trials.
"""

import json
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from hpo.search import schema


@dataclass(frozen=True, kw_only=True)
class Starts:
    """The present list held against a study's trials."""

    untried: Sequence[int] = ()
    """The indices of the entries that no trial has had, nor is queued with."""
    had_by: Collection[int] = ()
    """The numbers of the trials that have the others."""

    def gives_way(self, trial: FrozenTrial) -> bool:
        """Whether a trial of the budget is withdrawn for one with an entry: nobody has started it, and it has none."""
        is_new = trial.state == TrialState.WAITING and not trial.intermediate_values
        return is_new and schema.RETRY_OF not in trial.user_attrs and trial.number not in self.had_by


NONE = Starts()
"""There is no list, or all of it was tried."""


def starts_in(
    trials: Sequence[FrozenTrial], holders: Sequence[FrozenTrial], entries: Sequence[Mapping[str, Any]]
) -> Starts:
    """Hold `entries`, each as it is queued (`Space.queued`), against all `trials` and those that hold the slots."""
    by_number = {trial.number: trial for trial in trials}
    left: dict[str, list[int]] = defaultdict(list)
    for trial in sorted(holders, key=lambda each: (each.state == TrialState.WAITING, each.number)):
        if schema.START_WITH in trial.user_attrs:
            first = _first(trial, by_number)
            left[_said(first.system_attrs.get(schema.FIXED_PARAMS, {}))].append(trial.number)
    untried, had_by = [], set()
    for index, entry in enumerate(entries):
        if having := left[_said(entry)]:
            had_by.add(having.pop(0))
        else:
            untried.append(index)
    return Starts(untried=untried, had_by=had_by)


def _first(trial: FrozenTrial, by_number: Mapping[int, FrozenTrial]) -> FrozenTrial:
    """Return the trial that a retry goes back to: a retry is queued with all params, also with those drawn since."""
    before = trial.user_attrs.get(schema.RETRY_OF)
    while before is not None and before < trial.number and before in by_number:
        trial = by_number[before]
        before = trial.user_attrs.get(schema.RETRY_OF)
    return trial


def _said(params: Mapping[str, Any]) -> str:
    """Return params as a text that is the same for the same ones: of a file 1 is 1.0, but not `true`."""
    plain = {name: float(value) if type(value) is int else value for name, value in params.items()}
    return json.dumps(plain, sort_keys=True)
