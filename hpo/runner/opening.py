"""A prepared study opened: torch's settings, its storage, its data and its code, each held against what is stored."""

import json
import os
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hpo.errors import InputError, listed
from hpo.export.files import read_about
from hpo.log import log
from hpo.runner.preflight import preflight
from hpo.runner.prepare import Plan
from hpo.search import schema
from hpo.search.codes import with_code
from hpo.search.opening import no_study, open_search
from hpo.search.search import Search
from hpo.study.data import Data
from hpo.study.held import of_one_form, other_values, what_differs_unnamed
from hpo.study.leaks import repeated, telling
from hpo.study.objective import Objective
from hpo.study.sources import digest, file_fingerprint
from hpo.training.torch_settings import torch_settings


@contextmanager
def torch_set(plan: Plan) -> Iterator[None]:
    """Set torch's process-wide settings for a study, and give back those that were before.

    On a CPU one thread, unless OMP_NUM_THREADS says otherwise: torch's own default makes small networks many times
    slower.
    """
    one = plan.device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ
    with torch_settings(
        plan.device,
        precision=None if plan.trains_itself else plan.spec.precision,
        deterministic=plan.spec.deterministic,
        threads=1 if one else None,
    ):
        yield


def open_study(plan: Plan, *, make: bool = True, train: bool = False, wait: bool = False) -> Search | None:
    """Return the study in its storage, made if it is not there (None with `make=False`); see `open_search`."""
    return open_search(
        plan.spec,
        plan.space,
        plan.metric,
        maximize=plan.maximize,
        others=plan.others,
        options=plan.options,
        defaults=plan.option_defaults,
        make=make,
        train=train,
        wait=wait,
    )


def open_or_make(plan: Plan, *, wait: bool = False) -> Search:
    """Return the study in its storage, made if it is not there, to train it: nobody renames or deletes it meanwhile."""
    search = open_study(plan, train=True, wait=wait)
    assert search is not None
    return search


def open_existing(plan: Plan, path: Path | str) -> Search:
    """Return the study in its storage. Raises InputError where there is none."""
    search = open_study(plan, make=False)
    if search is None:
        raise no_study(plan.spec, path)
    return search


def load_data(plan: Plan, search: Search) -> Data | None:
    """Return the data, which must be the same for all of a study's trials, and see that networks can be built of it.

    None: the objective is a function, which has its own. Whoever comes first also says what may not be as it was meant.
    Raises InputError, DataError.
    """
    data = plan.load_data()
    if data is None:
        return None
    fingerprint, before = data.fingerprint(), search.attrs.get(schema.DATA)
    if before not in (None, fingerprint):
        raise InputError(
            f"the data of objective {plan.spec.objective} is not what study {plan.spec.name!r} began with "
            f"(fingerprint {fingerprint} here, {before} there); bring that data back, or give another `name`"
        )
    _see_names(plan, data, search)
    _, warnings = preflight(plan, data)
    if before is None:
        search.remember(schema.DATA, fingerprint)
        for warning in warnings:  # once a study, not in each of its processes
            log.warning(warning)
    return data


def _see_names(plan: Plan, data: Data, search: Search) -> None:
    """Store what the data's columns, categories and classes are called, and say so where that is something else."""
    assert isinstance(plan.objective, Objective)
    try:
        told = plan.objective.about().get("columns")
    except Exception:  # of the objective's own making: it may know more once it has made its preprocessing
        told = None
    columns = [each for each in told if isinstance(each, Mapping)] if isinstance(told, list) else []
    called = [[str(column.get(key)) for key in ("name", "kind", "categories")] for column in columns]
    text = json.dumps([data.feature_names, data.class_names, called], default=str)
    names, before = digest(text), search.attrs.get(schema.NAMES)
    if before == names:
        return
    search.remember(schema.NAMES, names)
    if before is None:
        return
    result = search.attrs.get(schema.RESULT)
    if isinstance(result, Mapping) and result.get("names") is None:  # an earlier version exported with those of then
        search.remember(schema.RESULT, {**result, "names": before})
    log.warning(
        "the data's columns, categories or classes are called otherwise than before, and its numbers are the same: "
        "trials stand, and a bundle that there is already is made again with the names of now"
    )


