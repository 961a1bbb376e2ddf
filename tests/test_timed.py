"""Halving where `time` bounds a study: trials are promoted, the best is complete when the time ends, and it ends."""

import math
import random
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest
from optuna.trial import TrialState

from hpo.runner.deadline import Deadline, set_end
from hpo.runner.prepare import prepare
from hpo.runner.worker import work
from hpo.search.halving import HalvingPruner
from hpo.search.opening import open_search
from hpo.search.pruning import settle_pruner
from hpo.search.timed import COHORT, TimedHalving, epoch_seconds
from hpo.study.spec import UNBOUNDED, Plugin
from hpo.tracking.base import MemoryTracker
from hpo.training.stack import Member
from tests.screens import Screen
from tests.searches import Opener, StopWhen
from tests.test_halving import paused, trial

EPOCHS = 20


def timed(left=math.inf, at_once=1, epochs=EPOCHS, **keys):
    rule = TimedHalving(HalvingPruner(epochs, **keys), 1, maximize=False, at_once=at_once)
    rule.left = lambda epoch: left
    return rule


def trained(trials, epoch=1.0):
    """Return paused trials as they are stored: an epoch of each has taken `epoch` seconds."""
    for each in trials:
        each.user_attrs["trained"] = [[each.number, each.number + len(each.intermediate_values) * epoch]]
    return trials


def numbers(choice):
    return [each.number for each in choice.claim]


class Simulated:
    """A study of so many seconds whose epochs take one each, in `slots` at once; trials are not really trained."""

    def __init__(self, seconds, slots=1, trials=UNBOUNDED, seed=0):
        self._seconds, self._slots, self._n, self._seed, self._now = seconds, slots, trials, seed, 0.0
        self._rule = timed(at_once=slots)
        self._rule.left = lambda epoch: self._seconds - self._now
        self.trials = []
        self._running = []

    def run(self):
        while True:
            while len(self._running) < self._slots and (some := self._ask()):
                for each in some:
                    self._start(each.number)
            if not self._running:
                return self
            end, number, to, start = min(self._running)
            if end > self._seconds:
                return self
            self._running.remove((end, number, to, start))
            self._now = end
            spans = [*self.trials[number].user_attrs["trained"], [start, end]]
            self.trials[number] = self._trial(number, "C" if to == EPOCHS else "W", to, spans)

    def _ask(self):
        n = min(self._slots, self._n - len(self.trials))
        new = [trial(len(self.trials) + i, "W") for i in range(n)]
        return self._rule.choose([*self.trials, *new], self._slots - len(self._running), self._n).claim

    def _start(self, number):
        if number == len(self.trials):
            self.trials.append(self._trial(number, "W", 0, []))
        before = self.trials[number]
        n = len(before.intermediate_values)
        to = self._rule.next_pause(n) or EPOCHS
        self._running.append((self._now + to - n, number, to, self._now))
        self.trials[number] = self._trial(number, "R", n, before.user_attrs["trained"])

    def _trial(self, number, state, n, spans):
        return trial(number, state, self.curve(number)[:n], trained=spans)

    def curve(self, number):
        draw = random.Random(1000 * self._seed + number)
        end, slow = draw.random(), draw.uniform(0.05, 0.4) * EPOCHS
        return [end + (2 - end) * math.exp(-(epoch + 1) / slow) for epoch in range(EPOCHS)]

    @property
    def complete(self):
        return [each for each in self.trials if each.state == TrialState.COMPLETE]

    @property
    def best_of_others(self):
        others = [t for t in self.trials if t.state != TrialState.COMPLETE and t.intermediate_values]
        return min((min(t.intermediate_values.values()) for t in others), default=math.inf)


class TestEnds:
    @pytest.mark.parametrize(
        ("seconds", "slots", "seed"),
        [
            pytest.param(
                seconds, slots, seed, marks=pytest.mark.slow if seconds == 400 and (seed > 0 or slots == 8) else ()
            )
            for seconds in [26, 40, 100, 400]
            for slots in [1, 2, 8]
            for seed in range(3)
        ],
    )
    def test_with_a_whole_trial_that_is_better_than_whatever_is_paused(self, seconds, slots, seed):
        done = Simulated(seconds, slots, seed=seed).run()
        assert done.complete
        assert all(len(each.intermediate_values) == EPOCHS for each in done.complete)
        assert min(each.value for each in done.complete) <= done.best_of_others

    def test_with_about_the_best_of_those_that_it_has_started(self):
        """Of as many seconds, 20 trials could be trained whole; the rule starts three times as many, and finds it."""
        done = Simulated(400).run()
        assert len(done.trials) > 50
        assert min(each.value for each in done.complete) == min(min(done.curve(each.number)) for each in done.trials)

    def test_the_same_where_trials_are_given_too_and_the_time_is_tighter(self):
        done = Simulated(100, trials=200).run()
        assert len(done.trials) < 200
        assert min(each.value for each in done.complete) <= done.best_of_others

    def test_as_without_a_time_where_trials_are_tighter(self):
        done, other = Simulated(1e6, trials=20).run(), Simulated(math.inf, trials=20).run()
        assert [t.intermediate_values for t in done.trials] == [t.intermediate_values for t in other.trials]


