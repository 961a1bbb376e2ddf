"""The keys of study.yaml as a frozen, typed `StudySpec`; `hpo.study.draft` reads a file into one.

Each key's docstring says what it is, its values, its default and an example; pydantic has it as the field's
`description`, from which the documentation is made.
"""

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, field_validator, model_validator

from hpo.study.constraints import checked
from hpo.study.goals import Direction, directions_of, metrics_of
from hpo.study.plugins import PRUNERS, SAMPLERS, Plugin, named, one_of
from hpo.study.ranges import Categorical, FloatRange, Frozen, IntRange, Scalar, Searched, parse_param
from hpo.study.spec_parts import Confirm, Loading, Stop, Time, confirm_of, stop_of, wrong_names
from hpo.study.value import check_value

__all__ = [
    "KEYS",
    "LONGEST_NAME",
    "PRUNERS",
    "SAMPLERS",
    "Categorical",
    "Confirm",
    "FloatRange",
    "IntRange",
    "Loading",
    "Plugin",
    "Searched",
    "Stop",
    "StudySpec",
    "parse_param",
]


def _off(value: Any) -> Any:
    return "off" if value is False or value is None else value


def _stack(value: Any) -> Any:
    if value != "auto" and not (type(value) is int and value >= 1):
        raise ValueError(f"must be auto, or a whole number of at least 1, but got {value!r}")
    return value


UNBOUNDED = 1_000_000
"""The `trials` of a study that has a `time` and names none."""
LONGEST_NAME = 128
"""Bytes of a study's name. A file's name may have 255, and `<name>.<process>.jsonl` has up to 100 beside it."""