def tell_of_data(data: Data) -> None:
    """Log the data's own notices, and what of it flatters: rows that two splits have, columns that say the target."""
    for notice in data.notices:
        log.info(f"data: {notice}")
    in_test, in_valid = repeated(data)
    if in_test:
        log.warning(
            f"{in_test} of {len(data.test)} test rows equal a row of train or validation, inputs and target: the test "
            "metrics flatter; a row must be in one split only, unless the data itself has it several times"
        )
    if in_valid > len(data.valid) / 10:  # fewer are the data's own, as the flower that iris has twice
        log.warning(
            f"{in_valid} of {len(data.valid)} validation rows equal a row of train, inputs and target: the study "
            "prefers what learns rows by heart"
        )
    if names := telling(data):
        log.warning(
            f"{listed(names)} alone tells the target in each of the {len(data.train)} rows of train: where it becomes "
            "known only with the target, the rows to be predicted lack it and all metrics flatter; leave it out then "
            "(of a table: the option `drop`)"
        )


def how_source_differs(plan: Plan, search: Search) -> str:
    """Return what of the objective is not that of the study, which is that of the first who asks; nothing: all is."""
    code, before = plan.source, search.attrs.get(schema.CODE)
    if before not in (None, code, file_fingerprint(plan.given)):  # the last is what an older version stored
        return "code"
    known = held_by(search.attrs)
    if (what := what_differs_unnamed(plan.given, plan.held, known)) == "code":
        return what
    if names := other_values(plan.held, known):
        return f"value of {', '.join(names)}"
    if before != code or not known or (plan.by_program and not of_one_form(plan.held, known)):
        remember_source(plan, search)
    return ""


def held_by(attrs: Mapping[str, Any]) -> Mapping[str, str]:
    """Return the digests of what a study's objective holds; nothing: an earlier version stored none of a study file."""
    return attrs.get(schema.HELD) or attrs.get(schema.HELD_BY_FILE) or {}


def require_same_unnamed(plan: Plan, search: Search) -> None:
    """Raise InputError where a study of that name has trials of another lambda, or of what another function made.

    No edit makes one of the other, as it does of a file: the results would be another function's.
    """
    if not plan.by_program or not plan.spec.objective.startswith("__main__:"):
        return
    what = what_differs_unnamed(plan.given, plan.held, held_by(search.attrs))
    if what and any(trial.state.is_finished() for trial in search.view().trials):
        name = plan.spec.objective.removeprefix("__main__:")
        raise InputError(
            f"study {plan.spec.name!r} in {plan.spec.storage} has trials of another {name}: "
            f"its {what} differs, and no name tells the two apart; give each study a `name` of its own, or "
            "`fresh=True`, which keeps the old study under another name"
        )


def warn_of_source(plan: Plan, search: Search) -> bool:
    """Say so where the objective is not what the study began with; return whether that is so."""
    if what := how_source_differs(plan, search):
        log.warning(f"the objective's {what} has changed since the study began: its trials may not be comparable")
    return bool(what)


def warn_of_bundle(plan: Plan, folder: Path | None) -> None:
    """Say so where the study's bundle was made of another code than the objective has now."""
    if folder is None:
        return
    made_of = read_about(folder).get("source_fingerprint")
    if made_of not in (None, plan.source, file_fingerprint(plan.given)):
        log.warning(
            f"{folder} was exported by another code of the objective than the present one, and is left as it is; to "
            f"have the best trial trained and exported by this one: rm -r {shlex.quote(str(folder))}, and run again"
        )


def remember_source(plan: Plan, search: Search) -> None:
    """Store what the objective's source is, for those who ask later."""
    code = plan.source
    search.remember(schema.CODES, with_code(search.attrs, code, same=[file_fingerprint(plan.given)]))
    search.remember(schema.CODE, code)
    search.remember(schema.HELD, dict(plan.held) if plan.by_program else {})
    search.remember(schema.HELD_BY_FILE, {} if plan.by_program else dict(plan.held))
