"""What tracking costs: the same study without it, in SQLite, on a server over HTTP, and on a server that never answers.

    python -m benchmarks.tracking [--rounds 3] [--trials 256] [--stack 64] [--only WHERE ...]

California Housing, 8-24-24-1, 50 epochs, random sampler, whole `hpo run` commands in empty folders, in turn. `search`
is the time in which trials ran, `command` that of the whole command: start, search, refit, export, and sending all that
is left to send. `its CPU` are the CPU seconds of the process that trains, `of others` those of the one that sends: on a
busy machine they say more than the time. Medians, with the smallest and largest; the ratio is to the run without
tracking of the same round.
"""

import argparse
import os
import platform
import re
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from datetime import date, datetime
from pathlib import Path

from tests.servers import MlflowServer

STUDY = """
name: {name}
objective: california_housing
tracking: {tracking}
trials: {trials}
epochs: 50
stack: {stack}
sampler: random
pruner: none
params:
  learning_rate: {{type: float, low: 3e-4, high: 1e-2, log: true}}
  n_hidden1: 24
  n_hidden2: 24
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--trials", type=int, default=256)
    parser.add_argument("--stack", type=int, default=64)
    parser.add_argument("--only", nargs="*", default=[], help="as in the table; `off` is always among them")
    options = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with tempfile.TemporaryDirectory() as name, socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()  # it takes connections and never answers
        folder, server = Path(name), MlflowServer(Path(name) / "server")
        addresses = {
            "off": "off",
            "SQLite": "sqlite:///mlflow.db",
            "a server over HTTP": server.address,
            "a server that never answers": f"http://127.0.0.1:{silent.getsockname()[1]}",
        }
        if options.only:
            addresses = {each: address for each, address in addresses.items() if each in ("off", *options.only)}
        taken: dict[str, list[tuple[float, ...]]] = {each: [] for each in addresses}
        try:
            for number in range(options.rounds + 1):
                for each, address in addresses.items():
                    where = folder / f"{number}-{each}"
                    study = STUDY.format(
                        name=f"s{number}", tracking=address, trials=options.trials, stack=options.stack
                    )
                    seconds = run(where, study)
                    said = ", ".join(f"{one:.1f}" for one in seconds)
                    print(f"round {number}, {each}: {said}", file=sys.stderr, flush=True)
                    if number > 0:  # the first round warms up
                        taken[each].append(seconds)
        finally:
            server.stop()
    print(
        f"{date.today()}, {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, {options}"
    )
    print("| tracking | search, s | to off | command, s | to off | its CPU, s | to off | of others, s |")
    print("|---|---|---|---|---|---|---|---|")
    for each, rounds in taken.items():
        cells = []
        for which in range(3):
            times = [seconds[which] for seconds in rounds]
            ratios = [mine / off[which] for mine, off in zip(times, taken["off"], strict=True)]
            cells += [spread(times, 1), spread(ratios, 2)]
        cells.append(spread([seconds[3] for seconds in rounds], 1))
        print(f"| {each} | {' | '.join(cells)} |")


RUN = """
import resource, sys
from hpo.cli.app import main
sys.argv = ["hpo", "run", "study.yaml"]
try:
    main()
finally:
    for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
        used = resource.getrusage(who)
        print("CPU", used.ru_utime + used.ru_stime)
"""


def run(folder: Path, study: str) -> tuple[float, ...]:
    """Return the seconds that a study's search and the whole command took, and CPU seconds: its own, its children's."""
    folder.mkdir()
    (folder / "study.yaml").write_text(study)
    start = time.perf_counter()
    done = subprocess.run((sys.executable, "-c", RUN), cwd=folder, capture_output=True, text=True)
    whole = time.perf_counter() - start
    if done.returncode != 0:
        raise SystemExit(done.stdout + done.stderr)
    cpu = [float(seconds) for seconds in re.findall(r"^CPU (.*)$", done.stdout, re.MULTILINE)]
    with closing(sqlite3.connect(folder / "mlruns" / "optuna.db")) as database:
        spans = database.execute("select min(datetime_start), max(datetime_complete) from trials").fetchone()
    first, last = map(datetime.fromisoformat, spans)
    return (last - first).total_seconds(), whole, *cpu


def spread(values: Sequence[float], digits: int) -> str:
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


if __name__ == "__main__":
    main()
