"""Processes of their own without the ten seconds of CPU time in which each would import PyTorch.

One process imports what a run needs and then only forks itself. Each fork is a process as `python -m hpo` is: with its
own pipes, environment, folder, signals and exit status; `Popen` here is subprocess's, whose child was forked there.
Its workers, and the process that sends to MLflow, are forked so too: a fork that runs `hpo` has a child to itself that
has imported the same and forks for it, since only what descends from a process can be made its child.

It is not for tests of what is imported, or of what the environment does to that (PYTHONPATH): those start Python.
"""

import array
import atexit
import ctypes
import functools
import gc
import importlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil

IMPORTED = (
    "alembic",
    "hpo.cli.commands",
    "hpo.runner.study",
    "hpo.tracking.sender",
    "mlflow",
    "mlflow.data.dataset",
    "mlflow.store.tracking.sqlalchemy_store",
    "mlflow.tracking.client",
    "sklearn.ensemble",
    "sklearn.impute",
    "sqlalchemy.dialects.postgresql",
    "sqlalchemy.dialects.sqlite",
    "torch._functorch.aot_autograd",
    "torch._inductor.codecache",
    "torch.export._trace",
)
"""What a run would import, some of it inside of functions."""
WORKS = sys.platform == "linux"
"""Whether processes can be forked so, and given to this one; elsewhere Python is started."""
SUBREAPER = 36  # prctl's PR_SET_CHILD_SUBREAPER
SET_NAME = 15  # PR_SET_NAME
_NAME = "hpo-forks"
"""Of a process that only forks."""


class Popen(subprocess.Popen):  # type: ignore[type-arg]
    """A fork of the warm process that runs `hpo ARGUMENTS`, or `code` with them, as a child of this process."""

    def __init__(
        self,
        *arguments: object,
        code: str | None = None,
        environ: Mapping[str, str] = {},
        folder: Path | None = None,
        stdin: int = subprocess.DEVNULL,
        stdout: int = subprocess.PIPE,
        stderr: int = subprocess.PIPE,
    ) -> None:
        self._wanted = {
            "arguments": [str(each) for each in arguments],
            "code": code,
            "environ": os.environ | environ,
            "folder": str(folder or Path.cwd()),
        }
        command = [sys.executable, *(["-m", "hpo"] if code is None else ["-c", code]), *self._wanted["arguments"]]
        where = {"cwd": self._wanted["folder"], "env": self._wanted["environ"]}
        super().__init__(command, text=True, stdin=stdin, stdout=stdout, stderr=stderr, **where)

    def _execute_child(self, *arguments: Any) -> None:
        """Fork there instead of here. subprocess's own arguments: ten of the command, then its files, ours and its."""
        if not WORKS:
            super()._execute_child(*arguments)  # type: ignore[misc]
            return
        _fork_child(self, _warm(os.getpid()).forks, self._wanted, arguments)


def run(code: str, *arguments: object, folder: Path | None = None) -> "subprocess.CompletedProcess[str]":
    """Run a program to its end, as `python -c CODE ARGUMENTS` in the current folder, or in `folder`."""
    process = Popen(*arguments, code=code, folder=folder)
    out, err = process.communicate(timeout=200)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def children(pid: int) -> list[psutil.Process]:
    """Return what a process has started, and what that has, but for those that are there to fork."""
    return [each for each in psutil.Process(pid).children(recursive=True) if each.name() != _NAME]


def workers(pid: int) -> list[psutil.Process]:
    """Return the workers that a process has started."""
    return [each for each in children(pid) if each.name().startswith("hpo-worker") or "worker" in each.cmdline()]


class _Popen(subprocess.Popen):  # type: ignore[type-arg]
    """In the place of subprocess's: what runs `hpo`, or sends to MLflow, is forked as well."""

    def _execute_child(self, *arguments: Any) -> None:
        command, environ = list(arguments[0]), arguments[6]
        wanted = {
            "environ": dict(os.environ if environ is None else environ),
            "folder": os.fspath(arguments[5] or os.getcwd()),
        }
        if command[:3] == [sys.executable, "-m", "hpo"]:
            wanted |= {"arguments": command[3:], "code": None}
        elif command[:3] in ([sys.executable, "-P", "-c"], [sys.executable, "-I", "-c"]):
            wanted |= {"arguments": command[4:], "code": command[3]}
        if not WORKS or "code" not in wanted or min(arguments[i] for i in _CHILDS) < 0:
            super()._execute_child(*arguments)  # type: ignore[misc]
        else:
            _fork_child(
                self, _forks or _warm(os.getpid()).forks, wanted | {"is_session": arguments[_NEW_SESSION]}, arguments
            )


def _run(command: list[str], *, cwd: Any, check: bool, **how: Any) -> "subprocess.CompletedProcess[str]":
    """Run it to its end; what it writes is captured."""
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with _Popen(command, cwd=cwd, text=True, **pipes) as process:
        out, err = process.communicate(timeout=200)
    return subprocess.CompletedProcess(command, process.returncode, out, err)


FORKING = SimpleNamespace(**{**vars(subprocess), "Popen": _Popen, "run": _run})
"""In the place of `subprocess` in a module of hpo; its `run` is only for what `hpo.export.parity` runs."""
_CHILDS = (10, 13, 15)
"""Of `_execute_child`'s arguments: the command's stdin, stdout, stderr; theirs and ours are 10 to 15."""
_NEW_SESSION = 21


