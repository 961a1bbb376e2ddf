"""Web servers of this machine as child processes: started, waited for until they answer, ended with all their own."""

import os
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress

from hpo.errors import HpoError, InputError

HOST = "127.0.0.1"
START_SECONDS = 90.0
"""How long a server may take until it answers: MLflow makes a new database's tables first."""
_END_SECONDS = 10.0
_LAST_LINES = 15


class Page:
    """A web server, in a session of its own, so that Ctrl-C reaches it through us."""

    def __init__(self, what: str, command: Sequence[str], port: int, environ: Mapping[str, str], stdin: str) -> None:
        """`what` names it in messages; `stdin` is what it reads first."""
        self.what, self.address = what, f"http://{HOST}:{port}"
        self._process = subprocess.Popen(
            command,
            env=os.environ | environ,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._said: deque[str] = deque(maxlen=_LAST_LINES)
        self._listening = threading.Thread(target=self._listen, daemon=True)
        self._listening.start()
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended already, which is said where it is waited for
            self._process.stdin.write(stdin)
            self._process.stdin.flush()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.strip() and not line.startswith((" ", "Traceback ")):  # of a traceback, only what it comes to
                self._said.append(line.rstrip())

    def wait_until_it_answers(self, path: str, stopping: Callable[[], bool]) -> None:
        """Return once it answers at `path`, or where `stopping` says so. Raises HpoError, with what it said last."""
        end = time.monotonic() + START_SECONDS
        while not stopping():
            self.require_running()
            if get(f"{self.address}{path}") is not None:
                return
            if time.monotonic() > end:
                raise HpoError(f"{self.what} has not answered for {START_SECONDS:g} s; it said last:\n{self.said()}")
            time.sleep(0.1)

    def require_running(self) -> None:
        """Raise HpoError where it has ended, with what it said last."""
        if (status := self._process.poll()) is not None:
            self._listening.join(timeout=1)
            raise HpoError(f"{self.what} has ended (exit status {status}); it said last:\n{self.said()}")

    def said(self) -> str:
        """Return the last that it wrote."""
        return "\n".join(f"  {line}" for line in list(self._said)) or "  nothing"

    def end(self) -> None:
        """End it, and all that it has started."""
        for number in (signal.SIGTERM, signal.SIGKILL):  # the second also for what the first has left of its group
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_END_SECONDS)
        self._listening.join(timeout=1)
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with suppress(OSError):
                    stream.close()


def get(address: str) -> str | None:
    """Return what a server answers; None: it does not, or says no."""
    try:
        with urllib.request.urlopen(address, timeout=5) as answer:
            text: str = answer.read().decode(errors="replace")
            return text
    except (OSError, urllib.error.HTTPError):
        return None


def port_of(wanted: int | None, default: int, taken: Collection[int] = ()) -> int:
    """Return the port that is `wanted`, or the first that is free from `default` on.

    Raises InputError where the wanted one is taken, or cannot be had.
    """
    if wanted is None:
        free = (port for port in range(default, 65536) if port not in taken and _why_not(port) is None)
        return next(free)
    if (why := _why_not(wanted)) is not None:
        raise InputError(f"--port: {HOST}:{wanted} cannot be had ({why}); give another, or none for the next free one")
    return wanted


def _why_not(port: int) -> str | None:
    """Return why nobody may listen on a port; None: it is free."""
    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((HOST, port))
        except (OSError, OverflowError) as error:
            return getattr(error, "strerror", None) or str(error)
    return None
