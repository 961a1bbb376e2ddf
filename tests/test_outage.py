"""A storage that is away, hangs, or has lost the study: training continues, a stop is obeyed, the end is plain."""

import os
import signal
import sqlite3
import subprocess
import threading
import time
from collections import deque
from contextlib import closing, contextmanager

import optuna
import psutil
import pytest
from optuna.storages import InMemoryStorage
from optuna.trial import TrialState, create_trial

from hpo.errors import StorageError
from hpo.log import log
from hpo.search.away import StoppedWhileAway, StorageAway, StudyGone, open_patiently
from hpo.search.retrying import RetryingStorage
from hpo.search.storage import StorageBusy, exclusive, open_storage
from tests import warm
from tests.cli import invoke, summary
from tests.conftest import LINEAR, start_hpo
from tests.searches import Opener
from tests.servers import free_port, wait_for_port

MINIMIZE = [optuna.study.StudyDirection.MINIMIZE]
BRIEF = (
    "import hpo.stopping; hpo.stopping.ANSWER_SECONDS = 2.0; "
    "import hpo.search.remote; hpo.search.remote._LISTING_SECONDS = 2.0; "
    "from hpo.cli.app import main; main()"
)
"""`python -m hpo` that waits for 2 s, not 6, for an answer."""


class Flaky(InMemoryStorage):
    """A storage that may be away, and that refuses the values of `bad` steps for good."""

    def __init__(self):
        super().__init__()
        self.away, self.bad, self.asked = False, (), 0

    def _ask(self):
        self.asked += 1
        if self.away:
            raise ConnectionError("nobody there")

    def set_trial_intermediate_value(self, trial_id, step, value):
        self._ask()
        if step in self.bad:
            raise ValueError("no such step")
        super().set_trial_intermediate_value(trial_id, step, value)

    def get_study_id_from_name(self, name):
        self._ask()
        return super().get_study_id_from_name(name)

    def create_new_trial(self, study_id, template_trial=None):
        self._ask()
        return super().create_new_trial(study_id, template_trial)


@pytest.fixture
def flaky(monkeypatch, said):
    monkeypatch.setattr("hpo.search.patient.RETRY_SECONDS", 0.05)
    inner = Flaky()
    storage = RetryingStorage(inner, 30.0)
    storage.said = said
    yield storage
    inner.away = False
    storage.close()


def a_trial(storage, name="s"):
    study_id = storage.create_new_study(MINIMIZE, name)
    assert storage.get_study_id_from_name(name) == study_id
    return storage.create_new_trial(study_id)


def test_a_report_that_is_refused_for_good_is_dropped_and_said_and_the_others_are_sent(flaky):
    trial = a_trial(flaky)
    flaky.inner.away = True
    for step in range(4):
        flaky.set_trial_intermediate_value(trial, step, 0.5)
    flaky.inner.away, flaky.inner.bad = False, (1,)
    assert flaky.get_trial(trial).intermediate_values == {0: 0.5, 2: 0.5, 3: 0.5}
    flaky.get_trial(trial)
    assert flaky.said[1:] == [
        f"a report of the trial with the id {trial} is dropped: ValueError: no such step",
        "the storage is back after 0 s",
    ]


def test_a_kept_report_of_a_study_that_was_deleted_is_dropped_and_the_end_is_said(flaky):
    trial = a_trial(flaky)
    flaky.inner.away = True
    flaky.set_trial_intermediate_value(trial, 0, 0.5)
    flaky.inner.delete_study(0)
    flaky.inner.away = False
    other = flaky.inner.create_new_trial(flaky.inner.create_new_study(MINIMIZE, "other"))
    with pytest.raises(StudyGone, match=r"study 's' is no longer in the storage: .* command again to start"):
        flaky.get_trial(trial)
    assert flaky.get_trial(other).state == TrialState.RUNNING  # the next call is not hindered


def test_what_is_not_there_though_its_study_is_stays_a_key_error(flaky):
    a_trial(flaky)
    with pytest.raises(KeyError):
        flaky.get_trial(99)
    with pytest.raises(KeyError):
        flaky.set_trial_intermediate_value(99, 0, 0.5)


def test_while_it_is_away_reports_ask_nothing_of_it(flaky):
    trial = a_trial(flaky)
    flaky._pause = 30.0
    flaky.inner.away = True
    flaky.set_trial_intermediate_value(trial, 0, 0.5)
    asked = flaky.inner.asked
    for step in range(1, 100):
        flaky.set_trial_intermediate_value(trial, step, 0.5)
    with flaky.at_once(), pytest.raises(StorageAway, match="nobody there"):
        flaky.get_trial(trial)
    assert flaky.inner.asked == asked


