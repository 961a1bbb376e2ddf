"""What is written of several trials in one transaction is what Optuna would have written, by Optuna's own reader."""

import math
from contextlib import closing, suppress

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import RDBStorage
from optuna.trial import TrialState, create_trial

from hpo.search.batch import Batch, claim, enqueue, write_one_by_one, write_to_database
from hpo.search.retrying import RetryingStorage
from hpo.search.storage import open_storage
from tests.searches import HandClock, Opener

MINIMIZE = [optuna.study.StudyDirection.MINIMIZE]
INF = math.inf


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request, tmp_path):
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/s.db"
    return request.getfixturevalue("server").database()


@pytest.fixture
def database(url):
    opened = open_storage(url)
    assert isinstance(opened, RDBStorage)
    opened.create_new_study(MINIMIZE, "s")
    with closing(RetryingStorage(opened, 1.0)):
        yield opened


def trials(database, n, state=TrialState.RUNNING):
    study_id = database.get_study_id_from_name("s")
    return [database.create_new_trial(study_id, create_trial(state=state)) for _ in range(n)]


def read(database, ids):
    """Return what Optuna reads of trials, but for what differs by its nature."""
    found = [database.get_trial(trial_id) for trial_id in ids]
    same = ("state", "values", "params", "distributions", "intermediate_values", "user_attrs", "system_attrs")
    return [[repr(getattr(trial, name)) for name in same] for trial in found]


def a_batch(a, b, c):
    """Everything that can be written, of three trials."""
    choice = CategoricalDistribution(("x", None, 1.5))
    return Batch(
        params={(a, "x"): (0.1, FloatDistribution(1e-3, 1, log=True)), (b, "n"): (3.0, IntDistribution(1, 9, step=2))}
        | {(a, "c"): (1.0, choice)},
        reports={(a, 0): 0.5, (a, 1): math.nan, (b, 0): INF, (b, 1): -INF, (b, 2): 1e-300, (c, 7): -0.0},
        user_attrs={(a, "curves"): {"loss": [0.5, "nan"]}, (b, "error"): "é ☃ '", (b, "none"): None},
        system_attrs={(c, "hpo:lease"): {"worker": "w", "attempt": 2}},
        ends={a: (TrialState.COMPLETE, [0.25]), b: (TrialState.PRUNED, [INF]), c: (TrialState.FAIL, None)},
    )


def test_it_is_what_optuna_writes(database):
    ours, theirs = trials(database, 3), trials(database, 3)
    assert write_to_database(database, a_batch(*ours)) == set()
    assert write_one_by_one(database, a_batch(*theirs)) == set()
    assert read(database, ours) == read(database, theirs)
    assert "'x': 0.1, 'c': None" in read(database, ours)[0][2]
    ended = [[database.get_trial(trial_id).datetime_complete for trial_id in some] for some in (ours, theirs)]
    assert all(abs((one - other).total_seconds()) < 60 for one, other in zip(*ended, strict=True))


def test_what_is_there_is_replaced_as_optuna_replaces_it(database):
    a, b, c = trials(database, 3)
    for value in (1.0, 2.0):
        batch = Batch(
            reports={(a, 0): value}, user_attrs={(a, "k"): value, (b, "k"): 0}, system_attrs={(c, "k"): value}
        )
        assert write_to_database(database, batch) == set()
    assert database.get_trial(a).intermediate_values == {0: 2.0}
    assert [database.get_trial(i).user_attrs for i in (a, b)] == [{"k": 2.0}, {"k": 0}]
    assert database.get_trial(c).system_attrs == {"k": 2.0}


def test_a_trial_that_was_ended_is_left_as_it_is_and_named(database):
    a, b, c = trials(database, 3)
    database.set_trial_state_values(b, TrialState.FAIL)
    before = read(database, [b])
    assert write_to_database(database, a_batch(a, b, c)) == {b}
    assert read(database, [b]) == before
    assert [database.get_trial(i).state for i in (a, c)] == [TrialState.COMPLETE, TrialState.FAIL]


