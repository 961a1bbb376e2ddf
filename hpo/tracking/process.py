"""Our end of the process that talks to MLflow (`hpo.tracking.sender`): started when needed, and again if it dies."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from typing import IO, Any

from hpo.log import log
from hpo.tracking.items import Answer, Item

_SERVE = "import json, sys; config = json.loads(sys.stdin.readline()); sys.path[:] = config.pop('path')\n"
_SERVE += "from hpo.tracking.sender import serve; serve(config)"
_ENVIRON = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # its own 7 retries of 120 s would hold up the study's end
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
"""What MLflow is to do, unless the environment says otherwise."""


class RunsProcess:
    """`hpo.tracking.runs.Runs` in a process of its own. One thread uses it; any may `kill` it."""

    END_SECONDS = 5.0

    def __init__(self, uri: str, study: str, *, making: str, adopts: bool, tags: Mapping[str, str]) -> None:
        self._config = {"uri": uri, "study": study, "making": making, "adopts": adopts, "tags": dict(tags)}
        self._process: subprocess.Popen[str] | None = None
        self._errors: IO[bytes] | None = None
        self.killed = False
        """Whether MLflow was given up: nothing is sent any more."""

    def _start(self) -> None:
        """Start the process, unless it runs: it needs a second or two to import MLflow. Raises OSError."""
        if self._process is not None or self.killed:
            return
        self.close()
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (open while the process runs)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", _SERVE],
            env=_ENVIRON | os.environ,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            encoding="utf-8",
            start_new_session=True,  # a Ctrl-C is ours: what is told until the end is still to be sent
        )
        self._ask(self._config | {"path": [str(folder) for folder in sys.path]})

    def attempt(self, item: Item) -> Answer:
        """Have `item` sent, and log what is to be logged of it. Raises OSError where the process cannot do it.

        A process that was killed since the last item is started again.
        """
        ran = self._process is not None
        try:
            return self._attempt(item)
        except OSError as error:
            if not ran or self.killed:
                raise
            log.warning(f"tracking: {error}; it is started again")
            return self._attempt(item | {"is_new": False})

    def _attempt(self, item: Item) -> Answer:
        self._start()
        answers = self._ask(item)
        while (line := answers.readline()).endswith("\n"):
            message = json.loads(line)
            if "answer" in message:
                return Answer(**message["answer"])
            level, text = message["log"]
            log.log(level, "%s", text)
        raise self._died()

    def _ask(self, message: dict[str, Any]) -> IO[str]:
        """Write `message`; return where the answer is read."""
        process = self._process
        if process is None or process.stdin is None or process.stdout is None:
            raise OSError("the process that sends was stopped")
        try:
            process.stdin.write(json.dumps(message) + "\n")
            process.stdin.flush()
        except OSError as error:
            raise self._died() from error
        return process.stdout

    def _died(self) -> OSError:
        said = b""
        if self._errors is not None:
            self._errors.seek(0)
            said = b"".join(self._errors.read().rstrip().splitlines()[-1:])
        status = self.close()
        how = f"was killed by signal {-status}" if status is not None and status < 0 else f"ended with status {status}"
        return OSError(f"the process that sends {how}" + (f": {said.decode(errors='replace')}" if said else ""))

    def kill(self) -> None:
        """End the process amid a call. It is not started again."""
        self.killed = True
        if (process := self._process) is not None:
            process.kill()

    def close(self) -> int | None:
        """End the process, where there is one, and return its exit status; the next item starts another."""
        process, self._process = self._process, None
        errors, self._errors = self._errors, None
        if errors is not None:
            errors.close()
        if process is None:
            return None
        for pipe in (process.stdin, process.stdout):
            with suppress(OSError):
                pipe.close()  # type: ignore[union-attr]
        try:
            return process.wait(self.END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()
