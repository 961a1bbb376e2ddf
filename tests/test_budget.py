"""The budget's arithmetic: one place for each trial that was asked for, however often it was taken up anew."""

import math
import time
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.trial import FrozenTrial, TrialState

from hpo.search.budget import Counts, count, covered, holders, refill, seconds_used, spans_of, wrong_row
from hpo.search.starts import NONE

NOON = datetime(2026, 1, 1, 12)
"""As Optuna gives it: in this machine's zone, without saying so."""


def trial(number, state=TrialState.COMPLETE, start=None, end=None, lease=None, **attrs):
    """Return a trial; `start` and `end` are seconds after noon, and so is `lease`, until when its worker was alive."""
    times = [None if seconds is None else NOON + timedelta(seconds=seconds) for seconds in (start, end)]
    until = None if lease is None else NOON.timestamp() + lease
    system = {} if lease is None else {"hpo:lease": {"worker": "w:1", "until": until, "attempt": 1}}
    return FrozenTrial(number, state, None, *times, {}, {}, attrs, system, {}, number)


def numbers(trials):
    return [t.number for t in holders(trials)]


@st.composite
def histories(draw):
    """A study as workers make it: a successor is queued for a trial that has a place, now and then a second one."""
    trials = [trial(n) for n in range(draw(st.integers(1, 6)))]
    first = len(trials)
    for number in range(first, first + draw(st.integers(0, 8))):
        kind = draw(st.sampled_from(["successor", "second", "new"]))
        replaced = sorted({t.user_attrs["retry_of"] for t in trials if "retry_of" in t.user_attrs})
        if kind == "new" or (kind == "second" and not replaced):
            trials.append(trial(number))
        else:
            before = draw(st.sampled_from(replaced if kind == "second" else numbers(trials)))
            trials.append(trial(number, retry_of=before))
    return trials


@settings(max_examples=50, deadline=None)
@given(histories())
def test_a_place_for_each_trial_that_succeeds_no_other(trials):
    n_roots = sum("retry_of" not in t.user_attrs for t in trials)
    assert len(holders(trials)) == n_roots


@settings(max_examples=50, deadline=None)
@given(histories())
def test_a_trial_and_its_successor_never_both_have_a_place(trials):
    kept = set(numbers(trials))
    assert not {t.user_attrs.get("retry_of") for t in trials} & kept


@settings(max_examples=50, deadline=None)
@given(histories(), st.randoms())
def test_places_are_in_the_order_of_their_numbers_however_the_storage_lists_them(trials, random):
    ordered = numbers(trials)
    assert ordered == sorted(ordered)
    random.shuffle(trials)
    assert numbers(trials) == ordered


@settings(max_examples=50, deadline=None)
@given(histories(), st.data())
def test_to_withdraw_a_trial_frees_exactly_one_place(trials, data):
    gone = data.draw(st.sampled_from(holders(trials)))
    left = [n for n in numbers(trials) if n != gone.number]
    gone.user_attrs["withdrawn"] = True
    assert numbers(trials) == left


def test_the_last_successor_has_the_place():
    assert numbers([trial(0), trial(1, retry_of=0), trial(2), trial(3, retry_of=1)]) == [2, 3]


def test_a_second_successor_is_harmless():
    assert numbers([trial(0), trial(1, retry_of=0), trial(2, retry_of=0)]) == [1]


def test_a_withdrawn_successor_does_not_bring_its_predecessor_back():
    assert numbers([trial(0, TrialState.FAIL), trial(1), trial(2, retry_of=0, withdrawn=True)]) == [1]


def test_counts_are_of_the_places_and_what_is_not_queued_waits():
    states = [TrialState.COMPLETE] * 3 + [TrialState.PRUNED] * 2
    states += [TrialState.FAIL, TrialState.RUNNING, TrialState.WAITING]
    counts = count([trial(n, state) for n, state in enumerate(states)], trials=10)
    assert counts == Counts(complete=3, pruned=2, failed=1, running=1, waiting=3)
    assert counts.finished == 6


def test_nothing_waits_where_more_is_done_than_the_budget_asks_for():
    assert count([trial(n) for n in range(5)], trials=3) == Counts(complete=5, pruned=0, failed=0, running=0, waiting=0)


spans = st.lists(st.tuples(st.integers(0, 100), st.integers(0, 30)).map(lambda s: (s[0], s[0] + s[1])), max_size=12)


@settings(max_examples=50, deadline=None)
@given(spans)
def test_covered_counts_each_second_once(spans):
    seconds = {second for start, end in spans for second in range(start, end)}
    assert covered(spans) == len(seconds)


@settings(max_examples=50, deadline=None)
@given(spans, st.randoms())
def test_covered_does_not_mind_the_order_nor_what_is_said_twice(spans, random):
    shuffled = spans * 2
    random.shuffle(shuffled)
    assert covered(shuffled) == covered(spans)


def test_a_date_that_was_set_meanwhile_is_no_training():
    trials = [trial(0, start=0, end=5000, trained_seconds=7.0), trial(1, start=5001, end=5004)]
    assert seconds_used(trials, {}) == pytest.approx(10)
    back = trial(0, start=0, end=-5000, trained_seconds=7)
    assert seconds_used([back], {}) == pytest.approx(7)
    assert wrong_row(back) is None
    for wrong in (-1.0, math.inf, math.nan, "7", True, None):
        assert "trained_seconds" in (wrong_row(trial(0, start=0, end=1, trained_seconds=wrong)) or "")


def test_seconds_used_are_those_in_which_a_trial_ran():
    trials = [trial(0, start=0, end=10), trial(1, start=5, end=12), trial(2, start=100, end=101), trial(3)]
    assert seconds_used(trials, {}) == pytest.approx(13)


def test_a_running_trial_uses_time_until_now():
    start = (datetime.now(UTC).replace(tzinfo=None) - NOON).total_seconds() - 7
    running = trial(0, TrialState.RUNNING, start=start, lease=start + 60)
    assert seconds_used([running], {}) == pytest.approx(7, abs=1)


@pytest.mark.parametrize(("state", "end"), [(TrialState.RUNNING, None), (TrialState.FAIL, 36_000)])
def test_a_killed_trial_uses_no_time_after_its_lease(state, end):
    assert seconds_used([trial(0, state, start=0, end=end, lease=90)], {}) == pytest.approx(90)


def test_a_time_is_that_of_the_machines_zone(monkeypatch):
    monkeypatch.setenv("TZ", "America/New_York")
    time.tzset()
    try:
        ((start, end),) = spans_of(trial(0, start=0, end=90))
        assert start == datetime(2026, 1, 1, 17, tzinfo=UTC).timestamp()
        assert end == start + 90
    finally:
        monkeypatch.undo()
        time.tzset()


def test_a_successor_that_says_another_place_has_its_predecessors():
    rows = [trial(0, place=0), trial(1, place=1), trial(2, TrialState.WAITING, place=2, retry_of=1)]
    for _ in range(5):
        change = refill(rows, 3, NONE, 16)
        rows += [trial(len(rows) + n, TrialState.WAITING, place=slot) for n, (slot, _) in enumerate(change.queue)]
    assert len(rows) == 4
    assert len(holders(rows)) == 3
