"""Samplers and pruners: each by its name, keys checked against Optuna's, and one random stream per trial."""

import weakref

import optuna
import pytest
from optuna.trial import TrialState

from hpo.search.samplers import PerTrialSampler, make_pruner, make_sampler
from hpo.study.space import build
from hpo.study.spec import PRUNERS, SAMPLERS, Plugin, parse_param

ENDLESS = {"x": {"type": "float", "low": 0, "high": 1}, "n": {"type": "int", "low": 1, "high": 64, "log": True}}
DISCRETE = {
    "x": {"type": "float", "low": 0, "high": 1, "step": 0.25},
    "k": {"type": "categorical", "choices": ["a", "b", "c"]},
}
QUICK = {"gp": {"n_startup_trials": 2}, "tpe": {"n_startup_trials": 2}}
"""Keys with which a sampler leaves its random start after two trials."""


def space_of(params):
    space, faults = build({name: parse_param(entry) for name, entry in params.items()}, ())
    assert not faults
    return space


def sampler(name, study_seed=1, params=DISCRETE, **keys):
    made, faults = make_sampler(Plugin(name=name, **keys), study_seed, space_of(params))
    assert not faults
    return made


def sampler_faults(name, params=ENDLESS, **keys):
    _, faults = make_sampler(Plugin(name=name, **keys), 1, space_of(params))
    return [(fault.path, fault.message) for fault in faults]


def pruner_faults(name, **keys):
    made, faults = make_pruner(Plugin(name=name, **keys), 20)
    assert isinstance(made, optuna.pruners.NopPruner) or not faults
    return [(fault.path, fault.message) for fault in faults]


def drawn(study, n_trials, params=DISCRETE):
    """Run `n_trials`, whose value is the sum of their numbers; return their params."""
    space = space_of(params)
    for _ in range(n_trials):
        trial = study.ask()
        study.tell(trial, sum(v for v in space.suggest(trial).values() if not isinstance(v, str)))
    return [trial.params for trial in study.trials]


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_can_be_made_and_draws_from_the_space(name):
    study = optuna.create_study(sampler=sampler(name, **QUICK.get(name, {})))
    space = space_of(DISCRETE)
    for params in drawn(study, 5):
        assert all(dimension.takes(params[dimension.name]) for dimension in space.dimensions)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_study_that_was_interrupted_goes_on_as_it_would_have(name):
    keys = QUICK.get(name, {})
    whole = drawn(optuna.create_study(sampler=sampler(name, **keys)), 6)
    storage = optuna.storages.InMemoryStorage()
    drawn(optuna.create_study(storage=storage, study_name="s", sampler=sampler(name, **keys)), 3)
    again = optuna.load_study(storage=storage, study_name="s", sampler=sampler(name, **keys))
    assert drawn(again, 3) == whole


@pytest.mark.parametrize("name", ["tpe", "gp", "nsgaii", "cmaes", "qmc", "random"])
def test_a_seed_makes_a_study_and_every_trial_draws_anew(name):
    def draws(seed):
        study = optuna.create_study(sampler=sampler(name, seed, ENDLESS, **QUICK.get(name, {})))
        return [params["x"] for params in drawn(study, 5, ENDLESS)]

    first = draws(1)
    assert draws(1) == first
    assert draws(2) != first
    assert len(set(first)) == 5


@pytest.mark.parametrize("name", ["qmc", "random", "tpe"])
def test_a_param_that_applies_to_some_trials_is_drawn_for_each_of_them(name):
    kind = {"type": "categorical", "choices": ["a", "b"]}
    some = {"type": "float", "low": 0.0, "high": 1.0, "when": {"kind": "a"}}
    params = {**ENDLESS, "kind": kind, "some": some, "wide": {"type": "int", "low": 1, "high": 999, "or": 0}}
    study = optuna.create_study(sampler=sampler(name, 1, params))
    draws = drawn(study, 24, params)
    for each in ("some", "wide"):
        values = [params[each] for params in draws if params.get(each, 0) != 0]
        assert len(values) >= 6
        assert len(set(values)) == len(values)


def test_a_restart_does_not_repeat_its_draws():
    storage, seen = optuna.storages.InMemoryStorage(), []
    for _ in range(4):
        study = optuna.create_study(
            storage=storage, study_name="s", load_if_exists=True, sampler=sampler("random", 1, ENDLESS)
        )
        seen = [params["x"] for params in drawn(study, 1, ENDLESS)]
    assert len(set(seen)) == 4


