"""Trials per minute of a trivial objective, with 1 to 16 worker processes, beside plain Optuna's.

    python benchmarks/workers.py [--storage sqlite postgres] [--workers 1 2 4 8 16] [--trials 160] [--rounds 3]

Each trial asks for two params, reports ten steps and may be pruned; both sides use TPE and the median pruner, and the
same budget. Time counts from when all processes are ready. The sides take turns, each first in every other round; paces
are medians over the rounds, the ratio is the median of the rounds' ratios. Plain Optuna is `study.optimize` with
`n_trials` divided among the processes, on a database whose tables were made before; a process that fails is counted.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

FUNCTION = """
import optuna
def f(trial):
    x, y = trial.suggest_float("x", -5, 5), trial.suggest_float("y", -5, 5)
    for step in range(10):
        trial.report(x * x + y * y + 10 - step, step)
        if trial.should_prune():
            raise optuna.TrialPruned()
    return x * x + y * y
"""
READY = """
print("ready", flush=True)
sys.stdin.readline()
"""
OURS = f"""
import math, sys
{FUNCTION}
from hpo.search.opening import open_search
from hpo.study.space import FreeSpace
from hpo.study.spec import StudySpec
spec = StudySpec(name="s", objective="f", storage=sys.argv[1], trials=int(sys.argv[2]), epochs=10)
search = open_search(spec, FreeSpace(fixed={{}}, dimensions=()), "value", maximize=False)
{READY}
while (claim := search.ask()) is not None:
    _, value = search.call(claim.number, f, lambda step, value: None)
    search.prune(claim.number) if value is None else search.complete(claim.number, value)
search.close()
"""
PLAIN = f"""
import sys
import optuna
{FUNCTION}
optuna.logging.set_verbosity(optuna.logging.ERROR)
pruner = optuna.pruners.MedianPruner(n_startup_trials=10, n_warmup_steps=2)
study = optuna.create_study(study_name="s", storage=sys.argv[1], load_if_exists=True, pruner=pruner)
{READY}
study.optimize(f, n_trials=int(sys.argv[2]) // int(sys.argv[3]))
"""
SIDES = (("plain", PLAIN), ("ours", OURS))
MAKE = "import optuna, sys; optuna.create_study(study_name='s', storage=sys.argv[1])"


def measure(code: str, address: str, n: int, trials: int) -> tuple[float, int]:
    """Return the trials per minute, and how many processes failed."""
    command = [sys.executable, "-W", "ignore", "-c", code, address, str(trials), str(n)]
    processes = [
        subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        for _ in range(n)
    ]
    for process in processes:
        process.stdout.readline()
    begun = time.perf_counter()
    for process in processes:
        if process.poll() is None:
            process.stdin.write("go\n")
            process.stdin.flush()
    for process in processes:
        process.wait()
    return trials / (time.perf_counter() - begun) * 60, sum(process.returncode != 0 for process in processes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--storage", nargs="+", choices=("sqlite", "postgres"), default=["sqlite", "postgres"])
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 2, 4, 8, 16])
    parser.add_argument("--trials", type=int, default=160)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    print("| storage | workers | plain Optuna, trials per minute | failed | hpo, trials per minute | failed | ratio |")
    print("|---|---|---|---|---|---|---|")
    slower = 0
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        server = None
        if "postgres" in given.storage:
            from tests.servers import postgres

            server = stack.enter_context(postgres(folder / "postgres" / "data"))
        for kind in given.storage:
            for n in given.workers:
                paces: dict[str, list[float]] = {"plain": [], "ours": []}
                failed = {"plain": 0, "ours": 0}
                for round in range(given.rounds):
                    for side, code in SIDES if round % 2 == 0 else reversed(SIDES):
                        if kind == "postgres":
                            address = server.database().replace("postgresql:", "postgresql+psycopg:")
                        else:
                            address = f"sqlite:///{folder}/{side}-{n}-{round}.db"
                        if side == "plain":
                            subprocess.run([sys.executable, "-W", "ignore", "-c", MAKE, address], check=True)
                        pace, lost = measure(code, address, n, given.trials)
                        paces[side].append(pace)
                        failed[side] += lost
                ratio = median(ours / plain for plain, ours in zip(paces["plain"], paces["ours"], strict=True))
                slower += ratio < 1 or failed["ours"] > 0
                print(
                    f"| {kind} | {n} | {median(paces['plain']):.0f} | {failed['plain']} "
                    f"| {median(paces['ours']):.0f} | {failed['ours']} | {ratio:.2f} |",
                    flush=True,
                )
    sys.exit(1 if slower else 0)


if __name__ == "__main__":
    main()
