"""When more trials are not worth it: the rules of `stop`, and that a search that was stopped stays exact."""

import json
import subprocess
import sys
import warnings
from datetime import datetime, timedelta

import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState, create_trial

from hpo.report.results import Study
from hpo.search import schema
from hpo.search.opening import is_over, open_stored
from hpo.search.stop import StopRules, stopped_in
from hpo.study.spec import Plugin, StudySpec
from hpo.study.spec_parts import TERMINATORS
from tests.logged import recorded
from tests.searches import Opener, claims


@pytest.fixture
def opened(tmp_path):
    opener = Opener(tmp_path)
    yield opener
    opener.close()


def run(search, values):
    """Train trials that come to these values (None: failed; "p": pruned) until none is left; return how many."""
    done = 0
    for value in values:
        claim = search.ask()
        if claim is None:
            break
        done += 1
        if value is None:
            search.fail(claim.number, "why")
        elif value == "p":
            search.prune(claim.number)
        else:
            search.complete(claim.number, value)
    return done


FALLING = [0.9, *(0.5 - 0.01 * i for i in range(40))]


@pytest.mark.parametrize(
    ("values", "maximize", "n"),
    [
        (FALLING, True, 4),
        (FALLING, False, 20),  # each is better than those before
        ([0.1, 0.1, 0.1, 0.1, 0.1, 0.1], True, 4),  # as good is not better
        ([0.1, 0.0, 0.0, 0.2, 0.0, 0.0, 0.0, 0.0], True, 7),
        ([0.1, None, "p", None, 0.5], True, 4),  # those that failed or were pruned have finished, too
        ([None, None, None, "p", "p", 0.1, 0.0, 0.0, 0.0, 0.0], True, 9),  # the first one is always a gain
    ],
)
def test_no_gain_counts_the_finished_trials_since_the_best(opened, values, maximize, n):
    search = opened(trials=20, maximize=maximize, stop={"no_gain": 3})
    assert run(search, values) == n
    assert (search.counts().finished, search.counts().unfinished) == (n, 0)
    assert (search.view().stopped is None) == (n == 20)


@pytest.mark.parametrize(
    ("values", "maximize", "n"),
    [
        ([0.1, 0.89999, 0.9, 0.95], True, 3),
        ([1.5, 0.91, 0.90001, 0.9, 0.1], False, 4),
        ([0.1, "p", None, 0.95, 0.1], True, 4),
    ],
)
def test_a_target_ends_the_search_once_a_complete_trial_has_reached_it(opened, values, maximize, n):
    search = opened(trials=20, maximize=maximize, stop={"target": 0.9})
    assert run(search, values) == n
    stopped = search.view().stopped
    assert (stopped.rule, stopped.setting, stopped.trials, stopped.finished) == ("target", 0.9, 20, n)
    assert stopped.text() == f"stopped after {n} of 20 trials: trial {n - 1} has reached the target 0.9, with " + (
        f"{values[n - 1]:.6g}"
    )


def test_a_study_that_has_spent_its_budget_was_not_stopped(opened):
    search = opened(trials=4, stop={"no_gain": 3})
    assert run(search, [0.9, 0.1, 0.1, 0.1]) == 4
    assert search.ask() is None
    assert search.view().stopped is None
    assert schema.STOPPED not in search.attrs


def test_without_the_key_nothing_is_asked_or_stored(opened, monkeypatch):
    monkeypatch.setattr(StopRules, "ask", None)
    search = opened(trials=5)
    search.settle_stop()
    claims(search)
    assert schema.STOPPED not in search.attrs


