"""Leases: a trial whose worker died is taken up by others, as it was; one whose worker lives is left alone."""

import math
import subprocess
import sys
import threading

import pytest
from optuna.storages import InMemoryStorage
from optuna.trial import TrialState

from hpo.search import schema
from hpo.search.budget import held_until
from hpo.search.lease import LeaseKeeper, LeaseMonitor
from hpo.search.trials import TrialCache
from hpo.study.space import Space
from tests.searches import HandClock, Opener, claims, stored

ATTEMPTS, GRACE = 3, 60
"""A study's defaults: two retries, a minute."""


@pytest.fixture
def opened(tmp_path):
    opener = Opener(tmp_path)
    yield opener
    opener.close()


def abandon(search, number, worker=None):
    """Leave a trial as a worker would that died: a process of this machine that is gone, or one elsewhere."""
    trial = stored(search, number)
    lease = dict(trial.system_attrs[schema.LEASE])
    place, _, _ = lease["worker"].rpartition("-")
    lease |= {"worker": worker or f"{place}-{gone_pid()}", "lease": "nobody's"}
    search.storage.set_trial_system_attr(trial._trial_id, schema.LEASE, lease)


def gone_pid():
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    return process.pid


@pytest.mark.parametrize("how", ["lease", "pid"])
def test_a_dead_workers_trial_is_taken_up_with_its_params_and_seed(opened, how):
    time = HandClock()
    dead, alive = opened(trials=1), opened(trials=1, clock=time.clock)
    lost = dead.ask()
    abandon(dead, lost.number, worker=None if how == "pid" else "elsewhere-1-1")
    if how == "lease":  # it would be renewed by then
        assert alive.ask() is None
        time.move(0.74 * GRACE)
        assert alive.ask() is None
        time.move(0.02 * GRACE)
    claim = alive.ask()
    assert (claim.params, claim.seed, claim.attempt) == (lost.params, lost.seed, 2)
    assert claim.number != lost.number
    (ended,) = alive.drain_lost()
    assert (ended.number, ended.state) == (lost.number, "INTERRUPTED")
    assert ended.reason.startswith("worker ")
    assert ended.reason.endswith(" died")
    assert alive.drain_lost() == []
    assert alive.complete(claim.number, 1.0)
    assert alive.counts() == dead.counts()
    assert (alive.counts().complete, alive.counts().failed, alive.counts().running) == (1, 0, 0)


def test_a_death_is_noticed_while_there_is_other_work(opened):
    time = HandClock()
    dead, alive = opened(trials=4), opened(trials=4, clock=time.clock)
    lost, mine = dead.ask(), alive.ask()
    abandon(dead, lost.number)
    assert alive.report(mine.number, 0, 0.5)
    assert alive.drain_lost() == []  # it has looked just before
    time.move(GRACE / 4)
    assert alive.report(mine.number, 1, 0.5)
    assert [ended.number for ended in alive.drain_lost()] == [lost.number]
    assert alive.counts().waiting == 3


def test_a_live_workers_trial_is_left_alone(opened):
    first, second = opened(trials=1), opened(trials=1)
    claim = first.ask()
    assert second.ask() is None
    assert second.counts().running == 1
    assert first.complete(claim.number, 1.0)


def test_a_trial_that_kills_its_workers_is_given_up(opened):
    attempts = []
    for _ in range(ATTEMPTS):
        search = opened(trials=1)
        claim = search.ask()
        attempts.append(claim.attempt)
        abandon(search, claim.number)
    last = opened(trials=1)
    assert attempts == list(range(1, ATTEMPTS + 1))
    assert last.ask() is None
    assert (last.counts().failed, last.counts().running, last.counts().waiting) == (1, 0, 0)
    assert [(ended.state, last.view().ends[ended.number][0]) for ended in last.drain_lost()] == [("FAIL", "FAIL")]


def test_a_second_successor_is_harmless(opened):
    search = opened(trials=2)
    first = search.ask()
    search.give_back(first.number, "interrupted")
    search.study.enqueue_trial({}, user_attrs={"retry_of": first.number})  # as a peer's crash might leave it
    assert len(claims(search)) == 2
    assert search.counts().complete == len(search.trials()) == 2


