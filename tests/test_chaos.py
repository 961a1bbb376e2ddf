"""A short form of `benchmarks/chaos.py`: processes killed at random and at named moments, servers stopped."""

import subprocess
import sys

import pytest

from tests.conftest import ROOT


@pytest.mark.timeout(600)  # it waits for leases, and for processes that are stopped beyond them
@pytest.mark.parametrize("storage", ["postgres", pytest.param("sqlite", marks=pytest.mark.slow)])
def test_a_study_comes_out_as_undisturbed_whoever_is_killed(storage):
    command = [sys.executable, ROOT / "benchmarks/chaos.py", "--storage", storage, "--kills", "6", "--workers", "2"]
    done = subprocess.run([*command, "--trials", "4", "--epochs", "15"], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    kills = int(done.stdout.partition(" kills (")[0].rpartition(" ")[2])
    assert kills > 0
    assert "| trials done | 4 | 4 |" in done.stdout
