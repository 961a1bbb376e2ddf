"""Workers on several hosts, each in a network namespace of its own: one is cut off for longer than `grace`."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from hpo.search.budget import holders, lease_of
from hpo.search.remote import CUT_OFF_SECONDS
from hpo.search.storage import close_storage, open_storage
from tests.cli import summary
from tests.conftest import run_hpo
from tests.servers import MlflowServer, postgres

NET = "192.0.2"  # an address range for documentation: nobody is there
SERVERS = f"{NET}.1"
TRIALS = 20  # more than one host trains while the other is cut off
CUT_SECONDS = CUT_OFF_SECONDS + 6  # so long that the connections that were open are given up


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


class Host:
    """A network namespace that reaches the servers through a cable; what runs in it has a host name of its own."""

    def __init__(self, number: int) -> None:
        self.name = f"host{number}-{os.getpid()}"
        self._address = f"{NET}.{10 + number}"
        self._cable, there = f"hpo{number}a{os.getpid()}", f"hpo{number}b{os.getpid()}"
        ip("netns", "add", self.name)
        ip("link", "add", self._cable, "type", "veth", "peer", "name", there, "netns", self.name)
        self.mend()
        ip("-n", self.name, "link", "set", "lo", "up")
        ip("-n", self.name, "addr", "add", f"{self._address}/24", "dev", there)
        ip("-n", self.name, "link", "set", there, "up")

    def start(self, *arguments: object, folder: Path) -> "subprocess.Popen[str]":
        """Start `python -m hpo ...` on this host."""
        folder.mkdir()
        (folder / "linear.py").write_text(Path("linear.py").read_text())
        here = ["ip", "netns", "exec", self.name, "unshare", "--uts", "sh", "-c", 'hostname "$0"; exec "$@"', self.name]
        return subprocess.Popen(
            [*here, sys.executable, "-m", "hpo", *map(str, arguments)],
            cwd=folder,
            env=os.environ | {"LINEAR_SECONDS": "0.02"},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def cut(self) -> None:
        ip("link", "set", self._cable, "down")

    def mend(self) -> None:
        ip("link", "set", self._cable, "up")
        ip("route", "replace", f"{self._address}/32", "dev", self._cable)

    def remove(self) -> None:
        ip("link", "del", self._cable)
        ip("netns", "del", self.name)


@contextmanager
def network() -> Iterator[list[Host]]:
    """Give two hosts that reach SERVERS, an address of this one. Skips where namespaces may not be made."""
    with ExitStack() as stack:
        try:
            ip("addr", "add", f"{SERVERS}/32", "dev", "lo")
            stack.callback(ip, "addr", "del", f"{SERVERS}/32", "dev", "lo")
            ip("netns", "add", f"hpo-{os.getpid()}")
            stack.callback(ip, "netns", "del", f"hpo-{os.getpid()}")
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"network namespaces cannot be made here, which needs root and iproute2: {error}")
        hosts = []
        for number in (1, 2):
            hosts.append(Host(number))
            stack.callback(hosts[-1].remove)
        yield hosts


class Watched:
    """What a storage says of a study."""

    def __init__(self, url: str) -> None:
        self._storage = open_storage(url)

    def trials(self) -> list:
        return self._storage.get_all_trials(self._storage.get_study_id_from_name("study"))

    def wait(self, seconds: float, condition) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            with suppress(KeyError):  # no study yet
                if any(condition(trial) for trial in self.trials()):
                    return
            time.sleep(0.2)
        raise AssertionError([(t.number, t.state, lease_of(t), t.intermediate_values) for t in self.trials()])

    def close(self) -> None:
        close_storage(self._storage)


@pytest.mark.slow
def test_a_host_that_is_cut_off_for_long_damages_nothing_when_it_is_back(study, tmp_path):
    with ExitStack() as stack:
        one, two = stack.enter_context(network())
        data = stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
        url = stack.enter_context(postgres(Path(data) / "data", SERVERS)).database()
        tracking = MlflowServer(tmp_path / "tracking", SERVERS)
        stack.callback(tracking.stop)
        path = study(
            f"storage: {url}\ntracking: {tracking.address}\ntrials: {TRIALS}\nepochs: 30\nstack: 1\ngrace: 4s\n"
            "pruner: none\nsampler: random"
        )
        workers = []
        for host in (one, two):
            workers.append(host.start("worker", path, folder=tmp_path / host.name))
            stack.callback(workers[-1].kill)
        seen = Watched(url)
        stack.callback(seen.close)
        of_two = lambda trial: lease_of(trial).get("worker", "").startswith(two.name)  # noqa: E731
        seen.wait(90, lambda trial: of_two(trial) and len(trial.intermediate_values) > 3)
        two.cut()
        mend_at = time.monotonic() + CUT_SECONDS
        seen.wait(90, lambda trial: of_two(trial) and trial.state.name == "FAIL")  # taken over by the other
        time.sleep(max(0.0, mend_at - time.monotonic()))
        two.mend()
        outs = [worker.communicate(timeout=200) for worker in workers]
        assert [worker.returncode for worker in workers] == [0, 0], outs
        assert "the storage does not answer" in outs[1][0]
        assert "the storage is back after" in outs[1][0]
        assert "another worker took this trial over" in outs[1][0]
        everything = seen.trials()
        done = holders(everything)
        assert [trial.state.name for trial in done] == ["COMPLETE"] * TRIALS
        assert {len(trial.intermediate_values) for trial in done} == {30}
        assert len({trial.params["learning_rate"] for trial in done}) == TRIALS
        assert all(trial.state.is_finished() for trial in everything)
        assert any(of_two(trial) for trial in done), outs[1][0]

        finished = run_hpo("run", path, "--json")
        assert finished.returncode == 0, finished.stderr
        assert summary(finished.stdout)["trials"]["complete"] == TRIALS

        import mlflow

        client = mlflow.MlflowClient(tracking.address)
        experiment = client.get_experiment_by_name("study").experiment_id
        every_run = client.search_runs([experiment])
        runs = {run.data.tags["hpo.trial"]: run.info.status for run in every_run}
        assert len(runs) == len(every_run)  # the workers started together, and made the study's run once
        assert "RUNNING" not in runs.values()
        assert [runs[str(trial.number)] for trial in done] == ["FINISHED"] * TRIALS
