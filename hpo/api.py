"""The Python API, for scripts and notebooks: each function does what the command of its name does.

A study is named by its file, or by a mapping with study.yaml's keys, or by an objective: a class, an instance, or a
plain Optuna function. All other arguments are study.yaml's keys.
"""

import dataclasses
import inspect
import json
import logging
import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from types import FunctionType
from typing import Any

from hpo.errors import InputError, masked
from hpo.log import log, shown_by
from hpo.report.results import Study
from hpo.runner import keeping
from hpo.runner import study as studies
from hpo.runner.joining import as_file, is_launched
from hpo.runner.opening import open_or_make, torch_set
from hpo.runner.prepare import Given, Plan, prepare, prepare_values
from hpo.runner.progress import PlainProgress, Progress, Refresh, state_of
from hpo.runner.study import StudyFile, WorkerOptions
from hpo.search import adoption
from hpo.study import catalog
from hpo.study.document import of_values
from hpo.study.draft import read
from hpo.study.objective import Objective
from hpo.study.sources import called
from hpo.study.spec import StudySpec

_RUNNING = threading.RLock()
_SAY_SECONDS = 2.0
"""A wait that is shorter is not worth a line."""
Named = str | Path | Mapping[str, Any] | Objective | type[Objective] | Callable[[Any], Any]


def run(study: Named, *, workers: int | None = 1, quiet: bool = False, fresh: bool = False, **overrides: Any) -> Study:
    """Run a study to its end: search, train the best params again on train + validation, test and export them.

    `study` is a study file's path, a mapping with its keys, an `hpo.Objective` (a class or an instance), or a plain
    Optuna function. `overrides` are study.yaml's keys (`trials=20`, `params={"n_hidden": 32}`), laid over what `study`
    says. A study that was interrupted is resumed; one that is done is not run again. With `fresh` a new one starts, and
    a study of that name is kept as `<name>-1`, `-2` or the first that is free. `workers` processes train at the
    same time (None: one a GPU, or a core): these must be able to import the objective, so with more than one a class
    must stand in a module or a file, not in a notebook's cell. Progress is logged by `logging.getLogger("hpo")`, and
    printed where nothing else shows it, unless `quiet`.

    Raises SpecError with everything that is wrong in the study, InputError for other bad input, HpoError where no trial
    is complete, Interrupted at Ctrl-C (twice: at once); then run it again.

    >>> study = hpo.run({"objective": "iris"}, trials=2, epochs=2, tracking="off", quiet=True)
    >>> study.counts.finished
    2
    """
    if is_launched():
        raise InputError(
            "hpo.run was called while a worker imported the objective's file; put the call under "
            '`if __name__ == "__main__":`'
        )
    if workers is not None and (isinstance(workers, bool) or not isinstance(workers, int) or workers < 1):
        raise InputError(f"workers: must be a number of at least 1, or None, but got {workers!r}")
    with ExitStack() as stack:
        stack.enter_context(_printed(quiet))
        stack.enter_context(_one_at_a_time())
        plan, file = _prepared(study, overrides, alone=workers == 1)
        path = stack.enter_context(file)
        stack.enter_context(torch_set(plan))
        if fresh:
            keeping.set_aside(plan.spec)
        search = open_or_make(plan)
        stack.callback(search.close)

        def show(alone: bool) -> AbstractContextManager[Progress]:
            board = state_of(plan, search)
            return nullcontext(PlainProgress(board, Refresh(board, search, alone)))

        studies.run(plan, search, path, show, WorkerOptions(workers=workers))
    return Study(plan.spec.name, plan.spec.storage)


@contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Wait until no other thread runs a study: torch's generators and settings, which trials are seeded by, are one."""
    if not _RUNNING.acquire(timeout=_SAY_SECONDS):
        log.info("another thread of this process runs a study; waiting until it is done")
        _RUNNING.acquire()
    try:
        yield
    finally:
        _RUNNING.release()