class TestCohorts:
    def test_are_of_one_size_where_as_many_trials_as_fit_are_trained(self):
        full = trained(paused(range(COHORT)))
        more = [trial(COHORT + i, "W") for i in range(4)]
        assert numbers(timed().choose([*full[1:], *more], 1, UNBOUNDED)) == [COHORT]  # its last one
        assert numbers(timed().choose([*full, *more], 2, UNBOUNDED)) == [0, 1]  # then the best are resumed
        whole = [trial(i, "C", [i] * EPOCHS) for i in range(COHORT)]
        assert numbers(timed().choose([*whole, *more], 3, UNBOUNDED)) == [COHORT, COHORT + 1, COHORT + 2]
        assert timed().choose(whole, 3, UNBOUNDED).n_to_queue == 3

    def test_are_twice_as_large_as_what_is_trained_at_once(self):
        full = trained(paused(range(COHORT)))
        assert timed(at_once=32).choose(full, 32, UNBOUNDED).n_to_queue == 32
        assert numbers(timed(at_once=16).choose(full, 16, UNBOUNDED)) == list(range(16))

    def test_are_a_part_of_the_trials_where_these_are_given(self):
        assert timed().choose([], 100, 60).n_to_queue == 60


class TestTheTimeLeft:
    def test_no_new_trial_is_started_where_it_is_needed_for_those_that_are_there(self):
        trials = [*trained(paused(range(8))), trial(8, "W")]
        assert numbers(timed(left=1000.0).choose(trials, 1, UNBOUNDED)) == [8]
        assert numbers(timed(left=36.0).choose(trials, 1, UNBOUNDED)) == [0]

    def test_the_best_one_comes_first_where_it_is_just_enough_for_that_one(self):
        trials = [
            trial(0, "C", [5.0] * EPOCHS),
            *trained(paused([9, 3], start=1)),
            *trained(paused([4, 6, 8, 9], 8, 3)),
        ]
        assert numbers(timed(left=20.0).choose(trials, 4, UNBOUNDED)) == [2]  # 18 epochs
        assert 2 not in numbers(timed(left=17.0).choose(trials, 4, UNBOUNDED))
        assert numbers(timed(left=13.0).choose(trials, 4, UNBOUNDED)) == [3]  # 12 epochs

    def test_a_complete_one_that_is_better_leaves_nobody_to_hurry_for(self):
        trials = [trial(0, "C", [1.0] * EPOCHS), *trained(paused([3], start=1)), trial(2, "W")]
        assert numbers(timed(left=1.0).choose(trials, 1, UNBOUNDED)) == [2]

    @pytest.mark.parametrize("left", [5.0, 0.0, -100.0])
    def test_without_a_complete_one_the_best_is_resumed_however_short_it_is(self, left):
        trials = [*trained(paused([4, 3, 5])), *trained(paused([2.5], 1, 3)), trial(4, "W")]
        assert numbers(timed(left=left).choose(trials, 1, UNBOUNDED)) == [3]
        assert numbers(timed(left=left).choose([*trials, trial(5, "W", retry_of=9)], 1, UNBOUNDED)) == [5]

    def test_it_is_reckoned_by_how_long_epochs_have_taken(self):
        assert epoch_seconds([trial(0, "W"), trial(1, "R", [1.0])]) is None
        assert epoch_seconds(trained(paused([1, 2, 3]), epoch=4.0)) == 4.0
        fast, slow = trained(paused(range(8)), epoch=0.1), trained(paused(range(8)), epoch=10.0)
        assert numbers(timed(left=60.0).choose([*fast, trial(8, "W")], 1, UNBOUNDED)) == [8]
        assert numbers(timed(left=60.0).choose([*slow, trial(8, "W")], 1, UNBOUNDED)) == [0]


TEXT = "objective: linear.py\ntime: {}\nepochs: {}\nsampler: random\nstack: 1\ndevice: cpu\ntracking: off\n"
HALVING = "pruner: {name: halving, first: 2}\n"


def opened(seconds, epochs=EPOCHS):
    Path("study.yaml").write_text(TEXT.format(seconds, epochs) + HALVING)
    plan = prepare(Path("study.yaml"))
    return plan, open_search(plan.spec, plan.space, plan.metric, maximize=plan.maximize)


class Hands:
    """The clock of the deadline, which stands still until it is moved."""

    def __init__(self, monkeypatch):
        self.seconds = 1000.0
        clock = SimpleNamespace(monotonic=lambda: self.seconds, time=lambda: self.seconds)
        monkeypatch.setattr("hpo.runner.deadline.time", clock)


