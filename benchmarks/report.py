"""Seconds that `hpo report` takes, and a browser until its page is there, of studies with many made-up trials.

    python benchmarks/report.py [--trials 100 1000 10000]

The trials have three params, 20 epochs of three metrics, three in ten of them pruned; they lie in SQLite. `page`: from
the command's start to its end, and its CPU seconds, with the objective's data loaded and baselines fitted. `open`: to
the `load` event in headless Chromium; `figures`: how long it takes then to draw every one of them.
"""

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from selenium.webdriver.support.ui import WebDriverWait

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.browser import chromium

MAKE = """
import random, sys; random.seed(0)
from datetime import datetime, timedelta
from pathlib import Path
from optuna.trial import TrialState, create_trial
from hpo.runner.opening import open_or_make
from hpo.runner.prepare import prepare

search = open_or_make(prepare(Path("many.yaml")))
of = {dimension.name: dimension.distribution for dimension in search.space.dimensions}
trials, start = [], datetime.now() - timedelta(days=1)
for slot in range(int(sys.argv[1])):
    params = {"learning_rate": 10 ** random.uniform(-3.4, -2.4), "weight_decay": 10 ** random.uniform(-5.9, -1.1),
              "n_hidden": random.randint(8, 64)}
    floor = abs(params["learning_rate"] - 2e-3) * 50 + random.random() * 0.1 + 0.1
    pruned = random.random() < 0.3
    curve = [floor + 1 / (epoch + 1) for epoch in range(5 if pruned else 20)]
    attrs = {"place": slot, "seed": slot, "best_epoch": len(curve) - 1,
             "curves": {"valid_loss": curve, "train_loss": curve, "valid_accuracy": [1 - x / 2 for x in curve]}}
    state, told = TrialState.PRUNED if pruned else TrialState.COMPLETE, dict(enumerate(curve))
    of_trial = {"intermediate_values": told, "user_attrs": attrs}
    trial = create_trial(state=state, value=curve[-1], params=params, distributions=of, **of_trial)
    trial.datetime_start = start + timedelta(seconds=slot)
    trial.datetime_complete = trial.datetime_start + timedelta(seconds=random.uniform(1, 8))
    trials.append(trial)
search.study.add_trials(trials)
search.close()
"""
STUDY = "objective: breast_cancer\nmetric: loss\nepochs: 20\ntracking: off\n"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--trials", type=int, nargs="+", default=[100, 1000, 10_000])
    counts = parser.parse_args().trials
    os.environ |= {"OMP_NUM_THREADS": "1", "MLFLOW_DISABLE_TELEMETRY": "true"}
    print(
        f"{time.strftime('%Y-%m-%d')}, {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    )
    print("| trials | page | CPU | open | figures | MB |\n|---|---|---|---|---|---|")
    for n in counts:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            (folder / "many.yaml").write_text(f"{STUDY}trials: {n}\n")
            command(folder, "-c", MAKE, str(n))
            page, cpu = command(folder, "-m", "hpo", "report", "many.yaml", "--out", "page.html")
            opened, drawn = in_browser(folder / "page.html")
            size = (folder / "page.html").stat().st_size / 1e6
        print(f"| {n:,} | {page:.1f} s | {cpu:.1f} s | {opened:.1f} s | {drawn:.1f} s | {size:.1f} |", flush=True)


def command(folder: Path, *arguments: str) -> tuple[float, float]:
    """Run Python in `folder`; return the seconds, and the CPU seconds."""
    start, before = time.perf_counter(), os.times()
    subprocess.run([sys.executable, *arguments], cwd=folder, check=True, capture_output=True)
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return time.perf_counter() - start, cpu


def in_browser(page: Path) -> tuple[float, float]:
    """Return the seconds until the page is there, by the browser's own clock, and those to draw its figures."""
    loaded = "return performance.getEntriesByType('navigation')[0].loadEventEnd"
    with chromium() as browser:
        browser.get(page.as_uri())
        opened = WebDriverWait(browser, 60).until(lambda browser: browser.execute_script(loaded)) / 1000
        start = time.perf_counter()
        browser.execute_script("plots.forEach(draw)")
        return opened, time.perf_counter() - start


if __name__ == "__main__":
    main()
