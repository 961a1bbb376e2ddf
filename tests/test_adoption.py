"""An existing Optuna study as history: the sampler sees its trials; the budget, the table and the best do not."""

from pathlib import Path

import optuna
import pytest

import hpo
from hpo.errors import InputError
from tests.cli import invoke
from tests.conftest import LINEAR
from tests.databases import closed_in_time

QUICK = {"tracking": "off", "quiet": True}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def bowl(trial):
    """Best at 0.8."""
    return (trial.suggest_float("x", 0, 1) - 0.8) ** 2


def earlier(n: int = 30, storage: str | None = None, direction: str = "minimize") -> optuna.Study:
    study = optuna.create_study(
        study_name="earlier", storage=storage, direction=direction, sampler=optuna.samplers.RandomSampler(0)
    )
    study.optimize(bowl, n_trials=n)
    return closed_in_time(study) if storage else study


def test_the_sampler_learns_from_adopted_trials_and_nothing_else_sees_them() -> None:
    old = earlier()
    assert hpo.adopt(bowl, old, **QUICK) == 30
    study = hpo.run(bowl, trials=5, **QUICK)
    alone = hpo.run(bowl, trials=5, name="alone", **QUICK)
    assert study.counts.complete == alone.counts.complete == 5
    assert list(study.trials["params_x"]) != list(alone.trials["params_x"]), "ten random draws come first without them"
    assert (study.trials["params_x"] - 0.8).abs().mean() < 0.25
    assert len(study.trials) == 5
    assert study.best.number not in range(30)
    with pytest.raises(InputError, match="has no trial 3"):
        study.curves(3)


def test_adopting_again_adds_nothing_and_a_run_in_between_is_kept(folder: Path) -> None:
    old = earlier(12)
    assert hpo.adopt(bowl, old, **QUICK) == 12
    hpo.run(bowl, trials=2, **QUICK)
    assert hpo.adopt(bowl, old, **QUICK) == 0
    old.optimize(bowl, n_trials=3)
    assert hpo.adopt(bowl, old, **QUICK) == 3
    assert hpo.run(bowl, trials=4, **QUICK).counts.complete == 4


def test_a_study_does_not_adopt_its_own_trials(folder: Path) -> None:
    hpo.run(bowl, trials=3, **QUICK)
    storage = "sqlite:///mlruns/optuna.db"
    with pytest.raises(InputError, match="study 'bowl' cannot adopt its own trials"):
        hpo.adopt(bowl, storage, "bowl", **QUICK)
    assert hpo.adopt(bowl, storage, "bowl", name="other", trials=7, **QUICK) == 3
    assert (hpo.open_study("other").counts.waiting, hpo.open_study("other").counts.complete) == (7, 0)
    with pytest.raises(InputError, match="cannot adopt its own trials"):
        hpo.adopt(bowl, optuna.load_study(study_name="bowl", storage=storage), **QUICK)
    assert hpo.run(bowl, trials=4, **QUICK).counts.complete == 4


def test_what_the_space_could_not_have_given_is_left_out_and_counted(folder: Path) -> None:
    (folder / "linear.py").write_text(LINEAR)
    (folder / "s.yaml").write_text(
        "objective: linear.py\ntrials: 2\nepochs: 2\ntracking: off\n"
        "params:\n  learning_rate: {type: float, low: 1e-3, high: 1e-1, log: true}\n"
        "  batch_size: {type: categorical, choices: [25, 50]}\n"
        "  weight_decay: {type: float, low: 1e-5, high: 1e-2, log: true, or: 0}\n"
    )
    old = closed_in_time(optuna.create_study(study_name="old", storage="sqlite:///old.db", direction="maximize"))
    floats = {
        "learning_rate": optuna.distributions.FloatDistribution(1e-5, 1.0),
        "batch_size": optuna.distributions.IntDistribution(1, 100),
        "weight_decay": optuna.distributions.FloatDistribution(0, 1),
    }
    rows = [
        {"learning_rate": 0.01, "batch_size": 25, "weight_decay": 1e-3},
        {"learning_rate": 0.02, "batch_size": 50, "weight_decay": 0.0},
        {"learning_rate": 0.9, "batch_size": 50, "weight_decay": 0.0},
        {"learning_rate": 0.02, "batch_size": 32, "weight_decay": 0.0},
        {"learning_rate": 0.02, "batch_size": 50},
    ]
    for row in rows:
        known = {name: floats[name] for name in row}
        old.add_trial(optuna.trial.create_trial(value=0.5, params=row, distributions=known))
    old.add_trial(optuna.trial.create_trial(state=optuna.trial.TrialState.FAIL, params={}, distributions={}))
    said = invoke("adopt", "s.yaml", "--from", "sqlite:///old.db", "--study", "old")
    assert "2 of 6 trials of old are history for the sampler now" in said
    for reason in (
        "its learning_rate is outside of the range here",
        "its batch_size is outside of the range here",
        "it has no weight_decay",
        "not complete (FAIL)",
    ):
        assert f"left out: 1 trials, {reason}" in said
    assert "[2/2]" in invoke("run", "s.yaml")
    assert "2 of 2 trials done" in invoke("status", "s.yaml")
    rows = hpo.open_study("s.yaml").to_optuna().trials
    assert rows[0].params == {"learning_rate": 0.01, "batch_size": 25, "weight_decay": 1e-3, "weight_decay:or": "range"}
    assert rows[1].params == {"learning_rate": 0.02, "batch_size": 50, "weight_decay:or": 0}


def test_trials_of_hpos_own_that_took_an_or_are_taken_too(folder: Path) -> None:
    (folder / "linear.py").write_text(LINEAR)
    (folder / "s.yaml").write_text(
        "objective: linear.py\ntrials: 5\nepochs: 2\ntracking: off\nsampler: random\n"
        "params:\n  weight_decay: {type: float, low: 1e-5, high: 1e-2, log: true, or: 0}\n"
    )
    invoke("run", "s.yaml")
    trials = [trial.params for trial in hpo.open_study("s.yaml").to_optuna().trials]
    assert {trial["weight_decay:or"] for trial in trials} == {0, "range"}
    adopt = ("adopt", "s.yaml", "--from", "sqlite:///mlruns/optuna.db", "--study", "s", "--set")
    assert "5 of 5 trials of s are history for the sampler now" in invoke(*adopt, "name=other")
    assert [trial.params for trial in hpo.open_study("other").to_optuna().trials] == trials
    said = invoke(*adopt, "name=third", "--set", "params={weight_decay: 1e-3}")
    assert "left out: 5 trials, weight_decay is fixed here at another value" in said


def test_what_does_not_compare_is_refused() -> None:
    with pytest.raises(InputError, match="'earlier' goes to maximize, this one to minimize"):
        hpo.adopt(bowl, earlier(2, direction="maximize"), **QUICK)
    with pytest.raises(InputError, match="there is no storage sqlite:///none"):
        hpo.adopt(bowl, "sqlite:///none.db", "earlier", **QUICK)
    earlier(2, "sqlite:///old.db")
    with pytest.raises(InputError, match="has no study 'erlier'; did you mean"):
        hpo.adopt(bowl, "sqlite:///old.db", "erlier", **QUICK)
    with pytest.raises(InputError, match="source_name: give the name"):
        hpo.adopt(bowl, "sqlite:///old.db", **QUICK)
    with pytest.raises(InputError, match="source: must be an optuna"):
        hpo.adopt(bowl, 5, **QUICK)
    several = optuna.create_study(directions=["minimize", "minimize"])
    with pytest.raises(InputError, match="has 2 metrics"):
        hpo.adopt(bowl, several, **QUICK)