def test_a_seed_of_the_samplers_own_goes_before_the_studys():
    def draw(study_seed, **keys):
        return drawn(optuna.create_study(sampler=sampler("random", study_seed, ENDLESS, **keys)), 2, ENDLESS)

    assert draw(1, seed=7) == draw(2, seed=7) == draw(7)
    assert draw(1, seed=7) != draw(1)


@pytest.mark.parametrize("name", ["grid", "brute_force"])
def test_a_space_that_ends_is_gone_through_once(name):
    params = drawn(optuna.create_study(sampler=sampler(name)), space_of(DISCRETE).size())
    assert len({(p["x"], p["k"]) for p in params}) == 15


def test_a_sampler_is_made_once_for_each_trial_with_the_trials_number():
    made = []

    def make(number):
        made.append(number)
        return optuna.samplers.RandomSampler(seed=number)

    study = optuna.create_study(sampler=PerTrialSampler(make))
    drawn(study, 2)
    assert made == [0, 1]
    first, second = study.ask(), study.ask()
    for trial in (first, second, first, second):
        trial.suggest_float(f"y{len(trial.params)}", 0, 1)
    assert made == [0, 1, 2, 3]


def test_a_sampler_is_forgotten_with_its_trial():
    made = []

    def make(number):
        sampler = optuna.samplers.RandomSampler(seed=number)
        made.append(weakref.ref(sampler))
        return sampler

    study = optuna.create_study(sampler=PerTrialSampler(make))
    drawn(study, 3)
    assert [ref() for ref in made] == [None] * 3


def test_an_error_after_a_trial_is_shown_unless_it_is_optunas_own_stop():
    class Broken(optuna.samplers.RandomSampler):
        def after_trial(self, study, trial, state, values):
            assert state is TrialState.COMPLETE
            raise RuntimeError("`Study.stop` is supposed to be invoked inside" if trial.number == 0 else "broken")

    study = optuna.create_study(sampler=PerTrialSampler(lambda number: Broken()))
    drawn(study, 1)
    with pytest.raises(RuntimeError, match=r"^broken$"):
        drawn(study, 1)


@pytest.mark.parametrize(
    ("name", "keys", "faults"),
    [
        (
            "tpe",
            {"n_startup_trial": 3},
            [("n_startup_trial", 'unknown key of Optuna\'s TPESampler; did you mean "n_startup_trials"?')],
        ),
        ("random", {"zzz": 3}, [("zzz", "unknown key of Optuna's RandomSampler; known: seed")]),
        (
            "tpe",
            {"n_startup_trials": "many", "constant_liar": 1, "seed": 1.5},
            [
                ("n_startup_trials", "must be int, but got 'many'"),
                ("constant_liar", "must be bool, but got 1"),
                ("seed", "must be int | None, but got 1.5"),
            ],
        ),
        ("tpe", {"n_ei_candidates": True}, [("n_ei_candidates", "must be int, but got True")]),
    ],
)
def test_a_key_that_is_not_optunas_is_a_fault(name, keys, faults):
    assert sampler_faults(name, **keys) == [(("sampler", key), message) for key, message in faults]


def test_what_optuna_itself_refuses_is_a_fault():
    [(path, message)] = sampler_faults("qmc", qmc_type="sobel")
    assert path == ("sampler",)
    assert message.startswith("Optuna refuses these keys of qmc: ")
    assert "sobel" in message


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("grid", "grid needs a step or choices, but x has neither"),
        ("brute_force", "brute_force needs a step or choices for every parameter, but x, n has none"),
    ],
)
def test_a_search_of_everything_needs_a_space_that_ends(name, message):
    assert sampler_faults(name) == [(("sampler",), message)]


NEEDED = {"percentile": {"percentile": 25.0}, "patient": {"patience": 2}, "threshold": {"lower": 0.1}}


@pytest.mark.parametrize("name", PRUNERS)
def test_every_pruner_can_be_made_and_asked(name):
    made, faults = make_pruner(Plugin(name=name, **NEEDED.get(name, {})), 20)
    assert not faults
    study = optuna.create_study(pruner=made)
    for value in (0.6, 0.5):
        trial = study.ask()
        trial.report(value, 1)
        assert trial.should_prune() is False
        study.tell(trial, value)


