"""A short form of `benchmarks/chaos.py`: processes killed at random and at named moments, servers stopped."""

import subprocess
import sys

import pytest

from tests.conftest import ROOT


@pytest.mark.timeout(600)  # it waits for leases, and for processes that are stopped beyond them
@pytest.mark.parametrize(
    ("storage", "n_kills", "n_trials", "n_epochs"),
    [
        ("sqlite", 2, 2, 8),
        pytest.param("postgres", 6, 4, 15, marks=pytest.mark.slow),
        pytest.param("sqlite", 6, 4, 15, marks=pytest.mark.slow),
    ],
)
def test_a_study_comes_out_as_undisturbed_whoever_is_killed(storage, n_kills, n_trials, n_epochs):
    command = [sys.executable, ROOT / "benchmarks/chaos.py", "--storage", storage, "--kills", n_kills, "--workers", 2]
    command += ["--trials", n_trials, "--epochs", n_epochs]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    kills = int(done.stdout.partition(" kills (")[0].rpartition(" ")[2])
    assert kills > 0
    assert f"| trials done | {n_trials} | {n_trials} |" in done.stdout
