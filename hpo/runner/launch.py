"""Local worker processes of one study: started, listened to, begun again when they are killed, stopped."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch

from hpo.errors import HpoError, InputError
from hpo.log import log
from hpo.runner.prepare import Plan
from hpo.runner.progress import Progress
from hpo.search.budget import trained
from hpo.search.search import Search
from hpo.search.view import StudyView

LAUNCHED = "HPO_LAUNCHED"
"""Set for a worker that `hpo run --workers` has started: how many there are of them."""
LAUNCHER = "HPO_LAUNCHER"
"""Set for such a worker of this machine: the process that has started it."""
_LAST_LINES = 60
STOP_SECONDS = 30.0
"""How long workers may take to end that are asked to."""
DEATHS = 8
"""How many workers may be killed one after the other without a trial being claimed, before the run gives up."""
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 15.0
"""Seconds before a killed worker is started again: doubled with each death while no trial is claimed."""


def gpus(plan: Plan) -> int:
    """Return over how many GPUs the study's workers are spread; 0: it names its device, which all of them use."""
    return torch.cuda.device_count() if plan.device.type == "cuda" and plan.spec.device in ("auto", "cuda") else 0


def how_many(wanted: int | None, plan: Plan) -> int:
    """Return the number of workers: what is wanted, or (None) one a GPU, on a CPU one a core."""
    if wanted is not None:
        return wanted
    return max(1, gpus(plan)) if plan.device.type != "cpu" else len(os.sched_getaffinity(0))


class Workers:
    """`n` processes of one command. Where they are spread over GPUs, each sees one of these, in turn."""

    def __init__(self, command: Sequence[str], n: int, gpus: int, search: Search) -> None:
        """`gpus`: over how many they are spread; 0: none, or the one that the study names.

        `search` knows whether there is something left to do, and whether workers claim trials before they die.
        """
        self._command, self._n, self._search = command, n, search
        self._deaths, self._claimed = 0, -1
        self._due: dict[int, float] = {}
        self._gpus = gpus
        self._running: dict[int, _Process] = {}

    def start(self) -> None:
        for place in range(self._n):
            self._start(place)

    def _start(self, place: int) -> None:
        path = os.pathsep.join(filter(None, sys.path))  # a script's own folder: modules that it imports lie there
        environ = {LAUNCHED: str(self._n), LAUNCHER: str(os.getpid()), "PYTHONPATH": path}
        if self._gpus:
            environ["CUDA_VISIBLE_DEVICES"] = _visible(place % self._gpus)
        self._running[place] = _Process(self._command, environ, f"worker {place}")

    def look(self) -> bool:
        """Return whether any still works. One that was killed is started again while there is something to do.

        Raises HpoError (or InputError) with what a worker said that has failed, or that is killed again and again.
        """
        for place, process in list(self._running.items()):
            status = process.status()
            if status is None:
                continue
            del self._running[place]
            if status < 0 and self._search.counts().unfinished:
                self._start_again(place, process, -status)
            elif status > 0 and status != 130:
                self.stop()
                raise (InputError if status == 2 else HpoError)(f"worker {place} failed:\n{process.said()}")
        for place in [place for place, due in self._due.items() if time.monotonic() >= due]:
            del self._due[place]
            if self._search.counts().unfinished:
                self._start(place)
        return bool(self._running or self._due)

    def _start_again(self, place: int, process: "_Process", signal_number: int) -> None:
        """Have a killed worker's place taken after a pause. Raises HpoError where that has not helped so far.

        One that dies while it trains costs its trial an attempt, so `retries` bounds these.
        """
        claimed = self._search.view().n_claimed
        self._deaths = 1 if claimed != self._claimed else self._deaths + 1
        self._claimed = claimed
        if self._deaths >= DEATHS:
            self.stop()
            said = process.said() or "it printed nothing; where memory runs out, the system kills with signal 9"
            raise HpoError(
                f"workers were killed {self._deaths} times, the last by signal {signal_number}, before they claimed a "
                f"trial; none is lost. Worker {place}, before it was killed:\n{said}"
            )
        pause = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2 ** (self._deaths - 1))
        self._due[place] = time.monotonic() + pause
        log.warning(f"worker {place} was killed (signal {signal_number}); it is started again in {pause:g} s")

    def ask(self) -> None:
        """Ask all to finish their epoch, each once: a second signal ends it at once. It may be called by a handler."""
        for process in list(self._running.values()):
            process.ask()

    def stop(self, seconds: float = STOP_SECONDS) -> None:
        """Ask all to finish their epoch, and wait; what does not end in so many seconds is killed."""
        self.ask()
        end = time.monotonic() + seconds
        for process in self._running.values():
            process.end(max(0.0, end - time.monotonic()))
        self._running.clear()
        self._due.clear()


