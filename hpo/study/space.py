"""The search space: `params` of study.yaml as Optuna distributions, with conditions (`when`) and branches (`or`).

`Space.suggest(trial)` asks an Optuna trial for all parameters that apply and returns them with the fixed ones.
A branch `or: 0` is one more categorical parameter, `<name>:or`, so that a sampler learns it like any other.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from optuna import create_study
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.samplers import RandomSampler
from optuna.trial import Trial

from hpo.errors import Fault, InputError, did_you_mean
from hpo.study.dimension import RANGE, Dimension, same, top_of
from hpo.study.ranges import Categorical, FloatRange, IntRange, Searched


@dataclass(frozen=True, kw_only=True)
class Space:
    """All parameters of a study: the `fixed` ones and the searched `dimensions`, each after those it depends on."""

    fixed: Mapping[str, Any]
    dimensions: tuple[Dimension, ...]

    def suggest(self, trial: Trial) -> dict[str, Any]:
        """Ask `trial` for every parameter that applies; return them with the fixed ones."""
        params = dict(self.fixed)
        for dimension in self.dimensions:
            if not dimension.applies(params):
                continue
            if dimension.branch is not None:
                chosen = trial.suggest_categorical(dimension.branch_name, dimension.branch.choices)
                if chosen != RANGE:
                    params[dimension.name] = chosen
                    continue
            params[dimension.name] = _ask(trial, dimension.name, dimension.distribution)
        return params

    def resolve(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Return all parameters of a trial from those that Optuna stored for it (`FrozenTrial.params`)."""
        params = dict(self.fixed)
        for dimension in self.dimensions:
            if dimension.name in asked:
                params[dimension.name] = asked[dimension.name]
            elif dimension.branch_name in asked:
                params[dimension.name] = asked[dimension.branch_name]
        return params

    def searched(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Return those of a trial's `params` that were searched."""
        return {d.name: params[d.name] for d in self.dimensions if d.name in params and d.applies(params)}

    def queued(self, configuration: Mapping[str, Any]) -> dict[str, Any]:
        """Return a `start_with` entry as the parameters to give to `Study.enqueue_trial`."""
        fixed: dict[str, Any] = {}
        for dimension in self.dimensions:
            if dimension.name not in configuration:
                continue
            value = configuration[dimension.name]
            if dimension.branch is not None:
                otherwise = dimension.branch.choices[0]
                fixed[dimension.branch_name] = otherwise if value == otherwise else RANGE
                if value == otherwise:
                    continue
            fixed[dimension.name] = value
        return fixed

    def grid(self) -> dict[str, list[Any]]:
        """Return every searched parameter's values, as Optuna's GridSampler takes them.

        Raises InputError where a parameter has no end of values, or is not always asked for.
        """
        grid: dict[str, list[Any]] = {}
        for dimension in self.dimensions:
            values = dimension.values()
            if values is None:
                raise InputError(f"grid needs a step or choices, but {dimension.name} has neither")
            if dimension.searched.when or dimension.branch is not None:
                raise InputError(f"grid takes neither `when` nor `or`, but {dimension.name} has one; use brute_force")
            grid[dimension.name] = values
        return grid

    def size(self) -> int | None:
        """Return how many configurations there are, or None where there is no end of them."""
        if any(dimension.n_values is None for dimension in self.dimensions):
            return None
        return self._count(dict(self.fixed), 0, {name for d in self.dimensions for name in d.searched.when})

    def _count(self, params: dict[str, Any], index: int, conditions: set[str]) -> int:
        """Return how many ways there are to go on from `params`; only the values of `conditions` are gone through."""
        if index == len(self.dimensions):
            return 1
        dimension = self.dimensions[index]
        if not dimension.applies(params):
            return self._count(params, index + 1, conditions)
        if dimension.name not in conditions:
            return (dimension.n_values or 0) * self._count(params, index + 1, conditions)
        values = dimension.values() or ()
        return sum(self._count(params | {dimension.name: value}, index + 1, conditions) for value in values)

    def corners(self, most: int = 16) -> list[dict[str, Any]]:
        """Return configurations at the ends of every range, at most `most`, to try whether each can be built."""
        highs = next(self._corners(dict(self.fixed), 0, last=True))
        corners = [corner for corner in islice(self._corners(dict(self.fixed), 0), most) if corner != highs]
        return [*corners[:1], highs, *corners[1:]][:most]  # that with every high is among them, however many there are

    def extremes(self, most: int = 64) -> list[dict[str, Any]]:
        """Return configurations that show what each parameter alone changes: all at their highest, but one at an end.

        At most `most`; first that with every parameter at its highest, then that with every one at its lowest.
        """
        lows, highs = (next(self._corners(dict(self.fixed), 0, last=last)) for last in (False, True))
        varied = [
            self.completed(highs | {d.name: value})
            for d in self.dimensions
            if d.name in highs
            for value in _ends(d.searched)
        ]
        unique = {repr(sorted(each.items())): each for each in (highs, lows, *varied)}
        return list(unique.values())[:most]

    def completed(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Return `params` without what does not apply, and with what does but is not there at its highest."""
        result = dict(self.fixed)
        for d in self.dimensions:
            if d.applies(result):
                result[d.name] = params[d.name] if d.name in params else _ends(d.searched)[-1]
        return result

    def draw(self, n: int, seed: int) -> list[dict[str, Any]]:
        """Return `n` configurations at random, as the random sampler would draw them."""
        study = create_study(sampler=RandomSampler(seed))
        return [self.suggest(study.ask()) for _ in range(n)]

    def combinations(self, names: Collection[str], most: int = 1 << 14) -> Iterator[dict[str, Any]]:
        """Yield each combination that params of these names can have, at most `most`, with those they depend on.

        Of a range it is both ends, the value beside it, and those that others depend on.
        """
        wanted: set[str] = set(names)
        for d in reversed(self.dimensions):  # each is after those it depends on
            wanted |= set(d.searched.when) if d.name in wanted else set()
        some = [d for d in self.dimensions if d.name in wanted]
        ends = {d.name: [*_ends(d.searched), *_beside(d.searched)] for d in some}
        for name, values in ((name, values) for d in some for name, values in d.searched.when.items()):
            if name in ends:
                ends[name] += values

        def of(params: dict[str, Any], left: Sequence[Dimension]) -> Iterator[dict[str, Any]]:
            if not left:
                yield params
            elif not left[0].applies(params):
                yield from of(params, left[1:])
            else:
                for value in dict.fromkeys(ends[left[0].name]):
                    yield from of(params | {left[0].name: value}, left[1:])

        return islice(of(dict(self.fixed), some), most)

    def _corners(self, params: dict[str, Any], index: int, last: bool = False) -> Iterator[dict[str, Any]]:
        if index == len(self.dimensions):
            yield params
            return
        dimension = self.dimensions[index]
        if not dimension.applies(params):
            yield from self._corners(params, index + 1, last)
            return
        for value in _ends(dimension.searched)[-1 if last else 0 :]:
            yield from self._corners(params | {dimension.name: value}, index + 1, last)

    def identity(self) -> dict[str, Any]:
        """Return the space as plain values, equal for equal spaces, to be stored with the study."""
        searched = {
            d.name: d.searched.model_dump(mode="json", by_alias=True, exclude_defaults=True) | {"type": d.searched.type}
            for d in self.dimensions
        }
        return {**self.fixed, **searched}


class FreeSpace(Space):
    """The space of a plain Optuna objective, which suggests its params itself."""

    def resolve(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        return dict(asked)

    def searched(self, params: Mapping[str, Any]) -> dict[str, Any]:
        return dict(params)

    def queued(self, configuration: Mapping[str, Any]) -> dict[str, Any]:
        return dict(configuration)

    def grid(self) -> dict[str, list[Any]]:
        raise InputError("grid needs all values in advance, but a function suggests its own; use brute_force")

    def size(self) -> int | None:
        return None


def _ask(trial: Trial, name: str, distribution: BaseDistribution) -> Any:
    if isinstance(distribution, CategoricalDistribution):
        return trial.suggest_categorical(name, distribution.choices)
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    suggest: Any = trial.suggest_int if isinstance(distribution, IntDistribution) else trial.suggest_float
    step = {} if distribution.log else {"step": distribution.step}
    return suggest(name, distribution.low, distribution.high, log=distribution.log, **step)


def _ends(searched: Searched) -> list[Any]:
    if isinstance(searched, Categorical):
        return list(searched.choices)
    return [searched.low, type(searched.high)(top_of(searched))]


def _beside(searched: Searched) -> list[Any]:
    return [] if isinstance(searched, Categorical) or searched.otherwise is None else [searched.otherwise]


def build(params: Mapping[str, Any], start_with: Sequence[Mapping[str, Any]]) -> tuple[Space, list[Fault]]:
    """Return the space of `params` (fixed values and `Searched`), and all that is wrong with it."""
    fixed = {name: value for name, value in params.items() if not _is_searched(value)}
    left = {name: Dimension(name=name, searched=value) for name, value in params.items() if _is_searched(value)}
    faults = [fault for dimension in left.values() for fault in _condition_faults(dimension, left, fixed)]
    ordered: dict[str, Dimension] = {}
    while left:
        ready = [d for d in left.values() if all(n in ordered or n not in left for n in d.searched.when)]
        if not ready:
            faults += [
                Fault(path=("params", name, "when"), message=f"goes in a circle: {' -> '.join(left)}")
                for name in list(left)[:1]
            ]
            break
        ordered |= {d.name: d for d in ready}
        left = {name: d for name, d in left.items() if name not in ordered}
    space = Space(fixed=fixed, dimensions=tuple(ordered.values()))
    faults += [fault for index, entry in enumerate(start_with) for fault in _start_faults(index, entry, space)]
    return space, faults


def _is_searched(value: Any) -> bool:
    return isinstance(value, FloatRange | IntRange | Categorical)


def _condition_faults(
    dimension: Dimension, searched: Mapping[str, Dimension], fixed: Mapping[str, Any]
) -> Iterator[Fault]:
    for name, values in dimension.searched.when.items():
        path = ("params", dimension.name, "when", name)
        others = [other for other in (*searched, *fixed) if other != dimension.name]
        if name not in others:
            yield Fault(path=path, message=f"there is no parameter {name!r}{did_you_mean(name, others)}")
            continue
        for value in values:
            if name in searched and not searched[name].takes(value):
                yield Fault(path=path, message=f"{name} cannot be {value!r}; it is {searched[name].describe()}")
            if name in fixed and not same(fixed[name], value):
                yield Fault(path=path, message=f"{name} cannot be {value!r}; it is fixed to {fixed[name]!r}")


def _start_faults(index: int, entry: Mapping[str, Any], space: Space) -> Iterator[Fault]:
    dimensions = {d.name: d for d in space.dimensions}
    for name, value in entry.items():
        path = ("start_with", index, name)
        if name in dimensions:
            if not dimensions[name].takes(value):
                yield Fault(path=path, message=f"{value!r} is outside of the space: {dimensions[name].describe()}")
        elif name not in space.fixed:
            yield Fault(
                path=path, message=f"there is no parameter {name!r}{did_you_mean(name, (*dimensions, *space.fixed))}"
            )
        elif not same(space.fixed[name], value):
            yield Fault(
                path=path, message=f"{name} is fixed to {space.fixed[name]!r}, so it cannot start with {value!r}"
            )