def test_all_of_it_or_nothing(database, monkeypatch):
    a, b, c = trials(database, 3)
    before = read(database, [a, b, c])
    with pytest.raises(KeyError, match=r"no trials with the ids \[10000\]"):
        write_to_database(database, a_batch(a, b, 10_000))
    monkeypatch.setattr("hpo.search.batch._write_ends", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_to_database(database, a_batch(a, b, c))
    assert read(database, [a, b, c]) == before


def test_of_those_that_wait_each_is_claimed_once(database):
    waiting = trials(database, 3, TrialState.WAITING)
    running = trials(database, 1)
    assert claim(database, {i: {"lease": "a"} for i in (*waiting[:2], *running)}) == waiting[:2]
    assert claim(database, {i: {"lease": "b"} for i in (*waiting, *running)}) == waiting[2:]
    assert claim(database, {}) == []
    assert all(database.get_trial(i).state == TrialState.RUNNING for i in waiting)
    assert database.get_trial(waiting[0]).datetime_start is not None
    leases = [database.get_trial(i).system_attrs for i in waiting]
    assert leases == [{"hpo:lease": {"lease": lease}} for lease in "aab"]
    # the connection was cut after it, and the same worker asks again
    assert claim(database, {i: {"lease": "a"} for i in waiting}) == waiting[:2]


def test_queued_trials_are_those_that_optuna_adds(database):
    study = optuna.load_study(study_name="s", storage=database)
    queued = [({"place": i, "seed": 2**63 + i}, {"fixed_params": {"x": 0.5, "y": None}} if i else {}) for i in range(3)]
    trials(database, 2)
    enqueue(database, study._study_id, queued[:2])
    ours = study.get_trials()[2:]
    for user, system in queued[:2]:
        study.add_trial(create_trial(state=TrialState.WAITING, user_attrs=user, system_attrs=system))
    enqueue(database, study._study_id, queued[2:])
    theirs = study.get_trials()[4:6]
    assert [trial.number for trial in study.get_trials()] == list(range(7))
    assert read(database, [t._trial_id for t in ours]) == read(database, [t._trial_id for t in theirs])
    with pytest.raises(KeyError, match="no study"):
        enqueue(database, 10_000, queued)


def test_what_it_does_not_take_costs_that_and_not_the_rest(database, said):
    a, b = trials(database, 2)
    storage = RetryingStorage(database, 1.0)
    with storage.together() as over:
        storage.set_trial_user_attr(a, "bad", {1, 2})  # no JSON
        storage.set_trial_user_attr(b, "good", 1)
        storage.set_trial_state_values(a, TrialState.COMPLETE, [0.5])
    assert over == set()
    assert (database.get_trial(a).user_attrs, database.get_trial(b).user_attrs) == ({}, {"good": 1})
    assert database.get_trial(a).values == [0.5]
    assert said == [f"bad of the trial with the id {a} is not stored: Object of type set is not JSON serializable"]


def test_what_was_written_when_the_connection_was_cut_is_ours(database, monkeypatch):
    a, b = trials(database, 2)
    database.set_trial_state_values(b, TrialState.FAIL)
    monkeypatch.setattr("hpo.search.patient.RETRY_SECONDS", 0.01)
    cut = [ConnectionError("cut off")]

    def written(storage, batch):
        over = write_to_database(storage, batch)
        if cut:
            raise cut.pop()
        return over

    monkeypatch.setattr("hpo.search.retrying.write_to_database", written)
    storage = RetryingStorage(database, 30.0)
    with storage.together() as over:
        storage.set_trial_state_values(a, TrialState.COMPLETE, [0.5])
        storage.set_trial_state_values(b, TrialState.COMPLETE, [0.5])
    assert over == {b}
    assert database.get_trial(a).values == [0.5]


def test_reports_alone_are_kept_while_it_is_away_and_training_continues(database, monkeypatch):
    (a,) = trials(database, 1)
    monkeypatch.setattr("hpo.search.patient.RETRY_SECONDS", 0.01)
    away = [True]

    def maybe(storage, batch):
        if away[0]:
            raise ConnectionError("nobody there")
        return write_to_database(storage, batch)

    monkeypatch.setattr("hpo.search.retrying.write_to_database", maybe)
    storage = RetryingStorage(database, 30.0)
    for step in range(3):
        with storage.together() as over:
            storage.set_trial_intermediate_value(a, step, 0.5)
        assert over == set()
    away[0] = False
    with storage.together():
        storage.set_trial_intermediate_value(a, 3, 0.5)
        storage.set_trial_state_values(a, TrialState.COMPLETE, [0.5])
    assert database.get_trial(a).intermediate_values == dict.fromkeys(range(4), 0.5)


def short_epochs(storage, time, trial, steps, seconds=0.1):
    for step in steps:
        time.move(seconds)
        with storage.together(epoch=True):
            storage.set_trial_intermediate_value(trial, step, float(step))


@pytest.fixture
def quick(database):
    time = HandClock()
    storage = RetryingStorage(database, 30.0, time.clock)

    def reported(trial):
        return sorted(database.get_trial(trial).intermediate_values)

    return storage, time, reported


def test_short_epochs_share_a_transaction_and_long_ones_have_one_each(database, quick):
    storage, time, reported = quick
    (a,) = trials(database, 1)
    short_epochs(storage, time, a, range(1))
    assert reported(a) == [0], "there was none before: it may be a long one"
    short_epochs(storage, time, a, range(1, 3))
    assert reported(a) == [0]
    short_epochs(storage, time, a, range(3, 4))
    assert reported(a) == [0, 1, 2, 3]
    short_epochs(storage, time, a, range(4, 6))
    short_epochs(storage, time, a, range(6, 8), seconds=60.0)
    assert reported(a) == list(range(8))


@pytest.mark.parametrize("how", ["end", "end of another", "given back", "an attribute", "a bug"])
def test_what_was_kept_back_is_written_before_all_else(database, quick, how):
    storage, time, reported = quick
    a, b = trials(database, 2)
    short_epochs(storage, time, a, range(3))
    assert reported(a) == [0]
    if how == "given back":
        storage.set_trial_state_values(a, TrialState.FAIL)
    elif how == "a bug":
        with suppress(KeyError), storage.together(epoch=True):
            storage.set_trial_intermediate_value(a, 3, 3.0)
            raise KeyError("a bug")
        with storage.together():
            pass
    else:
        with storage.together(epoch=True):
            if how == "an attribute":
                storage.set_trial_user_attr(a, "k", 1)
            else:
                storage.set_trial_state_values(a if how == "end" else b, TrialState.COMPLETE, [0.5])
    assert reported(a) == [0, 1, 2]


def test_while_epochs_are_short_trials_are_read_as_seldom_and_after_an_end_at_once(database, quick):
    storage, time, _ = quick
    study = optuna.load_study(study_name=database.get_all_studies()[0].study_name, storage=storage)
    a, b = trials(database, 2)

    def complete():
        time.move(0.1)
        with storage.together(epoch=True):
            return len(storage.get_all_trials(study._study_id, deepcopy=False, states=(TrialState.COMPLETE,)))

    before = complete()
    database.set_trial_state_values(a, TrialState.COMPLETE, [0.5])
    assert [complete() for _ in range(3)] == [before, before, before + 1]
    with storage.together(epoch=True):
        storage.set_trial_state_values(b, TrialState.COMPLETE, [0.5])
    assert complete() == before + 2


def test_a_stacks_epoch_is_one_transaction(tmp_path, monkeypatch):
    opener, writes = Opener(tmp_path), []
    search = opener(trials=4, epochs=2)
    monkeypatch.setattr(
        "hpo.search.retrying.write_to_database", lambda s, b: writes.append(b) or write_to_database(s, b)
    )
    numbers = [search.ask().number for _ in range(4)]
    writes.clear()
    with search.together() as elsewhere:
        assert all(search.report(number, 0, 0.5) for number in numbers)
        search.annotate(numbers[0], {"best_epoch": 0})
        assert search.complete(numbers[0], 0.5)
        assert search.prune(numbers[1])
    assert (len(writes), elsewhere) == (1, set())
    states = [trial.state.name for trial in search.study.get_trials()]
    assert states == ["COMPLETE", "PRUNED", "RUNNING", "RUNNING"]
    assert search.study.trials[1].value == 0.5  # its last report, as Optuna's tell has it
    opener.close()
