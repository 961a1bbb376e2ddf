"""A study that a user names, by its file or by its name in a storage, and what the storage knows of it.

Nothing of the objective is imported: what a command needs (output, tracking, budget) is in the study file that the
storage keeps with each study.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optuna.study._frozen import FrozenStudy

from hpo.errors import InputError, SpecError, did_you_mean, masked
from hpo.search import schema
from hpo.search.address import exists
from hpo.search.away import open_patiently
from hpo.search.front import others_in
from hpo.search.identity import not_ours
from hpo.search.retrying import RetryingStorage
from hpo.study.document import of_values
from hpo.study.draft import draft_of, read
from hpo.study.spec import StudySpec

StoredStudy = FrozenStudy
"""A study as its storage lists it."""
_KEYS = (
    "sampler",
    "pruner",
    "start_with",
    "timeout",
    "time",
    "stop",
    "device",
    "loading",
    "retries",
    "catch",
    "stack",
    *("confirm", "refit_seeds", "ensemble"),
)
"""Keys of a study file that its identity has not, but that may change what is found, or how fast."""
DEFAULT_STORAGE = str(StudySpec.model_fields["storage"].default)


@dataclass(frozen=True, kw_only=True)
class Named:
    """A study as a user names it."""

    name: str
    storage: str
    outage: float = 0.0
    """For how long a storage may be away, in seconds."""
    file: StudySpec | None = None
    """What its file says, where one was given."""


def named(study: str, storage: str | None, sets: Mapping[str, str] | None = None) -> Named:
    """Return what `study` names: a study file, or a study of the `storage` (default: study.yaml's own default).

    `sets` are laid over a file (`--set`). Raises SpecError for a file with faults, InputError for one that is not
    there, and for `sets` where no file is named.
    """
    sets = sets or {}
    path = Path(study)
    if path.suffix not in (".yaml", ".yml") and not path.is_file():
        for key, value in sets.items():
            raise InputError(
                f"--set {key}={value}: overrides a value of a study file, but {study!r} is a study's name; give the "
                "study's file in its place, or leave out --set"
            )
        return Named(name=study, storage=DEFAULT_STORAGE if storage is None else storage)
    draft = read(path, {**sets, **({} if storage is None else {"storage": json.dumps(storage)})})
    if draft.faults or draft.spec is None:
        raise SpecError(draft.document.render(draft.faults))
    return Named(name=draft.spec.name, storage=draft.spec.storage, outage=draft.spec.outage, file=draft.spec)


@contextmanager
def opened(url: str, outage: float = 0.0) -> Iterator[RetryingStorage]:
    """Give the storage at `url`, which is not made; `outage`: for how long it may be away, in seconds.

    Raises InputError where there is none, StorageError where it cannot be opened.
    """
    if not exists(url):
        raise InputError(f"there is no storage {masked(url)}; give the one of your studies with --storage")
    storage = RetryingStorage(open_patiently(url, outage, False), outage)
    try:
        yield storage
    finally:
        storage.close()


def found(storage: RetryingStorage, url: str, name: str) -> StoredStudy:
    """Return the study of that name in a storage. Raises InputError where there is none, or hpo has not made it."""
    studies = {study.study_name: study for study in storage.get_all_studies()}
    if name not in studies:
        raise InputError(f"the storage {masked(url)} has no study {name!r}{did_you_mean(name, studies)}")
    if not is_ours(studies[name]):
        raise not_ours(url, name)
    return studies[name]


def is_ours(study: StoredStudy) -> bool:
    """Whether hpo has made a study."""
    identity = study.user_attrs.get(schema.IDENTITY)
    return isinstance(identity, Mapping) and len(study.directions) == 1 + len(others_in(identity))


def stored_spec(study: StoredStudy, url: str) -> StudySpec:
    """Return the spec of a study of ours, as far as the storage keeps its file; the rest is study.yaml's defaults.

    What is at fault in it (a variable that is not set here) is left out. Raises InputError where its name could not be
    a folder's: hpo has not given it.
    """
    identity = study.user_attrs[schema.IDENTITY]
    objective = {"objective": str(identity.get("objective"))}
    values: dict[str, Any] = dict(objective)
    with suppress(KeyError, TypeError, ValueError, RecursionError):  # whoever can write the storage writes anything
        values |= dict(json.loads(study.user_attrs[schema.STUDY_FILE]))
    try:
        require_name(study.study_name)
    except InputError as error:
        raise InputError(f"study {study.study_name!r} in {masked(url)}: {error}") from error
    update = {"storage": url, "name": study.study_name}
    spec = draft_of(of_values("the stored study file", values | objective | update), study.study_name).spec
    if spec is None:
        raise InputError(f"study {study.study_name!r} in {masked(url)}: what is stored of it names no objective")
    return spec.model_copy(update=update)


def require_name(name: str) -> None:
    """Raise InputError unless a study may have that name."""
    try:
        StudySpec.check_name(name)
    except ValueError as error:
        raise InputError(f"the name {error}") from error


def settings_of(study: StoredStudy, spec: StudySpec) -> dict[str, Any]:
    """Return what a study was run with, by dotted keys of a study file, with the fingerprints of its data and code.

    What a password might be in is a fingerprint, as in its identity.
    """
    identity = study.user_attrs[schema.IDENTITY]
    kept = {key: json.loads(spec.model_dump_json(include={key}))[key] for key in _KEYS}
    if isinstance(pruner := study.user_attrs.get(schema.PRUNER), Mapping):  # what was chosen
        kept["pruner"] = dict(pruner)
    flat = {"trials": spec.trials, "data": study.user_attrs.get(schema.DATA), "code": study.user_attrs.get(schema.CODE)}
    return {key: value for key, value in _flat({**identity, **kept} | flat).items() if value is not None}


def _flat(values: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Return nested mappings as one with dotted keys; a range of a parameter stays one value."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and not before:
            flat |= _flat(value, f"{key}.")
        else:
            flat[f"{before}{key}"] = value
    return flat
