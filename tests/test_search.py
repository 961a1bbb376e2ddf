"""The Optuna side of a study: an exact budget, claims that are never shared, leases, and what is known of its trials."""

import os
import subprocess
import sys
import threading
import time
from collections import Counter

import pytest
from optuna.trial import TrialState

from hpo import lease as leases
from hpo.budget import LEASE_KEY
from hpo.errors import InputError
from hpo.lease import LEASE_SECONDS, is_dead
from hpo.search import MAX_ATTEMPTS, open_search
from hpo.space import build
from hpo.spec import Plugin, StudySpec, parse_param

PARAMS = {
    "learning_rate": {"type": "float", "low": 1e-3, "high": 1e-1, "log": True},
    "n_hidden": {"type": "int", "low": 4, "high": 8},
    "batch_size": 16,
}
DISCRETE = {"n_hidden": {"type": "int", "low": 1, "high": 3}, "kind": {"type": "categorical", "choices": ["a", "b"]}}


@pytest.fixture
def opened(tmp_path):
    """Return a function that opens the study `s` in `<tmp_path>/s.db`, as another worker or a second run would."""
    searches = []

    def open_again(params=PARAMS, maximize=True, make=True, **keys):
        keys = {"trials": 5, "epochs": 3, "pruner": Plugin(name="none")} | keys
        spec = StudySpec(**({"name": "s", "objective": "o", "storage": f"sqlite:///{tmp_path}/s.db"} | keys))
        space, faults = build({name: parse_param(entry) for name, entry in params.items()}, spec.start_with)
        assert not faults
        search = open_search(spec, space, "accuracy", maximize=maximize, make=make)
        if search is not None:
            searches.append(search)
        return search

    yield open_again
    for search in searches:
        search.close()


def claims(search):
    """Claim and complete all that is left; return the claims."""
    done = []
    while (claim := search.ask()) is not None:
        assert search.complete(claim.number, float(claim.number))
        done.append(claim)
    return done


def stored(search, number):
    """Return a trial as the storage has it, whether it has a place in the budget or not."""
    return next(t for t in search.study.get_trials() if t.number == number)


def abandon(search, number, until=None, pid=None):
    """Leave a trial as a worker would that died: its lease ran out, or its process is gone."""
    trial = stored(search, number)
    lease = dict(trial.system_attrs[LEASE_KEY])
    place, _, _ = lease["worker"].rpartition(":")
    lease |= {"until": lease["until"] if until is None else until} | ({} if pid is None else {"worker": f"{place}:{pid}"})
    search._lease.drop(trial._trial_id)
    search.storage.set_trial_system_attr(trial._trial_id, LEASE_KEY, lease)


def gone_pid():
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    return process.pid


