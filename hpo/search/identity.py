"""What must not change while a study is resumed, and whether a stored study is the one that a study file describes."""

import json
from collections.abc import Mapping
from shlex import quote
from typing import Any

from hpo.errors import InputError, did_you_mean
from hpo.search import schema
from hpo.search.storage import close_storage, open_storage
from hpo.study.goals import direction_of
from hpo.study.space import Space
from hpo.study.spec import StudySpec

FRESH = "hpo run FILE --fresh, or hpo.run(…, fresh=True)"
"""What starts a study of the same name from nothing, in a message."""
_ABSENT = "absent"
_KEYS = ("objective", "metric", "value", "epochs", "patience", "precision", "deterministic", "seed")
_LATER_KEYS: Mapping[str, Any] = {"precision": "float32", "deterministic": False}
"""What a key meant in studies that were stored before there was one."""


def identity(
    spec: StudySpec, space: Space, metric: str, options: Mapping[str, Any], others: Mapping[str, bool]
) -> dict[str, Any]:
    """Return what must not change while a study is resumed, as plain values: its trials would not compare.

    `options` are the spec's, without what must not be seen (`Document.options`); `others` the metrics beside the one
    that leads, each with whether more of it is better.
    """
    plain = {
        "objective": spec.objective,
        "options": options,
        "metric": metric,
        "value": spec.value,
        "epochs": spec.epochs,
        "patience": spec.patience,
        "precision": spec.precision,
        "deterministic": spec.deterministic,
        "seed": spec.seed,
        "params": space.identity(),
    }
    if spec.constraints:
        plain["constraints"] = spec.constraints
    if others:
        plain["others"] = {name: direction_of(maximize) for name, maximize in others.items()}
    stored: dict[str, Any] = json.loads(json.dumps(plain))  # as the storage gives it back
    return stored


def compare(spec: StudySpec, attrs: Mapping[str, Any], wanted: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Raise InputError where the stored study is not the one that the study file describes; it says what differs.

    An option that is given with its default (`defaults`) is one that is not given.
    """
    stored = attrs.get(schema.IDENTITY)
    if not isinstance(stored, Mapping) or not isinstance(stored.get("options", {}), Mapping):
        raise not_ours(spec.storage, spec.name)
    differences = []
    for key in _KEYS:
        there = stored.get(key, _LATER_KEYS.get(key))
        if there != wanted[key]:
            differences.append(f"{key} is {wanted[key]!r} here, {there!r} there")
    here, there = ({**defaults, **each} for each in (wanted["options"], stored.get("options", {})))
    differences += _different_options({**defaults, **spec.options}, here, there)
    differences += _different("metric", wanted.get("others", {}), stored.get("others", {}))
    differences += _different("constraints", wanted.get("constraints", {}), stored.get("constraints", {}))
    differences += _different("params", wanted["params"], stored.get("params", {}))
    if differences:
        raise another_study(spec, differences)


def _different(key: str, here: Mapping[str, Any], there: Any) -> list[str]:
    """Return in what two mappings under a `key` of the study file differ."""
    there = there if isinstance(there, Mapping) else {}
    return [
        f"{key}.{name} is {here.get(name, _ABSENT)} here, {there.get(name, _ABSENT)} there"
        for name in sorted({*here, *there})
        if here.get(name, _ABSENT) != there.get(name, _ABSENT)
    ]


def _different_options(clear: Mapping[str, Any], wanted: Mapping[str, Any], there: Mapping[str, Any]) -> list[str]:
    """Return in what the options `there` differ; those of an older version's study may be in `clear`."""
    plain = json.loads(json.dumps(clear))
    differences = []
    for key in sorted({*wanted, *there}) if there != plain else []:
        here, was = wanted.get(key, _ABSENT), there.get(key, _ABSENT)
        if was not in (here, plain.get(key, _ABSENT)) and str(was) != str(plain.get(key)):
            hidden = plain.get(key, _ABSENT) != here
            came = "another value than" if hidden else f"{here!r} here, {was!r}"
            differences.append(f"options.{key} is {came} there")
    return differences


def another_study(spec: StudySpec, differences: list[str]) -> InputError:
    """Return the error for a storage whose study of that name is another one."""
    lines = "".join(f"\n  {difference}" for difference in differences)
    return InputError(
        f"the storage {spec.storage} has another study named {spec.name!r}:{lines}\n"
        f"start a new one, and keep that one under another name: {FRESH}\n"
        f"or delete that one: hpo delete {quote(spec.name)} --storage {quote(spec.storage)}\n"
        "or give this one another `name`"
    )


def not_ours(url: str, name: str) -> InputError:
    """Return the error for a study that hpo has not made."""
    return InputError(
        f"the storage {url} has a study named {name!r} that was not made by hpo; take another `name`, or another "
        "`storage` (`hpo adopt` takes its trials as history; Optuna's own commands delete it)"
    )


def stored_file(url: str, name: str) -> dict[str, Any]:
    """Return the values of the study file that the storage keeps of study `name`. Raises InputError, StorageError."""
    storage = open_storage(url)
    try:
        studies = {study.study_name: study for study in storage.get_all_studies()}
        text = studies[name].user_attrs.get(schema.STUDY_FILE) if name in studies else None
    finally:
        close_storage(storage)
    if name not in studies:
        raise InputError(f"the storage {url} has no study {name!r}{did_you_mean(name, studies)}")
    if text is None:
        raise InputError(f"study {name!r} in {url} was not started by `hpo run`; give its study file")
    try:
        values = json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"study {name!r} in {url}: its study file cannot be read ({error}); give the file") from error
    if not isinstance(values, dict) or not isinstance(values.get("objective"), str):
        raise InputError(f"study {name!r} in {url}: its study file names no objective; give the file")
    return values
