"""Opening a study in its storage: made if it is not there, refused if it is another one."""

import json
import shlex
import time
import uuid
import warnings
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import optuna

from hpo.errors import InputError, masked
from hpo.search import schema
from hpo.search.address import exists
from hpo.search.away import open_patiently
from hpo.search.budget import leases_in
from hpo.search.clock import SYSTEM, Clock
from hpo.search.constraints import constraints_of
from hpo.search.identity import another_study, compare, identity, not_ours
from hpo.search.lease import working
from hpo.search.retrying import RetryingStorage, locked
from hpo.search.samplers import make_pruner, make_sampler, trials_of
from hpo.search.search import Search
from hpo.search.view import StudyView
from hpo.study.goals import Direction, direction_of
from hpo.study.ranges import parse_params
from hpo.study.space import FreeSpace, Space, build
from hpo.study.spec import StudySpec

_MAKING_SECONDS = 5.0
"""How long to wait for a peer that makes the study just now, where no lock keeps us out."""


def open_search(
    spec: StudySpec,
    space: Space,
    metric: str,
    *,
    maximize: bool,
    others: Mapping[str, bool] | None = None,
    options: Mapping[str, Any] | None = None,
    defaults: Mapping[str, Any] | None = None,
    make: bool = True,
    train: bool = False,
    wait: bool = False,
    clock: Clock = SYSTEM,
) -> Search | None:
    """Return the study in its storage, made if it is not there (None with `make=False`). Close it at the end.

    `others` are the metrics beside the one that leads, each with whether more of it is better; `options` the spec's
    as they may be stored, `defaults` what those are that are not given. With `wait`, a storage that does not answer is
    waited for, as it is later on.
    Raises StorageError where the storage cannot be opened, InputError where its study of that name is another one; no
    connection is left open then.
    """
    if not make and not exists(spec.storage):
        return None
    with ExitStack() as unless_opened:
        inner = open_patiently(spec.storage, spec.outage, wait)
        storage = RetryingStorage(inner, spec.outage, clock)
        unless_opened.callback(storage.close)
        others = others or {}
        wanted = identity(spec, space, metric, spec.options if options is None else options, others)
        directions = [direction_of(each) for each in (maximize, *others.values())]
        with locked(storage, spec.storage):
            found = _find(spec, storage, wanted, defaults or {}, directions[0])
            study = _make(spec, space, storage, wanted, directions) if found or make else None
            search = None if study is None else Search(study, storage, spec, space, metric, clock)
            if search is not None and train:
                search.lease.announce()  # within the lock: nobody may take its name away before
        if search is None:
            return None
        unless_opened.pop_all()
    return search


def no_study(spec: StudySpec, path: Path | str) -> InputError:
    """Return the error for a study that its storage does not have; `path` is its file."""
    return InputError(
        f"the storage {masked(spec.storage)} has no study named {spec.name!r}; run it first: hpo run "
        f"{shlex.quote(str(path))}"
    )


def open_stored(spec: StudySpec, given: Collection[str] = ()) -> Search | None:
    """Return the study of that name as its storage knows it, to be looked at; None: there is none.

    No objective is needed for that: metric, direction and space are the stored ones. Unless they are among the settings
    that are `given` now, epochs are those that it was run with last, and trials as many, if the file has fewer. Close
    it at the end.
    Raises StorageError where the storage cannot be opened, InputError where hpo has not made the study.
    """
    if not exists(spec.storage):
        return None
    with ExitStack() as unless_opened:
        storage = RetryingStorage(open_patiently(spec.storage, spec.outage, False), spec.outage)
        unless_opened.callback(storage.close)
        if spec.name not in [study.study_name for study in storage.get_all_studies()]:
            return None
        search = as_stored(spec, storage, given)
        unless_opened.pop_all()
    return search


def as_stored(spec: StudySpec, storage: RetryingStorage, given: Collection[str] = ("trials", "epochs")) -> Search:
    """Return the study named so as its opened storage knows it, to be looked at; the storage is the search's then.

    Raises InputError where hpo has not made the study.
    """
    study = optuna.load_study(study_name=spec.name, storage=storage)
    stored = study.user_attrs.get(schema.IDENTITY)
    if not isinstance(stored, Mapping):
        raise not_ours(spec.storage, spec.name)
    space = stored_space(stored)
    constraints = {name: each.text for name, each in constraints_of(study.user_attrs).items()}
    spec = spec.model_copy(update=_run_with(study, spec, given))
    spec = spec.model_copy(update={"trials": trials_of(spec, space), "constraints": constraints})
    return Search(study, storage, spec, space, str(stored.get("metric", "value")))


