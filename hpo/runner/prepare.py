"""A study made ready to run: everything that can be wrong is found here, before anything runs.

`prepare` reads the file, loads the objective, merges its default space, checks sampler, pruner and device, and reports
all faults of the file at once. `load_data` then looks at the data, `preflight` at networks. Nothing here touches the
storage or the tracker.
"""

import math
import os
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from hpo.errors import Fault, Faulty, HpoError, InputError, SpecError, collecting
from hpo.log import log
from hpo.runner.matching import faults_with, goals_of, of_one_network, stop_faults
from hpo.runner.params import space_of
from hpo.search.samplers import make_pruner, make_sampler, trials_of
from hpo.study import loading as objectives
from hpo.study.checking import defaults_of
from hpo.study.data import Data, DataInfo
from hpo.study.document import Document, of_values
from hpo.study.draft import Draft, draft_of, read
from hpo.study.held import held
from hpo.study.objective import Function, Objective
from hpo.study.sources import source_file, source_fingerprint
from hpo.study.space import Space
from hpo.study.spec import Plugin, StudySpec
from hpo.study.trust import unnamed_code
from hpo.tracking.base import check_address
from hpo.training.stack import Task

Given = Objective | type[Objective] | Callable[[Any], Any]
"""An objective that a study written in Python brings: an instance, its class, or a plain Optuna function."""
ENSEMBLE_SECONDS = 120.0
"""A shorter `time` is spent on trials, not on an ensemble that the study file does not ask for."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A study whose file has no faults."""

    spec: StudySpec
    document: Document
    given: Objective | Function
    """The objective as it was given: `objective` or `function` has it by its kind."""
    space: Space
    metric: str
    """What is optimized; of several metrics the one that leads."""
    maximize: bool
    others: Mapping[str, bool]
    """The other metrics, each with whether more of it is better."""
    device: torch.device
    held: Mapping[str, str]
    """Digests of the values that the objective holds when the study starts (`hpo.study.held`)."""
    by_program: bool
    """Whether a program gave the objective itself, which may hold others than one that is found by its name."""
    made: float = field(default_factory=time.monotonic)
    """When the plan was made, by time.monotonic(): a study's `time` counts from there."""

    @property
    def objective(self) -> Objective:
        """The objective; there is none where a plain Optuna function was given."""
        assert isinstance(self.given, Objective)
        return self.given

    @property
    def function(self) -> Function | None:
        """The plain Optuna function; None where an objective was given."""
        return self.given if isinstance(self.given, Function) else None

    @property
    def trains_itself(self) -> bool:
        """Whether trials are trained by the objective's own `train`, or by a function, and not by the engine's loop."""
        return self.function is not None or self.objective.train is not None

    @property
    def metric_key(self) -> str:
        """The metric's name among those that are reported of an epoch."""
        return self.metric if self.function is not None else f"valid_{self.metric}"

    @property
    def measured(self) -> tuple[str, ...]:
        """What each trial must come to with a value beside the metric that leads: constraints and other metrics."""
        return tuple(dict.fromkeys((*self.spec.constraints, *self.others)))

    def fault_in(self, metrics: Mapping[str, float], epoch: int) -> str | None:
        """Return why an `epoch` (counted from 1) ends a training: a metric is no finite number; None: it does not.

        An objective that trains itself need not report losses.
        """
        for name in dict.fromkeys(["train_loss", "valid_loss", self.metric_key]):
            value = metrics.get(name, 0.0 if self.trains_itself else math.nan)
            if not math.isfinite(value):
                return f"{name} became {value} in epoch {epoch}"
        return None

    @property
    def output(self) -> Path:
        """The folder for checkpoints, bundles and what could not be sent yet."""
        return Path(self.spec.output)

    @property
    def options(self) -> dict[str, Any]:
        """The objective's options as they may be stored and shown."""
        return self.document.options()

    @property
    def option_defaults(self) -> dict[str, Any]:
        """What the objective's options are that are not given, as plain values; a function has none."""
        return {} if self.function is not None else defaults_of(self.objective.Options)

    @cached_property
    def source(self) -> str:
        """The fingerprint of the objective's sources as they were when the study was opened, which asks first.

        What is imported stays what it was when its files are edited, moved or removed meanwhile.
        """
        return source_fingerprint(self.given)

    @property
    def source_file(self) -> Path | None:
        """The file that the objective is written in; None: a notebook's cell, or a callable object."""
        return source_file(self.given)

    def task(self, info: DataInfo, n_rows: int) -> Task:
        """Return what the members of this study share, when they are trained on so many rows."""
        assert isinstance(self.objective, Objective), "a function has no networks"
        return Task(
            objective=self.objective,
            info=info,
            device=self.device,
            n_rows=n_rows,
            epochs=self.spec.epochs,
            precision=self.spec.precision,
            catch=self.spec.catch,
        )

    def load_data(self) -> Data | None:
        """Return the objective's data, checked; None: a function has none that is known. Raises DataError."""
        if self.function is not None:
            return None
        data = guarded(self, "data", self.objective.data)
        if not isinstance(data, Data):
            plain = data is None or isinstance(data, bool | int | float | str)
            came = f"{data!r:.60}" if plain else f"a {type(data).__name__}"
            raise InputError(f"objective {self.spec.objective}: data must return hpo.study.data.Data, but got {came}")
        self.objective.info = data.checked(self.spec.objective).info
        return data


