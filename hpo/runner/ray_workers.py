"""Workers as Ray actors: Ray places them, gives each its share of a GPU, and begins again those that die.

Ray is imported when it is first used; the extra `ray` brings it. The code of the objective and the data must be where
the actors run, as for any worker; the storage tells them the study.
"""

import logging
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hpo.errors import HpoError, InputError
from hpo.log import log
from hpo.runner.launch import LAUNCHED
from hpo.stopping import StopToken, handlers_kept

_ANSWER_SECONDS = 5.0
Work = Callable[[StopToken], Any]
"""One worker's share of the study, until there is nothing left or it is asked to stop."""


class RayWorkers:
    """`n` actors on the cluster at `address` (local: of this process alone), each with so many GPUs.

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
        self._running: list[Any] = []
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
        if self._gpus is None:
            self._gpus = 1.0 if self._ray.cluster_resources().get("GPU", 0) >= 1 else 0.0
            if self._gpus:
                log.info("each worker on Ray has a GPU of its own; --gpus-per-worker 0.5 has two share one")
        environ = {LAUNCHED: str(self._n), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        actor = self._ray.remote(_Actor).options(
            num_cpus=1,
            num_gpus=self._gpus,
            max_restarts=-1,
            max_task_retries=-1,
            max_concurrency=2,  # `stop` is heard while `run` runs
            runtime_env={"env_vars": environ},
        )
        self._actors = [actor.remote(str(Path.cwd())) for _ in range(self._n)]
        self._running = [each.run.remote(self._work) for each in self._actors]

    def look(self) -> bool:
        """Return whether any still works. Raises HpoError with what a worker said that has failed."""
        if not self._running:
            return False
        done, self._running = self._ray.wait(self._running, num_returns=len(self._running), timeout=0)
        for reference in done:
            try:
                self._ray.get(reference)
            except Exception as error:  # Ray wraps what the worker raised
                cause = getattr(error, "cause", None) or error
                if isinstance(cause, HpoError):
                    raise cause from error
                raise HpoError(f"a worker on Ray failed: {error}") from error
        return bool(self._running)

    def stop(self, seconds: float = 30.0) -> None:
        """Ask all to finish their epoch, wait, and leave the cluster."""
        for actor in self._actors if self._running else []:
            actor.stop.remote()
        if self._running:
            self._ray.wait(self._running, num_returns=len(self._running), timeout=seconds)
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

    def run(self, work: Work) -> Any:
        return work(self._stop)

    def stop(self) -> None:
        self._stop.ask(0, None)