def test_who_waits_for_it_is_interrupted(flaky):
    trial = a_trial(flaky)
    flaky.inner.away = True
    stop = threading.Event()
    flaky.interrupt = stop.is_set
    timer = threading.Timer(0.3, stop.set)
    timer.start()
    with pytest.raises(
        StoppedWhileAway, match=r"interrupted while the storage was away \(nobody there\); no trial"
    ) as e:
        flaky.create_new_trial(0)
    assert e.value.exit_status == 130
    flaky.set_trial_intermediate_value(trial, 0, 0.5)  # kept, as before
    timer.join()


def test_a_trial_that_was_queued_though_nobody_said_so_is_not_queued_twice(flaky):
    study_id = flaky.create_new_study(MINIMIZE, "s")
    create, lost = flaky.inner.create_new_trial, deque([ConnectionError("cut off")])

    def create_and_lose(*arguments):
        made = create(*arguments)
        if lost:
            raise lost.pop()
        return made

    flaky.inner.create_new_trial = create_and_lose
    places = [create_trial(state=TrialState.WAITING, user_attrs={"place": place}) for place in (0, 1)]
    assert [flaky.create_new_trial(study_id, each) for each in places] == [0, 1]
    assert [trial.user_attrs["place"] for trial in flaky.get_all_trials(study_id)] == [0, 1]


def test_ids_of_deleted_studies_and_trials_are_not_given_again(tmp_path):
    storage = open_storage(f"sqlite:///{tmp_path}/s.db")
    before = storage.create_new_study(MINIMIZE, "s")
    trial = storage.create_new_trial(before)
    storage.delete_study(before)
    assert storage.create_new_study(MINIMIZE, "s") > before
    assert storage.create_new_trial(before + 1) > trial
    RetryingStorage(storage, 0.0).close()


# A peer of this machine that holds SQLite's locks, as one does that was stopped.


@contextmanager
def write_lock(path):
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("BEGIN IMMEDIATE")
        yield
        db.execute("ROLLBACK")


def test_a_peer_that_holds_sqlites_lock_stops_neither_training_nor_the_end(tmp_path, said, monkeypatch):
    monkeypatch.setattr("hpo.search.storage.ANSWER_SECONDS", 0.2)
    opener = Opener(tmp_path)
    search = opener(outage=60.0)
    number = search.ask().number
    with write_lock(tmp_path / "s.db"):
        begun = time.monotonic()
        for epoch in range(50):
            assert search.report(number, epoch, 0.5)
        assert time.monotonic() - begun < 5
        search.storage.interrupt = lambda: True
        with pytest.raises(StoppedWhileAway, match="database is locked"):
            search.give_back(number, "interrupted")
    search.storage.interrupt = lambda: False
    assert search.give_back(number, "interrupted")
    assert said[0].startswith("the storage does not answer (database is locked)")
    assert said[1].startswith("the storage is back after")
    assert len(search.study.trials[number].intermediate_values) == 50
    opener.close()


def test_a_peer_that_holds_the_queues_lock_stops_neither_training_nor_the_end(tmp_path):
    opener = Opener(tmp_path)
    search = opener(grace=0.1, outage=60.0)
    number = search.ask().number
    dead = opener().ask().number
    search._queue._monitor.is_dead = lambda trial, leases, trouble: trial.number == dead
    with exclusive(f"sqlite:///{tmp_path}/s.db"):
        begun = time.monotonic()
        for epoch in range(5):
            assert search.report(number, epoch, 0.5)
            search._queue._look_at = 0.0  # it looks for the dead, and would repair
            with pytest.raises(StorageAway, match="another process held"):
                search.ask(wait=False)  # as for a stack with room, whose other trials are in training
        assert not search.storage.away
        search.storage.interrupt = lambda: True
        with pytest.raises(StoppedWhileAway, match="another process held"):
            search.give_back(number, "interrupted")
        assert time.monotonic() - begun < 10
    opener.close()


