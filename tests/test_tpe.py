"""TPE for trials that are asked for together draws what Optuna's draws for them one after the other."""

from contextlib import nullcontext

import numpy as np
import optuna
import pytest
import scipy.special
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers._tpe import _truncnorm
from optuna.samplers._tpe.parzen_estimator import _ParzenEstimator, _ParzenEstimatorParameters
from optuna.samplers._tpe.sampler import default_weights
from optuna.trial import TrialState, create_trial

from hpo.search import tpe
from hpo.search.density import Density
from hpo.search.samplers import PerTrialSampler
from hpo.search.tpe import Shared, SharedTPESampler

SPACE = {
    "x": FloatDistribution(1e-4, 1, log=True),
    "y": FloatDistribution(-5, 5),
    "n": IntDistribution(1, 300),
    "kind": CategoricalDistribution(("a", "b", None)),
    "step": FloatDistribution(0, 1, step=0.1),
}


def history(n):
    """Return n finished trials of the space, some of them pruned, one failed."""
    rng = np.random.RandomState(0)
    trials = []
    for i in range(n):
        params = {name: of.to_external_repr(drawn(of, rng)) for name, of in SPACE.items()}
        value = (params["y"] - 1) ** 2 + params["n"] / 300 + (params["kind"] == "b")
        state = (TrialState.PRUNED if i % 5 == 1 else TrialState.FAIL) if i % 5 == 1 or i == 7 else TrialState.COMPLETE
        trials.append(
            create_trial(
                state=state,
                value=value if state == TrialState.COMPLETE else None,
                params=params,
                distributions=SPACE,
                intermediate_values={0: value},
            )
        )
    return trials


def drawn(of, rng):
    if isinstance(of, CategoricalDistribution):
        return rng.randint(len(of.choices))
    if isinstance(of, IntDistribution):
        return rng.randint(of.low, of.high + 1)
    return round(rng.uniform(of.low, of.high), 1) if of.step else rng.uniform(of.low, of.high)


def draws(sampler, n_before, n, together=True):
    """Sample n trials that were claimed together, one after the other; return their params."""
    study = optuna.create_study(sampler=sampler)
    study.add_trials(history(n_before))
    ids = [study._storage.create_new_trial(study._study_id) for _ in range(n)]
    params = []
    with sampler.together() if together else nullcontext():
        for trial_id in ids:
            study._thread_local.cached_all_trials = None
            trial = optuna.trial.Trial(study, trial_id)
            for name, of in SPACE.items():
                trial._suggest(name, of)
            if trial.params["kind"] == "a":
                trial.suggest_float("only of a", 0, 1)
            params.append(trial.params)
    return params


def same(one, other):
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert a[name] == (pytest.approx(b[name], rel=1e-9) if isinstance(b[name], float) else b[name])


@pytest.mark.parametrize(
    ("n_before", "keys", "together"),
    [
        pytest.param(n_before, keys, together, marks=pytest.mark.slow if n_before == 300 and not together else ())
        for n_before in (5, 40, 300)
        for keys in ({}, {"constant_liar": False}, {"multivariate": False}, {"n_ei_candidates": 5})
        for together in (True, False)
    ],
)
def test_the_draws_are_optunas(n_before, keys, together):
    shared = Shared()
    ours = PerTrialSampler(lambda number: SharedTPESampler(shared, seed=number, **keys), shared)
    theirs = PerTrialSampler(lambda number: optuna.samplers.TPESampler(seed=number, **keys))
    same(draws(ours, n_before, 30, together), draws(theirs, n_before, 30))
    assert shared.fits or n_before == 5  # it is not Optuna's own code that was compared with itself


CONTINUOUS = {name: SPACE[name] for name in ("x", "y")} | {"z": FloatDistribution(1e6, 1e6 + 1)}
KINDS = {
    "continuous": CONTINUOUS,
    "mixed": SPACE | {"log n": IntDistribution(1, 10**6, log=True), "wide": IntDistribution(0, 10**6)},
    "categorical": {"kind": SPACE["kind"]},
    "one int": {"n": SPACE["n"]},
}


@pytest.mark.parametrize("name", ["x", "y", "n", "step"])
def test_trials_outside_of_a_range_that_has_changed_are_left_to_optuna(name):
    of = SPACE[name]
    values = {name: np.array([of.high * 2 if i % 3 else of.high for i in range(9)], dtype=float)}
    plain = _ParzenEstimator(values, {name: of}, _ParzenEstimatorParameters(1.0, True, False, default_weights, True))
    samples = {name: np.array([of.low, of.high], dtype=float)}
    np.testing.assert_array_equal(Density(plain).log_pdf(samples), plain.log_pdf(samples))


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("n", [0, 1, 10, 1000])
@pytest.mark.parametrize("kind", KINDS)
def test_the_density_is_optunas(kind, n, clip):
    space, rng = KINDS[kind], np.random.RandomState(n)
    values = {name: np.array([float(drawn(of, rng)) for _ in range(n)]) for name, of in space.items()}
    parameters = _ParzenEstimatorParameters(1.0, clip, False, default_weights, True)
    plain = _ParzenEstimator(values, space, parameters)
    samples = plain.sample(rng, 50) | {}
    for name, of in space.items():
        if not isinstance(of, CategoricalDistribution):
            samples[name][:2] = of.low, of.high
    density = Density(plain)
    np.testing.assert_allclose(density.log_pdf(samples), plain.log_pdf(samples), rtol=1e-9, atol=1e-9)
    assert density._is_exact or not clip


def test_what_has_ended_since_is_seen_the_next_time():
    shared = Shared()
    sampler = PerTrialSampler(lambda number: SharedTPESampler(shared, seed=number), shared)
    study = optuna.create_study(sampler=sampler)
    study.add_trials(history(40))
    seen = []
    for _ in range(3):
        with sampler.together():
            study.tell(study.ask(SPACE), -100.0)
            seen += [fit.n_finished for fit in shared.fits.values()]
    study.tell(study.ask(SPACE), -100.0)
    seen += [fit.n_finished for fit in shared.fits.values()]
    assert seen == [seen[0] + i for i in range(4)]


def test_of_many_trials_a_few_are_added_at_a_time(monkeypatch):
    monkeypatch.setattr(tpe, "_EXACT", 20)
    built, estimator = [], SharedTPESampler._estimator

    def counted(self, values, space):
        built.append(len(next(iter(values.values()))))
        return estimator(self, values, space)

    monkeypatch.setattr(SharedTPESampler, "_estimator", counted)
    shared = Shared()
    sampler = PerTrialSampler(lambda number: SharedTPESampler(shared, seed=number), shared)
    params = draws(sampler, 100, 20)
    assert len(built) == 6  # those below once, those above with every fourth
    assert len({p["y"] for p in params}) == 20


def test_scipys_logarithm_of_the_normal_distribution_is_optunas():
    a = np.concatenate([np.linspace(-40, 10, 5001), [-1e3, -0.0, 0.0, 37.5]])
    own = np.array([_truncnorm._log_ndtr_single(x) for x in a.tolist()])
    assert _truncnorm._log_ndtr is scipy.special.log_ndtr
    np.testing.assert_allclose(scipy.special.log_ndtr(a), own, rtol=1e-9, atol=1e-15)