class TestDeadline:
    @pytest.fixture
    def clock(self, study, monkeypatch):
        study()
        return Hands(monkeypatch)

    def test_what_comes_behind_a_whole_trial_is_kept_before_one_is_complete(self, clock):
        plan, search = opened("100s")
        with closing(search):
            deadline = Deadline(plan, search)
            assert deadline() == math.inf  # nothing is given back
            assert deadline.left(1.0) == pytest.approx(100 - 6 - EPOCHS * 1.3)
            clock.seconds += 50
            assert deadline.left(1.0) == pytest.approx(50 - 6 - EPOCHS * 1.3)
            assert deadline.left(1000.0) == pytest.approx(50 - 60)

    def test_one_that_is_behind_a_paused_one_makes_room_and_past_the_time_it_ends(self, clock):
        plan, search = opened("20s")
        with closing(search):
            settle_pruner(search, 1, stacked=False)
            deadline = Deadline(plan, search)
            claim = search.ask()
            search.report(claim.number, 0, 0.5)
            search.pause(claim.number)
            member = Member(number=1, seed=0, params={}, epoch=1)
            clock.seconds += 19
            assert not deadline.must_end(member, 0.4, clock.seconds - 1)
            assert member.pause == 1
            clock.seconds += 1.5
            member.epoch = 2
            assert not deadline.must_end(member, 0.4, clock.seconds - 2.5)
            clock.seconds += 10
            member = Member(number=2, seed=0, params={}, epoch=1)
            assert deadline.must_end(member, 0.4, clock.seconds - 1)
            assert member.pause is None

    def test_one_that_is_behind_a_running_one_is_left_until_past_the_time(self, clock):
        plan, search = opened("20s")
        with closing(search):
            deadline, claim = Deadline(plan, search), search.ask()
            search.report(claim.number, 0, 0.5)
            member = Member(number=1, seed=0, params={}, epoch=1)
            clock.seconds += 19
            assert not deadline.must_end(member, 0.4, clock.seconds - 1)
            assert deadline.must_end(member, 0.6, clock.seconds - 1)
            clock.seconds += 10
            assert deadline.must_end(member, 0.4, clock.seconds - 1)

    def test_how_long_epochs_take_is_not_counted_over_a_pause(self, clock):
        plan, search = opened("100s")
        with closing(search):
            deadline, member = Deadline(plan, search), Member(number=0, seed=0, params={}, epoch=1)
            assert not deadline.must_end(member, 0.5, clock.seconds - 0.1)
            clock.seconds += 60  # it is paused meanwhile
            member.epoch = 2
            assert not deadline.must_end(member, 0.5, clock.seconds - 0.1)

    def test_the_first_epoch_of_a_stack_does_not_say_how_long_the_others_take(self, clock):
        plan, search = opened("100s")
        with closing(search):
            clock.seconds += 30
            member = Member(number=0, seed=0, params={}, epoch=1)
            assert Deadline(plan, search).must_end(member, 0.5, clock.seconds - 45)
            stacked = Deadline(plan, search, stacked=True)
            assert not stacked.must_end(member, 0.5, clock.seconds - 45)
            assert stacked.must_end(member, 0.5, clock.seconds - 400)
            clock.seconds += 0.1
            member.epoch = 2
            assert not stacked.must_end(member, 0.5, clock.seconds - 45)


def test_a_study_that_its_time_bounds_ends_with_a_whole_trial(study, monkeypatch):
    study()
    monkeypatch.setenv("LINEAR_SECONDS", "0.01")  # a whole trial takes a second
    monkeypatch.setattr("hpo.runner.deadline._MOST_EXPORT_SECONDS", 0.5)
    plan, search = opened("20s")  # on a busy machine a trial takes several of these
    with closing(search):
        set_end(plan, search)
        late = StopWhen(lambda: search.seconds_used() > 40)  # a run that does not end is ended here
        work(plan, plan.load_data(), search, MemoryTracker(), Screen(), late)
        seen = search.view()
    assert seen.counts.paused > 0
    assert any(len(each.intermediate_values) == EPOCHS for each in seen.complete)
    best = max(seen.curve(seen.best().number))
    assert all(max(seen.curve(number)) <= best for number in seen.paused)


@pytest.mark.parametrize("text", ["timeout: 100s\ntrials: 50\n", "time: 100s\n", "trials: 50\n"])
def test_what_is_left_of_a_timeout_is_reckoned_with_too(study, text):
    plan = prepare(study(f"{text}{HALVING}epochs: {EPOCHS}\n"))
    with closing(open_search(plan.spec, plan.space, plan.metric, maximize=plan.maximize)) as search:
        settle_pruner(search, 1, stacked=False)
        assert isinstance(search.halving, TimedHalving) == ("time" in text)


def test_a_queue_of_as_many_as_fit_is_not_filled_again_and_again(tmp_path):
    opener = Opener(tmp_path)
    search = opener(time=100.0, trials=UNBOUNDED, pruner=Plugin(name="halving"), epochs=EPOCHS)
    for _ in range(3):
        search._queue.fill()
    assert len(search.study.get_trials()) == 16
    opener.close()
