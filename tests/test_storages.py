"""One contract for all four kinds of storage, against real servers: the budget is exact, whatever the workers do."""

import subprocess
import threading
import time
from contextlib import suppress
from itertools import count

import pytest
from optuna.study import StudyDirection
from optuna.trial import TrialState

from hpo.errors import HpoError, StorageError
from hpo.search import schema
from hpo.search.away import StorageAway, StudyGone
from hpo.search.storage import close_storage, open_storage, serve_storage
from hpo.study.spec import Plugin
from tests import warm
from tests.conftest import run_hpo
from tests.searches import PARAMS, HandClock, Opener, claims, stored
from tests.servers import grpc_server

KINDS = ("sqlite", "postgresql", "journal", "grpc")
PEER = f"""
import sys
from hpo.search.opening import open_search
from hpo.study.space import build
from hpo.study.spec import Plugin, StudySpec, parse_param

print("ready", flush=True)
sys.stdin.readline()
spec = StudySpec(name="s", objective="o", storage=sys.argv[1], trials=24, epochs=3, pruner=Plugin(name="none"))
space, _ = build({{name: parse_param(entry) for name, entry in {PARAMS!r}.items()}}, ())
search = open_search(spec, space, "accuracy", maximize=True)
while (claim := search.ask()) is not None:
    assert search.report(claim.number, 0, 0.5)
    assert search.complete(claim.number, float(claim.number))
    print(claim.slot, claim.params["learning_rate"], flush=True)
search.close()
"""


@pytest.fixture(params=KINDS)
def url(request, tmp_path):
    """Return the address of a new storage of each kind."""
    if request.param == "grpc":
        with grpc_server(f"sqlite:///{tmp_path}/s.db") as address:
            yield address
    elif request.param == "postgresql":
        yield request.getfixturevalue("server").database()
    else:
        yield f"{request.param}:///{tmp_path}/s.db"


@pytest.fixture
def opened(url, tmp_path):
    opener = Opener(tmp_path)
    yield lambda **keys: opener(storage=url, **keys)
    opener.close()


def abandon(search, number):
    """Leave a trial as a worker of another machine would that died."""
    trial = stored(search, number)
    lease = dict(trial.system_attrs[schema.LEASE]) | {"worker": "elsewhere-1-1", "lease": "nobody's"}
    search.storage.set_trial_system_attr(trial._trial_id, schema.LEASE, lease)


@pytest.mark.parametrize("end", ["complete", "prune", "fail", "give_back", "pause"])
@pytest.mark.parametrize("hours", [1, -1, 0])
def test_a_date_that_is_set_while_a_trial_trains_is_no_time_of_training(tmp_path, end, hours):
    opener, time = Opener(tmp_path), HandClock()
    search = opener(clock=time.clock, timeout=600)
    number = search.ask().number
    time.set_date(3600 * hours)
    time.move(5)
    search.report(number, 0, 0.5)
    more = {"complete": (0.5,), "fail": ("why",), "give_back": ("why",)}.get(end, ())
    getattr(search, end)(number, *more)
    frozen = stored(search, number)
    seconds = frozen.user_attrs.get("trained_seconds")
    if end == "pause":
        ((start, until),) = frozen.user_attrs["trained"]
        seconds = until - start if hours else None
    assert seconds == (pytest.approx(5, abs=0.5) if hours else None)  # nothing more is stored where the date is right
    assert search.seconds_left(600) == pytest.approx(595, abs=5)
    opener.close()


def test_exactly_so_many_trials_by_turns_and_over_restarts(opened):
    one, two = opened(trials=7), opened(trials=7)
    done = []
    while (claim := (one, two)[len(done) % 2].ask()) is not None:
        assert (one, two)[len(done) % 2].complete(claim.number, 1.0)
        done.append(claim.slot)
    assert sorted(done) == list(range(7))
    assert claims(opened(trials=7)) == []
    assert len(claims(opened(trials=9))) == 2


