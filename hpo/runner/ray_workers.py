"""Workers as Ray actors: Ray places them, gives each its share of a GPU, and begins again those that die.

Ray is imported when it is first used; the extra `ray` brings it. The code of the objective and the data must be where
the actors run, as for any worker; the storage tells them the study.
"""

import logging
import os
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpo.errors import HpoError, InputError
from hpo.log import log
from hpo.runner.launch import LAUNCHED
from hpo.stopping import StopToken, handlers_kept

_ANSWER_SECONDS = 5.0
Work = Callable[[StopToken], Any]
"""One worker's share of the study, until there is nothing left or it is asked to stop."""


@dataclass(frozen=True, kw_only=True)
class _Worker:
    """An actor, and what Ray is to say of it: that it has begun, as one that waits for a GPU has not; its run's end."""

    actor: Any
    begun: Any
    run: Any


class RayWorkers:
    """`n` actors on the cluster at `address` (local: of this process alone), each with so many GPUs.

    One ends with its run: the next, which waits for a GPU, has its place.

    None: one, where the cluster has any. To an actor that asks for none Ray leaves all GPUs of its machine, of which
    every one would take the first, or hides them, so that it trains on the CPU.
    """

    def __init__(self, address: str, n: int, gpus: float | None, work: Work) -> None:
        """Raises InputError where there is no Ray, or none that answers."""
        try:
            import ray
        except ImportError as error:
            raise InputError("--ray needs Ray: pip install 'hpo[ray]'") from error
        self._n, self._gpus, self._work = n, gpus, work
        self._ray: Any = ray  # its decorators are beyond what can be typed
        self._running: list[_Worker] = []
        _require_answer(address)
        cores = max(n, len(os.sched_getaffinity(0)))
        where: dict[str, Any] = (
            {"num_cpus": cores, "include_dashboard": False} if address == "local" else {"address": address}
        )
        try:
            with handlers_kept():  # Ray's own of SIGTERM would end this process at once
                ray.init(**where, log_to_driver=False, logging_level=logging.ERROR)
        except SystemExit as error:  # Ray's handler, while it starts: nothing runs yet
            raise KeyboardInterrupt from error
        except Exception as error:  # ConnectionError, RuntimeError, ValueError, Ray's own
            line = (str(error).splitlines() or [type(error).__name__])[0]
            raise InputError(
                f"--ray {address}: no cluster answers there ({line}); write local, or its address"
            ) from error

    def start(self) -> None:
        there = self._ray.cluster_resources().get("GPU", 0)
        if self._gpus is None:
            self._gpus = 1.0 if there >= 1 else 0.0
            if self._gpus:
                log.info("each worker on Ray has a GPU of its own; --gpus-per-worker 0.5 has two share one")
        if self._gpus * self._n > there:
            wanted = f"{self._n} workers want {self._gpus:g} GPU each, and the cluster has {there:g}"
            log.warning(f"{wanted}: those without one wait until another worker ends")
        environ = {LAUNCHED: str(self._n), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        actor = self._ray.remote(_Actor).options(
            num_cpus=1,
            num_gpus=self._gpus,
            max_restarts=-1,
            max_task_retries=-1,
            max_concurrency=2,  # `stop` is heard while `run` runs
            runtime_env={"env_vars": environ},
        )
        actors = [actor.remote(str(Path.cwd())) for _ in range(self._n)]
        for each in actors:
            self._running.append(_Worker(actor=each, begun=each.begun.remote(), run=each.run.remote(self._work)))

    def look(self) -> bool:
        """Return whether any still works. Raises HpoError with what a worker said that has failed."""
        for worker in self._ended():
            try:
                self._ray.get(worker.run)
            except Exception as error:  # Ray wraps what the worker raised
                cause = getattr(error, "cause", None) or error
                if isinstance(cause, HpoError):
                    raise cause from error
                raise HpoError(f"a worker on Ray failed: {error}") from error
            self._ray.kill(worker.actor)
        return bool(self._running)

    def _ended(self) -> list[_Worker]:
        """Return those whose run has ended, which are no longer counted as running."""
        done = self._those_done([worker.run for worker in self._running])
        ended = [worker for worker in self._running if worker.run in done]
        self._running = [worker for worker in self._running if worker.run not in done]
        return ended

    def _those_done(self, asked: list[Any], seconds: float = 0.0) -> list[Any]:
        """Return what Ray has an answer to, once it has one to all, or so many seconds are over."""
        done: list[Any] = self._ray.wait(asked, num_returns=len(asked), timeout=seconds)[0] if asked else []
        return done

    def stop(self, seconds: float = 30.0) -> None:
        """Ask all to finish their epoch, wait for those that have begun, and leave the cluster."""
        begun = self._those_done([worker.begun for worker in self._running])
        for worker in self._running:
            worker.actor.stop.remote()
        self._those_done([worker.run for worker in self._running if worker.begun in begun], seconds)
        self._ray.shutdown()


def _require_answer(address: str) -> None:
    """Raise InputError where nothing listens at `host:port`: Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        return
    try:
        socket.create_connection((host, int(port)), timeout=_ANSWER_SECONDS).close()
    except OSError as error:
        raise InputError(f"--ray {address}: no cluster answers there ({error}); write local, or its address") from error


class _Actor:
    def __init__(self, folder: str) -> None:
        if Path(folder).is_dir():
            os.chdir(folder)  # relative addresses of storage and data mean the same as where the study was begun
        self._stop = StopToken()
        log.addHandler(logging.StreamHandler(sys.stdout))  # Ray shows what its workers print
        log.setLevel(logging.INFO)

    def begun(self) -> None:
        """Answer, as one can that has been placed."""

    def run(self, work: Work) -> Any:
        return work(self._stop)

    def stop(self) -> None:
        self._stop.ask(0, None)
