"""Studies side by side: what each has found and cost, whether their values compare, and in what they differ."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hpo.errors import masked
from hpo.search import schema
from hpo.search.budget import Counts
from hpo.search.named import Named, found, opened, settings_of, stored_spec
from hpo.search.opening import as_stored
from hpo.search.view import Best

_ABSENT = "-"


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One of the studies that are compared."""

    label: str
    """Its name; where another has the same, with its storage."""
    storage: str
    metric: str
    maximize: bool
    counts: Counts
    best: Best | None
    epochs: int
    """Trained, over all trials."""
    seconds: float
    """For how long at least one trial was running."""
    test: Mapping[str, float]
    settings: Mapping[str, Any]
    """What it was run with, by dotted keys of a study file; what a password might be in is a fingerprint."""

    @property
    def trials_an_hour(self) -> float | None:
        return self.counts.finished / self.seconds * 3600 if self.seconds else None

    @property
    def goal(self) -> str:
        return f"the {'highest' if self.maximize else 'lowest'} {self.metric}"

    def as_dict(self) -> dict[str, Any]:
        """Return what `--json` prints of it."""
        best = None if self.best is None else {"number": self.best.number, "value": self.best.value}
        return {
            "study": self.label,
            "storage": self.storage,
            "metric": self.metric,
            "direction": "maximize" if self.maximize else "minimize",
            "best": best,
            "trials": self.counts.by_state(),
            "epochs": self.epochs,
            "seconds": self.seconds,
            "trials_an_hour": self.trials_an_hour,
            "test": dict(self.test),
        }


def compared(studies: Sequence[Named]) -> list[Compared]:
    """Return what is stored of each of `studies`. Raises InputError where there is none, or hpo has not made it."""
    names = [study.name for study in studies]
    return [_read(study, alone=names.count(study.name) == 1) for study in studies]


def _read(study: Named, alone: bool) -> Compared:
    with opened(study.storage, study.outage) as storage:
        there = found(storage, study.storage, study.name)
        search = as_stored(stored_spec(there, study.storage), storage)
        seen = search.view()
        result = there.user_attrs.get(schema.RESULT)
        test = result.get("test") if isinstance(result, Mapping) else None
        return Compared(
            label=study.name if alone else f"{study.name} in {masked(study.storage)}",
            storage=study.storage,
            metric=search.metric,
            maximize=search.maximize,
            counts=seen.counts,
            best=seen.best(),
            epochs=seen.effort.epochs,
            seconds=search.seconds_used(seen),
            test=test if isinstance(test, Mapping) else {},
            settings=settings_of(there, search.spec),
        )


def differences(studies: Sequence[Compared]) -> dict[str, list[Any]]:
    """Return by key what differs between the studies, each value in their order; `-` where one has none."""
    keys = list(dict.fromkeys(key for study in studies for key in study.settings))
    values = {key: [study.settings.get(key, _ABSENT) for study in studies] for key in keys}
    return {key: each for key, each in values.items() if any(value != each[0] for value in each)}


def verdict(studies: Sequence[Compared]) -> tuple[str | None, str]:
    """Return the label of the study with the best value, if their values compare, and what is to be said of that."""
    goals = {study.goal for study in studies}
    if len(goals) > 1:
        return None, f"their values do not compare: they look for {' and for '.join(sorted(goals))}"
    having = [study for study in studies if study.best is not None]
    if len(having) < 2:
        return None, "there is nothing to compare yet: fewer than two of them have a complete trial"
    sign = -1 if studies[0].maximize else 1
    ranked = sorted(having, key=lambda study: sign * _value(study))
    first, second = ranked[:2]
    if _value(first) == _value(second):
        even = [study.label for study in having if _value(study) == _value(first)]
        text = f"{', '.join(even)} are even: {first.metric} {_value(first):.6g}"
        return None, text + _doubt(studies)
    ahead = abs(_value(first) - _value(second))
    text = f"{first.label} is best: {first.metric} {_value(first):.6g}, {ahead:.2g} ahead of {second.label}"
    return first.label, text + _doubt(studies)


def _value(study: Compared) -> float:
    assert study.best is not None
    return study.best.value


def _doubt(studies: Sequence[Compared]) -> str:
    """Return why the values of studies with one goal may still not compare; empty: nothing is known against it."""
    differs = differences(studies)
    what = [name for name, key in (("objectives", "objective"), ("data", "data")) if key in differs]
    what += ["options"] if any(key.startswith("options.") for key in differs) else []
    return f" (of different {' and '.join(what)}, so their values may not compare)" if what else ""