def test_who_starts_while_a_peer_holds_the_lock_waits_and_says_so(tmp_path, said, monkeypatch):
    monkeypatch.setattr("hpo.search.storage.ANSWER_SECONDS", 0.1)
    monkeypatch.setattr("hpo.search.away.RETRY_SECONDS", 0.05)
    url = f"sqlite:///{tmp_path}/s.db"
    with exclusive(url):
        with pytest.raises(StorageBusy, match=r"another process held .*s\.db\.lock for 0\.1 s") as caught:
            open_patiently(url, 0.3, wait=False)
        assert caught.value.exit_status == 1
    assert said == [f"waiting for the storage ({caught.value})"]
    held = exclusive(url)
    held.__enter__()
    timer = threading.Timer(0.4, lambda: None)
    timer.start()

    def let_go(text):
        held.__exit__(None, None, None)

    monkeypatch.setattr(log, "warning", let_go)
    RetryingStorage(open_patiently(url, 30.0, wait=False), 0.0).close()
    timer.cancel()
    with pytest.raises(StorageError, match="there is no folder"):  # what will not pass is not waited for
        open_patiently("sqlite:////nowhere/s.db", 30.0, wait=False)


# Real processes, whose server is stopped with SIGSTOP: its connections stay.


@pytest.fixture
def stepping(study):
    """Write a study whose objective appends to the file `steps`, 4 times an epoch."""

    def write(text):
        path = study(text)
        loss = '        with open("steps", "a") as steps:\n            steps.write("x")\n        time.sleep('
        (path.parent / "linear.py").write_text(LINEAR.replace("        time.sleep(", loss, 1))
        return path

    return write


def steps():
    return os.path.getsize("steps") if os.path.exists("steps") else 0


def trains():
    """Whether a trial is in training: the first epochs of the preflight are fewer than 30 steps."""
    return steps() > 60


def wait_for(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.05)


class Hpo:
    """A process of hpo that waits for 2 s for an answer, and what it has said so far."""

    def __init__(self, *arguments, **environ):
        self.lines = []
        self.process = warm.Popen(*arguments, code=BRIEF, environ=environ, stderr=subprocess.STDOUT)
        self._thread = threading.Thread(target=self._listen)
        self._thread.start()

    def _listen(self):
        for line in self.process.stdout:
            self.lines.append(line)

    def has_said(self, text, times=1):
        return sum(text in line for line in self.lines) >= times

    def end(self, seconds):
        """Return its exit status and all that it said."""
        try:
            self.process.wait(seconds)
        finally:
            self.close()
        return self.process.returncode, "".join(self.lines)

    def close(self):
        """Kill it, and let go of its output."""
        self.process.kill()
        self.process.wait()
        self._thread.join()
        self.process.stdout.close()


@contextmanager
def stopped(*processes):
    try:
        for process in processes:
            process.suspend()
        yield
    finally:
        for process in processes:
            process.resume()


def processes_of(server):
    """Return PostgreSQL's processes, the one that starts the others first."""
    pid = int((server._server.pgdata / "postmaster.pid").read_text().split()[0])
    first = psutil.Process(pid)
    return [first, *first.children(recursive=True)]


def trains_on():
    """Whether, from now on, at least 20 steps are trained; 5 s are waited for at most."""
    before = steps()
    wait_for(lambda: steps() >= before + 20, 5.0)
    return True


def hang_twice(path, url, server, **environ):
    """Let a study's server hang, come back, hang again; stop the run then. Return what it said."""
    with closing(Hpo("run", path, "--storage", url, **environ)) as hpo:
        wait_for(trains)
        with stopped(*server()):
            wait_for(lambda: hpo.has_said("the storage does not answer ("))
            assert trains_on()
        wait_for(lambda: hpo.has_said("the storage is back after"))
        with stopped(*server()):
            wait_for(lambda: hpo.has_said("the storage does not answer (", 2))
            assert trains_on()
            hpo.process.send_signal(signal.SIGTERM)
            status, said = hpo.end(20)
    assert status == 130, said
    assert "Traceback" not in said
    assert "interrupted while the storage was away (" in said
    return said


# Long enough that a slow machine is still in the first trial when the server hangs for the second time.
STUDY = "stack: 1\ntrials: 1\nepochs: 400\ngrace: 2s\nseed: 1\n"


def test_a_postgresql_that_hangs_stops_neither_training_nor_the_end(stepping, server):
    path, url = stepping(STUDY), server.database()
    hang_twice(path, url, lambda: processes_of(server), LINEAR_SECONDS="0.04")
    counts = summary(invoke("run", path, "--storage", url, "--json"))["trials"]
    assert counts == {"complete": 1, "pruned": 0, "failed": 0, "running": 0, "paused": 0, "waiting": 0}


