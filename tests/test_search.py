"""The Optuna side of a study: an exact budget, claims that are never shared, and what is known of its trials."""

import os
import threading
from collections import Counter

import pytest
from optuna.trial import TrialState

from hpo.errors import InputError
from hpo.study.spec import Plugin
from tests.searches import PARAMS, Opener, claims, stored

DISCRETE = {"n_hidden": {"type": "int", "low": 1, "high": 3}, "kind": {"type": "categorical", "choices": ["a", "b"]}}


@pytest.fixture
def opened(tmp_path):
    opener = Opener(tmp_path)
    yield opener
    opener.close()


class TestOrder:
    def test_what_was_interrupted_is_trained_before_what_waits(self, opened):
        search = opened(trials=3)
        first = search.ask()
        search.give_back(first.number, "interrupted")
        resumed, *others = claims(opened(trials=3))
        assert (resumed.retry_of, resumed.params, resumed.seed) == (first.number, first.params, first.seed)
        assert len(others) == 2


class TestBudget:
    def test_exactly_so_many_trials_and_then_none(self, opened):
        search = opened(trials=5)
        assert [claim.number for claim in claims(search)] == [0, 1, 2, 3, 4]
        assert search.ask() is None
        assert len(search.study.get_trials()) == 5
        assert (search.counts().complete, search.counts().waiting) == (5, 0)
        assert opened(trials=5).ask() is None

    def test_a_study_is_shared_once_two_processes_have_trained_its_trials(self, opened, monkeypatch):
        for process, is_shared in (("here-1-1", False), ("here-1-1", False), ("elsewhere-1-2", True)):
            monkeypatch.setattr("hpo.search.lease.this_process", lambda process=process: process)
            search = opened(trials=3)
            search.complete(search.ask().number, 0.0)
            assert search.view().is_shared is is_shared

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
        assert len(search.study.get_trials()) == 16
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


A, B, C = ({"n_hidden": n} for n in (4, 5, 6))


class TestAListOfStartsThatChanges:
    def tried(self, search):
        """Return the first `n_hidden` that each trial of the budget was to have; None: it was drawn."""
        by_number = {trial.number: trial for trial in search.view().everything}
        firsts = [by_number[trial.user_attrs.get("lineage", trial.number)] for trial in search.trials()]
        return [first.system_attrs.get("fixed_params", {}).get("n_hidden") for first in firsts]

    @pytest.mark.parametrize("now", [(B, A), (B, A, C), (B,), (A, B), (C, B)])
    def test_what_no_trial_had_is_tried_wherever_it_stands_and_nothing_else(self, opened, now):
        first = opened(trials=5, start_with=(A,))
        first.complete(first.ask().number, 0.0)  # the other four are queued
        again = opened(trials=5, start_with=now)
        new = [entry["n_hidden"] for entry in now if entry != A]
        assert [claim.params["n_hidden"] for claim in claims(again)][: len(new)] == new
        assert sorted(filter(None, self.tried(again))) == sorted([4, *new])
        assert again.counts().complete == len(again.trials()) == 5

    def test_what_is_queued_for_an_entry_that_is_gone_gives_way_and_two_alike_have_two_trials(self, opened):
        first = opened(trials=3, start_with=(A, B, C))
        first.complete(first.ask().number, 0.0)
        again = opened(trials=3, start_with=({"n_hidden": 4.0}, C, C))
        assert len(claims(again)) == 2
        assert self.tried(again) == [4, 6, 6]

    def test_a_retry_has_the_entry_of_the_trial_that_it_goes_back_to(self, opened):
        first = opened(trials=2, start_with=(A,))
        lost = first.ask()
        first.give_back(lost.number, "interrupted")
        one, two = (opened(trials=2, start_with=(B, A)) for _ in range(2))
        assert (one.ask().params, two.ask().params["n_hidden"]) == (lost.params, 5)
        assert (one.ask(), two.ask()) == (None, None)

    def test_a_trial_that_ended_before_it_drew_is_retried_with_its_entry(self, opened):
        search = opened(trials=1, start_with=(A,))
        (taken,) = search._queue.take(1)
        search._queue.give_back(taken._trial_id, "interrupted")
        assert search.ask().params["n_hidden"] == 4

    def test_of_several_workers_one_tries_what_is_new(self, opened):
        first = opened(trials=8, start_with=(A,))
        first.complete(first.ask().number, 0.0)
        workers = [opened(trials=8, start_with=(B, A)) for _ in range(3)]
        while any([search.ask() for search in workers]):
            pass
        assert sorted(filter(None, self.tried(first))) == [4, 5]
        assert first.counts().running == 7


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
        (running,) = search.view().running
        assert (running.number, running.epoch, running.value) == (number, 2, 0.75)
        assert running.worker.endswith(f"-{os.getpid()}")
        search.complete(number, 0.75)
        assert search.view().running == []
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
        search.annotate(number, {"mlflow_run_id": "abc"})
        assert search.fail(number, "train_loss became nan")
        assert stored(search, number).state == TrialState.FAIL
        attrs = stored(search, number).user_attrs
        assert (attrs["error"], attrs["mlflow_run_id"]) == ("train_loss became nan", "abc")
        assert len(claims(search)) == 1
        assert (search.counts().failed, search.counts().complete) == (1, 1)

    def test_what_is_given_back_is_done_again_with_its_params_and_seed(self, opened):
        search = opened(trials=2)
        first = last = search.ask()
        search.complete(search.ask().number, 0.0)
        for _ in range(4):  # an interruption is nobody's fault, however often
            search.give_back(last.number, "interrupted")
            last = search.ask()
            assert (last.params, last.seed, last.attempt) == (first.params, first.seed, 1)
        search.complete(last.number, 1.0)
        assert search.ask() is None
        assert [t.number for t in search.trials()] == [1, last.number]
        assert stored(search, first.number).state == TrialState.FAIL
        assert stored(search, first.number).user_attrs["error"] == "interrupted"


