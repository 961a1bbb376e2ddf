"""A stored trial as a row of a table, and the best of them: what `Study.trials` and `hpo report` both show."""

from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from hpo.errors import masked
from hpo.search import schema
from hpo.search.budget import covered, is_paused, rank, spans_of, worker_of
from hpo.search.constraints import holds, is_feasible, values_of, violation_of
from hpo.search.front import leading, others_of
from hpo.search.view import Best

COLUMNS = ("number", "state", "value")
"""The first columns of a table of trials; those of the params follow, then MORE_COLUMNS."""
MORE_COLUMNS = ("epochs", "best_epoch", "seconds", "worker", "retry_of", "error")
PARAM = "params_"
"""How the name of a param's column begins."""
NO_OTHERS: Mapping[str, bool] = {}
OTHER = "values_"
"""How the name of a column begins that has the value of a metric beside the one that leads."""
CONSTRAINED = "constrained_"
"""How the name of a column begins that has the value of a constraint; a latency is in milliseconds."""
OR = ":or"
"""How the name ends under which Optuna stores the branch of a parameter with an `or`."""


def row_of(trial: FrozenTrial, others: Collection[str] = ()) -> dict[str, Any]:
    """Return a trial's row: COLUMNS, what is known of constraints, `params_<name>` of its params, MORE_COLUMNS.

    And `values_<name>` of the study's `others`, its metrics beside the one that leads.
    """
    best_epoch = trial.user_attrs.get(schema.BEST_EPOCH)
    return {
        "number": trial.number,
        "state": state_of(trial),
        "value": leading(trial) if trial.state == TrialState.COMPLETE else None,
        **{f"{OTHER}{name}": value for name, value in others_of(trial, others).items()},
        **({"feasible": is_feasible(trial), "violation": violation_of(trial)} if trial.constraints else {}),
        **{f"{CONSTRAINED}{name}": value for name, value in values_of(trial).items()},
        **{f"{PARAM}{name}": value for name, value in params_of(trial).items()},
        "epochs": len(trial.intermediate_values),
        "best_epoch": None if best_epoch is None else best_epoch + 1,
        "seconds": covered(spans) if (spans := spans_of(trial)) and trial.state.is_finished() else None,
        "worker": worker_of(trial),
        "retry_of": trial.user_attrs.get(schema.RETRY_OF),
        "error": trial.user_attrs.get(schema.ERROR),
    }


def columns_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the columns of a table of these rows: those of all constraints and params that any row has, by name."""
    there = {name for row in rows for name in row}
    held = [name for name in ("feasible", "violation") if name in there]
    named = [name for begin in (CONSTRAINED, PARAM) for name in sorted(there) if name.startswith(begin)]
    others = [name for name in dict.fromkeys(name for row in rows for name in row) if name.startswith(OTHER)]
    return [*COLUMNS, *others, *held, *named, *MORE_COLUMNS]


def state_of(trial: FrozenTrial) -> str:
    """Return Optuna's name of a trial's state, or PAUSED."""
    return "PAUSED" if is_paused(trial) else trial.state.name


def params_of(trial: FrozenTrial) -> dict[str, Any]:
    """Return the params that were searched, under their own names."""
    params = dict(trial.params)
    branches = [name for name in params if name.endswith(OR)]
    for name in branches:
        params.setdefault(name.removesuffix(OR), params[name])
        del params[name]
    return params


def best_of(
    trials: Sequence[FrozenTrial], fixed: Mapping[str, Any], *, maximize: bool, others: Mapping[str, bool] = NO_OTHERS
) -> Best | None:
    """Return the best feasible trial, with its `fixed` params; None: there is none. `others` as in `row_of`."""
    trial = next(iter(ranked(trials, maximize=maximize, others=others)), None)
    return None if trial is None else as_best(trial, fixed, others)


def as_best(trial: FrozenTrial, fixed: Mapping[str, Any], others: Collection[str] = ()) -> Best:
    """Return a complete trial, with its `fixed` params."""
    value = leading(trial)
    assert value is not None
    return Best(
        number=trial.number,
        value=value,
        others=others_of(trial, others),
        params={**fixed, **params_of(trial)},
        epoch=min(trial.user_attrs.get(schema.BEST_EPOCH, 0), max(len(trial.intermediate_values) - 1, 0)),
        seed=trial.user_attrs.get(schema.SEED, 0),
        metrics=trial.user_attrs.get(schema.METRICS, {}),
    )


def ranked(
    trials: Sequence[FrozenTrial], *, maximize: bool, others: Mapping[str, bool] = NO_OTHERS
) -> list[FrozenTrial]:
    """Return the complete trials that break no constraint, the best first, by the order that the study goes by.

    `others` are the metrics beside the one that leads, each with whether more of it is better.
    """
    more = tuple(others.values())
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE and leading(trial) is not None]
    return sorted(filter(holds, complete), key=lambda trial: rank(trial, maximize=maximize, others=more))


def fixed_in(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Return the params of a study's identity that are not searched."""
    params = identity.get("params", {})
    return {key: value for key, value in params.items() if not isinstance(value, Mapping)}


@lru_cache(maxsize=10_000)
def _masked(text: str) -> str:
    """Mask a text once: most are the names of columns, states and workers."""
    return masked(text)


def plain(value: Any) -> Any:
    """Return what a storage holds as plain values, every text masked; what JSON has not is a text."""
    if isinstance(value, str):
        return _masked(value)
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, Mapping):
        return {_masked(str(key)): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return _masked(str(value))


def forget_masked() -> None:
    """Forget the texts that were masked: by now there may be more to mask in them."""
    _masked.cache_clear()
