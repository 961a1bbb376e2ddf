"""Samplers and pruners by name, their keys checked against Optuna's own classes, and one random stream per trial."""

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import optuna
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from hpo.errors import Fault, InputError, did_you_mean, is_number
from hpo.search import schema
from hpo.search.cmaes import Evolution, RebuiltCmaEsSampler
from hpo.search.front import WorstIfPruned
from hpo.search.halving import HalvingPruner
from hpo.search.pruners import SharedMedianPruner, SharedPercentilePruner
from hpo.search.seen import EVERY, LEARNING, AtOneRung, SeenStudy
from hpo.search.tpe import Shared, SharedTPESampler
from hpo.seeds import derive
from hpo.study.space import Space
from hpo.study.spec import PRUNERS, Plugin, StudySpec

_SAMPLERS: dict[str, Callable[..., BaseSampler]] = {
    "tpe": optuna.samplers.TPESampler,
    "gp": optuna.samplers.GPSampler,
    "nsgaii": optuna.samplers.NSGAIISampler,
    "cmaes": optuna.samplers.CmaEsSampler,
    "qmc": optuna.samplers.QMCSampler,
    "random": optuna.samplers.RandomSampler,
    "grid": optuna.samplers.GridSampler,
    "brute_force": optuna.samplers.BruteForceSampler,
}
_PRUNERS: dict[str, Callable[..., BasePruner]] = {
    "median": optuna.pruners.MedianPruner,
    "halving": HalvingPruner,
    "percentile": optuna.pruners.PercentilePruner,
    "successive_halving": optuna.pruners.SuccessiveHalvingPruner,
    "hyperband": optuna.pruners.HyperbandPruner,
    "patient": optuna.pruners.PatientPruner,
    "threshold": optuna.pruners.ThresholdPruner,
    "wilcoxon": optuna.pruners.WilcoxonPruner,
    "none": optuna.pruners.NopPruner,
}
_SHARED: dict[str, Callable[..., BasePruner]] = {"median": SharedMedianPruner, "percentile": SharedPercentilePruner}
CANNOT_HALVE = ("cmaes", "nsgaii")
"""Samplers that learn from trials in the order in which they end, generation by generation: none can be paused."""
CONSTRAINED = ("tpe", "gp", "nsgaii")
"""Samplers that look for trials that hold to the study's constraints; the others ignore these."""
ONE_METRIC = ("cmaes",)
"""Samplers of studies that have one metric only."""
_ONE_STREAM = ("qmc", "grid")
"""Samplers whose points are one sequence, counted in the storage: every worker must have the same seed."""


class PerTrialSampler(BaseSampler):
    """A sampler of its own for each trial, seeded by the trial's slot of the budget.

    So draws do not repeat after a restart or on another worker, as they do with one seed for every process, and a
    study that was interrupted draws what it would have drawn without. Optuna's samplers keep what they have learned in
    the storage, so nothing is lost with the object.
    """

    see: AtOneRung | WorstIfPruned | None = None
    """What the samplers see of the study's trials; None: all of them."""

    def __init__(
        self,
        make: Callable[[int], BaseSampler],
        shared: Shared | None = None,
        random: Callable[[int], BaseSampler] | None = None,
    ) -> None:
        """`shared` is what the samplers of TPE share; `random` makes those of each EVERY-th trial under `see`."""
        self._make, self._shared, self._random = make, shared or Shared(), random
        self._current: dict[int, BaseSampler] = {}

    @contextmanager
    def together(self) -> Iterator[None]:
        """Within this, trials are sampled that were claimed together: what others have told meanwhile is not seen."""
        self._shared.fits.clear()
        self._shared.kept = True
        if self.see is not None:
            self._shared.forget_space()
        try:
            yield
        finally:
            self._shared.kept = False

    def _of(self, trial: FrozenTrial) -> BaseSampler:
        if trial.number not in self._current:
            slot = trial.user_attrs.get(schema.SLOT, trial.number)
            is_random = isinstance(self.see, AtOneRung) and slot % EVERY == EVERY - 1
            make = (self._random if is_random else None) or self._make
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                self._current[trial.number] = make(slot)
        return self._current[trial.number]

    def _seen(self, study: Study) -> Study:
        return study if self.see is None else SeenStudy(study, self.see)

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        if trial.params:  # it was paused, and is resumed with its params
            return
        if not self._shared.kept:
            self._shared.fits.clear()
        self._of(trial).before_trial(self._seen(study), trial)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> Any:
        return {} if trial.params else self._of(trial).infer_relative_search_space(self._seen(study), trial)

    def sample_relative(self, study: Study, trial: FrozenTrial, search_space: Any) -> dict[str, Any]:
        if trial.params:
            return {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return self._of(trial).sample_relative(self._seen(study), trial, search_space)

    def sample_independent(self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: Any) -> Any:
        return self._of(trial).sample_independent(self._seen(study), trial, param_name, param_distribution)

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Any) -> None:
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Constraints have been set")  # said once, as the study starts
                self._of(trial).after_trial(study, trial, state, values)
        except RuntimeError as error:
            # grid and brute_force call Study.stop once all was tried, which Optuna allows in `optimize` only; here
            # the budget ends the study (`hpo.runner.prepare` cuts it to the number of configurations).
            if "Study.stop" not in str(error):
                raise
        finally:
            self._current.pop(trial.number, None)


