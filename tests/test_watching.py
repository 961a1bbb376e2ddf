"""`hpo status --watch`, `--quiet`, `--log-file` and `--version`: how much is shown, where, and until when."""

import io
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

import hpo
from hpo.cli import status as command
from tests.cli import app, invoke, refused, summary
from tests.conftest import run_hpo, start_hpo

Write = Callable[..., Path]


def test_version() -> None:
    done = run_hpo("--version")
    assert done.stdout == f"{hpo.__version__}\n"


def test_quiet_prints_the_result_alone_and_the_log_file_has_all(study: Write) -> None:
    Path("log.txt").write_text("before\n")
    printed = invoke("run", study(), "--quiet", "--log-file", "log.txt")
    assert printed.startswith("study")
    assert "trial 0 complete" not in printed
    assert re.search(r"test +│ loss", printed)
    first, *lines = Path("log.txt").read_text().splitlines()
    assert first == "before"
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} INFO ", line) for line in lines)
    assert sum(" trial 2 complete: r2 " in line for line in lines) == 1
    loud = invoke("run", study("trials: 4"))
    assert "trial 3 complete" in loud


def test_quiet_shows_warnings_and_the_log_file_no_secret(study: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpo.tracking.mlflow.MlflowTracker.CLOSE_SECONDS", 0.5)
    path = study("tracking: http://bob:s3cret@127.0.0.1:9/")
    printed = invoke("run", path, "--quiet", "--log-file", "log.txt")
    assert "tracking: http://bob:***@127.0.0.1:9/ does not work" in printed
    text = Path("log.txt").read_text()
    assert " WARNING tracking: http://bob:***@127.0.0.1:9/ does not work" in text
    assert "s3cret" not in text
    refused("run", study("epochs: 7"), "--log-file", "log.txt")
    assert (
        " ERROR the storage sqlite:///mlruns/optuna.db has another study named 'study'" in Path("log.txt").read_text()
    )


def test_a_log_file_that_cannot_be_written_is_refused_before_anything_runs(study: Write) -> None:
    message = refused("run", study(), "--log-file", "gone/log.txt")
    assert message == "--log-file gone/log.txt: cannot be written (No such file or directory); give another file"
    assert not Path("mlruns").exists()


def test_the_status_is_of_what_the_study_was_run_with(study: Write) -> None:
    path = study()
    invoke("run", path, "--trials", 3, "--set", "epochs=3")
    assert "3 of 3 trials done" in invoke("status", path, "--watch")
    whole = summary(invoke("status", path, "--json"))
    assert (whole["trials"]["waiting"], whole["epochs"]["without"]) == (0, 9)
    assert "3 of 4 trials done" in invoke("status", path, "--trials", 4)


@pytest.mark.parametrize(
    "command", ["objectives", *(pytest.param(name, marks=pytest.mark.slow) for name in ("run", "status"))]
)
def test_a_closed_stdout_is_no_error(study: Write, command: str) -> None:
    path = study()
    invoke("run", path)
    of_study = [] if command == "objectives" else [str(path)]
    code = "import sys; sys.stdout = None; sys.argv = ['hpo', *sys.argv[1:]]; from hpo.cli.app import main; main()"
    done = subprocess.run([sys.executable, "-c", code, command, *of_study], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_watching_ends_with_the_study_and_prints_what_changed(study: Write) -> None:
    path = study("trials: 4")
    invoke("run", path, "--trials", "2")
    watching = start_hpo("status", path, "--watch", "0.2")
    time.sleep(2.5)
    assert watching.poll() is None, "it waits for the other two"
    invoke("run", path)
    out, err = watching.communicate(timeout=20)
    assert watching.returncode == 0, err
    blocks = out.strip().split("\n\n")
    assert blocks[0].startswith("study: 2 of 4 trials done (2 complete")
    assert blocks[-1].startswith("study: 4 of 4 trials done (4 complete")
    assert len({re.sub("time used .*", "", block) for block in blocks}) == len(blocks), "each says something else"


def test_on_a_terminal_it_is_redrawn_in_place() -> None:
    written = io.StringIO()
    out = Console(file=written, force_terminal=True, width=80)
    with command._redrawn(out) as show:
        show(["one", "two"])
        show(["three postgresql://bob:s3cret@host/x"])
    assert "s3cret" not in written.getvalue()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--watch", "--json"], "prints one state; leave out --watch"),
        (["5"], "seconds are for --watch"),
        (["0", "--watch"], "should be greater than or equal to 0.1"),
        (["-1", "--watch"], "No such option"),
    ],
)
def test_what_makes_no_sense_is_refused(study: Write, arguments: list[str], message: str) -> None:
    from typer.testing import CliRunner

    result = CliRunner().invoke(app, ["status", str(study()), *arguments])
    assert result.exit_code == 2
    assert message in result.output
