"""Trials of another Optuna study as history: the sampler sees them, the budget and the results do not.

Each is added to the study as a COMPLETE trial that bears the mark `schema.ADOPTED`, and with the distributions of this
study's own space, so that a sampler takes it for one of its own.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from hpo.errors import InputError, did_you_mean, is_number, masked
from hpo.search import schema
from hpo.search.address import exists
from hpo.search.constraints import attrs_of, constraints_of, values_of
from hpo.search.retrying import RetryingStorage, locked
from hpo.search.storage import close_storage, open_storage
from hpo.study.constraints import Constraint
from hpo.study.dimension import RANGE, Dimension, same
from hpo.study.space import FreeSpace, Space
from hpo.study.spec import Categorical


def trials_of(url: str, name: str, *, maximize: bool) -> list[FrozenTrial]:
    """Return all trials of study `name` in the storage at `url`. Raises InputError, StorageError."""
    if not exists(url):
        raise InputError(f"there is no storage {masked(url)}")
    storage = open_storage(url)
    try:
        names = [study.study_name for study in storage.get_all_studies()]
        if name not in names:
            raise InputError(f"the storage {masked(url)} has no study {name!r}{did_you_mean(name, names)}")
        study = optuna.load_study(study_name=name, storage=storage)
        require_alike(study, maximize=maximize)
        return study.get_trials()
    finally:
        close_storage(storage)


def require_alike(study: optuna.Study, *, maximize: bool) -> None:
    """Raise InputError where the values of `study` do not compare with those of the one that adopts its trials."""
    if len(study.directions) > 1:
        n = len(study.directions)
        raise InputError(f"study {study.study_name!r} has {n} metrics: only one with one can be adopted")
    if (study.direction == optuna.study.StudyDirection.MAXIMIZE) != maximize:
        here = "maximize" if maximize else "minimize"
        raise InputError(f"study {study.study_name!r} goes to {study.direction.name.lower()}, this one to {here}")


def as_history(
    trials: Sequence[FrozenTrial],
    space: Space,
    source: str,
    adopted: Sequence[FrozenTrial],
    constraints: Mapping[str, Constraint] | None = None,
) -> tuple[list[FrozenTrial], Counter[str]]:
    """Return those of `trials` that `space` could have given, to be added, and how many were left out, by the reason.

    `source` names the study they come from; what stands in `adopted` already is left out too, and trials of which it is
    not known whether they hold to the study's `constraints`.
    """
    constraints = constraints or {}
    there = {trial.user_attrs[schema.ADOPTED] for trial in adopted}
    history, left_out = [], Counter[str]()
    for trial in trials:
        mark = f"{source}#{trial.number}"
        attrs = attrs_of(constraints, _values(trial))
        unknown = next((name for name in constraints if name not in attrs.get(schema.CONSTRAINED, {})), None)
        reason = _why_not(trial, space) or (unknown and f"its {unknown} is not known, which is constrained here")
        if reason is not None or mark in there:
            left_out[reason or "adopted before"] += 1
            continue
        free = isinstance(space, FreeSpace)
        params, distributions = (trial.params, trial.distributions) if free else _fitted(_named(trial), space)
        history.append(
            create_trial(
                state=TrialState.COMPLETE,
                value=trial.value,
                params=params,
                distributions=distributions,
                user_attrs={schema.ADOPTED: mark},
                system_attrs={key: value for key, value in attrs.items() if key.startswith(schema.CONSTRAINT)},
            )
        )
    return history, left_out


def _mark(trial: FrozenTrial) -> tuple[int, str, str]:
    """Return what tells a trial from those of other studies; one that was not started is like none."""
    start = trial.datetime_start
    return (trial.number, str(start), repr(sorted(trial.params.items()))) if start else (-1, str(id(trial)), "")


def _values(trial: FrozenTrial) -> dict[str, float]:
    """Return what is known of a trial of hpo's that may be constrained: its metrics, and what was constrained there."""
    metrics = trial.user_attrs.get(schema.METRICS, {})
    known = {str(name).removeprefix("valid_"): value for name, value in metrics.items()}
    return {
        name: float(value)
        for name, value in {**known, **values_of(trial)}.items()
        if is_number(value) and isfinite(value)
    }


def _why_not(trial: FrozenTrial, space: Space) -> str | None:
    """Return why a trial is not one that `space` could have given; None: it is."""
    if schema.ADOPTED in trial.user_attrs:
        return "adopted from elsewhere itself"
    if trial.state != TrialState.COMPLETE or trial.value is None:
        return f"not complete ({trial.state.name})"
    if isinstance(space, FreeSpace):
        return None
    named = _named(trial)
    for name, value in space.fixed.items():
        if name in named and named[name] != value:
            return f"{name} is fixed here at another value"
    params = {**space.fixed, **named}
    for dimension in space.dimensions:
        if not dimension.applies(params):
            continue
        if dimension.name not in named:
            return f"it has no {dimension.name}"
        if not dimension.takes(named[dimension.name]):
            return f"its {dimension.name} is outside of the range here"
    return None


def _named(trial: FrozenTrial) -> dict[str, Any]:
    """Return a trial's params by name, where one of hpo's has the value of an `or` under `<name>:or` only."""
    others = {name.removesuffix(":or"): x for name, x in trial.params.items() if name.endswith(":or") and x != RANGE}
    return {**others, **trial.params}


def _fitted(params: Mapping[str, Any], space: Space) -> tuple[dict[str, Any], dict[str, BaseDistribution]]:
    """Return a trial's params as this study would have asked for them, with their distributions."""
    applying = {d.name: _value(d, params[d.name]) for d in space.dimensions if d.applies({**space.fixed, **params})}
    asked = space.queued(applying)
    known: dict[str, BaseDistribution] = {}
    for dimension in space.dimensions:
        known[dimension.name] = dimension.distribution
        if dimension.branch is not None:
            known[dimension.branch_name] = dimension.branch
    return asked, {name: known[name] for name in asked}


def _value(dimension: Dimension, value: Any) -> Any:
    """Return a value as this study's distribution has it: of choices the one that is meant."""
    if isinstance(dimension.searched, Categorical):
        return next(choice for choice in dimension.searched.choices if same(value, choice))
    return value


def adopt(
    study: optuna.Study, storage: RetryingStorage, url: str, space: Space, trials: Sequence[FrozenTrial], source: str
) -> tuple[int, Counter[str]]:
    """Add `trials` to `study` as history; return how many were added, and how many not, by the reason.

    Raises InputError where the study has several metrics: what trials of others came to in each of them is not known;
    and where the trials are its own, which its sampler would see twice.
    """
    if len(study.directions) > 1:
        raise InputError(f"study {study.study_name!r} has {len(study.directions)} metrics: it cannot adopt trials")
    with locked(storage, url):
        present = study.get_trials(deepcopy=False)
        own = {(trial.number, trial.datetime_start) for trial in present if trial.datetime_start is not None}
        if any(
            (trial.number, trial.datetime_start) in own for trial in trials if schema.ADOPTED not in trial.user_attrs
        ):
            raise InputError(f"study {study.study_name!r} cannot adopt its own trials; name the study of others")
        adopted = [trial for trial in present if schema.ADOPTED in trial.user_attrs]
        history, left_out = as_history(trials, space, source, adopted, constraints_of(study.user_attrs))
        study.add_trials(history)
    return len(history), left_out
