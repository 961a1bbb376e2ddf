"""CMA-ES that unpickles nothing: Optuna's sampler, its state rebuilt from the finished trials' own numbers.

Optuna's `CmaEsSampler` keeps its optimizer as a pickle in an attribute of a trial and loads that at the next: who can
write the storage runs code in every worker. The state of CMA-ES is a function of the solutions that it was given,
generation by generation, and these are in the storage anyway: params and value of trials, each with the number of its
generation. So the generations are replayed, and only the new ones where a process has replayed the others before.
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

from hpo.search import schema

_LARGEST = 1e32
"""`cmaes` refuses larger coordinates."""


class Evolution:
    """An optimizer, the space it is of, and the trials that it was given so far: shared by a process's samplers."""

    def __init__(self) -> None:
        self.optimizer: Any = None
        self.space: Any = None
        self.told: list[tuple[int, ...]] = []
        self.solutions: dict[int, tuple[np.ndarray, float] | None] = {}
        """By a trial's number its point (D,) and its loss; None: what is stored of it is unusable."""

    def start(self, space: Any, optimizer: Any) -> None:
        """Start with an optimizer of that space that was given no trial yet."""
        self.space, self.optimizer, self.told, self.solutions = space, optimizer, [], {}


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
            attrs[schema.X_FOR_TELL] = before_rounding.tolist()
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
        """Return the optimizer that was given every full generation among `completed`."""
        known, space = self._evolution, repr(sorted(search_space.items()))
        if known.space != space:
            known.start(space, self._init_optimizer(transform, study.direction))
        generations = self._generations(study.direction, completed, transform)
        if generations[: len(known.told)] != known.told:
            known.start(space, self._init_optimizer(transform, study.direction))
        for numbers in generations[len(known.told) :]:
            known.optimizer.tell([known.solutions[number] for number in numbers])
            known.told.append(numbers)
        return known.optimizer

    def _generations(
        self, direction: StudyDirection, completed: Sequence[FrozenTrial], transform: _SearchSpaceTransform
    ) -> list[tuple[int, ...]]:
        """Return the numbers of the trials of each full generation; their solutions are known then."""
        size, known = self._evolution.optimizer.population_size, self._evolution.solutions
        sign = 1 if direction == StudyDirection.MINIMIZE else -1
        members: dict[int, list[int]] = {}
        for trial in completed:
            generation = trial.system_attrs.get(self._attr_key_generation)
            if type(generation) is not int or len(members.setdefault(generation, [])) == size:
                continue
            if trial.number not in known:
                point = self._point(trial, transform)
                value = trial.value if trial.value is not None and math.isfinite(trial.value) else None
                known[trial.number] = None if point is None or value is None else (point, sign * value)
            if known[trial.number] is not None:
                members[generation].append(trial.number)
        full: list[tuple[int, ...]] = []
        while len(group := members.get(len(full), [])) == size:
            full.append(tuple(group))
        return full

    def _point(self, trial: FrozenTrial, transform: _SearchSpaceTransform) -> np.ndarray | None:
        """Return the point that a trial stands for, (D,); None where the storage holds none: it is not trusted."""
        try:
            attr = trial.system_attrs[schema.X_FOR_TELL] if self._with_margin else transform.transform(trial.params)
            point = np.asarray(attr, dtype=float)
        except (KeyError, TypeError, ValueError):
            return None
        usable = point.shape == (len(transform.bounds),) and bool(np.all(np.abs(point) < _LARGEST))
        return point if usable else None