def prepare(path: Path, overrides: Mapping[str, str] | None = None, may_run: Collection[str] | None = None) -> Plan:
    """Return the plan of the study file at `path`. Of its code only what is among `may_run` is imported; None: all.

    Raises SpecError with every fault of the file, each with file and line, or InputError where there is no such file.
    """
    return _planned(read(path, overrides), path.parent, may_run)


def prepare_values(name: str, values: Any, overrides: Mapping[str, str], given: Given | None = None) -> Plan:
    """Return the plan of a study that was written in Python, as a mapping with study.yaml's keys.

    `name` stands for the file in messages; `given` is the objective itself, where there is one. Raises as `prepare`.
    """
    document = of_values(name, values, overrides)
    return _planned(draft_of(document, "study"), Path(), None, given)


def _planned(draft: Draft, folder: Path, may_run: Collection[str] | None, given: Given | None = None) -> Plan:
    faults = list(draft.faults)
    plan = None
    unnamed = unnamed_code(draft.spec, draft.document, may_run) if draft.spec and may_run is not None else []
    faults += unnamed
    if draft.spec is not None and not unnamed:
        plan, more = _check(draft, draft.spec, folder, given)
        faults += more
    if faults or plan is None:
        raise SpecError(draft.document.render(faults))
    return plan


def _check(draft: Draft, spec: StudySpec, folder: Path, given: Given | None) -> tuple[Plan | None, list[Fault]]:
    faults: list[Fault] = []
    device = torch.device("cpu")
    with collecting(faults):
        device = find_device(spec.device)
    try:
        check_address(spec.tracking)
    except InputError as error:
        faults.append(Fault(path=("tracking",), message=str(error)))
    if os.path.exists(spec.output) and not os.path.isdir(spec.output):
        faults.append(Fault(path=("output",), message=f"must be a folder, but {spec.output} is a file"))
    _pruner, more = make_pruner(spec.pruner, spec.epochs)
    faults += more
    objective, more = _objective(spec, folder, given)
    faults += more
    if objective is None:
        return None, faults
    spec = _paced(_unpruned(spec), objective, faults)
    faults += faults_with(spec, objective)
    goals = {"": False}
    with collecting(faults):
        goals = goals_of(objective, spec)
    (metric, maximize), *others = goals.items()
    space, more = space_of(objective, draft, spec, folder)
    if any(fault.path[:1] == ("params",) for fault in draft.faults):  # its own faults come first: mend those
        more = [fault for fault in more if fault.path[0] != "start_with"]
    faults += more
    faults += stop_faults(spec, space, objective)
    spec = _starting(spec, objective, space)
    _, more = make_sampler(spec.sampler, spec.seed, space)
    faults += more
    if spec.sampler.name == "grid" and spec.start_with:
        message = "the grid tries every configuration anyway; remove start_with, or use another sampler"
        faults.append(Fault(path=("start_with",), message=message))
    if not faults and (trials := trials_of(spec, space)) < spec.trials:
        log.info(f"the space has {trials} configurations in all: trials is {trials}, not {spec.trials}")
        spec = spec.model_copy(update={"trials": trials})
    return Plan(
        spec=spec,
        document=draft.document,
        given=objective,
        space=space,
        metric=metric,
        maximize=maximize,
        others=dict(others),
        device=device,
        held=held(objective),
        by_program=given is not None,
    ), faults