def test_a_dead_workers_trial_is_taken_up_once_by_one_of_its_peers(opened):
    time = HandClock()
    dead, one, two = (opened(trials=2, clock=time.clock) for _ in range(3))
    lost = dead.ask()
    abandon(dead, lost.number)
    for peer in (one, two, one, two):
        peer.repair()
        time.move(one.spec.grace / 2)
    done = claims(one) + claims(two)
    assert sorted(claim.slot for claim in done) == [0, 1]
    (again,) = [claim for claim in done if claim.slot == lost.slot]
    assert (again.params, again.seed, again.is_retry) == (lost.params, lost.seed, True)
    assert not dead.complete(lost.number, 1.0)
    assert stored(one, lost.number).state == TrialState.FAIL
    assert one.counts().complete == 2


def test_what_is_given_back_goes_on_as_it_was(opened):
    search = opened(trials=1)
    first = search.ask()
    search.report(first.number, 0, 0.25)
    assert search.give_back(first.number, "interrupted")
    again = search.ask()
    assert (again.params, again.seed, again.slot) == (first.params, first.seed, first.slot)
    search.repeat(again.number, [0.25])
    search.report(again.number, 1, 0.5)
    assert search.complete(again.number, 0.5)
    assert stored(search, again.number).intermediate_values == {0: 0.25, 1: 0.5}
    assert search.view().ends[first.number] == ("INTERRUPTED", "interrupted")
    assert search.view().ends[again.number] == ("COMPLETE", None)


def test_start_with_comes_first_and_once_whoever_asks(opened):
    keys = {"trials": 3, "start_with": ({"n_hidden": 8, "learning_rate": 0.05},)}
    one, two = opened(**keys), opened(**keys)
    first, second = one.ask(), two.ask()
    assert first.params["learning_rate"] == 0.05
    assert second.params["learning_rate"] != 0.05


def test_the_studys_attributes_are_kept(opened):
    opened().remember("hpo:result", {"number": 1, "test": {"r2": 0.5}})
    assert opened().attrs["hpo:result"] == {"number": 1, "test": {"r2": 0.5}}


def test_what_a_pruner_reads_is_all_that_is_complete_and_nothing_else(opened):
    one, two = opened(trials=40), opened(trials=40)
    for n in (1, 2, 12):  # more than are read one by one
        for _ in range(n):
            assert two.complete(two.ask().number, 1.0)
        two.prune(two.ask().number)
        running = two.ask()
        complete = one.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        assert complete == [t for t in two.study.get_trials() if t.state == TrialState.COMPLETE]
        two.fail(running.number, "why")


def test_who_claims_several_lets_the_sampler_see_those_before(opened):
    search = opened(trials=4)
    seen = []
    before = search.study.sampler.sample_independent

    def spy(study, trial, name, distribution):
        seen.append([t.number for t in study._get_trials(use_cache=True) if "learning_rate" in t.params])
        return before(study, trial, name, distribution)

    search.study.sampler.sample_independent = spy
    for _ in range(3):
        search.ask()
    assert seen[::2] == [[], [0], [0, 1]]


def test_peers_try_different_trials(opened):
    one, two = opened(trials=16), opened(trials=16)
    one.ask()
    abandon(one, 0)
    two.ask()
    assert len(two._queue._waiting) == 7  # half of the 15 that waited, less the one that it has claimed


def test_a_study_that_was_deleted_is_said_and_what_is_done_for_it_harms_no_other(opened, url):
    search = opened()
    number = search.ask().number
    dashboard = open_storage(url)
    dashboard.delete_study(dashboard.get_study_id_from_name("s"))
    other = dashboard.create_new_study([StudyDirection.MINIMIZE], "s")
    trials = [dashboard.create_new_trial(other) for _ in range(3)]
    calls = (
        lambda: [search.report(number, 0, 0.5), search.ask()],  # a journal takes the report, and nobody reads it
        lambda: search.counts(),
        lambda: search.ask(),
        lambda: search.remember("key", "value"),
    )
    for call in calls:
        with pytest.raises(StudyGone, match=r"study 's' is no longer in the storage: .* to start from scratch"):
            call()
    with suppress(StudyGone):
        search.give_back(number, "why")
    found = [dashboard.get_trial(trial) for trial in trials]
    assert all(not t.intermediate_values and not t.user_attrs and not t.system_attrs for t in found)
    assert dashboard.get_study_user_attrs(other) == {}
    close_storage(dashboard)


