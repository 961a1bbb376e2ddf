"""Our study of each task, as committed: the test metrics of the model that it chose, beside the bar.

    python benchmarks/quality.py [--only STUDY ...]

Validation chooses; the test set is read once (`n_test_evaluations` in the bundle shows it). Each study runs alone, from
nothing, in a folder of its own, with `tracking: off` and one thread; seconds are of the whole command, CPU seconds of
its process. Data comes from HPO_DATA_HOME.
"""

import argparse
import json
import resource
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from studies import run_study

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Bar:
    """A study's test metric and what it is to reach: at least, or (`less`) at most."""

    study: str
    metric: str
    bar: float
    less: bool = False


BARS = (
    Bar("breast_cancer", "accuracy", 0.96),
    Bar("synthetic_moons", "accuracy", 0.98),
    Bar("california_housing", "rmse", 0.51, less=True),
    Bar("california_embeddings", "rmse", 0.455, less=True),
    Bar("mnist", "accuracy", 0.983),
    Bar("fashion_mnist", "accuracy", 0.90),
    Bar("covertype", "accuracy", 0.93),
)


def run(bar: Bar, folder: Path) -> bool:
    """Run the study, print its line; return whether it reached its bar."""
    begun, cpu = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    summary = run_study(bar.study, folder)
    seconds, after = time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_seconds = after.ru_utime + after.ru_stime - cpu.ru_utime - cpu.ru_stime
    about = json.loads((folder / summary["bundle"] / "bundle.json").read_text())
    if about["n_test_evaluations"] != 1:
        raise SystemExit(f"{bar.study}: the test set was read {about['n_test_evaluations']} times")
    ours, trials = summary["test"][bar.metric], summary["trials"]
    reached = ours <= bar.bar if bar.less else ours >= bar.bar
    budget = f"{sum(trials.values())} ({trials['pruned']} pruned)"
    sign = "<=" if bar.less else ">="
    mark = "" if reached else " **no**"
    print(
        f"| {bar.study} | {budget} | {bar.metric} | {summary['best']['value']:.4f} | {sign} {bar.bar} "
        f"| {ours:.4f}{mark} | {seconds:.0f} | {cpu_seconds:.0f} |",
        flush=True,
    )
    return reached


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = [bar.study for bar in BARS]
    parser.add_argument("--only", nargs="+", choices=known, metavar="STUDY", help=", ".join(known))
    arguments = parser.parse_args()
    print("| study | trials | metric | its objective's value on validation | bar | test | seconds | CPU seconds |")
    print("|---|---|---|---|---|---|---|---|")
    missed = 0
    for bar in BARS:
        if arguments.only is None or bar.study in arguments.only:
            with tempfile.TemporaryDirectory() as folder:
                missed += not run(bar, Path(folder))
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