def _unpruned(spec: StudySpec) -> StudySpec:
    """Return the spec without a pruner, where the study has several metrics and names none to prune on."""
    is_open = "pruner" not in spec.model_fields_set and spec.prune_on is None
    if is_open and isinstance(spec.metric, tuple):
        return spec.model_copy(update={"pruner": Plugin(name="none")})
    return spec


def _paced(spec: StudySpec, objective: Objective | Function, faults: list[Fault]) -> StudySpec:
    """Return the spec with the objective's own `pace`, where the study has a `time` and its file names no epochs."""
    if spec.time is None or isinstance(objective, Function):
        return spec
    keys = {"epochs", "patience"}
    metrics = spec.metric if isinstance(spec.metric, tuple) else ()
    limited = of_one_network([*spec.constraints, *metrics])
    if spec.time >= ENSEMBLE_SECONDS and "refit_seeds" not in spec.model_fields_set and not limited:
        keys.add("ensemble")
    with collecting(faults):
        try:
            pace = {key: int(n) for key, n in objective.pace.items() if key in keys}
        except HpoError:
            return spec  # the data's own fault is said where it is read
        except Exception as error:  # the user's own code
            raise Faulty(("objective",), f"its pace failed: {objectives.origin(error)}") from error
        return spec.model_copy(update={key: n for key, n in pace.items() if key not in spec.model_fields_set})
    return spec


def _starting(spec: StudySpec, objective: Objective | Function, space: Space) -> StudySpec:
    """Return the spec with the objective's defaults as the first trial, where they are meant to be."""
    if isinstance(objective, Function) or not objective.defaults_first or spec.start_with:
        return spec
    if spec.sampler.name in ("grid", "brute_force"):  # they try every configuration anyway
        return spec
    defaults = objective.defaults
    first = {d.name: defaults[d.name] for d in space.dimensions if d.name in defaults and d.takes(defaults[d.name])}
    return spec.model_copy(update={"start_with": (first,)}) if first else spec


def _objective(spec: StudySpec, folder: Path, given: Given | None) -> tuple[Objective | Function | None, list[Fault]]:
    if given is None:
        return objectives.load(spec.objective, spec.options, folder)
    if isinstance(given, Objective):
        faults: list[Fault] = []
        with collecting(faults):
            objectives.require_trainable(given, type(given).__name__)
        return None if faults else given, faults
    if isinstance(given, type):
        return objectives.make(given, given.__name__, spec.options, folder)
    return objectives.function(given, getattr(given, "__name__", "the objective"), spec.options)


def find_device(name: str) -> torch.device:
    """Return the device of that name, `auto` being CUDA, else Apple's MPS, else the CPU. Raises Faulty."""
    available = [f"cuda:{i}" for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    available += ["mps"] if torch.backends.mps.is_available() else []
    available += ["cpu"]
    if name == "auto":
        return torch.device(available[0])
    try:
        device = torch.device(name)
        wanted = f"cuda:{device.index or 0}" if device.type == "cuda" else device.type
    except RuntimeError:
        wanted = None
    if wanted not in available:
        raise Faulty(("device",), f"there is no device {name!r} here; available: auto, {', '.join(available)}")
    return torch.device(wanted)


def guarded(plan: Plan, what: str, call: Any) -> Any:
    """Return what `call`, a part of the user's objective, gives; raise InputError that says where it failed."""
    try:
        return call()
    except HpoError:
        raise
    except (Exception, SystemExit) as error:  # the user's own code
        raise InputError(f"objective {plan.spec.objective}: {what} failed: {objectives.origin(error)}") from error