class TestWhatIsKnown:
    @pytest.mark.parametrize(("maximize", "number"), [(True, 2), (False, 1)])
    def test_the_best_is_the_first_of_equals(self, opened, maximize, number):
        search = opened(trials=6, maximize=maximize)
        for value in (0.5, 0.1, 0.9, 0.9, 0.1):
            search.complete(search.ask().number, value)
        search.prune(search.ask().number)
        assert search.best().number == number

    @pytest.mark.parametrize("maximize", [True, False])
    def test_of_equals_the_lower_loss_is_best_then_the_smaller_network_then_the_earlier(self, opened, maximize):
        search = opened(trials=5, maximize=maximize)
        nan = float("nan")
        for loss, size, best in ((nan, 10, 0), (0.3, 30, 1), (0.3, 20, 2), (0.3, 20, 2), (0.4, 10, 2)):
            claim = search.ask()
            metrics = {"metrics": {"valid_loss": loss}} if loss == loss else {}
            search.annotate(claim.number, metrics | {"n_parameters": size})
            search.complete(claim.number, 0.5)
            assert search.best().number == best

    def test_the_best_holds_all_params_its_epoch_and_its_metrics(self, opened):
        search = opened(trials=3)
        assert search.best() is None
        claim = search.ask()
        search.annotate(claim.number, {"best_epoch": 1, "metrics": {"valid_loss": 0.25}})
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

    @pytest.mark.parametrize(
        ("change", "text"),
        [
            ({"objective": "other"}, "objective is 'other' here, 'o' there"),
            ({"epochs": 7, "seed": 3}, "epochs is 7 here, 3 there\n  seed is 3 here, 42 there"),
            ({"patience": 2}, "patience is 2 here, None there"),
            ({"precision": "bf16"}, "precision is 'bf16' here, 'float32' there"),
            ({"params": PARAMS | {"batch_size": 32}}, "params.batch_size is 32 here, 16 there"),
            ({"params": PARAMS | {"beta1": 0.5}}, "params.beta1 is 0.5 here, absent there"),
            ({"maximize": False}, "it goes to minimize here, the other way there"),
        ],
    )
    def test_a_study_of_that_name_that_is_another_is_refused(self, opened, change, text):
        opened()
        with pytest.raises(InputError) as caught:
            opened(**change)
        assert "has another study named 's':\n  " + text in str(caught.value)
        assert str(caught.value).endswith("give this one another `name`")


@pytest.mark.parametrize(("first", "then"), [({}, {"valid": 0.2}), ({"valid": 0.2, "names": []}, {"test": 0.1})])
def test_an_option_that_is_given_as_its_default_is_one_that_is_not_given(opened, first, then):
    defaults = {"valid": 0.2, "test": 0.1, "names": []}
    opened(options=first, defaults=defaults)
    opened(options=then, defaults=defaults)
    with pytest.raises(InputError, match=r":\n  options.valid is 0.3 here, 0.2 there\nstart"):
        opened(options={"valid": 0.3}, defaults=defaults)


def test_ctrl_c_then_fewer_trials_then_more_ends_with_exactly_so_many(opened):
    """A withdrawn successor once kept its predecessor's place: one more WAITING row at each look, for ever."""
    first = opened(trials=8)
    for claim in [first.ask() for _ in range(4)]:
        first.give_back(claim.number, "interrupted")
    assert len(claims(opened(trials=2))) == 2
    assert len(claims(opened(trials=6))) == 4
    again = opened(trials=6)
    assert again.ask() is None
    assert (again.counts().complete, again.counts().unfinished) == (6, 0)
    assert len(again.study.get_trials()) <= 4 + 8 + 6


def test_trials_that_were_queued_twice_are_none_of_the_budget_and_none_waits_at_the_end(opened):
    """Behind gRPC there is no lock: two workers may fill the queue at once, and left WAITING rows behind for good."""
    search = opened(trials=3)
    first = search.ask()
    for place in range(3):
        search.study.enqueue_trial({}, user_attrs={"place": place, "seed": 1})
    assert search.complete(first.number, 0.0)
    assert len(claims(search)) == 2
    search.tidy()
    states = [trial.state for trial in search.study.get_trials()]
    assert states.count(TrialState.WAITING) == states.count(TrialState.RUNNING) == 0
    assert (search.counts().complete, search.counts().failed) == (3, 0)
