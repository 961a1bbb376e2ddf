"""Ctrl-C, kill -9 and bugs in real processes: the trial is marked, a second run goes on, the budget is exact."""

import fcntl
import json
import math
import os
import pty
import signal
import sqlite3
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hpo import stopping
from tests import warm
from tests.conftest import run_hpo, start_hpo
from tests.databases import rows


def wait_for_running_trial(seconds: float = 60) -> None:
    """Wait until a trial has reported an epoch, so that a signal strikes in the middle of one."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if Path("mlruns/optuna.db").is_file():
            try:
                if rows("select count(*) from trial_intermediate_values") > [(0,)]:
                    return
            except sqlite3.OperationalError:
                pass  # its tables are not made yet
        time.sleep(0.2)
    raise AssertionError("no trial has reported an epoch")


def states() -> list[tuple[int, str]]:
    return rows("select number, state from trials order by number")


def attribute(number: int, key: str) -> object:
    found = rows(
        "select value_json from trial_user_attributes join trials using (trial_id) where number = ? and key = ?",
        number,
        key,
    )
    return json.loads(found[0][0]) if found else None


@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, *(pytest.param(other, marks=pytest.mark.slow) for other in (signal.SIGINT, signal.SIGHUP))],
)
def test_a_signal_gives_the_trial_back_and_a_second_run_goes_on(study: Callable[..., Path], number: int) -> None:
    path = study("epochs: 60\nstack: 1")
    process = start_hpo("run", path, LINEAR_SECONDS="0.05")
    wait_for_running_trial()
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "interrupted; the running trials were given back, run the same command again to resume" in err
    assert "Traceback" not in err
    assert (0, "FAIL") in states()
    assert attribute(0, "error") == "interrupted"

    done = run_hpo("run", path, "--json", "--set", "epochs=60")
    summary = json.loads(done.stdout.splitlines()[-1])
    assert done.returncode == 0, done.stderr
    assert summary["trials"] == {"complete": 3, "pruned": 0, "failed": 0, "running": 0, "paused": 0, "waiting": 0}


@contextmanager
def on_a_terminal(*arguments: object, **environ: str) -> Iterator[tuple["subprocess.Popen[bytes]", int]]:
    """Give `hpo ...` on a terminal of its own, which it is the first process of, and the other end of that terminal."""
    ours, its = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "hpo", *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | environ,
        stdin=its,
        stdout=its,
        stderr=its,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(its)
    try:
        yield process, ours
    finally:
        process.kill()
        process.wait()


def test_a_terminal_that_is_closed_gives_the_trial_back(study: Callable[..., Path]) -> None:
    path = study("epochs: 60\nstack: 1")
    with on_a_terminal("run", path, LINEAR_SECONDS="0.05") as (process, terminal):
        wait_for_running_trial()
        os.close(terminal)
        process.send_signal(signal.SIGHUP)  # as a shell does, too, before it ends
        assert process.wait(timeout=30) == 130
    assert [number for number, state in states() if state == "RUNNING"] == []
    assert attribute(0, "error") == "interrupted"


NOHUP = """
import signal
signal.signal(signal.SIGHUP, signal.SIG_IGN)
from hpo.cli.app import main
main()
"""
"""What `nohup hpo` does."""


def test_under_nohup_a_closed_terminal_stops_nothing(study: Callable[..., Path]) -> None:
    path = study("epochs: 5\nstack: 1\ntrials: 1")
    process = warm.Popen("run", path, code=NOHUP, environ={"LINEAR_SECONDS": "0.05"})
    wait_for_running_trial()
    process.send_signal(signal.SIGHUP)
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert states() == [(0, "COMPLETE")]


def test_a_signal_that_cannot_be_a_persons_second_one_stops_nothing_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a terminal that is closed come two: the system's, and the shell's."""
    monkeypatch.setattr(stopping, "_leave_terminal", lambda: None)  # this terminal is not
    with stopping.signals() as stop:
        for _ in range(2):
            signal.raise_signal(signal.SIGHUP)
        assert stop.requested()
        assert not stop.immediate()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)


def test_a_signal_is_passed_on_within_its_handler_and_leaves_so_much_time() -> None:
    heard = []
    with stopping.signals() as stop, stopping.signals(os.getppid()) as launched:
        assert stop.seconds_left() == launched.limited().seconds_left() == math.inf
        launched.heard = lambda: heard.append(1)
        signal.raise_signal(signal.SIGTERM)
        assert heard == [1]
        stop.ask(signal.SIGTERM, None)
        assert 20 < launched.limited().seconds_left() < stop.seconds_left() < 30
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        assert heard == [1]
        assert launched.seconds_left() == 0


def test_a_killed_trial_is_taken_up_anew_with_its_params_and_seed(study: Callable[..., Path]) -> None:
    path = study("epochs: 60\nstack: 1")
    process = start_hpo("run", path, LINEAR_SECONDS="0.05")
    wait_for_running_trial()
    process.kill()
    process.communicate(timeout=30)
    assert (0, "RUNNING") in states()

    done = run_hpo("run", path, "--json")
    summary = json.loads(done.stdout.splitlines()[-1])
    assert done.returncode == 0, done.stderr
    assert summary["trials"] == {"complete": 3, "pruned": 0, "failed": 0, "running": 0, "paused": 0, "waiting": 0}
    assert "trial 0 was lost (worker" in done.stdout
    successor = next(number for number, _ in states() if attribute(number, "retry_of") == 0)
    assert attribute(successor, "seed") == attribute(0, "seed")
    params = dict(rows("select number, param_value from trial_params join trials using (trial_id)"))
    assert params[0] == params[successor]


def test_a_bug_stops_the_study_with_its_traceback_and_costs_no_trial(study: Callable[..., Path]) -> None:
    path = study("stack: 1")  # with `auto`, a bug shows while it is measured, before there is a trial
    done = run_hpo("run", path, LINEAR_BUG="1")
    assert done.returncode == 1
    assert "KeyError: 'a bug'" in done.stderr
    assert attribute(0, "error") == "KeyError: 'a bug'"
    done = run_hpo("run", path, "--json")
    assert json.loads(done.stdout.splitlines()[-1])["trials"]["complete"] == 3


def test_three_runs_at_once_on_a_fresh_database_share_one_exact_budget(study: Callable[..., Path]) -> None:
    path = study("trials: 12\nstack: 1")
    processes = [start_hpo("run", path, "--json", LINEAR_SECONDS="0.01") for _ in range(3)]
    outputs = [process.communicate(timeout=200) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], outputs
    assert [state for _, state in states()] == ["COMPLETE"] * 12
    assert len(set(rows("select param_value from trial_params"))) == 12