def make_sampler(
    plugin: Plugin, seed: int, space: Space, maximize: Sequence[bool] = (False,)
) -> tuple[BaseSampler, list[Fault]]:
    """Return the sampler that study.yaml names, and all that is wrong with its keys.

    `maximize`: of each metric whether more of it is better.
    """
    several = len(maximize) > 1
    cls = _SAMPLERS[plugin.name]
    keys = plugin.keys
    faults = _key_faults(cls, keys, ("sampler",))
    base = keys.pop("seed", seed)
    if plugin.name == "grid" and not faults:
        try:
            keys.setdefault("search_space", space.grid())
        except InputError as error:
            faults.append(Fault(path=("sampler",), message=str(error)))
    if plugin.name == "brute_force" and (endless := ", ".join(d.name for d in space.dimensions if d.n_values is None)):
        message = f"brute_force needs a step or choices for every parameter, but {endless} has none"
        faults.append(Fault(path=("sampler",), message=message))
    if plugin.name in ("gp", "cmaes", "qmc"):
        keys.setdefault("warn_independent_sampling", False)
    if plugin.name == "qmc":
        keys.setdefault("scramble", True)
        keys.setdefault("warn_asynchronous_seeding", False)

    shared, construct = Shared(), cls
    if plugin.name == "cmaes":
        construct = partial(RebuiltCmaEsSampler, Evolution())
    elif plugin.name == "tpe" and not keys.get("group") and not several:
        construct = partial(SharedTPESampler, shared)

    def make(number: int) -> BaseSampler:
        if plugin.name == "qmc":  # what no sequence has, as a param that applies to some trials, is drawn at random
            apart = {"independent_sampler": _random_sampler(base, number), "warn_independent_sampling": False}
            return construct(seed=base, **apart | keys)
        seed_here = base if plugin.name in _ONE_STREAM else derive(base, "sampler", number)
        return construct(seed=seed_here, **keys)

    if not faults:
        faults += _try(lambda: make(0), plugin.name, ("sampler",))
    random = partial(_random_sampler, base) if plugin.name in LEARNING else None
    sampler = PerTrialSampler(make, shared, random)
    if several and plugin.name in LEARNING:
        sampler.see = WorstIfPruned(maximize)
    return sampler, faults


def _random_sampler(base: int, number: int) -> BaseSampler:
    return optuna.samplers.RandomSampler(seed=derive(base, "sampler", number))