def test_a_connection_that_was_cut_while_idle_costs_nothing(server, tmp_path, said):
    opener = Opener(tmp_path)
    search = opener(storage=server.database())
    number = search.ask().number
    server.stop()
    server.start()
    assert search.report(number, 0, 0.5)
    server.stop()
    server.start()
    assert search.complete(number, 0.5)
    assert said == []
    opener.close()


def test_workers_that_start_together_on_nothing_all_run_and_no_two_draw_the_same(url):
    peers = [warm.Popen(url, code=PEER, stdin=subprocess.PIPE) for _ in range(8)]
    for peer in peers:
        assert peer.stdout.readline() == "ready\n"
    for peer in peers:
        peer.stdin.write("go\n")
        peer.stdin.flush()
    lines = [line.split() for peer in peers for line in peer.communicate(timeout=200)[0].splitlines()]
    assert [peer.returncode for peer in peers] == [0] * 8
    assert sorted(int(place) for place, _ in lines) == list(range(24))
    assert len({rate for _, rate in lines}) == 24


def test_postgresql_that_restarts_costs_a_wait_and_no_report(server, tmp_path, said):
    opener = Opener(tmp_path)
    search = opener(storage=server.database(), outage=30.0)
    claim = search.ask()
    server.stop()
    try:
        for epoch in range(3):
            assert search.report(claim.number, epoch, epoch / 10)
    finally:
        server.start()
    assert search.complete(claim.number, 0.2)
    assert stored(search, claim.number).intermediate_values == {0: 0.0, 1: 0.1, 2: 0.2}
    assert len(said) == 2
    assert said[0].startswith("the storage does not answer (")
    assert said[1].startswith("the storage is back after ")
    opener.close()


def test_postgresql_that_goes_away_between_a_report_and_the_pruner_does_not_stop_training(server, tmp_path):
    opener = Opener(tmp_path)
    search = opener(storage=server.database(), pruner=Plugin(name="median"), outage=60.0)
    number = search.ask().number
    trial, report = search._claimed[number], search._claimed[number].report

    def report_then_stop(value, step):
        report(value, step)
        server.stop()

    trial.report = report_then_stop
    begun = time.monotonic()
    try:
        assert search.report(number, 0, 0.5)
        assert search.storage.away
        assert time.monotonic() - begun < 30
    finally:
        server.start()
    assert search.complete(number, 0.5)
    opener.close()


def test_postgresql_that_restarts_while_its_lock_is_held_costs_a_wait(server, tmp_path):
    opener = Opener(tmp_path)
    search = opener(storage=server.database(), trials=2)
    enqueue = search.storage.enqueue

    def restart_then(*arguments):
        server.stop()
        server.start()
        enqueue(*arguments)

    search.storage.enqueue = restart_then
    assert [claim.slot for claim in claims(search)] == [0, 1]
    search.storage.enqueue = enqueue
    assert search.ask() is None
    opener.close()


def test_postgresql_that_stays_away_is_given_up_in_time(server, tmp_path):
    opener, time = Opener(tmp_path), HandClock()
    search = opener(storage=server.database(), outage=0.5, clock=time.clock)
    claim = search.ask()
    server.stop()
    try:
        assert search.report(claim.number, 0, 0.5)
        assert not search.storage.away_for_good
        time.move(0.6)
        assert search.storage.away_for_good
        with pytest.raises(StorageAway, match=r"away for 0.5 s .*; no trial is lost: run the same command again"):
            search.complete(claim.number, 0.5)
    finally:
        server.start()
    opener.close()


