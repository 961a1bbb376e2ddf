"""Several workers of one study in real processes: the budget is exact, whoever is killed; what differs is refused."""

import json
import logging
import os
import signal
import sqlite3
import subprocess
import time
from contextlib import closing
from pathlib import Path

import pytest
import torch
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState, create_trial

from hpo.errors import HpoError
from hpo.runner import launch
from hpo.runner.opening import open_or_make
from hpo.runner.prepare import prepare
from hpo.runner.progress import PlainProgress, state_of
from hpo.search.clock import duration
from tests import warm
from tests.cli import invoke, refused, summary
from tests.conftest import run_hpo, start_hpo
from tests.databases import MLFLOW, rows
from tests.logged import recorded


def wait_for(statement: str, n: int, seconds: float = 90) -> None:
    """Wait until the study's database has at least `n` such rows."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if rows(statement)[0][0] >= n:
                return
        except sqlite3.OperationalError:
            pass
        time.sleep(0.1)
    raise AssertionError(f"{statement} did not come to {n}")


RUNNING = (
    "select count(distinct trial_id) from trial_intermediate_values join trials using (trial_id) "
    "where state = 'RUNNING'"
)
OPEN_RUNS = "select count(*) from runs where status = 'RUNNING'"


def test_two_workers_share_a_study_and_one_that_is_killed_is_replaced(study):
    path = study("trials: 4\nepochs: 20\nstack: 1\ntracking: sqlite:///mlruns/mlflow.db\ncheckpoint_every: 0.5s")
    process = start_hpo("run", path, "--workers", "2", "--json", LINEAR_SECONDS="0.02")
    wait_for(RUNNING, 2)
    warm.workers(process.pid)[0].kill()
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    assert "was killed (signal 9); it is started again in 0.5 s" in out
    assert summary(out)["trials"] == {"complete": 4, "pruned": 0, "failed": 0, "running": 0, "paused": 0, "waiting": 0}
    assert rows("select count(*) from trials where state = 'RUNNING'") == [(0,)]
    assert rows(OPEN_RUNS, file=MLFLOW) == [(0,)]
    assert not list(Path("mlruns/checkpoints/study").glob("place-*"))
    places = rows("select count(distinct value_json) from trial_user_attributes where key = 'place'")
    assert places == [(4,)]


def test_a_signal_stops_all_workers_and_a_second_run_goes_on_from_their_checkpoints(study):
    path = study("trials: 3\nepochs: 60\nstack: 1")
    process = start_hpo("run", path, "--workers", "2", LINEAR_SECONDS="0.02")
    wait_for(RUNNING, 2)
    workers = warm.workers(process.pid)
    begun = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert time.monotonic() - begun < 30
    assert "run the same command again to resume" in err
    assert not any(worker.is_running() for worker in workers)
    assert len(list(Path("mlruns/checkpoints/study").glob("place-*.pt"))) == 2

    done = run_hpo("run", path, "--json")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("resumes after epoch") == 2
    assert summary(done.stdout)["trials"]["complete"] == 3


def test_a_worker_is_asked_once_to_stop_whoever_asks(study, monkeypatch):
    """A second SIGTERM would end its epoch at once; a first that comes late takes from its time."""
    sent = []
    monkeypatch.setattr(subprocess.Popen, "send_signal", lambda process, number: sent.append(number))
    workers = launch.Workers(["--version"], 2, 0, search=None)
    workers.start()
    workers.ask()
    workers.stop(60)
    assert sent == [signal.SIGTERM, signal.SIGTERM]


def test_a_trial_that_ends_between_two_looks_took_as_long_as_is_stored(study, monkeypatch):
    monkeypatch.setenv("LINEAR_SECONDS", "0.1")
    path = study("trials: 1")
    plan = prepare(path, {})
    with closing(open_or_make(plan)) as search:
        monitor = launch.StudyMonitor(plan, search, PlainProgress(state_of(plan, search), lambda *ended: None))
        invoke("run", path)
        with recorded(logging.INFO) as said:
            monitor.look()
        (trial,) = search.view().trials
    took = (trial.datetime_complete - trial.datetime_start).total_seconds()
    assert took > 0.3
    assert f"; {duration(took)};" in said[-1]


def test_a_trial_that_is_seen_before_its_params_are_stored_is_shown_with_them(study):
    plan = prepare(study("trials: 1"), {})
    with closing(open_or_make(plan)) as search:
        monitor = launch.StudyMonitor(plan, search, PlainProgress(state_of(plan, search), lambda *ended: None))
        storage, study_id = search.study._storage, search.study._study_id
        claimed = create_trial(state=TrialState.RUNNING, user_attrs={"place": 0})
        trial_id = storage.create_new_trial(study_id, claimed)
        monitor.look()
        storage.set_trial_param(trial_id, "learning_rate", 0.02, FloatDistribution(1e-3, 1e-1, log=True))
        storage.set_trial_state_values(trial_id, TrialState.COMPLETE, [0.5])
        with recorded(logging.INFO) as said:
            monitor.look()
    assert "learning_rate=0.02" in said[-1]


def test_a_bug_in_a_worker_stops_all_with_its_traceback(study):
    path = study("stack: 1")
    done = run_hpo("run", path, "--workers", "2", LINEAR_BUG="1")
    assert done.returncode == 1
    assert "KeyError: 'a bug'" in done.stderr


def test_a_worker_joins_by_its_file_or_by_the_studys_name(study):
    path = study("trials: 2")
    invoke("run", path)
    assert summary(invoke("worker", path, "--json"))["trials"]["complete"] == 2
    study("trials: 4")
    invoke("worker", path)
    storage = "sqlite:///mlruns/optuna.db"
    out = invoke("worker", "--study", "study", "--storage", storage, "--objective", "linear.py", "--json")
    assert summary(out)["trials"]["complete"] >= 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--study", "study"], "give a study file, or --study NAME and --storage URL"),
        ([], "give a study file"),
        (["--study", "studdy", "--storage", "sqlite:///mlruns/optuna.db"], "has no study 'studdy'; did you mean"),
    ],
)
def test_a_worker_of_nothing_is_told_what_to_give(study, arguments, said):
    invoke("run", study())
    assert said in refused("worker", *arguments)


def test_a_worker_with_another_spec_code_or_data_is_refused_saying_what_differs(study, monkeypatch):
    path = study()
    invoke("run", path)
    assert "epochs is 9 here, 2 there" in refused("worker", path, "--set", "epochs=9")
    monkeypatch.setenv("LINEAR_DATA", "other")
    assert "is not what study 'study' began with (fingerprint" in refused("worker", path)
    monkeypatch.delenv("LINEAR_DATA")
    file = Path("linear.py")
    file.write_text(file.read_text() + "\n# changed\n")
    assert "the code of objective linear.py is not what study 'study' began with" in refused("worker", path)
    assert "the objective's code has changed" in invoke("run", path, "--trials", 4)


def test_repair_frees_places_and_ends_the_runs_that_were_left_open(study):
    path = study("trials: 2\nepochs: 200\nstack: 1\ntracking: sqlite:///mlruns/mlflow.db")
    process = start_hpo("run", path, LINEAR_SECONDS="0.02")
    wait_for(RUNNING, 1)
    process.kill()
    process.communicate(timeout=30)
    out = invoke("repair", path, "--json")
    assert "trial 0 is ended: worker" in out
    assert summary(out)["trials"] == {"complete": 0, "pruned": 0, "failed": 0, "running": 0, "paused": 0, "waiting": 2}
    assert rows("select state from trials where number = 0") == [("FAIL",)]
    runs = rows("select status from runs where name = 'trial 0 (interrupted)'", file=MLFLOW)
    assert runs == [("KILLED",)]
    again = invoke("repair", path)
    assert "is ended" not in again


def test_repair_names_no_runs_where_nothing_is_tracked(study):
    path = study("trials: 1\ntracking: off")
    invoke("run", path)
    out = invoke("repair", path)
    assert "1 of 1 trials done, 0 running, 0 waiting" in out
    assert "the runs in" not in out


def test_repair_does_not_say_of_runs_that_they_agree_where_mlflow_does_not_answer(study):
    path = study("trials: 1\ntracking: off")
    invoke("run", path)
    Path("mlruns/mlflow.db").write_text("no database")
    out = invoke("repair", path, "--tracking", "sqlite:///mlruns/mlflow.db")
    assert "does not work (DatabaseError: file is not a database; move that file away, and a new one is made)" in out
    assert out.splitlines()[-1].endswith("1 of 1 trials done, 0 running, 0 waiting")
    Path("mlruns/mlflow.db").unlink()
    out = invoke("repair", path, "--tracking", "sqlite:///mlruns/mlflow.db")
    assert "0 waiting; the runs in sqlite:///mlruns/mlflow.db say the same" in out


def test_serve_says_that_there_is_no_login_and_workers_join_through_it(study):
    path = study("trials: 3")
    invoke("run", path, "--trials", 1)
    from tests.servers import free_port, wait_for_port

    port = free_port()
    process = start_hpo("serve", path, "--port", port, "--host", "0.0.0.0")
    try:
        wait_for_port(port)
        out = invoke("worker", path, "--storage", f"grpc://127.0.0.1:{port}", "--json")
        assert summary(out)["trials"]["complete"] == 3
    finally:
        process.terminate()
        out, _ = process.communicate(timeout=30)
    assert "there is no login" in out


def test_a_wrong_number_of_workers_is_refused(study):
    done = run_hpo("run", study(), "--workers", "none")
    assert done.returncode == 2
    assert "must be auto, or a number of at least 1, but got 'none'" in done.stderr


def test_the_studys_file_is_kept_without_its_passwords(study):
    path = study("trials: 1")
    invoke("run", path, "--set", "tracking=off")
    (stored,) = rows("select value_json from study_user_attributes where key = 'hpo:study_file'")
    kept = json.loads(json.loads(stored[0]))
    assert kept["objective"] == "linear.py"
    assert "storage" not in kept


def test_workers_that_die_at_their_start_are_not_started_for_ever(study, monkeypatch):
    """Ten in a minute, for ever: now so many, with pauses, and then the reason."""
    monkeypatch.setattr(launch, "DEATHS", 4)
    monkeypatch.setattr(launch, "_FIRST_PAUSE", 0.05)
    text = Path("linear.py").read_text()
    Path("linear.py").write_text(
        f"{text}\nimport os, signal, sys\nif 'HPO_LAUNCHED' in os.environ:\n"
        "    print('the driver is missing', file=sys.stderr, flush=True)\n    os.kill(os.getpid(), signal.SIGSEGV)\n"
    )
    path = study("trials: 2")
    with pytest.raises(HpoError) as caught:
        invoke("run", path, "--workers", "2")
    assert caught.value.exit_status == 1
    assert "workers were killed 4 times, the last by signal 11, before they claimed a trial" in str(caught.value)
    assert "the driver is missing" in str(caught.value)
    assert rows("select count(*) from trials where state not in ('WAITING', 'FAIL')") == [(0,)]


@pytest.fixture
def machine(monkeypatch):
    """Return a function that gives this machine so many GPUs; they are stand-ins."""

    def make(n_gpus):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: n_gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: n_gpus)

    return make


def started(plan, n, monkeypatch):
    """Return the environments of the processes that `n` workers of a study are started in."""
    environs = []

    class Process:
        def __init__(self, command, environ, *rest):
            environs.append(environ)

    monkeypatch.setattr(launch, "_Process", Process)
    launch.Workers(["worker"], n, launch.gpus(plan), None).start()
    return [environ.get("CUDA_VISIBLE_DEVICES") for environ in environs]


@pytest.mark.parametrize("device", ["auto", "cuda"])
@pytest.mark.parametrize(
    ("visible", "expected"), [(None, ["0", "1", "2", "0", "1"]), ("5,3,GPU-8f", ["5", "3", "GPU-8f", "5", "3"])]
)
def test_workers_are_pinned_each_to_its_gpu(study, machine, monkeypatch, device, visible, expected):
    machine(3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    plan = prepare(study(f"device: {device}"))
    assert launch.how_many(None, plan) == 3
    assert started(plan, 5, monkeypatch) == expected


@pytest.mark.parametrize(("device", "n"), [("cuda:1", 1), ("cpu", len(os.sched_getaffinity(0)))])
def test_workers_of_a_study_that_names_its_device_all_use_that(study, machine, monkeypatch, device, n):
    machine(3)
    plan = prepare(study(f"device: {device}"))
    assert launch.how_many(None, plan) == n
    assert started(plan, 2, monkeypatch) == [None, None]