def make_pruner(plugin: Plugin, epochs: int, at: tuple[str, ...] = ("pruner",)) -> tuple[BasePruner, list[Fault]]:
    """Return the pruner that study.yaml names, and all that is wrong with its keys.

    A pruned trial has cost its epochs, so `median` waits longer here than in Optuna: 10 trials, and a fifth of
    the epochs (measured: regret 0.089; with Optuna's own 5 and 0, 0.154; with no pruning, 0.096).
    """
    cls, keys = _PRUNERS[plugin.name], plugin.keys
    if plugin.name == "halving":
        return _make_halving(keys, epochs, at)
    faults = (
        _key_faults(cls, keys, at)
        if plugin.name != "none"
        else [Fault(path=(*at, key), message="none takes no keys") for key in keys]
    )
    if plugin.name == "median":
        keys = {"n_startup_trials": 10, "n_warmup_steps": max(1, epochs // 5)} | keys
    if plugin.name == "hyperband":
        keys.setdefault("max_resource", epochs)
    if plugin.name == "patient" and keys.get("wrapped_pruner") is not None:
        keys["wrapped_pruner"], more = _wrapped(keys["wrapped_pruner"], epochs, (*at, "wrapped_pruner"))
        faults += more
    elif plugin.name == "patient":
        keys["wrapped_pruner"] = None
    if not faults:
        faults += _try(lambda: cls(**keys), plugin.name, at)
    return (optuna.pruners.NopPruner() if faults else _quietly(lambda: _SHARED.get(plugin.name, cls)(**keys))), faults


def _make_halving(keys: Mapping[str, Any], epochs: int, at: tuple[str, ...]) -> tuple[BasePruner, list[Fault]]:
    make = partial(HalvingPruner, epochs)
    if faults := _key_faults(make, keys, at, "the pruner halving"):
        return optuna.pruners.NopPruner(), faults
    try:
        return make(**keys), []
    except ValueError as error:
        name = str(error).split()[0]
        return optuna.pruners.NopPruner(), [Fault(path=(*at, name), message=str(error).removeprefix(f"{name} "))]


def trials_of(spec: StudySpec, space: Space) -> int:
    """Return how many trials a study has: where each configuration is tried once, no more than there are."""
    return at_most(spec.trials, spec.sampler.name, space)


def at_most(trials: int, sampler: Any, space: Space) -> int:
    """Return how many of so many trials a sampler of that name can find in a space."""
    size = space.size() if sampler in ("grid", "brute_force") else None
    return trials if size is None else min(size, trials)


def looks_at_its_trial_only(pruner: BasePruner) -> bool:
    """Whether a pruner looks at nothing but the trial's own reports and at complete trials, and writes nothing."""
    if isinstance(pruner, optuna.pruners.PatientPruner):
        return pruner._wrapped_pruner is None or looks_at_its_trial_only(pruner._wrapped_pruner)
    light = (HalvingPruner, optuna.pruners.PercentilePruner, optuna.pruners.NopPruner, optuna.pruners.ThresholdPruner)
    return isinstance(pruner, (*light, optuna.pruners.WilcoxonPruner))  # the median's is a percentile's


def _wrapped(inner: Any, epochs: int, at: tuple[str, ...]) -> tuple[BasePruner | None, list[Fault]]:
    inner = {"name": inner} if isinstance(inner, str) else inner
    if isinstance(inner, Mapping) and inner.get("name") == "halving":
        return None, [Fault(path=at, message="halving pauses trials, it does not judge them: it cannot be wrapped")]
    if isinstance(inner, Mapping) and inner.get("name") in PRUNERS:
        return make_pruner(Plugin(**inner), epochs, at)
    message = f"must be a pruner, `{{name: median}}`, one of {', '.join(PRUNERS)}, but got {inner!r}"
    return None, [Fault(path=at, message=message)]


_FILLED_IN = ("wrapped_pruner", "search_space")
"""Keys that Optuna requires and that have a default here."""
_NOT_PLAIN = (
    "independent_sampler",
    "source_trials",
    "constraints_func",
    "gamma",
    "weights",
    "categorical_distance_func",
    "mutation",
    "crossover",
    "elite_population_selection_strategy",
    "child_generation_strategy",
    "after_trial_strategy",
)
"""Keys that take objects and functions."""
_KINDS: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,)}


def _key_faults(
    cls: Callable[..., Any], keys: Mapping[str, Any], at: tuple[str, ...], whose: str | None = None
) -> list[Fault]:
    """Return the keys that `cls` has not, and those of another plain type than it says. `whose`: if not Optuna's."""
    known = {n: p for n, p in inspect.signature(cls).parameters.items() if n not in ("args", "kwargs")}
    required = [name for name, p in known.items() if p.default is p.empty and name not in _FILLED_IN]
    faults = [Fault(path=(*at, name), message="is missing") for name in required if name not in keys]
    for key, value in keys.items():
        if key not in known:
            of_whom = f"Optuna's {cls.__name__}" if whose is None else whose
            message = f"unknown key of {of_whom}{did_you_mean(key, known)}"
            faults.append(Fault(path=(*at, key), message=message))
            continue
        if key in _NOT_PLAIN:
            faults.append(Fault(path=(*at, key), message="is Python code's to give: leave it out of a study file"))
            continue
        if key == "x0" and not (isinstance(value, Mapping) and all(map(is_number, value.values()))):
            message = f"must be numbers by the names of params, but got {value!r:.100}"
            faults.append(Fault(path=(*at, key), message=message))
            continue
        annotation = str(known[key].annotation).removeprefix("<class '").removesuffix("'>")
        names = [name.strip() for name in annotation.split("|")]
        kinds = tuple(kind for name in names for kind in _KINDS.get(name, ()))
        plain = all(name in _KINDS or name == "None" for name in names)
        wrong = not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds)
        if plain and wrong and not (value is None and "None" in names):
            faults.append(Fault(path=(*at, key), message=f"must be {annotation}, but got {value!r}"))
    return faults


def _quietly(make: Callable[[], Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make()


def _try(make: Callable[[], Any], name: str, at: tuple[str, ...]) -> list[Fault]:
    try:
        _quietly(make)
    except Exception as error:  # Optuna's own checks raise ValueError, TypeError, AssertionError, ...
        text = " ".join(str(error).split()) or type(error).__name__
        return [Fault(path=at, message=f"Optuna refuses these keys of {name}: {text}")]
    return []
