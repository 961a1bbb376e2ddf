"""Where stdout is a full disk or a pipe that nobody reads, and how a command ends that a signal strikes early."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests import warm
from tests.cli import invoke, summary
from tests.conftest import run_hpo, start_hpo

Write = Callable[..., Path]
FULL = "the output cannot be written (No space left on device)"


def on_a_full_disk(*arguments: object) -> tuple[int, str]:
    """Run a command whose stdout is on a full disk; return its exit status and stderr."""
    with open("/dev/full", "w") as full:
        process = warm.Popen(*arguments, stdout=full.fileno())
        _, err = process.communicate(timeout=100)
    return process.returncode, err


def test_a_study_trains_on_where_its_display_cannot_be_written(study: Write) -> None:
    path = study("trials: 2")
    status, err = on_a_full_disk("run", path)
    assert (status, err) == (0, f"hpo: {FULL}; the command continues without it, and `hpo status` shows the study\n")
    status, err = on_a_full_disk("run", path, "--trials", 3, "--log-file", "/dev/full", "--json")
    assert status == 1
    full, log_file, no_summary = err.splitlines()
    assert full.startswith(f"hpo: {FULL}; the command continues")
    assert log_file.startswith("hpo: --log-file /dev/full: cannot be written ([Errno 28] No space left on device)")
    assert no_summary == f"hpo: --json: {FULL}"
    assert summary(invoke("status", path, "--json", "--trials", 3))["trials"]["complete"] == 3
    for command in (
        ["--help"],
        ["run", "--help"],
        ["studies"],
        ["status", path, "--json"],
        ["report", path, "--format", "csv", "--out", "-"],
    ):
        assert on_a_full_disk(*command) == (1, f"hpo: {FULL}\n")


def test_a_study_trains_on_where_nobody_reads_its_lines(study: Write) -> None:
    path = study("trials: 3")
    running = start_hpo("run", path, LINEAR_SECONDS="0.05")
    assert running.stdout is not None
    running.stdout.readline()
    running.stdout.close()
    running.stdout = None
    _, err = running.communicate(timeout=100)
    assert running.returncode == 0
    said = "hpo: the output cannot be written (Broken pipe); the command continues without it, and `hpo status` shows"
    assert err.startswith(said)
    assert len(err.splitlines()) == 1
    assert summary(invoke("status", path, "--json"))["trials"]["complete"] == 3


def test_a_signal_while_a_command_still_imports_is_said(study: Write) -> None:
    code = (
        "import os, signal, sys; from hpo.cli import app\n"
        "app._commands = lambda: os.kill(os.getpid(), signal.SIGTERM)\n"
        "sys.argv = ['hpo', 'run', 'study.yaml']; app.main()"
    )
    study()
    done = warm.run(code)
    assert (done.returncode, done.stderr) == (130, "hpo: interrupted\n")


@pytest.mark.parametrize("is_there", [True, False])
def test_how_a_file_is_named_that_looks_like_an_option(study: Write, is_there: bool) -> None:
    study(name="-dash.yaml" if is_there else "other.yaml")
    done = run_hpo("run", "-dash.yaml")
    assert done.returncode == 2
    hint = "hpo: -dash.yaml is a file whose name starts as an option does; write ./-dash.yaml\n"
    assert done.stderr.endswith("No such option: -d\n" + hint * is_there)