class StudyMonitor:
    """Shows what other processes do with a study, as far as the storage knows it."""

    def __init__(self, plan: Plan, search: Search, progress: Progress) -> None:
        self._plan, self._search, self._progress = plan, search, progress
        self._epochs: dict[int, int] = {}
        self._ended = set(search.view().ends)

    def look(self) -> None:
        seen = self._search.view()
        self._progress.looked(seen)
        for number, epoch in seen.paused.items():
            if number in self._epochs:
                del self._epochs[number]
                self._progress.trial_paused(number, epoch)
        for trial in seen.running:
            if not self._epochs.get(trial.number):  # until its first report its params may not be stored yet
                self._begin(trial.number, seen)
            if trial.epoch > self._epochs[trial.number]:
                self._epochs[trial.number] = trial.epoch
                metrics = {} if trial.value is None else {self._plan.metric_key: trial.value}
                self._progress.epoch_ended(trial.number, trial.epoch, self._plan.spec.epochs, metrics)
        ended = set(seen.ends) - self._ended
        # as stored: it may have been trained, whole, between two looks, or while the storage did not answer
        seconds = {t.number: trained(t) for t in seen.everything if t.number in ended}
        for number in sorted(ended):
            self._ended.add(number)
            self._begin(number, seen)
            state, error = seen.ends[number]
            broken = seen.broken(number) if error is None else ""
            reason = error or (broken and f"infeasible: {broken}")
            self._progress.trial_ended(number, state, seen.value_of(number), reason, seconds[number])

    def _begin(self, number: int, seen: StudyView) -> None:
        self._epochs[number] = 0
        self._progress.trial_started(number, self._plan.space.searched(seen.params_of(number)))


def _visible(place: int) -> str:
    """Return the GPU at that place among those that this process may see itself."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",")[place] if named else str(place)


class _Process:
    """One worker, in a session of its own: Ctrl-C reaches it through us, once."""

    def __init__(self, command: Sequence[str], environ: Mapping[str, str], name: str) -> None:
        """What it writes to stdout is logged, with its `name`."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "hpo", *command],
            env=os.environ | environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._asked = False
        self._errors: deque[str] = deque(maxlen=_LAST_LINES)
        hears = (self._process.stdout, partial(log.info, f"{name}: %s")), (self._process.stderr, self._errors.append)
        self._threads = [threading.Thread(target=_listen, args=each, daemon=True) for each in hears]
        for thread in self._threads:
            thread.start()

    def status(self) -> int | None:
        """Return its exit status; None: it runs."""
        status = self._process.poll()
        if status is not None:
            self._hear_out()
        return status

    def said(self) -> str:
        """Return the last that it wrote to stderr."""
        self._hear_out()
        return "\n".join(self._errors)

    def _hear_out(self) -> None:
        """Read what is left in the pipes of a process that has ended, and close them."""
        for thread in self._threads:
            thread.join(timeout=5)  # a process of the worker's own may hold them open
        for stream, thread in zip((self._process.stdout, self._process.stderr), self._threads, strict=True):
            if stream is not None and not thread.is_alive():
                stream.close()

    def ask(self) -> None:
        """Send SIGTERM, the first time only."""
        if not self._asked:
            self._asked = True
            self._process.send_signal(signal.SIGTERM)

    def end(self, seconds: float) -> None:
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._hear_out()


def _listen(stream: object, hear: Callable[[str], object]) -> None:
    for line in stream:  # type: ignore[attr-defined]
        hear(line.rstrip("\n"))