class TestStopped:
    def test_what_is_queued_is_withdrawn_and_each_trial_has_one_end(self, opened):
        search = opened(trials=20, stop={"no_gain": 2})
        assert run(search, [0.9, 0.1, 0.1, 0.1]) == 3
        states = [trial.state for trial in search.study.get_trials()]
        assert TrialState.WAITING not in states
        assert states.count(TrialState.COMPLETE) == 3
        assert [t.number for t in search.trials()] == [0, 1, 2]
        assert (search.counts().complete, search.counts().failed, search.counts().waiting) == (3, 0, 0)
        assert is_over(search, search.view())
        assert set(search.view().ends) == {0, 1, 2}  # what nobody has claimed has not ended, either

    def test_another_worker_claims_none_either_not_even_one_that_it_has_seen_waiting(self, opened):
        one, two = (opened(trials=20, stop={"no_gain": 2}) for _ in range(2))
        first = two.ask()
        assert run(one, [0.9, 0.1, 0.1, 0.1]) == 3
        assert two.ask() is None
        assert two.complete(first.number, 1.0)  # what is in training is trained to its end
        assert one.ask() is None
        assert (two.counts().complete, two.counts().unfinished) == (4, 0)
        assert one.best().number == first.number

    def test_the_decision_stands_though_a_trial_in_training_comes_to_more(self, opened):
        search = opened(trials=20, stop={"no_gain": 2})
        late = search.ask()
        run(search, [0.5, 0.1, 0.1, 0.1])
        search.complete(late.number, 0.9)
        again = opened(trials=20, stop={"no_gain": 2})
        again.settle_stop()
        assert again.ask() is None
        raised = opened(trials=21, stop={"no_gain": 2})  # who asks for more asks the rules again, which do not hold now
        raised.settle_stop()
        assert raised.view().stopped is None
        assert run(raised, [0.1, 0.2, 0.3]) == 2
        assert raised.view().stopped.trials == 21

    def test_a_trial_whose_worker_dies_is_trained_again(self, opened):
        search = opened(trials=20, stop={"no_gain": 2})
        lost = search.ask()
        assert run(search, [0.9, 0.1, 0.1, 0.1]) == 3
        search.give_back(lost.number, "interrupted")
        assert (search.counts().waiting, search.counts().unfinished) == (1, 1)
        again = opened(trials=20, stop={"no_gain": 2})
        again.settle_stop()
        retry = again.ask()
        assert (retry.retry_of, retry.seed, retry.params) == (lost.number, lost.seed, lost.params)
        again.complete(retry.number, 0.3)
        assert again.ask() is None
        assert (again.counts().complete, again.counts().unfinished) == (4, 0)

    def test_one_that_was_killed_before_it_withdrew_anything_is_tidied(self, opened):
        search = opened(trials=20, stop={"no_gain": 2})
        for value in (0.9, 0.1, 0.1):
            search.complete(search.ask().number, value)
        found = search._queue._rules.ask(search.trials())
        search.remember(schema.STOPPED, found.as_dict())
        assert any(t.state == TrialState.WAITING for t in search.study.get_trials())
        again = opened(trials=20, stop={"no_gain": 2})
        again.settle_stop()
        assert again.counts().waiting == 0
        assert again.ask() is None
        assert not any(t.state == TrialState.WAITING for t in again.study.get_trials())


class TestChangedFile:
    """`stop` is no part of a study's identity: what has ended it holds as long as the study file says the same."""

    @pytest.fixture
    def search(self, opened):
        search = opened(trials=20, stop={"no_gain": 2, "target": 5.0})
        assert run(search, [0.9, 0.1, 0.1, 0.1]) == 3
        return search

    @pytest.mark.parametrize("stop", [None, {"no_gain": 3}, {"target": 1.0}, {"target": 5.0}])
    def test_another_rule_searches_on(self, search, opened, stop):
        again = opened(trials=20, stop=stop)
        assert again.counts().waiting == 17
        again.settle_stop()
        assert again.ask() is not None
        assert again.attrs[schema.STOPPED] is None

    @pytest.mark.parametrize(
        ("trials", "stop"), [(20, {"no_gain": 2}), (10, {"no_gain": 2}), (100, {"no_gain": 2}), (20, {"no_gain": 1})]
    )
    def test_a_rule_that_still_holds_stops_at_once_and_says_so(self, search, opened, trials, stop):
        again = opened(trials=trials, stop=stop)
        with recorded() as said:
            again.settle_stop()
        assert len(said) == 1
        assert "stopped after 3 of" in said[0]
        assert again.ask() is None
        assert again.counts().unfinished == 0

    def test_a_search_that_goes_further_draws_what_it_would_have_drawn(self, search, opened, tmp_path):
        rest = [(c.slot, c.seed, c.params) for c in claims(opened(trials=8, sampler=Plugin(name="random")))]
        (tmp_path / "other").mkdir()
        other = Opener(tmp_path / "other")
        whole = other(trials=8, sampler=Plugin(name="random"))
        assert [(c.slot, c.seed, c.params) for c in claims(whole)][3:] == rest
        other.close()


def test_what_others_have_written_there_stops_nothing():
    sound = {"rule": "no_gain", "setting": 3, "trials": 9, "finished": 5, "why": "x"}
    assert stopped_in(sound) is not None
    wrong = [
        None,
        3,
        [],
        {},
        sound | {"trials": "9"},
        sound | {"why": 3},
        sound | {"setting": [1]},
        sound | {"more": 1},
    ]
    wrong += [{key: value for key, value in sound.items() if key != "why"}, sound | {"finished": True}]
    assert [stopped_in(each) for each in wrong] == [None] * len(wrong)


def complete(values, at=lambda i: {"x": -3 + 6 * (i * 0.618 % 1), "y": -3 + 6 * (i * 0.414 % 1)}):
    """Return complete trials of these values, which ended one after the other."""
    space = {name: FloatDistribution(-3, 3) for name in ("x", "y")}
    made = []
    for i, value in enumerate(values):
        each = create_trial(value=value, params=at(i), distributions=space)
        each.number, each.datetime_complete = i, datetime(2026, 1, 1) + timedelta(seconds=i)
        made.append(each)
    return made


