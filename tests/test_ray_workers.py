"""Workers on a Ray of this machine: one that is killed is begun again by Ray, and the budget is exact."""

import os
import signal
import sys
from contextlib import nullcontext
from unittest.mock import MagicMock

import psutil
import pytest
import torch

from hpo.errors import HpoError, InputError
from hpo.runner.prepare import prepare
from hpo.runner.ray_workers import RayWorkers
from hpo.runner.study import StudyFile, WorkerOptions, _workers
from hpo.stopping import signals
from tests.cli import refused, summary
from tests.conftest import start_hpo
from tests.databases import rows
from tests.test_launch import RUNNING, wait_for


def actors(pid: int) -> list[int]:
    """Return the processes of the actors that have been started by process `pid`'s Ray."""
    found = []
    for child in psutil.Process(pid).children(recursive=True):
        if "_Actor" in " ".join(child.cmdline()):
            found.append(child.pid)
    return found


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_actor_is_begun_again_and_the_budget_is_exact(study):
    path = study("trials: 6\nepochs: 60\nstack: 1\ncheckpoint_every: 0.5s")
    process = start_hpo("run", path, "--ray", "local", "--workers", "2", "--json", LINEAR_SECONDS="0.02")
    wait_for(RUNNING, 2, seconds=300)
    os.kill(actors(process.pid)[0], signal.SIGKILL)
    out, err = process.communicate(timeout=500)
    assert process.returncode == 0, err
    assert summary(out)["trials"] == {"complete": 6, "pruned": 0, "failed": 0, "running": 0, "paused": 0, "waiting": 0}
    assert rows("select count(*) from trials where state = 'RUNNING'") == [(0,)]
    retried = rows("select count(*) from trial_user_attributes where key = 'retry_of'")
    assert retried[0][0] >= 1


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_sigterm_gives_the_trials_back(study):
    path = study("trials: 4\nepochs: 200\nstack: 1")
    process = start_hpo("run", path, "--ray", "local", "--workers", "2", LINEAR_SECONDS="0.05")
    wait_for(RUNNING, 2, seconds=300)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "interrupted; the running trials were given back" in err
    assert rows("select count(*) from trials where state = 'RUNNING'") == [(0,)]


@pytest.mark.parametrize("ends", [False, True])
def test_ray_leaves_the_handlers_of_signals_as_they_were(ends, monkeypatch):
    def init(**how):
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))  # as Ray does
        if ends:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setitem(sys.modules, "ray", MagicMock(init=init))
    with signals() as stop:
        with pytest.raises(KeyboardInterrupt) if ends else nullcontext():
            RayWorkers("local", 1, 0.0, lambda stop: None)
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested()


def test_a_cluster_that_is_not_there_is_said(study):
    message = refused("run", study(), "--ray", "127.0.0.1:1", "--workers", 2)
    assert "--ray 127.0.0.1:1: no cluster answers there (" in message


def test_without_ray_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(InputError, match=r"--ray needs Ray: pip install 'hpo\[ray\]'"):
        RayWorkers("local", 1, 0.0, lambda stop: None)


class OneGpu:
    """As Ray, with one GPU: an actor that wants one waits for it until the one that has it is ended."""

    def __init__(self, error=None):
        self.error, self.actors, self.waits = error, [], []

    def init(self, **keys):
        pass

    def cluster_resources(self):
        return {"CPU": 4.0, "GPU": 1.0}

    def remote(self, cls):
        return self

    def options(self, **keys):
        def actor(folder):
            made = MagicMock()
            made.run.remote.return_value, made.begun.remote.return_value = (made, "run"), (made, "begun")
            self.actors.append(made)
            return made

        return MagicMock(remote=actor)

    def wait(self, references, num_returns, timeout):
        self.waits.append((references, timeout))
        done = [each for each in references if each[0] in self.actors[:1]]
        return done, [each for each in references if each not in done]

    def get(self, reference):
        if self.error is not None:
            raise self.error

    def kill(self, actor):
        self.actors.remove(actor)

    def shutdown(self):
        pass


@pytest.mark.parametrize("error", [InputError("the file is wrong"), HpoError("the disk is full")])
def test_what_a_worker_says_is_said(error, monkeypatch):
    class Wrapped(Exception):
        cause = error

    monkeypatch.setitem(sys.modules, "ray", OneGpu(Wrapped()))
    workers = RayWorkers("auto", 2, 0.5, lambda stop: None)
    workers.start()
    with pytest.raises(type(error), match=str(error)):
        workers.look()


def test_a_worker_that_waits_for_a_gpu_has_it_once_another_has_ended(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "ray", OneGpu())
    workers = RayWorkers("auto", 2, None, lambda stop: None)
    workers.start()
    assert "2 workers want 1 GPU each, and the cluster has 1: those without one wait" in caplog.text
    assert workers.look()
    assert not workers.look()


def test_a_stop_does_not_wait_for_a_worker_that_has_no_gpu_yet(monkeypatch):
    ray = OneGpu()
    monkeypatch.setitem(sys.modules, "ray", ray)
    workers = RayWorkers("auto", 2, None, lambda stop: None)
    workers.start()
    workers.stop(20.0)
    assert ray.waits[-1] == ([(ray.actors[0], "run")], 20.0)
    assert all(each.stop.remote.called for each in ray.actors)


@pytest.mark.parametrize(
    ("device", "asked", "there", "expected"),
    [
        ("auto", None, 2, 1.0),
        ("cuda", None, 8, 1.0),
        ("auto", None, 0, 0.0),
        ("cpu", None, 2, 0.0),
        ("auto", 0.5, 2, 0.5),
    ],
)
def test_an_actor_has_a_gpu_where_there_are_any(study, monkeypatch, caplog, device, asked, there, expected):
    asked_for = []

    class FakeRay:
        def init(self, **keys):
            pass

        def cluster_resources(self):
            return {"CPU": 4.0} | ({"GPU": float(there)} if there else {})

        def remote(self, cls):
            return self

        def options(self, **keys):
            asked_for.append(keys["num_gpus"])
            return MagicMock()

    monkeypatch.setitem(__import__("sys").modules, "ray", FakeRay())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    path = study(f"device: {device}")
    options = WorkerOptions(ray="auto", gpus_per_worker=asked)
    workers = _workers(prepare(path), None, StudyFile(path=path, overrides={}), options, 2)
    with caplog.at_level("INFO", "hpo"):
        workers.start()
    assert asked_for == [expected]
    assert ("each worker on Ray has a GPU of its own" in caplog.text) == (expected == 1.0)