class TestBudget:
    def test_exactly_so_many_trials_and_then_none(self, opened):
        search = opened(trials=5)
        assert [claim.number for claim in claims(search)] == [0, 1, 2, 3, 4]
        assert search.ask() is None
        assert len(search.study.get_trials()) == 5
        assert (search.counts().complete, search.counts().waiting) == (5, 0)
        assert opened(trials=5).ask() is None

    def test_a_raised_budget_gives_the_difference(self, opened):
        claims(opened(trials=2))
        assert len(claims(opened(trials=5))) == 3
        assert opened(trials=5).counts().complete == 5

    def test_a_lowered_budget_withdraws_what_is_queued(self, opened):
        first = opened(trials=8)
        for _ in range(2):
            first.complete(first.ask().number, 0.0)
        lower = opened(trials=3)
        assert lower.counts().waiting == 1
        assert len(claims(lower)) == 1
        assert lower.counts() == opened(trials=3).counts()
        assert lower.counts().complete == len(lower.trials()) == 3

    def test_a_budget_below_what_is_done_gives_nothing_and_loses_nothing(self, opened):
        claims(opened(trials=4))
        lower = opened(trials=2)
        assert lower.ask() is None
        assert lower.counts().complete == 4

    def test_a_budget_that_is_lowered_and_raised_again_is_exact(self, opened):
        first = opened(trials=6, start_with=({"n_hidden": 4}, {"n_hidden": 5}, {"n_hidden": 6}))
        first.complete(first.ask().number, 0.0)
        assert len(claims(opened(trials=2, start_with=({"n_hidden": 4}, {"n_hidden": 5})))) == 1
        again = claims(opened(trials=6, start_with=({"n_hidden": 4}, {"n_hidden": 5}, {"n_hidden": 6})))
        assert len(again) == 4
        assert again[0].params["n_hidden"] == 6

    def test_a_trial_given_back_under_a_lowered_budget_does_not_count_as_failed(self, opened):
        first = opened(trials=5)
        first.give_back(first.ask().number, "interrupted")
        lower = opened(trials=2)
        assert len(claims(lower)) == 2
        assert (lower.counts().complete, lower.counts().failed) == (2, 0)

    def test_a_large_budget_is_queued_a_chunk_at_a_time(self, opened):
        search = opened(trials=250)
        search.ask()
        assert len(search.study.get_trials()) == 100
        assert search.counts().waiting == 249

    def test_several_workers_share_one_budget(self, opened):
        workers = [opened(trials=20) for _ in range(3)]
        claimed, barrier = [], threading.Barrier(3)

        def work(search):
            barrier.wait()
            claimed.extend(claim.number for claim in claims(search))
            search.storage.remove_session()

        threads = [threading.Thread(target=work, args=(search,)) for search in workers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(claimed) == list(range(20))

    @pytest.mark.parametrize("sampler", ["grid", "brute_force"])
    def test_a_sampler_that_has_tried_all_ends_the_study_cleanly(self, opened, sampler):
        search = opened(DISCRETE, trials=6, sampler=Plugin(name=sampler))
        tried = [tuple(claim.params.values()) for claim in claims(search)]
        assert sorted(tried) == [(n, kind) for n in (1, 2, 3) for kind in "ab"]
        assert search.counts().complete == 6


class TestClaims:
    def test_start_with_comes_first_and_once(self, opened):
        starts = ({"n_hidden": 8, "learning_rate": 0.01}, {"n_hidden": 4})
        first = opened(start_with=starts)
        claim = first.ask()
        first.complete(claim.number, 0.0)
        rest = claims(opened(start_with=starts))
        assert (claim.params["n_hidden"], claim.params["learning_rate"]) == (8, 0.01)
        assert rest[0].params["n_hidden"] == 4
        marks = [t.user_attrs.get("start_with") for t in first.trials()]
        assert marks == [0, 1, None, None, None]

    def test_params_are_of_the_space_with_the_fixed_ones(self, opened):
        search = opened(trials=8)
        done = claims(search)
        for claim in done:
            assert claim.params["batch_size"] == 16
            assert all(d.takes(claim.params[d.name]) for d in search.space.dimensions)
            assert search.space.resolve(stored(search, claim.number).params) == claim.params
        assert len({claim.params["learning_rate"] for claim in done}) == 8
        assert len({claim.seed for claim in done}) == 8

    def test_what_one_worker_queued_another_can_claim(self, opened):
        starts = ({"n_hidden": 8, "learning_rate": 0.01}, {"n_hidden": 4, "learning_rate": 0.02})
        first, second = (opened(trials=2, start_with=starts) for _ in range(2))
        assert [search.ask().params["n_hidden"] for search in (first, second)] == [8, 4]

    def test_an_interrupted_trial_can_be_claimed_in_the_next_run(self, opened):
        first = opened(trials=1)
        lost = first.ask()
        first.give_back(lost.number, "interrupted")
        claim = opened(trials=1).ask()
        assert (claim.params, claim.seed) == (lost.params, lost.seed)

    def test_a_study_in_two_runs_draws_what_one_run_draws(self, opened, tmp_path):
        def draws(search):
            return [(claim.params, claim.seed) for claim in claims(search)]

        whole = draws(opened(trials=4, storage=f"sqlite:///{tmp_path}/whole.db"))
        assert draws(opened(trials=2)) + draws(opened(trials=4)) == whole

    def test_a_value_is_reported_at_each_epoch(self, opened):
        search = opened()
        number = search.ask().number
        assert search.report(number, 0, 0.5)
        assert search.report(number, 1, 0.75)
        (running,) = search.running()
        assert (running.number, running.epoch, running.value) == (number, 2, 0.75)
        assert running.worker.endswith(f":{os.getpid()}")
        search.complete(number, 0.75)
        assert search.running() == []
        assert stored(search, number).intermediate_values == {0: 0.5, 1: 0.75}

    def test_the_pruner_says_when_to_stop(self, opened):
        search = opened(pruner=Plugin(name="threshold", lower=0.6))
        number = search.ask().number
        assert search.report(number, 0, 0.7)
        assert not search.report(number, 1, 0.5)
        assert search.prune(number)
        assert stored(search, number).state == TrialState.PRUNED
        assert search.counts().pruned == 1

    def test_a_failure_keeps_its_reason_and_its_place(self, opened):
        search = opened(trials=2)
        number = search.ask().number
        search.annotate(number, mlflow_run_id="abc")
        assert search.fail(number, "train_loss became nan")
        assert stored(search, number).state == TrialState.FAIL
        assert stored(search, number).user_attrs.items() >= {"error": "train_loss became nan", "mlflow_run_id": "abc"}.items()
        assert len(claims(search)) == 1
        assert (search.counts().failed, search.counts().complete) == (1, 1)

    def test_what_is_given_back_is_done_again_with_its_params_and_seed(self, opened):
        search = opened(trials=2)
        first = last = search.ask()
        search.complete(search.ask().number, 0.0)
        for _ in range(MAX_ATTEMPTS + 1):  # an interruption is nobody's fault, however often
            search.give_back(last.number, "interrupted")
            last = search.ask()
            assert (last.params, last.seed, last.attempt) == (first.params, first.seed, 1)
        search.complete(last.number, 1.0)
        assert search.ask() is None
        assert [t.number for t in search.trials()] == [1, last.number]
        assert stored(search, first.number).state == TrialState.FAIL
        assert stored(search, first.number).user_attrs["error"] == "interrupted"


class TestLeases:
    @pytest.mark.parametrize("how", ["lease", "pid"])
    def test_a_dead_workers_trial_is_taken_up_with_its_params_and_seed(self, opened, how):
        dead, alive = opened(trials=1), opened(trials=1)
        lost = dead.ask()
        abandon(dead, lost.number, **({"until": time.time() - 1} if how == "lease" else {"pid": gone_pid()}))
        claim = alive.ask()
        assert (claim.params, claim.seed, claim.attempt) == (lost.params, lost.seed, 2)
        assert claim.number != lost.number
        ((number, reason),) = alive.drain_lost()
        assert number == lost.number
        assert reason.startswith("worker ")
        assert reason.endswith(" died")
        assert alive.drain_lost() == []
        assert alive.complete(claim.number, 1.0)
        assert alive.counts() == dead.counts()
        assert (alive.counts().complete, alive.counts().failed, alive.counts().running) == (1, 0, 0)

    def test_a_live_workers_trial_is_left_alone(self, opened):
        first, second = opened(trials=1), opened(trials=1)
        claim = first.ask()
        assert second.ask() is None
        assert second.counts().running == 1
        assert first.complete(claim.number, 1.0)

    def test_a_trial_that_kills_its_workers_is_given_up(self, opened):
        attempts = []
        for _ in range(MAX_ATTEMPTS):
            search = opened(trials=1)
            claim = search.ask()
            attempts.append(claim.attempt)
            abandon(search, claim.number, until=0.0)
        last = opened(trials=1)
        assert attempts == list(range(1, MAX_ATTEMPTS + 1))
        assert last.ask() is None
        assert (last.counts().failed, last.counts().running, last.counts().waiting) == (1, 0, 0)

    def test_a_second_successor_is_harmless(self, opened):
        search = opened(trials=2)
        first = search.ask()
        search.give_back(first.number, "interrupted")
        search.study.enqueue_trial({}, user_attrs={"retry_of": first.number})  # as a peer's crash might leave it
        assert len(claims(search)) == 2
        assert search.counts().complete == len(search.trials()) == 2

    def test_a_crash_between_the_successor_and_the_end_of_its_predecessor_loses_nothing(self, opened):
        dead, alive = opened(trials=1), opened(trials=1)
        lost = dead.ask()
        dead.study.enqueue_trial(dict(stored(dead, lost.number).params), user_attrs={"retry_of": lost.number, "seed": lost.seed})
        abandon(dead, lost.number, until=0.0)
        (claim,) = claims(alive)
        assert claim.seed == lost.seed
        assert len(alive.study.get_trials()) == 2
        assert stored(alive, lost.number).state == TrialState.FAIL

    def test_a_claim_without_a_lease_yet_is_given_time(self, opened):
        search = opened()
        claim = search.ask()
        trial = stored(search, claim.number)
        trial.system_attrs.pop(LEASE_KEY)
        assert not is_dead(trial, time.time())
        assert is_dead(trial, time.time() + LEASE_SECONDS + 1)

    def test_a_process_of_another_machine_is_judged_by_its_lease_alone(self, opened):
        search = opened()
        trial = stored(search, search.ask().number)
        trial.system_attrs[LEASE_KEY] = {"worker": f"elsewhere:1:{gone_pid()}", "until": time.time() + 30, "attempt": 1}
        assert not is_dead(trial, time.time())
        assert is_dead(trial, time.time() + 31)

    def test_a_lease_is_renewed_even_after_an_error(self, opened, monkeypatch):
        monkeypatch.setattr(leases, "LEASE_SECONDS", 0.2)
        search = opened()
        write, failures = search.storage.set_trial_system_attr, []

        def fails_twice(*arguments):
            if len(failures) < 2 and threading.current_thread().name == "hpo-lease":
                failures.append(1)
                raise OSError("the database is away")
            write(*arguments)

        monkeypatch.setattr(search.storage, "set_trial_system_attr", fails_twice)
        number = search.ask().number
        first, end = stored(search, number).system_attrs[LEASE_KEY]["until"], time.monotonic() + 10
        while stored(search, number).system_attrs[LEASE_KEY]["until"] == first:
            assert time.monotonic() < end
            time.sleep(0.05)
        assert len(failures) == 2

    @pytest.mark.parametrize("tell", [lambda s, n: s.complete(n, 1.0), lambda s, n: s.prune(n), lambda s, n: s.fail(n, "x")])
    def test_telling_a_trial_that_a_peer_took_over_says_so_and_changes_nothing(self, opened, tell):
        slow, peer = opened(trials=1), opened(trials=1)
        number = slow.ask().number
        abandon(slow, number, until=0.0)
        again = peer.ask()
        assert not slow.report(number, 0, 0.5)
        assert tell(slow, number) is False
        assert peer.complete(again.number, 0.25)
        assert slow.best().value == 0.25
        assert slow.counts().complete == len(slow.trials()) == 1

    def test_giving_back_a_trial_that_a_peer_took_over_queues_no_other(self, opened):
        slow, peer = opened(trials=1), opened(trials=1)
        number = slow.ask().number
        abandon(slow, number, until=0.0)
        again = peer.ask()
        slow.give_back(number, "interrupted")
        assert peer.complete(again.number, 0.25)
        assert slow.ask() is None
        assert len(slow.study.get_trials()) == 2


class TestWhatIsKnown:
    @pytest.mark.parametrize(("maximize", "number"), [(True, 2), (False, 1)])
    def test_the_best_is_the_first_of_equals(self, opened, maximize, number):
        search = opened(trials=6, maximize=maximize)
        for value in (0.5, 0.1, 0.9, 0.9, 0.1):
            search.complete(search.ask().number, value)
        search.prune(search.ask().number)
        assert search.best().number == number

    def test_the_best_holds_all_params_its_epoch_and_its_metrics(self, opened):
        search = opened(trials=3)
        assert search.best() is None
        claim = search.ask()
        search.annotate(claim.number, best_epoch=1, metrics={"valid_loss": 0.25})
        search.complete(claim.number, 0.75)
        best = search.best()
        assert (best.params, best.seed, best.value) == (claim.params, claim.seed, 0.75)
        assert (best.epoch, best.metrics) == (1, {"valid_loss": 0.25})
        failed = search.ask().number
        search.fail(failed, "nan")
        assert search.best(claim.number) == best
        assert search.best(failed) is None
        assert search.best(99) is None

    def test_counts_are_the_same_from_outside(self, opened):
        search = opened(trials=6)
        tells = [lambda n: search.complete(n, 1.0), search.prune, lambda n: search.fail(n, "nan")]
        for tell in tells:
            tell(search.ask().number)
        search.ask()
        counts = opened(trials=6, make=False).counts()
        assert Counter(vars(counts)) == Counter(complete=1, pruned=1, failed=1, running=1, waiting=2)

    def test_looking_makes_neither_a_database_nor_a_study(self, opened, tmp_path):
        assert opened(make=False) is None
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(("change", "text"), [
        ({"objective": "other"}, "objective is 'other' here, 'o' there"),
        ({"epochs": 7, "seed": 3}, "epochs is 7 here, 3 there\n  seed is 3 here, 42 there"),
        ({"params": PARAMS | {"batch_size": 32}}, "params.batch_size is 32 here, 16 there"),
        ({"params": PARAMS | {"beta1": 0.5}}, "params.beta1 is 0.5 here, absent there"),
        ({"maximize": False}, "it goes to minimize here, the other way there"),
    ])
    def test_a_study_of_that_name_that_is_another_is_refused(self, opened, change, text):
        opened()
        with pytest.raises(InputError) as caught:
            opened(**change)
        assert "has another study named 's':\n  " + text in str(caught.value)
        assert str(caught.value).endswith("give this one another `name`, or another `storage`")