class TestTerminators:
    def rules(self, name, trials=400):
        return StopRules(StudySpec(name="s", objective="o", trials=trials, stop={"terminator": name}), maximize=False)

    @pytest.mark.parametrize(
        ("n", "asked"),
        [(60, [30, 35, 40, 45, 50, 55, 60]), (130, [*range(30, 61, 5), 66, 72, 79, 86, 94, 103, 113, 124])],
    )
    def test_it_is_asked_seldom_and_only_with_enough_complete_trials(self, n, asked, monkeypatch):
        seen = []
        monkeypatch.setattr("hpo.search.stop._terminator", lambda name, seed: Answers(False, seen))
        rules, trials = self.rules("emmr"), complete([float(i % 7) for i in range(n)])
        assert [rules.ask(trials[:i]) for i in range(n + 1)] == [None] * (n + 1)
        assert [len(states) for states in seen] == asked

    @pytest.mark.parametrize("name", ["emmr", "regret_bound"])
    def test_optunas_own_is_asked_of_our_trials(self, name):
        """Whatever it says, it takes them: of a bowl whose bottom is well known EMMR expects nothing more."""
        trials = complete([0.0] * 40)
        for trial in trials:
            trial.value = sum(x * x for x in trial.params.values())
        with recorded() as said:
            stopped = self.rules(name).ask(trials)
        assert said == []
        if name == "emmr":
            assert (stopped.rule, stopped.setting, stopped.finished) == ("terminator", "emmr", 40)
            assert stopped.why == "Optuna's terminator emmr expects nothing more of it, after 40 complete trials"

    def test_best_value_stagnation_is_optunas_thirty_trials(self):
        rules, trials = self.rules("best_value_stagnation"), complete([0.1, *[0.9] * 49])
        assert next(i for i in range(51) if rules.ask(trials[:i]) is not None) == 32

    def test_it_is_asked_at_every_trial(self):
        """Optuna's own Terminator, asked after each, ends at the same trial."""
        values = [0.9, 0.8, 0.1, *[0.5] * 60]
        rules, trials = self.rules("best_value_stagnation"), complete(values)
        study = optuna.create_study()
        with warnings.catch_warnings(action="ignore"):
            terminator = optuna.terminator.Terminator(optuna.terminator.BestValueStagnationEvaluator())
            for n in range(len(values)):
                study.add_trial(trials[n])
                if n >= 20 and terminator.should_terminate(study):
                    break
        asked = [rules.ask(trials[: i + 1]) is not None for i in range(n + 1)]
        assert asked.index(True) == n == 33

    def test_one_that_fails_costs_no_study(self, monkeypatch):
        monkeypatch.setattr("hpo.search.stop._terminator", lambda name, seed: Answers(ValueError("singular"), []))
        with recorded() as said:
            assert self.rules("emmr").ask(complete([0.1] * 34)) is None
        assert said == ["stop.terminator: emmr could not be asked (ValueError: singular)"]

    def test_adopted_and_retried_trials_are_no_part_of_what_it_sees(self, opened, monkeypatch):
        seen = []
        monkeypatch.setitem(TERMINATORS, "emmr", 3)
        monkeypatch.setattr("hpo.search.stop._terminator", lambda name, seed: Answers(True, seen))
        search = opened(trials=10, stop={"terminator": "emmr"})
        search.study.add_trial(create_trial(value=1.0, user_attrs={schema.ADOPTED: "other#1"}))
        search.give_back(search.ask().number, "interrupted")
        assert run(search, [0.1, None, 0.1, 0.1, 0.1, 0.1, 0.1]) == 5  # the retry is trained all the same
        assert seen == [[TrialState.COMPLETE] * 3]


class Answers:
    """A terminator that gives one answer, or raises it, and notes the states of the trials that it was asked of."""

    def __init__(self, answer, seen):
        self.answer, self.seen = answer, seen

    def should_terminate(self, study):
        self.seen.append([trial.state for trial in study.trials])
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def test_status_and_the_api_know_it_and_ask_nothing(opened, tmp_path, monkeypatch):
    search = opened(trials=20, stop={"no_gain": 2})
    search.remember(schema.STUDY_FILE, json.dumps({"objective": "o", "trials": 20, "stop": {"no_gain": 2}}))
    run(search, [0.9, 0.1, 0.1, 0.1])
    monkeypatch.setattr(StopRules, "ask", None)
    url = f"sqlite:///{tmp_path}/s.db"
    text = "stopped after 3 of 20 trials: none of the last 2 finished trials was better than trial 0"
    looked = open_stored(StudySpec(name="s", objective="o", trials=20, storage=url, stop={"no_gain": 2}))
    assert looked.view().stopped.text() == text
    assert is_over(looked, looked.view())
    looked.close()
    study = Study("s", url)
    assert study.stopped == text
    assert (study.counts.finished, study.counts.unfinished) == (3, 0)
    assert repr(study).startswith("Study('s': 3 of 3 trials finished")


def test_to_read_the_rules_needs_no_torch():
    code = "import sys, hpo.search.stop; sys.exit('torch' in sys.modules or 'optuna.terminator' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
