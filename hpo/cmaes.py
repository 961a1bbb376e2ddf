"""CMA-ES that unpickles nothing: Optuna's sampler, its state rebuilt from the finished trials' own numbers.

Optuna's `CmaEsSampler` keeps its optimizer as a pickle in an attribute of a trial and loads that at the next: whoever
can write the storage runs code in every worker. The state of CMA-ES is a function of the solutions that it was told,
generation by generation, and these are in the storage anyway: params and value of trials, each with the number of its
generation. So the generations are told again, and only the new ones where a process has told the others before.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from optuna._transform import _SearchSpaceTransform
from optuna.distributions import BaseDistribution
from optuna.samplers import CmaEsSampler
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial

X_FOR_TELL = "x_for_tell"
"""Optuna's attribute of a trial, with margin: the point before it was rounded to a step."""
_LARGEST = 1e32
"""`cmaes` refuses to be told of larger coordinates."""


class Evolution:
    """An optimizer, the space it is of, and the trials that it was told of so far: shared by a process's samplers."""

    def __init__(self) -> None:
        self.optimizer: Any = None
        self.space: Any = None
        self.told: list[tuple[int, ...]] = []

    def start(self, space: Any, optimizer: Any) -> None:
        """Take an optimizer of that space that was told nothing yet."""
        self.space, self.optimizer, self.told = space, optimizer, []


class RebuiltCmaEsSampler(CmaEsSampler):
    """Optuna's `CmaEsSampler` with its keys; see the module's docstring."""

    def __init__(self, evolution: Evolution, **keys: Any) -> None:
        super().__init__(**keys)
        self._evolution = evolution

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        completed = self._get_trials(study)
        if not search_space or len(completed) < self._n_startup_trials:
            return {}
        seed = self._cma_rng.rng.randint(1, 2**16) + trial.number  # before an optimizer is made, which draws too
        transform = _SearchSpaceTransform(search_space, transform_step=not self._with_margin, transform_0_1=True)
        optimizer = self._rebuilt(study, completed, transform, search_space)
        optimizer.reseed_rng(seed)
        point = optimizer.ask()
        attrs = {self._attr_key_generation: optimizer.generation}
        if self._with_margin:
            point, before_rounding = point
            attrs[X_FOR_TELL] = before_rounding.tolist()
        for key, value in attrs.items():
            study._storage.set_trial_system_attr(trial._trial_id, key, value)
        return transform.untransform(point)

    def _rebuilt(
        self,
        study: Study,
        completed: Sequence[FrozenTrial],
        transform: _SearchSpaceTransform,
        search_space: dict[str, BaseDistribution],
    ) -> Any:
        """Return the optimizer that was told of every full generation among `completed`."""
        known, space = self._evolution, repr(sorted(search_space.items()))
        if known.space != space:
            known.start(space, self._init_optimizer(transform, study.direction))
        generations = self._generations(study.direction, completed, transform)
        if [numbers for numbers, _ in generations[: len(known.told)]] != known.told:
            known.start(space, self._init_optimizer(transform, study.direction))
        for numbers, solutions in generations[len(known.told) :]:
            known.optimizer.tell(solutions)
            known.told.append(numbers)
        return known.optimizer

    def _generations(
        self, direction: StudyDirection, completed: Sequence[FrozenTrial], transform: _SearchSpaceTransform
    ) -> list[tuple[tuple[int, ...], list[tuple[np.ndarray, float]]]]:
        """Return the full generations in their order: the trials' numbers, and their (point, loss), as told."""
        size = self._evolution.optimizer.population_size
        sign = 1 if direction == StudyDirection.MINIMIZE else -1
        members: dict[int, list[tuple[int, tuple[np.ndarray, float]]]] = {}
        for trial in completed:
            generation = trial.system_attrs.get(self._attr_key_generation)
            if type(generation) is int and len(members.setdefault(generation, [])) < size:
                point = self._point(trial, transform)
                if point is not None and trial.value is not None and math.isfinite(trial.value):
                    members[generation].append((trial.number, (point, sign * trial.value)))
        full = []
        while len(group := members.get(len(full), [])) == size:
            full.append((tuple(number for number, _ in group), [solution for _, solution in group]))
        return full

    def _point(self, trial: FrozenTrial, transform: _SearchSpaceTransform) -> np.ndarray | None:
        """Return the point that a trial stands for, (D,); None where the storage holds none: it is not to be trusted."""
        try:
            attr = trial.system_attrs[X_FOR_TELL] if self._with_margin else transform.transform(trial.params)
            point = np.asarray(attr, dtype=float)
        except (KeyError, TypeError, ValueError):
            return None
        usable = point.shape == (len(transform.bounds),) and bool(np.all(np.abs(point) < _LARGEST))
        return point if usable else None