@pytest.mark.slow
def test_a_grpc_server_that_hangs_stops_neither_training_nor_the_end(stepping):
    path, port = stepping(STUDY), free_port()
    serving = start_hpo("serve", path, "--port", port)
    try:
        wait_for_port(port)
        url = f"grpc://127.0.0.1:{port}"
        hang_twice(path, url, lambda: [psutil.Process(serving.pid)], LINEAR_SECONDS="0.04")
        counts = summary(invoke("run", path, "--storage", url, "--json"))["trials"]
        assert counts == {"complete": 1, "pruned": 0, "failed": 0, "running": 0, "paused": 0, "waiting": 0}
    finally:
        serving.kill()
        serving.communicate()


@pytest.mark.slow
def test_a_stop_is_obeyed_while_a_trials_end_is_to_be_told_and_by_every_worker(stepping, server):
    path, url = stepping("stack: 1\ntrials: 9\nepochs: 20\ngrace: 2s\nseed: 1\n"), server.database()
    with closing(Hpo("run", path, "--storage", url, "--workers", "2", LINEAR_SECONDS="0.01")) as hpo:
        wait_for(trains)
        workers = warm.workers(hpo.process.pid)
        with stopped(*processes_of(server)):
            wait_for(lambda: hpo.has_said("the storage does not answer (", 2))
            before = -1
            while before != steps():  # until all wait to tell
                before = steps()
                time.sleep(1.0)
            hpo.process.send_signal(signal.SIGTERM)
            status, said = hpo.end(25)
            assert status == 130, said
            assert not any(worker.is_running() for worker in workers)
    assert "Traceback" not in said
    counts = summary(invoke("run", path, "--storage", url, "--json"))["trials"]
    assert counts == {"complete": 9, "pruned": 0, "failed": 0, "running": 0, "paused": 0, "waiting": 0}


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_a_postgresql_that_hangs_and_has_mlflow_too_is_not_waited_for(stepping, server, workers):
    path, url = stepping("stack: 1\ntrials: 2\nepochs: 150\ngrace: 2s\nseed: 1\n"), server.database()
    command = ("run", path, "--storage", url, "--tracking", server.database())
    with closing(Hpo(*command, "--workers", workers, LINEAR_SECONDS="0.02")) as hpo:
        wait_for(trains)
        time.sleep(15.0)  # until MLflow has made its tables, and answers
        with stopped(*processes_of(server)):
            wait_for(lambda: hpo.has_said("the storage does not answer ("))
            trainers = warm.workers(hpo.process.pid) if workers > 1 else []
            hpo.process.send_signal(signal.SIGTERM)
            status, said = hpo.end(30)
            assert status == 130, said
            assert not any(trainer.is_running() for trainer in trainers)
    assert "interrupted while the storage was away (" in said
    assert "has not answered; what could not be sent is kept in" in said
    counts = summary(invoke(*command, "--json"))["trials"]
    assert counts == {"complete": 2, "pruned": 0, "failed": 0, "running": 0, "paused": 0, "waiting": 0}


@pytest.mark.parametrize("kind", ["sqlite", pytest.param("journal", marks=pytest.mark.slow)])
def test_a_study_that_is_deleted_while_it_runs_ends_the_run_plainly_and_harms_no_other(stepping, kind):
    path, url = stepping("stack: 1\ntrials: 2\nepochs: 400\n"), f"{kind}:///s.db"
    with closing(Hpo("run", path, "--storage", url, LINEAR_SECONDS="0.01")) as hpo:
        wait_for(trains)
        storage = open_storage(url)
        optuna.delete_study(study_name="study", storage=storage)
        other = optuna.create_study(study_name="study", storage=storage)
        trials = [other.ask() for _ in range(3)]
        status, said = hpo.end(30)
    assert status == 1, said
    assert "hpo: study 'study' is no longer in the storage: it was deleted while it was in use" in said
    assert "Traceback" not in said
    assert len(other.trials) == 3
    assert all(not t.intermediate_values and not t.user_attrs and not t.system_attrs for t in other.trials), trials
    optuna.delete_study(study_name="study", storage=storage)
    RetryingStorage(storage, 0.0).close()
    done = summary(invoke("run", path, "--storage", url, "--set", "epochs=2", "--json"))
    assert done["trials"]["complete"] == 2
