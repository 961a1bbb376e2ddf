"""Trials read from a database by our own statements are those that Optuna reads; what cannot change is read once."""

import math
from contextlib import closing

import optuna
import pytest
from optuna.storages import RDBStorage
from optuna.trial import TrialState, create_trial

from hpo.search import trials
from hpo.search.batch import Batch, claim, write_to_database
from hpo.search.retrying import RetryingStorage
from hpo.search.storage import open_storage
from hpo.search.trials import TrialCache

ENDED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request, tmp_path):
    sqlite = request.param == "sqlite"
    url = f"sqlite:///{tmp_path}/s.db" if sqlite else request.getfixturevalue("server").database()
    opened = open_storage(url)
    assert isinstance(opened, RDBStorage)
    with closing(RetryingStorage(opened, 1.0)):
        yield opened


@pytest.fixture
def reads(monkeypatch):
    """The ids of the trials that are read, call by call."""
    read, seen = trials._read, []

    def counted(connection, ids, study_id=None):
        seen.append(sorted(ids))
        return read(connection, ids, study_id)

    monkeypatch.setattr(trials, "_read", counted)
    return seen


def mixed(database, n=12, name="s"):
    """Make a study with trials of all states and of everything that a trial may have; return its id."""
    study = optuna.create_study(study_name=name, storage=database)

    def objective(trial):
        x = trial.suggest_float("x", 1e-4, 1, log=True)
        if trial.suggest_categorical("kind", ("a", None, 2.5, True)) == "a":
            trial.suggest_int("n", 1, 9, step=2)
        trial.set_user_attr("note", {"é": [1, None, "☃"]})
        for step, value in enumerate((x, math.nan, math.inf, -math.inf)):
            trial.report(value, 3 * step)
        if trial.number % 4 == 1:
            raise optuna.TrialPruned
        if trial.number % 4 == 2:
            raise KeyError("x")
        return math.inf if trial.number % 4 == 3 else x

    study.optimize(objective, n_trials=n, catch=KeyError)
    study.ask().suggest_float("x", 1e-4, 1, log=True)
    study.enqueue_trial({"x": 0.5})
    return study._study_id


def same(one, other):
    """Whether two lists of trials are equal, NaN too."""
    keys = list(vars(other[0]))
    return [[repr(getattr(t, key)) for key in keys] for t in one] == [
        [repr(getattr(t, key)) for key in keys] for t in other
    ]


@pytest.mark.parametrize("all_from", [3, 2000], ids=["whole tables", "by ids"])
def test_they_are_what_optuna_reads(database, monkeypatch, all_from):
    monkeypatch.setattr(trials, "_ALL_FROM", all_from)
    mixed(database, name="another")
    study_id = mixed(database)
    cache = TrialCache(database)
    for _ in range(2):
        assert same(cache.all(study_id), database.get_all_trials(study_id))
    complete = cache.all(study_id, (TrialState.COMPLETE,))
    assert same(complete, database.get_all_trials(study_id, states=(TrialState.COMPLETE,)))
    assert same([cache.one(t._trial_id) for t in complete], complete)
    fresh = TrialCache(database)
    assert same(fresh.all(study_id, (TrialState.COMPLETE,)), complete)
    assert same(fresh.all(study_id), cache.all(study_id))


def test_only_what_may_have_changed_is_read_again(database, reads):
    study_id = mixed(database, 4)
    running = next(t._trial_id for t in database.get_all_trials(study_id) if t.state == TrialState.RUNNING)
    cache = TrialCache(database)
    everything = sorted(t._trial_id for t in cache.all(study_id))
    cache.all(study_id)
    cache.all(study_id, ENDED)
    assert reads == [everything, [running], []]  # not the one that waits; of those that are finished none
    database.set_trial_intermediate_value(running, 0, 0.25)
    assert cache.all(study_id)[-2].intermediate_values == {0: 0.25}
    (waiting,) = [t._trial_id for t in cache.all(study_id) if t.state == TrialState.WAITING]
    reads.clear()
    assert claim(database, {waiting: {}}) == [waiting]
    assert [t.state for t in cache.all(study_id)[-2:]] == [TrialState.RUNNING] * 2
    write_to_database(database, Batch(ends={waiting: (TrialState.PRUNED, None)}))
    new = database.create_new_trial(study_id, create_trial(state=TrialState.WAITING))
    assert [t.state.name for t in cache.all(study_id)[-3:]] == ["RUNNING", "PRUNED", "WAITING"]
    assert reads == [[running, waiting], [running, waiting, new]]
    assert same(cache.all(study_id), database.get_all_trials(study_id))


def test_unfinished_trials_that_were_left_out_are_read_when_they_are_asked_for(database, reads):
    study_id = mixed(database, 4)
    cache = TrialCache(database)
    assert len(cache.all(study_id, ENDED)) == 4
    assert len(reads[0]) == 4
    assert same(cache.all(study_id, fresh=False), database.get_all_trials(study_id))


def test_a_trial_of_ours_is_read_once_and_has_what_is_written_to_it(database, reads):
    study_id = mixed(database, 1)
    (waiting,) = [t._trial_id for t in database.get_all_trials(study_id) if t.state == TrialState.WAITING]
    cache = TrialCache(database)
    claim(database, {waiting: {}})
    cache.take([waiting])
    ours = cache.one(waiting)
    ours.intermediate_values[0] = 0.5
    cache.note(waiting, "key", 1)
    reads.clear()
    seen = cache.all(study_id)[-1]
    assert seen.intermediate_values is ours.intermediate_values
    assert waiting not in reads[0]
    assert seen.system_attrs["key"] == 1
    assert "key" not in ours.system_attrs, "a pruner that has fetched it before compares the trial with it"
    database.set_trial_state_values(waiting, TrialState.FAIL)  # by a peer
    assert cache.all(study_id)[-1].state == TrialState.FAIL
    cache.let_go([waiting])
    assert same(cache.all(study_id), database.get_all_trials(study_id))


def test_what_is_not_there_is_a_key_error(database):
    study_id = mixed(database, 1)
    cache = TrialCache(database)
    cache.all(study_id)
    database.delete_study(study_id)
    for ask in (lambda: cache.all(study_id), lambda: cache.one(10_000)):
        with pytest.raises(KeyError):
            ask()
