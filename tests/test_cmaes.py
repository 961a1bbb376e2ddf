"""CMA-ES without a pickle: the same evolution as Optuna's own, and nothing from a storage that is run."""

import os
import pickle

import numpy as np
import optuna
import pytest
from optuna.samplers import CmaEsSampler, _cmaes

from hpo.search.cmaes import Evolution, RebuiltCmaEsSampler
from tests.searches import Opener, stored

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")


def sphere(trial):
    x, y = trial.suggest_float("x", -5, 5), trial.suggest_float("y", 1e-3, 1e3, log=True)
    z = trial.suggest_int("z", 1, 64)
    return (x - 1) ** 2 + (np.log10(y) - 1) ** 2 + (z - 20) ** 2 / 100


@pytest.mark.parametrize("keys", [{}, {"use_separable_cma": True}, {"with_margin": True}, {"popsize": 5}])
def test_what_is_rebuilt_is_the_optimizer_that_optunas_own_sampler_pickles(keys):
    study = optuna.create_study(sampler=CmaEsSampler(seed=1, warn_independent_sampling=False, **keys))
    study.optimize(sphere, n_trials=40)
    theirs = CmaEsSampler(**keys)._restore_optimizer(study.trials)
    evolution = Evolution()
    ours = RebuiltCmaEsSampler(evolution, seed=2, **keys)
    trial = study.ask()
    ours.sample_relative(
        study, study._storage.get_trial(trial._trial_id), ours.infer_relative_search_space(study, trial)
    )
    told = evolution.optimizer
    assert told.generation >= theirs.generation >= 4
    first = Evolution()
    kept = [t for t in study.trials if t.number <= max(evolution.told[theirs.generation - 1])]
    again = optuna.create_study()
    again.add_trials(kept)
    ours = RebuiltCmaEsSampler(first, seed=2, **keys)
    trial = again.ask()
    ours.sample_relative(
        again, again._storage.get_trial(trial._trial_id), ours.infer_relative_search_space(again, trial)
    )
    rebuilt = first.optimizer
    assert rebuilt.generation == theirs.generation
    np.testing.assert_array_equal(rebuilt.mean, theirs.mean)


def test_it_searches_as_well_as_optunas():
    best = {}
    for name, make in (("ours", lambda seed: RebuiltCmaEsSampler(Evolution(), seed=seed)), ("theirs", None)):
        values = []
        for seed in range(5):
            sampler = make(seed) if make else CmaEsSampler(seed=seed)
            study = optuna.create_study(sampler=sampler)
            study.optimize(sphere, n_trials=150)
            values.append(study.best_value)
        best[name] = np.median(values)
    assert best["ours"] < max(0.05, 3 * best["theirs"])


class Poison:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("keys", [{}, {"with_margin": True}, {"use_separable_cma": True}])
def test_what_an_attacker_stores_is_never_run(tmp_path, monkeypatch, keys):
    opened = Opener(tmp_path)
    plugin = {"sampler": {"name": "cmaes", **keys}}
    search = opened(trials=30, **plugin)
    poison = pickle.dumps(Poison(tmp_path / "ran")).hex()
    for n in range(20):
        claim = search.ask()
        trial_id = stored(search, claim.number)._trial_id
        for prefix in ("cma", "cmawm", "sepcma"):
            search.storage.set_trial_system_attr(trial_id, f"{prefix}:optimizer:0", poison)
            if n % 3 == 0:
                search.storage.set_trial_system_attr(trial_id, f"{prefix}:generation", "0; import os")
        if n % 4 == 0:
            search.storage.set_trial_system_attr(trial_id, "x_for_tell", [1e300, "x"])
        assert search.complete(claim.number, float(n))
    monkeypatch.setattr(_cmaes.pickle, "loads", lambda text: pytest.fail("unpickled"))
    again = opened(trials=30, **plugin)
    assert again.ask() is not None
    assert not (tmp_path / "ran").exists()
    opened.close()
