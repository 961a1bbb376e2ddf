"""Optuna's TPE for trials that are asked for together: they share what is the same for all of them.

Optuna sorts all trials, and takes their params apart, for each trial that it is asked for. Of trials that are asked for
together only the last few differ in what they see: with `constant_liar` each sees the params of those before. So that
is done once, and the params of each trial are added; the draws are Optuna's (`tests/test_tpe.py` compares them). In
studies of thousands of trials a few are added at a time.
"""

from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
from optuna.distributions import BaseDistribution
from optuna.samplers import TPESampler
from optuna.samplers._tpe import _truncnorm
from optuna.samplers._tpe.sampler import _split_trials, default_gamma
from optuna.search_space import IntersectionSearchSpace
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from hpo.search.density import Density

_EXACT = 2000
"""Up to how many trials each sees the params of all before it; with more, of all but the last n / _EXACT."""


@dataclass
class _Fit:
    """What the trials of a study say of a search space."""

    n_finished: int
    below: Density
    """Of the good trials."""
    numbers: list[int]
    """Of the other trials, in their order; `values` are their params by name, as Optuna stores them."""
    values: dict[str, np.ndarray]
    unknown: list[FrozenTrial]
    """Running trials, whose params are not known yet."""
    above: Density | None = None
    n_above: int = -1
    """Of how many trials `above` is."""

    def add(self, trial: FrozenTrial, params: dict[str, float]) -> None:
        at = int(np.searchsorted(self.numbers, trial.number))
        self.numbers.insert(at, trial.number)
        self.values = {  # np.insert takes ten times as long
            name: np.concatenate((values[:at], (params[name],), values[at:])) for name, values in self.values.items()
        }


@dataclass
class Shared:
    """What a process's samplers share: fits, those of the trials that are sampled together; the space of all trials."""

    fits: dict[tuple[str, ...], _Fit] = field(default_factory=dict)
    kept: bool = False
    """Whether the fits hold for the next trial too."""
    space: IntersectionSearchSpace = field(default_factory=lambda: IntersectionSearchSpace(include_pruned=True))

    def forget_space(self) -> None:
        """Forget which params all trials have: where trials are seen that were not before, others may come first."""
        self.space = IntersectionSearchSpace(include_pruned=True)


class SharedTPESampler(TPESampler):
    """Optuna's `TPESampler` with its keys; see the module's docstring. Trials are asked for by one thread."""

    def __init__(self, shared: Shared, **keys: Any) -> None:
        super().__init__(**keys)
        _use_scipy()
        self._shared = shared
        self._search_space = shared.space

    def _sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        if search_space == {} or self._fit(study, search_space).n_finished < self._n_startup_trials:
            return {}
        return self._sample(study, trial, search_space)

    def _sample(self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]) -> dict[str, Any]:
        fit = self._fit(study, search_space)
        self._look_at_the_running(fit, study, search_space)
        if fit.above is None or len(fit.numbers) - fit.n_above >= max(1, len(fit.numbers) // _EXACT):
            fit.above, fit.n_above = self._estimator(fit.values, search_space), len(fit.numbers)
        samples = fit.below.sample(self._rng.rng, self._n_ei_candidates)
        best = self._compare(samples, fit.below.log_pdf(samples) - fit.above.log_pdf(samples))
        return {name: of.to_external_repr(cast(float, best[name])) for name, of in search_space.items()}

    def _fit(self, study: Study, search_space: dict[str, BaseDistribution]) -> _Fit:
        key = tuple(search_space)
        if key not in self._shared.fits:
            states = [TrialState.COMPLETE, TrialState.PRUNED]
            n_finished = len(study._get_trials(deepcopy=False, states=states, use_cache=True))
            if self._constant_liar:
                states.append(TrialState.RUNNING)
            trials = study._get_trials(deepcopy=False, states=states, use_cache=True)
            below, above = _split_trials(study, trials, (self._gamma or default_gamma)(n_finished))
            # a trial counts once it has all of these params: so the one that is sampled does not count yet
            known = [t for t in above if search_space.keys() <= self._get_params(t, study).keys()]
            numbers = {t.number for t in known}
            self._shared.fits[key] = _Fit(
                n_finished=n_finished,
                below=self._estimator(self._get_internal_repr(below, search_space, study), search_space),
                numbers=[t.number for t in known],
                values=self._get_internal_repr(known, search_space, study),
                unknown=[t for t in above if t.state == TrialState.RUNNING and t.number not in numbers],
            )
        return self._shared.fits[key]

    def _look_at_the_running(self, fit: _Fit, study: Study, search_space: dict[str, BaseDistribution]) -> None:
        unknown = []
        for trial in fit.unknown:
            params = self._get_params(trial, study)
            if search_space.keys() <= params.keys():
                fit.add(trial, {name: of.to_internal_repr(params[name]) for name, of in search_space.items()})
            else:
                unknown.append(trial)
        fit.unknown = unknown

    def _estimator(self, values: dict[str, np.ndarray], search_space: dict[str, BaseDistribution]) -> Density:
        return Density(self._parzen_estimator_cls(values, search_space, self._parzen_estimator_parameters))


def _use_scipy() -> None:
    """Have Optuna take SciPy's logarithm of the normal distribution: its own is Python, number by number.

    That was 70% of what asking for a trial takes. SciPy is imported here, since `hpo status` asks for none.
    """
    import scipy.special

    if hasattr(_truncnorm, "_log_ndtr"):
        _truncnorm._log_ndtr = scipy.special.log_ndtr