def test_a_crash_between_the_successor_and_the_end_of_its_predecessor_loses_nothing(opened):
    dead, alive = opened(trials=1), opened(trials=1)
    lost = dead.ask()
    attrs = {"retry_of": lost.number, "seed": lost.seed}
    dead.study.enqueue_trial(dict(stored(dead, lost.number).params), user_attrs=attrs)
    abandon(dead, lost.number)
    (claim,) = claims(alive)
    assert claim.seed == lost.seed
    assert len(alive.study.get_trials()) == 2
    assert stored(alive, lost.number).state == TrialState.FAIL


def test_a_claim_without_a_lease_yet_is_given_time(opened):
    search = opened()
    trial = stored(search, search.ask().number)
    trial.system_attrs.pop(schema.LEASE)
    time = HandClock()
    monitor = LeaseMonitor(GRACE, time.clock)
    for _ in range(3):
        assert monitor.is_dead(trial, {}) is None
        time.move(0.25 * GRACE)
    assert monitor.is_dead(trial, {}) is True


@pytest.mark.parametrize("wrong", [-7200, -30, 7200])
def test_a_clock_that_is_wrong_neither_kills_a_worker_of_another_machine_nor_keeps_it_alive(opened, wrong):
    search = opened()
    trial = stored(search, search.ask().number)
    time = HandClock()
    monitor = LeaseMonitor(GRACE, time.clock)
    for _ in range(5):
        leases = {"a": time.clock.now() + wrong}
        trial.system_attrs[schema.LEASE] = {"worker": f"elsewhere-1-{gone_pid()}", "lease": "a", "attempt": 1}
        assert monitor.is_dead(trial, leases) is (False if wrong > 0 else None)
        time.move(GRACE / 4)
    time.move(GRACE / 2)
    now = time.clock.monotonic()
    assert monitor.is_dead(trial, leases, trouble=now) is not True  # nobody could renew a lease just now
    assert monitor.is_dead(trial, leases) is True


def test_a_trial_that_an_older_version_left_running_has_a_lease_of_its_own(opened):
    search, time = opened(), HandClock()
    trial = stored(search, search.ask().number)
    until = time.clock.now() + GRACE
    trial.system_attrs[schema.LEASE] = {"worker": f"elsewhere-1-{gone_pid()}", "until": until, "attempt": 1}
    monitor = LeaseMonitor(GRACE, time.clock)
    assert monitor.is_dead(trial, {}) is False
    time.move(0.75 * GRACE)
    assert monitor.is_dead(trial, {}) is True


def test_a_worker_has_one_lease_however_many_trials_it_holds(opened):
    time = HandClock()
    first, second = opened(trials=4, clock=time.clock), opened(trials=4, clock=time.clock)
    numbers = [first.ask().number for _ in range(3)]
    other = second.ask().number
    ids = [stored(first, number).system_attrs[schema.LEASE]["lease"] for number in (*numbers, other)]
    assert len(set(ids)) == 2  # of one process: what opens the study again is another worker
    assert len(set(ids[:3])) == 1
    assert first._reader.leases() == dict.fromkeys(ids, time.clock.now() + GRACE)
    time.move(GRACE)  # nobody renews the first one's
    second.lease.renew()
    second.repair()
    assert sorted(ended.number for ended in second.drain_lost()) == numbers
    assert stored(second, other).state == TrialState.RUNNING


def test_the_time_of_a_trial_that_a_peer_ended_is_up_to_its_lease(opened):
    time = HandClock()
    dead, alive = opened(trials=1, clock=time.clock), opened(trials=1, clock=time.clock)
    number = dead.ask().number
    lease = stored(dead, number).system_attrs[schema.LEASE]
    elsewhere = lease | {"worker": "elsewhere-1-1"}
    alive.storage.set_trial_system_attr(stored(dead, number)._trial_id, schema.LEASE, elsewhere)
    until = time.clock.now() + GRACE
    assert alive.ask() is None
    time.move(0.75 * GRACE)
    assert alive.ask() is not None
    assert stored(alive, number).system_attrs[schema.LEASE] == elsewhere | {"until": until}
    dead.lease.renew()  # it was cut off only: what it does later changes nothing
    assert held_until(stored(alive, number), alive._reader.leases()) == until


