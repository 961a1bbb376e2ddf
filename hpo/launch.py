"""Local worker processes of one study: started, listened to, begun again when they are killed, stopped."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence

import torch

from hpo.errors import HpoError, InputError
from hpo.plan import Plan
from hpo.progress import Progress
from hpo.search import Search

LAUNCHED = "HPO_LAUNCHED"
"""Set for a worker that `hpo run --workers` has started: how many there are of them."""
LAUNCHER = "HPO_LAUNCHER"
"""Set for such a worker of this machine: the process that has started it."""
_LAST_LINES = 60
_STOP_SECONDS = 30.0


def how_many(wanted: int | None, device: torch.device) -> int:
    """Return the number of workers: what is wanted, or (None) one a GPU, on a CPU one a core."""
    if wanted is not None:
        return wanted
    return torch.cuda.device_count() if device.type == "cuda" else len(os.sched_getaffinity(0))


class Workers:
    """`n` processes of one command. On CUDA each sees one GPU, in turn."""

    def __init__(
        self,
        command: Sequence[str],
        n: int,
        device: torch.device,
        say: Callable[[str], None],
        open_trials: Callable[[], bool],
    ) -> None:
        """`open_trials` says whether there is still something to do for one that takes a killed one's place."""
        self._command, self._n, self._say, self._open_trials = command, n, say, open_trials
        self._gpus = torch.cuda.device_count() if device.type == "cuda" and device.index is None else 0
        self._running: dict[int, _Process] = {}

    def start(self) -> None:
        for place in range(self._n):
            self._start(place)

    def _start(self, place: int) -> None:
        environ = {LAUNCHED: str(self._n), LAUNCHER: str(os.getpid())}
        if self._gpus:
            environ["CUDA_VISIBLE_DEVICES"] = _visible(place % self._gpus)
        self._running[place] = _Process(self._command, environ, lambda line: self._say(f"worker {place}: {line}"))

    def look(self) -> bool:
        """Return whether any still works. One that was killed is begun again while there is something to do.

        Raises HpoError (or InputError) with what a worker said that has failed.
        """
        for place, process in list(self._running.items()):
            status = process.status()
            if status is None:
                continue
            del self._running[place]
            if status < 0 and self._open_trials():
                self._say(f"worker {place} was killed (signal {-status}); another one takes its place")
                self._start(place)
            elif status > 0 and status != 130:
                self.stop()
                raise (InputError if status == 2 else HpoError)(f"worker {place} failed:\n{process.said()}")
        return bool(self._running)

    def stop(self) -> None:
        """Ask all to finish their epoch, and wait; what does not end in time is killed."""
        for process in self._running.values():
            process.signal(signal.SIGTERM)
        end = time.monotonic() + _STOP_SECONDS
        for process in self._running.values():
            process.end(max(0.0, end - time.monotonic()))
        self._running.clear()


class Watch:
    """Shows what other processes do with a study, as far as the storage knows it."""

    def __init__(self, plan: Plan, search: Search, progress: Progress) -> None:
        self._plan, self._search, self._progress = plan, search, progress
        self._epochs: dict[int, int] = {}
        self._ended = set(search.ends())

    def look(self) -> None:
        for trial in self._search.running():
            if trial.number not in self._epochs:
                self._begin(trial.number)
            if trial.epoch > self._epochs[trial.number]:
                self._epochs[trial.number] = trial.epoch
                metrics = {} if trial.value is None else {self._plan.metric_key: trial.value}
                self._progress.epoch_ended(trial.number, trial.epoch, self._plan.spec.epochs, metrics)
        ends = self._search.ends()
        for number in sorted(set(ends) - self._ended):
            self._ended.add(number)
            if number not in self._epochs:
                self._begin(number)
            state, error = ends[number]
            self._progress.trial_ended(number, state, self._search.value_of(number), error)

    def _begin(self, number: int) -> None:
        self._epochs[number] = 0
        self._progress.trial_started(number, self._plan.space.searched(self._search.params_of(number)))


def _visible(place: int) -> str:
    """Return the GPU at that place among those that this process may see itself."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",")[place] if named else str(place)


class _Process:
    """One worker, in a session of its own: Ctrl-C reaches it through us, once."""

    def __init__(self, command: Sequence[str], environ: Mapping[str, str], say: Callable[[str], None]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "hpo", *command],
            env=os.environ | environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._errors: deque[str] = deque(maxlen=_LAST_LINES)
        self._threads = [
            threading.Thread(target=_listen, args=(stream, hear), daemon=True)
            for stream, hear in ((self._process.stdout, say), (self._process.stderr, self._errors.append))
        ]
        for thread in self._threads:
            thread.start()

    def status(self) -> int | None:
        return self._process.poll()

    def said(self) -> str:
        """Return the last that it wrote to stderr."""
        for thread in self._threads:
            thread.join(timeout=5)
        return "\n".join(self._errors)

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def end(self, seconds: float) -> None:
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _listen(stream: object, hear: Callable[[str], object]) -> None:
    for line in stream:  # type: ignore[attr-defined]
        hear(line.rstrip("\n"))