def _fork_child(process: Any, forks: "_Forks", wanted: dict[str, Any], arguments: Any) -> None:
    """Do what `_execute_child` would do for `process`."""
    try:
        process.pid = forks.fork(wanted, [arguments[i] for i in _CHILDS])
        process._child_created = True
    finally:
        process._close_pipe_fds(*arguments[10:16])


class _Warm:
    """The process that forks for this one."""

    def __init__(self) -> None:
        ours, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        command = [sys.executable, "-m", "tests.warm", str(other.fileno())]
        root = str(Path(__file__).parent.parent)
        self._process = subprocess.Popen(command, cwd=root, pass_fds=[other.fileno()], stdin=subprocess.DEVNULL)
        other.close()
        self.forks = _Forks(ours)
        atexit.register(self._end)

    def _end(self) -> None:
        self.forks.close()
        self._process.wait(30)


class _Forks:
    """Our end of the socket to a process that forks for this one."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._lock = threading.Lock()

    def fork(self, wanted: dict[str, Any], files: list[int]) -> int:
        """Return the id of a new process, which is this one's child."""
        with self._lock:
            return self._fork(json.dumps(wanted).encode(), files)

    def _fork(self, content: bytes, files: list[int]) -> int:
        # it is a grandchild of the warm process whose parent ends at once: the system gives it to the nearest process
        # that asks for such, which is this one, but only now, lest it be given others' orphans too
        _prctl(SUBREAPER, 1)
        try:
            socket.send_fds(self._socket, [struct.pack("=I", len(content))], files)
            self._socket.sendall(content)
            (pid,) = struct.unpack("=i", _received(self._socket, 4))
        finally:
            _prctl(SUBREAPER, 0)
        return int(pid)

    def close(self) -> None:
        self._socket.close()


_forks: _Forks | None = None
"""In a fork: what forks for it."""


@functools.cache
def _warm(_pid: int) -> _Warm:
    """Return the warm process of this one, started when it is first asked for."""
    return _Warm()


def _prctl(option: int, value: Any) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")


def _received(connection: socket.socket, n: int) -> bytes:
    content = b""
    while len(content) < n:
        part = connection.recv(n - len(content))
        if not part:
            raise EOFError("the warm process has ended; see its error above")
        content += part
    return content


def _serve(connection: socket.socket) -> None:
    """Fork for each request, until there is nobody to ask; a fork does what is wanted of it, and returns."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for those who were forked
    while True:
        try:
            head, files = _head(connection)
        except EOFError:
            os._exit(0)
        wanted = json.loads(_received(connection, struct.unpack("=I", head)[0]))
        reading, writing = os.pipe()
        between = _fork()
        if between == 0:
            pid = _fork()
            if pid == 0:
                os.close(reading)
                os.close(writing)
                connection.close()
                return _become(wanted, files)
            os.write(writing, struct.pack("=i", pid))
            os._exit(0)
        os.waitpid(between, 0)
        connection.sendall(os.read(reading, 4))
        for file in (reading, writing, *files):
            os.close(file)


def _fork() -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of threads, which the imported have at most for waiting
        return os.fork()


def _head(connection: socket.socket) -> tuple[bytes, list[int]]:
    files = array.array("i")
    content, more, _, _ = connection.recvmsg(4, socket.CMSG_LEN(3 * files.itemsize))
    if not content:
        raise EOFError
    for _, _, data in more:
        files.frombytes(data[: len(data) - len(data) % files.itemsize])
    return content, list(files)


def _become(wanted: dict[str, Any], files: list[int]) -> None:
    """Make this fork what `python -m hpo` would be, or `python -c CODE`; and before, one more that forks for it."""
    global _forks
    ours, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    if _fork() == 0:
        os.setsid()
        ours.close()
        for file in files:
            os.close(file)
        for number in (0, 1):
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
        _prctl(SET_NAME, _NAME.encode())
        _serve(other)
        return
    other.close()
    _forks = _Forks(ours)
    subprocess.Popen = _Popen  # type: ignore[misc]
    if wanted.get("is_session"):
        os.setsid()
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _prctl(SET_NAME, f"hpo-{'code' if wanted['code'] is not None else ' '.join(wanted['arguments'])}"[:15].encode())
    os.environ.clear()
    os.environ.update(wanted["environ"])
    os.chdir(wanted["folder"])
    sys.path[0] = "" if wanted["code"] is not None else wanted["folder"]
    sys.argv = ["hpo" if wanted["code"] is None else "-c", *wanted["arguments"]]
    import numpy

    numpy.random.seed()  # as it would be; a fork has its parent's
    if wanted["code"] is None:
        from hpo.cli.app import main

        main()
    else:
        exec(compile(wanted["code"], "<string>", "exec"), {"__name__": "__main__"})
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        os._exit(0)  # to take all of PyTorch's modules down takes a second; what hpo itself leaves is taken down


if __name__ == "__main__":
    for each in IMPORTED:
        importlib.import_module(each)
    gc.freeze()
    _serve(socket.socket(fileno=int(sys.argv[1])))