def test_a_lease_is_renewed_even_after_an_error(opened, monkeypatch):
    time = HandClock()
    search = opened(clock=time.clock)
    write, failures = search.storage.inner.set_study_system_attr, []

    def fails_twice(*arguments):
        if len(failures) < 2:
            failures.append(1)
            raise OSError("the database is away")
        write(*arguments)

    search.ask()
    until = lambda: list(search._reader.leases().values())  # noqa: E731
    first = time.clock.now() + GRACE
    assert until() == [first]
    monkeypatch.setattr(search.storage.inner, "set_study_system_attr", fails_twice)
    for _ in range(2):
        time.move(GRACE / 4)
        search.lease.renew()
        assert until() == [first]
    assert search.lease.failed_at == time.clock.monotonic()
    time.move(GRACE / 4)
    search.lease.renew()
    assert until() == [first + 0.75 * GRACE]


def test_the_thread_that_renews_survives_errors():
    calls, renewed = [], threading.Event()

    class Away(InMemoryStorage):
        def set_study_system_attr(self, *arguments):
            calls.append(threading.current_thread().name)
            if len(calls) in (2, 3):
                raise OSError("the database is away")
            if len(calls) == 4:
                renewed.set()

    keeper = LeaseKeeper(Away(), 0, grace=0.02)
    assert keeper.lease(1)["attempt"] == 1
    assert renewed.wait(10)
    keeper.stop()
    assert calls[1:4] == ["hpo-lease"] * 3
    assert keeper.failed_at > -math.inf


@pytest.mark.parametrize(
    "tell", [lambda s, n: s.complete(n, 1.0), lambda s, n: s.prune(n), lambda s, n: s.fail(n, "x")]
)
def test_telling_a_trial_that_a_peer_took_over_says_so_and_changes_nothing(opened, tell):
    slow, peer = opened(trials=1), opened(trials=1)
    number = slow.ask().number
    abandon(slow, number)
    again = peer.ask()
    assert not slow.report(number, 0, 0.5)
    assert tell(slow, number) is False
    assert peer.complete(again.number, 0.25)
    assert slow.best().value == 0.25
    assert slow.counts().complete == len(slow.trials()) == 1


def test_giving_back_a_trial_that_a_peer_took_over_queues_no_other(opened):
    slow, peer = opened(trials=1), opened(trials=1)
    number = slow.ask().number
    abandon(slow, number)
    again = peer.ask()
    slow.give_back(number, "interrupted")
    assert peer.complete(again.number, 0.25)
    assert slow.ask() is None
    assert len(slow.study.get_trials()) == 2


@pytest.mark.parametrize("moment", ["claim", "params"])
def test_a_claim_that_is_lost_inside_ask_is_let_go(opened, monkeypatch, moment):
    """Each failed renewal of its lease once restarted the wait for others: nobody was ever counted as dead again."""
    time = HandClock()
    slow, peer = opened(trials=3, clock=time.clock), opened(trials=3)
    where = (TrialCache, "take") if moment == "claim" else (Space, "suggest")
    first = getattr(*where)

    def is_overtaken(*arguments):
        trial = stored(peer, 0)
        monkeypatch.setattr(*where, first)
        peer.storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
        return first(*arguments)

    monkeypatch.setattr(*where, is_overtaken)
    claim = slow.ask()
    assert claim.number != 0
    assert list(slow._claimed) == [claim.number]
    lost = peer.ask()
    abandon(peer, lost.number, worker="elsewhere-1-1")
    slow.repair()
    time.move(0.75 * GRACE)
    slow.lease.renew()
    slow.repair()
    assert [ended.number for ended in slow.drain_lost()] == [lost.number]
