"""Whether hpo's TPE finds as much as plain Optuna's: ten functions and recorded curves, the best of 200 trials.

    python benchmarks/search_quality.py [--seeds 20] [--trials 200] [--asked 1 16] [--only NAME ...]

Both sides have the same space, seed and number of trials. Plain Optuna asks, evaluates and tells one trial at a time,
with `TPESampler(seed=)`; beside it, where several are asked for at once, Optuna with `constant_liar=True` that asks as
many before it tells them. hpo is the real `Search` over a storage in memory, `asked` trials at a time. For each task
the medians over the seeds, and Wilcoxon's signed rank test over them (two-sided); at the end over all tasks, of ranks
within each task, and the milliseconds that a trial took.
"""

import argparse
import logging
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any

import numpy as np
import optuna
from curves import FOLDER
from replay import NO_LOCK, Task, in_memory
from scipy.stats import rankdata, wilcoxon

from hpo.study.spec import Plugin, StudySpec


@dataclass(frozen=True)
class Problem:
    """A function of params, less being better, and its space as study.yaml has it."""

    name: str
    space: Mapping[str, Mapping[str, Any]]
    value: Callable[[Mapping[str, Any]], float]


def _cube(name: str, d: int, low: float, high: float, f: Callable[[np.ndarray], Any]) -> Problem:
    names = [f"x{i}" for i in range(d)]
    space = {each: {"type": "float", "low": low, "high": high} for each in names}
    return Problem(name, space, lambda params: float(f(np.array([params[each] for each in names]))))


def _ackley(x: np.ndarray) -> Any:
    return 20 + math.e - 20 * np.exp(-0.2 * np.sqrt((x**2).mean())) - np.exp(np.cos(2 * np.pi * x).mean())


def _griewank(x: np.ndarray) -> Any:
    return 1 + (x**2).sum() / 4000 - np.cos(x / np.sqrt(np.arange(1, len(x) + 1))).prod()


def _levy(x: np.ndarray) -> Any:
    w = 1 + (x - 1) / 4
    inner = ((w[:-1] - 1) ** 2 * (1 + 10 * np.sin(np.pi * w[:-1] + 1) ** 2)).sum()
    return np.sin(np.pi * w[0]) ** 2 + inner + (w[-1] - 1) ** 2 * (1 + np.sin(2 * np.pi * w[-1]) ** 2)


def _branin(x: np.ndarray) -> Any:
    a, b = 15 * x[0] - 5, 15 * x[1]
    return (b - 5.1 / (4 * np.pi**2) * a**2 + 5 / np.pi * a - 6) ** 2 + 10 * (1 - 1 / (8 * np.pi)) * np.cos(a) + 10


_ALPHA = np.array([1.0, 1.2, 3.0, 3.2])
_A = np.array(
    [[10, 3, 17, 3.5, 1.7, 8], [0.05, 10, 17, 0.1, 8, 14], [3, 3.5, 1.7, 10, 17, 8], [17, 8, 0.05, 10, 0.1, 14]]
)
_P = np.array(
    [
        [0.1312, 0.1696, 0.5569, 0.0124, 0.8283, 0.5886],
        [0.2329, 0.4135, 0.8307, 0.3736, 0.1004, 0.9991],
        [0.2348, 0.1451, 0.3522, 0.2883, 0.3047, 0.6650],
        [0.4047, 0.8828, 0.8732, 0.5743, 0.1091, 0.0381],
    ]
)


def _hartmann(x: np.ndarray) -> Any:
    return -(_ALPHA * np.exp(-(_A * (x - _P) ** 2).sum(axis=1))).sum()


def _network(params: Mapping[str, Any]) -> float:
    """As a network's error may look: a valley of learning rate and batch size that the optimizer moves, and a width."""
    best = {"sgd": -1.0, "adam": -3.0, "rmsprop": -3.3}[params["optimizer"]] + 0.2 * math.log2(params["batch"] / 32)
    width = math.log2(params["width"])
    noise = {"sgd": 0.05, "adam": 0.0, "rmsprop": 0.1}[params["optimizer"]]
    return float(
        (math.log10(params["rate"]) - best) ** 2 + 0.02 * (width - 7) ** 2 + 2 * params["dropout"] ** 2 + noise
    )


