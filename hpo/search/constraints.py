"""Whether a trial holds to the study's constraints: Optuna's own record of it, and what the values were.

Optuna's samplers read a number for each constraint in a trial's attributes (`Trial.set_constraint`): it holds where
that is 0 or less. A plain Optuna objective sets its own; the engine's are set when a trial ends, or is paused.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from hpo.search import schema
from hpo.study.constraints import Constraint, constraints_in


def attrs_of(constraints: Mapping[str, Constraint], values: Mapping[str, float]) -> dict[str, Any]:
    """Return the attributes of a trial whose `values` of the constraints' names are these, as far as they are known."""
    known = {name: values[name] for name in constraints if name in values}
    if not known:
        return {}
    optunas = {f"{schema.CONSTRAINT}{name}": constraints[name].violation(value) for name, value in known.items()}
    return {schema.CONSTRAINED: known, **optunas}


def violation_of(trial: FrozenTrial) -> float:
    """Return by how much a trial breaks its constraints, added up as Optuna does; 0: as far as is known, by nothing."""
    return float(sum(each for each in trial.constraints.values() if each > 0))


def holds(trial: FrozenTrial) -> bool:
    """Whether a trial breaks none of its constraints, as far as is known: only such a one can be the best."""
    return violation_of(trial) == 0


def is_untrained(trial: FrozenTrial) -> bool:
    """Whether a trial was pruned before its first epoch, since its network breaks a constraint."""
    return trial.state == TrialState.PRUNED and not trial.intermediate_values and not holds(trial)


def is_feasible(trial: FrozenTrial) -> bool | None:
    """Whether a trial holds to all of its constraints; None: it has none, or is not complete and breaks none so far."""
    if not holds(trial):
        return False
    return True if trial.constraints and trial.state == TrialState.COMPLETE else None


def constraints_of(attrs: Mapping[str, Any]) -> dict[str, Constraint]:
    """Return a study's constraints by name, from its attributes."""
    identity = attrs.get(schema.IDENTITY)
    return constraints_in(identity.get("constraints")) if isinstance(identity, Mapping) else {}


def values_of(trial: FrozenTrial) -> dict[str, float]:
    """Return what is stored of a trial's constrained values, by name."""
    return dict(trial.user_attrs.get(schema.CONSTRAINED, {}))


def said_of(trial: FrozenTrial, constraints: Mapping[str, Constraint]) -> str:
    """Return which constraints a trial breaks, and by how much, for a person; empty: none."""
    values, parts = values_of(trial), []
    for name, violation in trial.constraints.items():
        if violation > 0:
            known = name in constraints and name in values
            parts.append(constraints[name].said(values[name]) if known else f"{name} broken by {violation:.4g}")
    return ", ".join(parts)


def nearest(trials: Sequence[FrozenTrial]) -> FrozenTrial | None:
    """Return the trial that breaks its constraints by the least, a complete one if there is any; None: none does."""
    broken = [trial for trial in trials if not holds(trial)]
    return min(broken, key=lambda t: (t.state != TrialState.COMPLETE, violation_of(t), t.number), default=None)


def feasible_text(trials: Sequence[FrozenTrial], constraints: Mapping[str, Constraint]) -> str:
    """Return how many of a study's complete trials hold to its constraints, and how near the others come.

    Empty: the study has none, and no trial breaks one of its own.
    """
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    held = sum(map(holds, complete))
    found = nearest(trials)
    if not constraints and found is None:
        return ""
    texts = [f"{each.name} {each.text}" for each in constraints.values()] or ["its own constraints"]
    untrained = sum(map(is_untrained, trials))
    said = f"{held} of {len(complete)} complete trials hold to {', '.join(texts)}"
    said += f"; {untrained} more were not trained, since they break one" if untrained else ""
    if held or found is None:
        return said
    return f"{said}; the nearest is trial {found.number}: {said_of(found, constraints)}"


def wrong_constraints(trial: FrozenTrial) -> str | None:
    """Return what is wrong with what a storage holds of a trial's constraints; None: nothing."""
    for key, value in trial.system_attrs.items():
        if key.startswith(schema.CONSTRAINT) and not is_real(value):
            return f"its {key} is {value!r:.100}, not a number"
    values = trial.user_attrs.get(schema.CONSTRAINED, {})
    sound = isinstance(values, Mapping) and all(map(is_real, values.values()))
    return None if sound else f"its {schema.CONSTRAINED} is {values!r:.100}"


def is_real(value: Any) -> bool:
    """Whether what a storage holds is a number, finite or not."""
    return type(value) in (int, float) and value == value