@pytest.mark.parametrize(
    ("keys", "epochs", "pruned"),
    [
        ({}, 20, (10, 4)),
        ({}, 3, (10, 1)),
        ({}, 50, (10, 10)),
        ({"n_startup_trials": 2}, 20, (2, 4)),
        ({"n_warmup_steps": 0}, 20, (10, 0)),
    ],
)
def test_median_waits_ten_trials_and_a_fifth_of_the_epochs(keys, epochs, pruned):
    """A trial worse than all before is pruned at the first step after the warm-up, once there were enough trials."""
    made, _ = make_pruner(Plugin(name="median", **keys), epochs)
    study = optuna.create_study(pruner=made)
    for number in range(pruned[0] + 1):
        trial, asked = study.ask(), []
        for step in range(epochs):
            trial.report(float(number), step)
            asked.append(trial.should_prune())
        study.tell(trial, float(number))
        assert asked == [number == pruned[0] and step >= pruned[1] for step in range(epochs)]


def test_hyperband_knows_the_epochs_before_any_trial_is_complete():
    made, _ = make_pruner(Plugin(name="hyperband"), 20)
    study, pruned = optuna.create_study(pruner=made, study_name="fixed"), []
    for trial in [study.ask() for _ in range(20)]:
        trial.report(float(trial.number), 19)
        pruned.append(trial.should_prune())
    assert any(pruned)
    assert not pruned[0]


def test_patient_waits_before_it_asks_the_pruner_in_it():
    inner = {"name": "threshold", "upper": 1.0}
    made, faults = make_pruner(Plugin(name="patient", patience=2, wrapped_pruner=inner), 20)
    assert not faults
    trial, asked = optuna.create_study(pruner=made).ask(), []
    for step, value in enumerate([2.0, 1.9, 2.0, 2.0, 2.0]):
        trial.report(value, step)
        asked.append(trial.should_prune())
    assert asked == [False, False, False, False, True]


@pytest.mark.parametrize(
    ("name", "keys", "faults"),
    [
        (
            "median",
            {"n_warmup": 3},
            [("n_warmup", 'unknown key of Optuna\'s MedianPruner; did you mean "n_warmup_steps"?')],
        ),
        ("median", {"n_startup_trials": 1.5}, [("n_startup_trials", "must be int, but got 1.5")]),
        ("none", {"patience": 3}, [("patience", "none takes no keys")]),
        (
            "patient",
            {"patience": 1, "wrapped_pruner": {"name": "median", "n_min_trial": 1}},
            [("wrapped_pruner.n_min_trial", 'unknown key of Optuna\'s MedianPruner; did you mean "n_min_trials"?')],
        ),
        (
            "patient",
            {"patience": 1, "wrapped_pruner": "best"},
            [
                (
                    "wrapped_pruner",
                    "must be a pruner, `{name: median}`, one of median, halving, percentile, successive_halving, "
                    "hyperband, patient, threshold, wilcoxon, none, but got {'name': 'best'}",
                )
            ],
        ),
    ],
)
def test_a_pruners_key_that_is_wrong_is_a_fault(name, keys, faults):
    assert pruner_faults(name, **keys) == [(("pruner", *key.split(".")), message) for key, message in faults]


@pytest.mark.parametrize(
    ("name", "keys", "said"),
    [
        ("threshold", {}, "Either lower or upper must be specified."),
        ("percentile", {"percentile": 200}, "Percentile must be between 0 and 100 inclusive"),
    ],
)
def test_what_optuna_refuses_of_a_pruner_is_a_fault(name, keys, said):
    [(path, message)] = pruner_faults(name, **keys)
    assert path == ("pruner",)
    assert message.startswith(f"Optuna refuses these keys of {name}: ")
    assert said in message


@pytest.mark.parametrize(("name", "key"), [("patient", "patience"), ("percentile", "percentile")])
def test_a_key_that_a_pruner_requires_is_missed(name, key):
    assert pruner_faults(name) == [(("pruner", key), "is missing")]


@pytest.mark.parametrize(
    ("plugin", "said"),
    [
        ({"name": "gp", "independent_sampler": "x"}, "is Python code's to give"),
        ({"name": "cmaes", "source_trials": [1]}, "is Python code's to give"),
        ({"name": "nsgaii", "crossover": "uniform"}, "is Python code's to give"),
        ({"name": "cmaes", "x0": "abc"}, "must be numbers by the names of params, but got 'abc'"),
        ({"name": "tpe", "constraints_func": "x"}, "is Python code's to give"),
    ],
)
def test_keys_that_a_file_cannot_give_are_refused_before_anything_runs(plugin, said):
    space, _ = build({}, ())
    _, faults = make_sampler(Plugin(**plugin), 1, space)
    assert said in faults[0].message