def stored_space(identity: Mapping[str, Any]) -> Space:
    """Return the space that a study was made with, by what is stored of it; one of a function takes anything."""
    kept = identity.get("params")
    params, unread = parse_params(kept if isinstance(kept, dict) else {}, ("params",))
    space, more = build(params, [])
    if not params or unread or more:  # a function's; or a later version's
        return FreeSpace(fixed={}, dimensions=())
    return space


def _run_with(study: optuna.Study, spec: StudySpec, given: Collection[str]) -> dict[str, int]:
    """Return trials and epochs of a study that may be running with others than its file has, if its storage says so."""
    try:
        kept = dict(json.loads(study.user_attrs[schema.STUDY_FILE]))
    except (KeyError, TypeError, ValueError, RecursionError):  # whoever can write the storage writes anything
        return {}
    least = {"trials": spec.trials, "epochs": 1}
    found = {key: kept.get(key) for key in least if key not in given}
    return {key: n for key, n in found.items() if type(n) is int and n >= least[key]}


def workers_of(search: Search, seen: StudyView) -> dict[str, float]:
    """Return the processes that work on a study, each with until when its lease holds (seconds since 1970)."""
    leases = leases_in(search.storage.get_study_system_attrs(search.study._study_id))
    return working(seen.everything, leases, search.spec.grace, time.time())


def is_over(search: Search, seen: StudyView) -> bool:
    """Whether no trial of a study is left to train, or its timeout has ended it."""
    timeout, ended_by = search.spec.limit, search.attrs.get(schema.TIMED_OUT)
    timed_out = timeout is not None and isinstance(ended_by, int | float) and ended_by >= timeout
    return seen.counts.unfinished == 0 or (timed_out and seen.counts.running == 0)


def _find(
    spec: StudySpec, storage: RetryingStorage, wanted: Mapping[str, Any], defaults: Mapping[str, Any], direction: str
) -> bool:
    """Return whether the study is there already. Raises InputError where it is another one. The lock must be held."""
    if spec.name not in [study.study_name for study in storage.get_all_studies()]:
        return False
    study_id = storage.get_study_id_from_name(spec.name)
    attrs = _attrs_of(storage, study_id)
    compare(spec, attrs, wanted, defaults)
    stored = attrs[schema.IDENTITY]
    if stored.get("options") != wanted["options"]:  # an older version stored them in clear
        storage.set_study_user_attr(study_id, schema.IDENTITY, stored | {"options": wanted["options"]})
    if storage.get_study_directions(study_id)[0].name.lower() != direction:
        raise another_study(spec, [f"it goes to {direction} here, the other way there"])
    return True


def _make(
    spec: StudySpec,
    space: Space,
    storage: RetryingStorage,
    wanted: Mapping[str, Any],
    directions: Sequence[Direction],
) -> optuna.Study:
    """Return the study, made with all of its attributes if it is not there. The lock must be held."""
    sampler, _ = make_sampler(spec.sampler, spec.seed, space, [each == "maximize" for each in directions])
    pruner, _ = make_pruner(spec.pruner, spec.epochs)
    study = optuna.create_study(
        study_name=spec.name,
        storage=storage,
        directions=directions,
        load_if_exists=True,
        sampler=sampler,
        pruner=pruner,
    )
    if schema.MAKING not in study.user_attrs:
        study.set_user_attr(schema.MAKING, uuid.uuid4().hex)
    if schema.IDENTITY not in study.user_attrs:
        study.set_user_attr(schema.IDENTITY, wanted)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study.set_metric_names([wanted["metric"], *wanted.get("others", {})])  # the dashboard's axis
    return study


def _attrs_of(storage: RetryingStorage, study_id: int) -> dict[str, Any]:
    """Return the study's attributes; a peer that makes it just now, where no lock keeps us out, is waited for."""
    end = time.monotonic() + _MAKING_SECONDS
    attrs = storage.get_study_user_attrs(study_id)
    while schema.IDENTITY not in attrs and time.monotonic() < end and not storage.get_all_trials(study_id):
        time.sleep(0.05)
        attrs = storage.get_study_user_attrs(study_id)
    return attrs