def test_a_worker_that_starts_while_postgresql_is_away_waits_for_it(server, tmp_path):
    opener, url = Opener(tmp_path), server.database()
    server.stop()
    back = threading.Timer(1.0, server.start)
    back.start()
    try:
        with pytest.raises(StorageError, match="cannot be opened: connection"):
            opener(storage=url)
        assert opener(storage=url, wait=True).ask().number == 0
    finally:
        back.join()
        opener.close()


def test_after_an_outage_nobody_is_taken_for_dead_at_once(server, tmp_path):
    opener, time = Opener(tmp_path), HandClock()
    url = server.database()
    cut, peer = opener(storage=url, trials=1), opener(storage=url, trials=1, grace=2.0, clock=time.clock)
    number = cut.ask().number
    abandon(cut, number)
    peer.repair()  # it sees the lease
    server.stop()
    peer.storage.set_trial_intermediate_value(1, 0, 0.0)  # it sees that the storage is away
    server.start()
    time.move(1.6)
    peer.repair()
    assert peer.storage.back_at > 0
    assert peer.drain_lost() == []
    time.move(1.6)
    peer.repair()
    assert [lost.number for lost in peer.drain_lost()] == [number]
    opener.close()


def test_a_full_disk_is_said_and_what_was_told_before_is_kept(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("no small disk can be made here, which needs root")
    opener = Opener(disk)
    try:
        search = opener()
        number = search.ask().number
        with suppress(OSError), (disk / "filler").open("wb", buffering=0) as filler:
            while True:
                filler.write(bytes(1024))
        epochs = count()
        with pytest.raises(HpoError, match=r"the storage's disk is full \(database or disk is full\); make room"):
            all(search.report(number, epoch, 0.5) for epoch in epochs)
        (disk / "filler").unlink()
        assert search.complete(number, 0.5)
        reported = next(epochs)  # with the one that the disk had no room for
        assert stored(search, number).intermediate_values == dict.fromkeys(range(reported), 0.5)
    finally:
        opener.close()
        subprocess.run(["umount", disk], check=True)


def test_only_a_database_can_be_served(tmp_path):
    with pytest.raises(StorageError, match="only a database can be served"):
        serve_storage(f"journal:///{tmp_path}/s.log", "127.0.0.1", 1)


def test_serving_without_grpc_says_what_to_install_and_makes_no_database(tmp_path, monkeypatch):
    monkeypatch.setattr("hpo.search.storage.find_spec", lambda name: None)
    with pytest.raises(StorageError, match=r"serving needs gRPC, which is not installed: pip install 'hpo\[grpc\]'"):
        serve_storage(f"sqlite:///{tmp_path}/s.db", "127.0.0.1", 1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("host", ["127.0.0.1", "no-such-host.invalid"])
def test_that_it_serves_is_said_only_where_it_does(tmp_path, host):
    """A port that another server has, which gRPC would share, or one of a host that is not there."""
    said = []
    with grpc_server(f"sqlite:///{tmp_path}/other.db") as other:
        port = int(other.rpartition(":")[2])
        with pytest.raises(StorageError, match=rf"{host}:{port} cannot be listened on: .*; give another --port"):
            serve_storage(f"sqlite:///{tmp_path}/s.db", host, port, lambda: said.append("served"))
    assert said == []


@pytest.mark.parametrize("port", ["0", "99999", "-1"])
def test_a_port_that_cannot_be_is_refused(study, port):
    done = run_hpo("serve", study(), "--port", port)
    assert done.returncode == 2
    assert "Invalid value for '--port': Input should be " in done.stderr


def test_a_password_is_not_shown(server):
    url = server.database().replace("postgres@", "postgres:s3cret@").replace("test_", "other_")
    with pytest.raises(StorageError) as caught:
        close_storage(open_storage(url))
    assert "s3cret" not in str(caught.value)
    assert "***" in str(caught.value)