def _cut(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."


class StudySpec(Frozen):
    """All of a study, as study.yaml says it."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    name: Annotated[str, BeforeValidator(lambda v: str(v) if type(v) in (int, float) else v)]
    """The name of Optuna's study, of MLflow's experiment, and of the folders of checkpoints and bundle.

    Values: letters, digits, `_`, `-`, `.`, spaces, at most 128 bytes. Default: the file's name without its ending.
    Example: `name: fashion_mnist`
    """
    objective: str
    """What is to be learned: the code that has the data, the network, the loss and the metrics.

    Values: the name of one that comes with hpo, or `package.module[:Name]`, or `path/to/file.py[:Name]`, where the name
    may be that of a plain Optuna function. Default: none, it must be given.
    Example: `objective: my_objective.py`
    """
    options: dict[str, Any] = Field(default_factory=dict)
    """The objective's own options, checked by the types in its `Options`.

    Values: a mapping. Default: `{}`, each option has the objective's default.
    Example: `options: {file: wine.csv, target: quality}`
    """
    metric: Annotated[str | tuple[str, ...] | None, BeforeValidator(metrics_of)] = None
    """What is optimized, measured on the validation set: one metric, or several, whose Pareto front is searched.

    Of several the first that is measured each epoch leads (or `prune_on`): by it the best epoch and trial are chosen.
    Values: one of the objective's metrics, or `loss`; or a list, also of `n_parameters` (trainable), `latency` and
    `latency_256` (milliseconds for a batch of 1 and of 256 rows). Default: the objective's first metric.
    Example: `metric: [accuracy, n_parameters]`
    """
    direction: Annotated[Direction | tuple[Direction, ...] | None, BeforeValidator(directions_of)] = None
    """Whether less of the metric is better, or more; needed only where the metric does not say it itself.

    Values: `minimize`, `maximize`; of several metrics a list. Default: as they say; of a function's value, less.
    Example: `direction: maximize`
    """
    prune_on: str | None = None
    """Of several metrics the one by which trials are pruned; without it none is, since it might be good in another.

    Values: one of `metric` that is measured each epoch. Default: none.
    Example: `prune_on: accuracy`
    """
    constraints: Annotated[dict[str, str], BeforeValidator(checked)] = {}
    """What a trial must come to beside its metric: only one that does can be the best, and samplers look for such.

    Values: a mapping of names to `<=` or `>=` and a number. Names: the objective's metrics, `loss`, `n_parameters`
    (trainable; a network with too many is not trained), `latency` and `latency_256` (of a batch of 1 and of 256 rows,
    with the unit `ms` or `s`). Default: `{}`, none.
    Example: `constraints: {n_parameters: "<= 100000", latency: "<= 2ms"}`
    """
    value: Annotated[str, BeforeValidator(check_value)] = "best"
    """Which epoch's metric is a trial's value: the best one's, the last one's, or the mean over the last K.

    Values: `best`, `last`, `mean_of_K` (`mean_of_3`, ...). Default: `best`.
    Example: `value: mean_of_3`
    """
    epochs: int = Field(default=20, ge=1)
    """How many epochs each trial is trained, unless it is pruned or `patience` ends it.

    Values: a whole number of at least 1. Default: `20`.
    Example: `epochs: 50`
    """
    patience: int | None = Field(default=None, ge=1)
    """Early stopping: a trial ends when its metric has not improved for so many epochs.

    Values: a whole number of at least 1. Default: none, a trial has all its epochs.
    Example: `patience: 16`
    """
    trials: int = Field(default=50, ge=1)
    """The budget: exactly so many trials, over all workers and all restarts. It may be raised or lowered later.

    Values: a whole number of at least 1. Default: `50`.
    Example: `trials: 200`
    """
    timeout: Time | None = None
    """The time in which trials may run, over all restarts. Loading data, and the refit and export, are not counted.

    Values: a length of time, such as `90s`, `45m`, `2h`, `1h30m`, `1d`, or seconds. Default: none.
    Example: `timeout: 2h`
    """
    time: Time | None = None
    """The time in which the whole of `hpo run` aims to end: search, confirmation, refit and export, over all restarts.

    Without `trials` there are as many as fit; at least one is finished.
    Values: a length of time. Default: none.
    Example: `time: 10m`
    """
    stop: Annotated[Stop | None, BeforeValidator(stop_of)] = None
    """End the search when more trials are not worth it; what is in training is trained to its end.

    Its keys, of which the first that holds counts: `no_gain` (so many finished trials without a better one), `target`
    (a value that is good enough), `terminator` (one of Optuna's). It may be changed at any time.
    Values: `false`, or a mapping of its keys. Default: `false`.
    Example: `stop: {no_gain: 30, target: 0.98}`
    """
    seed: int = Field(default=42, ge=0, lt=1 << 32)
    """What every random stream of the study follows from: weights, order of rows, dropout, sampler.

    Values: a whole number from 0 to 4294967295. Default: `42`.
    Example: `seed: 7`
    """
    sampler: Annotated[Plugin, BeforeValidator(named), one_of(SAMPLERS)] = Plugin(name="tpe")
    """Optuna's sampler, which chooses the params of each trial.

    Values: `tpe`, `gp`, `nsgaii`, `cmaes`, `qmc`, `random`, `grid`, `brute_force`, alone or as `name` beside the keys
    of Optuna's own class. Default: `tpe`.
    Example: `sampler: {name: tpe, n_startup_trials: 20}`
    """
    pruner: Annotated[Plugin, BeforeValidator(named), one_of(PRUNERS)] = Plugin(name="median")
    """What ends trials that do worse than others did at the same epoch: `halving`, or one of Optuna's pruners.

    `halving` pauses every trial at rungs and resumes the best, so it also compares trials that are trained at once. Its
    keys: `first` (epochs to the first rung, `auto`: a tenth), `factor` (2), `finish` (3), `reach`
    (1), `cohorts` (`auto`: 3, or 1), `memory` (256 MiB).
    Values: `median`, `halving`, `percentile`, `successive_halving`, `hyperband`, `patient`, `threshold`, `wilcoxon`,
    `none`, alone or as `name` beside the keys of Optuna's own class. Default: `median` (after 10 trials and a fifth of
    the epochs) where trials are trained one at a time; `halving` where a stack holds several.
    Example: `pruner: {name: halving, first: 4}`
    """
    params: dict[str, Any] = Field(default_factory=dict)
    """The hyperparameters: constants and search space in one place. With one range in it, it is the whole space.

    Values: for each name a plain value, or a range: `{type: float, low:, high:, log:, step:, or:, when:}`, `{type: int,
    ...}`, `{type: categorical, choices: [...], when:}`. Default: `{}`, the objective's default space is searched.
    Example: `params: {batch_size: 32, learning_rate: {type: float, low: 1e-5, high: 1e-1, log: true}}`
    """
    start_with: tuple[dict[str, Scalar], ...] = Field(default=(), strict=False)
    """Known good configurations, which are tried first; what one does not name is sampled.

    Values: a list of mappings, at most as many as `trials`. Default: `[]`.
    Example: `start_with: [{learning_rate: 0.1, n_hidden1: 100}]`
    """
    storage: str = "sqlite:///mlruns/optuna.db"
    """Where Optuna keeps the study: any worker that reaches it can join.

    Values: `sqlite:///FILE`, `postgresql://...`, `grpc://HOST:PORT`, `journal:///FILE`. Default:
    `sqlite:///mlruns/optuna.db`.
    Example: `storage: postgresql://me:${PASSWORD}@db/hpo`
    """
    tracking: Annotated[str, BeforeValidator(_off)] = "sqlite:///mlruns/mlflow.db"
    """Where MLflow keeps the runs. An MLflow that does not answer stops nothing: what is unsent is sent later.

    Values: a server's address, a database's, or `off`. Default: `sqlite:///mlruns/mlflow.db`.
    Example: `tracking: http://mlflow:5000`
    """
    output: str = "mlruns"
    """The folder for checkpoints, bundles and what MLflow has not taken yet: below it, each study has its own.

    Values: a folder, from the working folder on or absolute. Default: `mlruns`.
    Example: `output: /scratch/me/results`
    """
    device: str = "auto"
    """What trials are trained on.

    Values: `auto` (CUDA, else Apple's MPS, else the CPU), `cpu`, `cuda`, `cuda:1`, `mps`. Default: `auto`.
    Example: `device: cuda:1`
    """
    precision: Literal["float32", "tf32", "bf16"] = "float32"
    """How networks compute.

    Values: `float32`, `tf32` (in matrix products, on CUDA), `bf16` (under autocast). Default: `float32`.
    Example: `precision: bf16`
    """
    deterministic: bool = False
    """Whether torch uses deterministic algorithms only, and refuses those that are not.

    Values: `true`, `false`. Default: `false`.
    Example: `deterministic: true`
    """
    loading: Loading = Loading()
    """How data gets to the device: it lies there as a whole, or streams through a `DataLoader`.

    Values: `resident` (`auto`, `true`, `false`) beside `num_workers`, `prefetch_factor`, `persistent_workers`,
    `pin_memory`, `non_blocking` as torch has them. Default: `{resident: auto}`.
    Example: `loading: {resident: false, num_workers: 2}`
    """
    checkpoint_every: Time = 60.0
    """The least time between two checkpoints of a trial, from which it resumes; they are made at the end of epochs.

    Values: a length of time. Default: `60s`.
    Example: `checkpoint_every: 5m`
    """
    grace: Time = 60.0
    """A worker that has not renewed its lease for so long counts as dead, and its trials are retried by others.

    Values: a length of time. Default: `60s`.
    Example: `grace: 3m`
    """
    retries: int = Field(default=2, ge=0)
    """How often a trial whose worker died is retried: it may be the trial that kills it.

    Values: a whole number of at least 0. Default: `2`.
    Example: `retries: 0`
    """
    outage: Time = 600.0
    """How long the storage may be away before a worker stops.

    Values: a length of time. Default: `10m`.
    Example: `outage: 1h`
    """
    catch: tuple[str, ...] = Field(default=(), strict=False)
    """Exceptions that fail the trial whose code raises them, not the study (`Study.optimize(catch=)`).

    Values: a list of names, as Python shows them. Default: `[]`.
    Example: `catch: [ValueError, torch.linalg.LinAlgError]`
    """
    stack: Annotated[Literal["auto"] | int, BeforeValidator(_stack)] = "auto"
    """How many trials are trained at once on the device, as one stack, where their structure allows.

    Values: `auto` (measured), or a whole number of at least 1. Default: `auto`.
    Example: `stack: 16`
    """

    confirm: Annotated[Confirm | None, BeforeValidator(confirm_of)] = None
    """Train the best configurations of the search again with fresh seeds, and choose the one with the best mean.

    Its keys: `top` (5, how many), `seeds` (5, how often each), `resplit` (`false`; `true`: another validation split for
    each seed), `folds` (none; K: cross-validation in K folds).
    Values: `false`, `true` (all keys' defaults), or a mapping of its keys. Default: `false`.
    Example: `confirm: {top: 5, seeds: 5}`
    """

    refit_seeds: int = Field(default=1, ge=1)
    """How many networks the chosen params are trained to at the end; the first is exported, all are tested.

    The test metrics are then also given as mean and standard deviation over seeds.
    Values: a whole number of at least 1. Default: `1`.
    Example: `refit_seeds: 5`
    """
    ensemble: int = Field(default=1, ge=1)
    """How many networks the exported model has: the mean of the predictions of as many seeds, tested as one.

    Values: a whole number of at least 1. Default: `1`, a single network.
    Example: `ensemble: 5`
    """
    baseline: bool = True
    """Whether the result is compared with models that cost next to nothing, and with the default configuration.

    Values: `true`, `false`. Default: `true`.
    Example: `baseline: false`
    """

    @property
    def budget_text(self) -> str:
        """The budget in words: so many trials, in so much time."""
        if self.time is None:
            return f"{self.trials} trials"
        n = "as many trials" if self.trials == UNBOUNDED else f"{self.trials} trials"
        return f"{n} {'as fit ' if self.trials == UNBOUNDED else ''}in {self.time:g} s"

    @property
    def limit(self) -> float | None:
        """The shortest time that trials may take together, in seconds; None: there is none."""
        return min((seconds for seconds in (self.timeout, self.time) if seconds is not None), default=None)

    @model_validator(mode="before")
    @classmethod
    def _bounded_by_time(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("time") is not None and "trials" not in values:
            return values | {"trials": UNBOUNDED}
        return values

    @field_validator("catch")
    @classmethod
    def _exceptions(cls, catch: tuple[str, ...]) -> tuple[str, ...]:
        for why in wrong_names(catch):
            raise ValueError(why)
        return catch

    @field_validator("output")
    @classmethod
    def _folder(cls, output: str) -> str:
        if not output.strip() or "\0" in output:
            raise ValueError(f"must be a folder, but got {_cut(output)!r}")
        return output

    @field_validator("name")
    @classmethod
    def check_name(cls, name: str) -> str:
        if not re.fullmatch(r"[\w][\w .+=-]*", name):
            raise ValueError(f"must be letters, digits, `_`, `-`, `.` (it names a folder), but got {_cut(name)!r}")
        if (size := len(name.encode())) > LONGEST_NAME:
            raise ValueError(
                f"must be at most {LONGEST_NAME} bytes long, since it names files, but got {size} bytes: {_cut(name)!r}"
            )
        return name


KEYS = tuple(StudySpec.model_fields)