FUNCTIONS = (
    _cube("sphere, 5", 5, -5, 5, lambda x: ((x - 1) ** 2).sum()),
    _cube("ellipsoid, 6", 6, -5, 5, lambda x: (10 ** (np.arange(len(x)) / 2) * (x + 0.7) ** 2).sum()),
    _cube("rosenbrock, 4", 4, -2, 2, lambda x: (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()),
    _cube("rastrigin, 4", 4, -5.12, 5.12, lambda x: (x**2 - 10 * np.cos(2 * np.pi * x) + 10).sum()),
    _cube("ackley, 5", 5, -15, 30, _ackley),
    _cube("griewank, 4", 4, -60, 60, _griewank),
    _cube("levy, 5", 5, -10, 10, _levy),
    _cube("branin, 2", 2, 0, 1, _branin),
    _cube("hartmann, 6", 6, 0, 1, _hartmann),
    Problem(
        "a network's error, 5",
        {
            "rate": {"type": "float", "low": 1e-5, "high": 1.0, "log": True},
            "optimizer": {"type": "categorical", "choices": ["sgd", "adam", "rmsprop"]},
            "batch": {"type": "int", "low": 16, "high": 512, "log": True},
            "width": {"type": "int", "low": 8, "high": 1024, "log": True},
            "dropout": {"type": "float", "low": 0.0, "high": 0.6},
        },
        _network,
    ),
)


def recorded() -> list[Problem]:
    """Return the tasks of recorded curves: a trial's value is the best of the nearest configuration's curve."""
    tasks = [Task.read(file) for file in sorted(FOLDER.glob("*.json"))]
    return [Problem(task.name, task.searched, lambda p, task=task: float(task.nearest(p).min())) for task in tasks]


def of_optuna(problem: Problem, trials: int, seed: int, asked: int) -> float:
    """Return the best value of Optuna's own TPE."""
    space, keys = problem.space, {"constant_liar": True} if asked > 1 else {}
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed, **keys))
    while len(study.get_trials(deepcopy=False)) < trials:
        several = [study.ask() for _ in range(min(asked, trials - len(study.get_trials(deepcopy=False))))]
        for trial in several:
            for name, entry in space.items():
                if entry["type"] == "categorical":
                    trial.suggest_categorical(name, entry["choices"])
                elif entry["type"] == "int":
                    trial.suggest_int(name, entry["low"], entry["high"], log=entry.get("log", False))
                else:
                    trial.suggest_float(name, entry["low"], entry["high"], log=entry.get("log", False))
        for trial in several:
            study.tell(trial, problem.value(trial.params))
    return study.best_value


def of_hpo(problem: Problem, trials: int, seed: int, asked: int) -> float:
    """Return the best value of hpo's search."""
    spec = StudySpec(
        name="quality",
        objective="function",
        storage=NO_LOCK,
        trials=trials,
        epochs=1,
        seed=seed,
        sampler=Plugin(name="tpe"),
        pruner=Plugin(name="none"),
    )
    with in_memory(spec, problem.space) as (inner, (search,)):
        while claims := search.ask_up_to(asked):
            with search.together():
                for claim in claims:
                    search.complete(claim.number, problem.value(claim.params))
        values = [trial.value for trial in inner.get_all_trials(0, deepcopy=False)]
    assert len(values) == trials
    return min(value for value in values if value is not None)


def compare(problems: Sequence[Problem], options: argparse.Namespace) -> None:
    sides: dict[str, Callable[[Problem, int], float]] = {}
    for asked in options.asked:
        at_once = f", {asked} at once" if asked > 1 else ""
        sides[f"Optuna{at_once}"] = lambda p, seed, n=asked: of_optuna(p, options.trials, seed, n)
        sides[f"hpo{at_once}"] = lambda p, seed, n=asked: of_hpo(p, options.trials, seed, n)
    pairs = [(ours, ours.replace("hpo", "Optuna")) for ours in sides if ours.startswith("hpo")]
    heads = [*sides, *(f"p: {ours}" for ours, _ in pairs)]
    print("| task | " + " | ".join(heads) + " |\n" + "|---" * (len(heads) + 1) + "|")
    seconds = dict.fromkeys(sides, 0.0)
    ranks: dict[str, list[float]] = {side: [] for side in sides}
    for problem in problems:
        values: dict[str, list[float]] = {side: [] for side in sides}
        for seed in range(options.seeds):
            for side, run in sides.items():
                start = time.process_time()
                values[side].append(run(problem, seed))
                seconds[side] += time.process_time() - start
        of_all = rankdata([value for side in sides for value in values[side]]).reshape(len(sides), -1)
        for side, its in zip(sides, of_all, strict=True):
            ranks[side] += list(its)
        cells = [f"{np.median(values[side]):.5g}" for side in sides]
        cells += [_p(values[ours], values[other]) for ours, other in pairs]
        print(f"| {problem.name} | {' | '.join(cells)} |", flush=True)
    n = len(problems) * options.seeds
    for ours, other in pairs:
        better, worse = (np.sign(np.subtract(ranks[other], ranks[ours])) == sign for sign in (1, -1))
        print(
            f"{ours} against {other}, {n} pairs of ranks: better in {better.sum()}, worse in {worse.sum()}, "
            f"p = {_p(ranks[ours], ranks[other])}"
        )
    for side in sides:
        print(f"{side}: {1000 * seconds[side] / n / options.trials:.1f} ms of CPU a trial")


def _p(ours: Sequence[float], theirs: Sequence[float]) -> str:
    if np.array_equal(ours, theirs):
        return "equal"
    return f"{wilcoxon(ours, theirs).pvalue:.2g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--asked", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--only", nargs="*", default=[])
    options = parser.parse_args()
    logging.getLogger("hpo").setLevel(logging.ERROR)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore")
    problems = [each for each in (*FUNCTIONS, *recorded()) if not options.only or each.name in options.only]
    print(f"{date.today()}, Optuna {optuna.__version__}, {options}")
    compare(problems, options)


if __name__ == "__main__":
    main()
