"""`hpo ui`: both pages answer and land on the study, no password is in `ps`, and nothing is left behind."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from urllib.request import urlopen

import psutil
import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from hpo.cli import pages
from hpo.cli.pages import Page, port_of
from hpo.errors import HpoError, InputError
from tests import browser, warm
from tests.cli import invoke, refused
from tests.conftest import start_hpo

Write = Callable[..., Path]


def _lines(process: "subprocess.Popen[str]", n: int) -> list[str]:
    assert process.stdout is not None
    return [process.stdout.readline().rstrip() for _ in range(n)]


def _look(mlflow: str, dashboard: str) -> None:
    """See the study's run in MLflow's list of training runs, and the study in the dashboard, in a real browser."""
    with browser.chromium() as page:
        wait = WebDriverWait(page, 60)
        page.get(mlflow)
        wait.until(lambda page: "Run Name" in page.find_element(By.TAG_NAME, "body").text)
        wait.until(lambda page: "linear.py" in page.find_element(By.TAG_NAME, "body").text)  # its dataset
        browser.errors(page)  # MLflow's own
        page.get(dashboard)
        wait.until(lambda page: "Best Trial" in page.find_element(By.TAG_NAME, "body").text)
        assert "study" in page.find_element(By.TAG_NAME, "body").text
        assert browser.errors(page) == []


def test_both_pages_land_on_the_study_and_end_with_it(study: Write) -> None:
    invoke("run", study("tracking: sqlite:///mlruns/mlflow.db"))
    process = start_hpo("ui", "study")
    mlflow, dashboard, ends = _lines(process, 3)
    children = warm.children(process.pid)
    try:
        assert mlflow.startswith("MLflow: http://127.0.0.1:")
        assert mlflow.endswith("/#/experiments/1/runs?workflowType=machine_learning")
        assert dashboard.startswith("Optuna's dashboard: http://127.0.0.1:")
        address = dashboard.partition(": ")[2]
        assert address.endswith("/dashboard/studies/1")
        with urlopen(address) as page:
            assert b"<title>Optuna Dashboard" in page.read()
        with urlopen(address.replace("dashboard/studies/1", "api/studies/1")) as page:
            assert b'"name":"study"' in page.read().replace(b'": ', b'":')
        if browser.MISSING is None:
            _look(mlflow.partition(": ")[2], address)
        assert ends == "Ctrl-C ends them"
        assert len(children) >= 3, "MLflow, its server and the dashboard"
    finally:
        process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (0, "", "")
    time.sleep(0.3)
    assert not [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]


def test_sigterm_ends_it_too(study: Write) -> None:
    invoke("run", study())
    process = start_hpo("ui", "study", "--no-mlflow")
    assert _lines(process, 2)[1] == "Ctrl-C ends it"
    (child,) = warm.children(process.pid)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=30) == ("", "")
    assert process.returncode == 0
    assert not child.is_running()


def test_the_dashboard_shows_no_address_in_ps_and_ends_where_hpo_is_killed(study: Write) -> None:
    invoke("run", study())
    process = start_hpo("ui", study(), "--port", str(port_of(None, 18080)))
    said = _lines(process, 2)
    assert said[0] == "MLflow: left out, the study is not tracked (tracking: off)"
    assert said[1].startswith("Optuna's dashboard: http://127.0.0.1:")
    (child,) = warm.children(process.pid)
    assert "optuna.db" not in " ".join(child.cmdline())
    process.kill()
    process.communicate()
    child.wait(timeout=10)


def test_a_port_that_is_taken(study: Write) -> None:
    invoke("run", study())
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        message = refused("ui", "study", "--port", port, "--no-mlflow")
        assert message.startswith(f"--port: 127.0.0.1:{port} cannot be had (Address already in use); give another")
        assert port_of(None, port) != port
        with pytest.raises(InputError, match="cannot be had"):
            port_of(port, 1)


def test_what_mlflow_is_not_served_is_said(study: Write) -> None:
    invoke("run", study())
    assert "there is no storage" in refused("ui", "study", "--storage", "sqlite:///no.db")
    assert "has no study 'other'" in refused("ui", "other")
    said = invoke("ui", "study", "--no-dashboard", "--tracking", "http://bob:s3cret@mlflow:5000")
    assert said == "MLflow: its server is http://bob:***@mlflow:5000, experiment study\n"
    said = invoke("ui", "study", "--no-dashboard", "--tracking", "sqlite:///gone.db")
    assert said == "MLflow: left out, there is no sqlite:///gone.db yet\n"
    assert not Path("gone.db").exists()
    message = refused("ui", "study", "--tracking", "postgresql://bob:***@host/mlflow")
    assert message.startswith("the storage keeps no password, and postgresql://bob:***@host/mlflow has one")


def test_a_server_that_ends_or_does_not_answer_is_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = Page("It", ["sh", "-c", "echo no room for bob:s3cret; exit 3"], 1, {}, "")
    with pytest.raises(HpoError, match=r"It has ended \(exit status 3\); it said last:\n  no room"):
        ended.wait_until_it_answers("/", lambda: False)
    ended.end()
    monkeypatch.setattr(pages, "START_SECONDS", 0.3)
    silent = Page("It", ["sh", "-c", "read line; echo $line $MORE; exec sleep 60"], 1, {"MORE": "more"}, "hello\n")
    with pytest.raises(HpoError, match=r"It has not answered for 0.3 s; it said last:\n  hello more"):
        silent.wait_until_it_answers("/", lambda: False)
    silent.end()
    assert silent._process.poll() == -signal.SIGTERM


def test_of_a_servers_traceback_only_the_error_is_quoted() -> None:
    code = 'print("starting", flush=True); raise ValueError("no database")'
    ended = Page("It", [sys.executable, "-c", code], 1, {}, "")
    with pytest.raises(HpoError) as error:
        ended.wait_until_it_answers("/", lambda: False)
    ended.end()
    assert str(error.value) == "It has ended (exit status 1); it said last:\n  starting\n  ValueError: no database"


def test_what_a_server_has_started_ends_too(tmp_path: Path) -> None:
    script = f"(trap '' TERM; echo $BASHPID > {tmp_path}/pid; while true; do sleep 0.1; done) & wait"
    page = Page("It", ["bash", "-c", script], 1, {}, "")
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        time.sleep(0.05)
    pid = int((tmp_path / "pid").read_text())
    page.end()
    time.sleep(0.2)
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    assert os.getpid() != pid