def check(study: Named, **overrides: Any) -> None:
    """Find everything that is wrong with a study before anything runs: its keys, space, data, networks, storage.

    Takes what `hpo.run` takes. Raises SpecError or InputError with all faults, each with its place and what to do.

    >>> hpo.check({"objective": "iris", "trials": 2}, tracking="off")
    >>> hpo.check({"objective": "iris", "trails": 2})
    Traceback (most recent call last):
        ...
    hpo.errors.SpecError: study: trails: unknown key; did you mean "trials"?
    """
    with _one_at_a_time():
        plan, file = _prepared(study, overrides, alone=True)
        with file, torch_set(plan):
            studies.check(plan)


def open_study(name_or_path: str | Path, storage: str | None = None) -> Study:
    """Return a study that was run: by the path of its file, or by its name in a `storage`.

    `storage` is Optuna's address, as in study.yaml (default: the one that the file names, else its default). Nothing of
    the objective is imported. Raises InputError where there is no such study.

    >>> _ = hpo.run({"objective": "iris"}, name="flowers", trials=1, epochs=1, tracking="off", quiet=True)
    >>> hpo.open_study("flowers").best.number
    0
    """
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        draft = read(path, {} if storage is None else {"storage": json.dumps(storage)})
        if draft.spec is None:
            raise InputError("\n".join(draft.document.render(draft.faults)))
        return Study(draft.spec.name, draft.spec.storage)
    default = str(StudySpec.model_fields["storage"].default)
    return Study(str(name_or_path), default if storage is None else storage)


def adopt(study: Named, source: Any, source_name: str | None = None, *, quiet: bool = False, **overrides: Any) -> int:
    """Give a study the trials of an existing Optuna study as history for its sampler; return how many were taken.

    `source` is an `optuna.Study`, or the address of a storage with the study `source_name` in it. Complete trials whose
    params the study's space could have given are taken, once; they hold no slot of the budget, are in no table and are
    never the best. Others are left out, and it is said why. The other arguments are as for `hpo.run`; adopt before it
    is run, or in between.

    Raises InputError where there is no such study, or it goes in the other direction.

    >>> import optuna
    >>> optuna.logging.set_verbosity(optuna.logging.WARNING)
    >>> def old(trial):
    ...     return trial.suggest_float("x", 0, 1) ** 2
    >>> earlier = optuna.create_study(study_name="earlier")
    >>> earlier.optimize(old, n_trials=12)
    >>> hpo.adopt(old, earlier, tracking="off", quiet=True)
    12
    >>> hpo.run(old, trials=3, tracking="off", quiet=True).counts.complete
    3
    """
    plan, file = _prepared(study, overrides, alone=True)
    with file, torch_set(plan), ExitStack() as stack:
        stack.enter_context(_printed(quiet))
        if isinstance(source, str):
            if source_name is None:
                raise InputError(f"source_name: give the name of the study in {masked(source)}")
            trials, name = adoption.trials_of(source, source_name, maximize=plan.maximize), source_name
        elif hasattr(source, "get_trials") and hasattr(source, "directions"):
            adoption.require_alike(source, maximize=plan.maximize)
            trials, name = source.get_trials(), source.study_name
        else:
            raise InputError(f"source: must be an optuna.Study or a storage's address, but got {source!r:.100}")
        search = open_or_make(plan)
        stack.callback(search.close)
        return studies.adopt(plan, search, trials, name)


def _prepared(
    study: Named, overrides: Mapping[str, Any], alone: bool
) -> tuple[Plan, AbstractContextManager[StudyFile]]:
    """Return the plan of what a user named, and what gives the study file that other processes are to read."""
    if isinstance(study, str | Path):
        texts = _texts(of_values("the overrides", overrides).written)
        path = Path(study)
        if not path.exists() and str(study) in catalog.names():
            raise InputError(f'{study}: no such file; for that objective write hpo.run({{"objective": "{study}"}})')
        return prepare(path, texts), nullcontext(StudyFile(path=path, overrides=texts))
    if isinstance(study, Mapping):
        values, given = _laid_over(study, overrides), None
        if isinstance(values.get("objective"), str):  # iris, wine.py:Wine, package.module: iris, wine, module
            target = values["objective"].partition(":")[0]
            values.setdefault("name", Path(target).stem if target.endswith(".py") else target.rpartition(".")[2])
    elif isinstance(study, Objective | type) or callable(study):
        values, given = _of_objective(study, overrides, alone), study
        if isinstance(study, type) and not issubclass(study, Objective):
            raise InputError(f"study: the class {study.__name__} is not an hpo.Objective")
    else:
        raise InputError(
            f"study: must be a path, a mapping, an hpo.Objective or a function of a trial, but got {study!r:.100}"
        )
    plan = prepare_values("study", values, {}, given)
    return plan, _written(plan)


def _of_objective(given: Given, overrides: Mapping[str, Any], alone: bool) -> dict[str, Any]:
    """Return the keys of a study of an objective that is given itself: how other processes find it, its options."""
    what = type(given) if isinstance(given, Objective) else given
    name: str = getattr(what, "__name__", called(what).__name__)
    reference, can_import = _reference(what, name)
    if not alone and not can_import:
        how = f"is a {type(what).__name__}, not a function or class that a file defines by a name"
        if isinstance(what, FunctionType | type):
            how = "was defined in a notebook or within a function"
        raise InputError(f"{name} {how}, so no worker can import it; save it in a file so, or run with workers=1")
    if not alone and isinstance(given, Objective) and (needs := _needs(type(given))):
        raise InputError(
            f"{name}.__init__ takes {needs}, but each worker makes its own {name} by its options; have a dataclass, "
            "`Options`, hold what it needs, or run with workers=1"
        )
    plain = "function" if name == "<lambda>" else re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()
    values: dict[str, Any] = {"objective": reference, "name": plain}
    if isinstance(given, Objective) and dataclasses.is_dataclass(given.options):
        if "options" in overrides:
            raise InputError(f"options: an instance of {name} has its own; give the class, or no options")
        values["options"] = dataclasses.asdict(given.options)  # type: ignore[arg-type]  # an instance, not its class
    return values | dict(overrides)


def _needs(cls: type[Objective]) -> str:
    """Return the argument that a class is made with where that is not its options; nothing: there is none."""
    every = inspect.signature(cls).parameters.values()
    takes = [each.name for each in every if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)]
    return "" if not takes or takes[0].startswith("opt") else takes[0]


def _reference(what: Any, name: str) -> tuple[str, bool]:
    """Return how study.yaml names a class or function, and whether another process finds it by that."""
    module = sys.modules.get(getattr(what, "__module__", ""))
    is_top = getattr(module, name, None) is what
    file = getattr(module, "__file__", None)
    if module is None or not is_top or (module.__name__ == "__main__" and file is None):
        return f"__main__:{name}", False
    if module.__name__ == "__main__" or module.__name__ in catalog.names() or module.__name__.startswith("hpo_"):
        path = Path(str(file)).absolute()  # relative where it can be: it is stored with the study
        return f"{path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}:{name}", True
    return f"{module.__name__}:{name}", True


def _laid_over(values: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return `values` with `overrides`; of params and options one by one, as `--set params.x=1` does."""
    merged = dict(values)
    for key, value in overrides.items():
        both = key in ("params", "options") and isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = {**merged[key], **value} if both else value
    return merged


def _texts(overrides: Mapping[str, Any]) -> dict[str, str]:
    """Return overrides as `--set` has them: dotted keys, and values as YAML."""
    texts: dict[str, str] = {}
    for key, value in overrides.items():
        if key in ("params", "options") and isinstance(value, Mapping):
            texts |= {f"{key}.{name}": json.dumps(each) for name, each in value.items()}
        else:
            texts[key] = json.dumps(value)
    return texts


@contextmanager
def _written(plan: Plan) -> Iterator[StudyFile]:
    """Give a study that was written in Python as a file, for workers and for MLflow."""
    with as_file(plan.document.written) as path:
        yield StudyFile(path=path, overrides={})


def _printed(quiet: bool) -> AbstractContextManager[None]:
    """Have printed what is logged, unless the program has its own handlers, or it is to be `quiet`."""
    return nullcontext() if quiet else shown_by(logging.StreamHandler(sys.stdout), unless_handled=True)
