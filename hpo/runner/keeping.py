"""A study renamed, set aside or deleted, with all that belongs to it: neither torch nor its objective is imported.

<output>/checkpoints/<name>/   goes with the study
<output>/bundles/<name>/       is renamed with it; deleted only where that is asked for
<output>/unsent/<name>/        what MLflow has not taken yet is renamed with it
MLflow's experiment            stays as it is: later runs of a renamed study go to one of its new name
"""

import json
import re
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import Any

from hpo.errors import HpoError, InputError, masked
from hpo.export.files import FILES, MORE_FILES
from hpo.log import log
from hpo.search import schema
from hpo.search.address import exists
from hpo.search.budget import wrong_row
from hpo.search.lease import at_work
from hpo.search.named import Named, StoredStudy, found, opened, require_name, stored_spec
from hpo.search.retrying import RetryingStorage, locked
from hpo.search.whole import delete as delete_study
from hpo.search.whole import renaming, taken
from hpo.study.spec import StudySpec


def checkpoints_of(spec: StudySpec, name: str | None = None) -> Path:
    """Return the folder of a study's weights, or of one of that `name` beside it."""
    return Path(spec.output) / "checkpoints" / (spec.name if name is None else name)


def claim_of(spec: StudySpec) -> Path:
    """Return the file that says which study, of all of that name, those folders are of."""
    folder = checkpoints_of(spec)
    return folder.with_name(f".{folder.name}.study.json")


def bundle_of(spec: StudySpec, name: str | None = None) -> Path:
    """Return the folder of a study's bundle, or of that of one of that `name` beside it."""
    return Path(spec.output) / "bundles" / (spec.name if name is None else name)


def unsent_of(spec: StudySpec) -> Path:
    """Return the folder of what MLflow has not taken yet, of all studies of that `output`."""
    return Path(spec.output) / "unsent"


def rename(study: Named, new: str) -> list[str]:
    """Rename a study, and return in words what has become of what belongs to it.

    Raises InputError where there is no such study, or one named `new`, or `new` is no name, or workers train it.
    """
    with opened(study.storage, study.outage) as storage, locked(storage, study.storage):
        return _rename(storage, found(storage, study.storage, study.name), study.storage, new)


def set_aside(spec: StudySpec) -> str | None:
    """Rename the stored study of that name to the first free `<name>-1`, `-2`... and return it; None: there is none.

    Raises InputError where workers train it, or hpo has not made it.
    """
    if not exists(spec.storage):
        return None
    with opened(spec.storage, spec.outage) as storage, locked(storage, spec.storage):
        names = {study.study_name for study in storage.get_all_studies()}
        if spec.name not in names:
            return None
        study = found(storage, spec.storage, spec.name)
        new = _free_name(stored_spec(study, spec.storage), names)
        _rename(storage, study, spec.storage, new)
    log.info("study %s is kept as %s; a new one starts", spec.name, new)
    return new


def _free_name(spec: StudySpec, names: Collection[str]) -> str:
    numbered = (f"{spec.name}-{number}" for number in count(1))
    folders = (checkpoints_of, bundle_of)
    return next(name for name in numbered if name not in names and not any(f(spec, name).exists() for f in folders))


def _rename(storage: RetryingStorage, study: StoredStudy, url: str, new: str) -> list[str]:
    """Rename a study and what belongs to it, all or nothing; its storage's lock must be held."""
    spec = stored_spec(study, url)
    require_name(new)
    if new in {each.study_name for each in storage.get_all_studies()}:
        raise taken(url, new)
    require_idle(storage, study, url)
    moves = [(folder(spec), folder(spec, new)) for folder in (checkpoints_of, bundle_of) if folder(spec).is_dir()]
    for _, to in moves:
        if to.exists():
            raise InputError(f"{to} is there already, of a study that is gone; move it away, or give another name")
    attrs = _renamed_attrs(study, spec, new)
    with _moving() as move, renaming(storage.inner, url, spec.name, new, attrs):
        for here, to in moves:
            move(here, to)
        for file in _unsent(spec, study.user_attrs.get(schema.MAKING)):
            move(file, file.parent.with_name(new) / file.name)
    with suppress(OSError):
        (unsent_of(spec) / spec.name).rmdir()
    lines = [f"{here} is {to} now" for here, to in moves]
    if spec.tracking != "off":
        where = f"the experiment {spec.name} of {masked(spec.tracking)}"
        lines.append(f"its runs stay in {where}; later ones go to the experiment {new}")
    return lines


@contextmanager
def _moving() -> Iterator[Callable[[Path, Path], None]]:
    """Give what moves a file or folder; where the block, or a move in it, fails, all are moved back."""
    done: list[tuple[Path, Path]] = []

    def move(here: Path, to: Path) -> None:
        try:
            to.parent.mkdir(parents=True, exist_ok=True)
            here.rename(to)
        except OSError as error:
            raise HpoError(f"{here} cannot be moved to {to} ({error.strerror}); nothing was renamed") from error
        done.append((here, to))

    try:
        yield move
    except BaseException:
        for here, to in reversed(done):
            to.rename(here)
        raise


def _renamed_attrs(study: StoredStudy, spec: StudySpec, new: str) -> dict[str, Any]:
    """Return those attributes of a study that hold its name, as they are under its new one."""
    attrs: dict[str, Any] = {}
    with suppress(KeyError, TypeError, ValueError):
        attrs[schema.STUDY_FILE] = json.dumps(dict(json.loads(study.user_attrs[schema.STUDY_FILE])) | {"name": new})
    result = study.user_attrs.get(schema.RESULT)
    if isinstance(result, dict) and result.get("bundle") == str(bundle_of(spec)) and bundle_of(spec).is_dir():
        attrs[schema.RESULT] = result | {"bundle": str(bundle_of(spec, new))}
    return attrs


def _unsent(spec: StudySpec, making: Any) -> Iterator[Path]:
    """Yield the files of what MLflow has not taken yet of a study: others of its name have another making."""
    if isinstance(making, str) and re.fullmatch(r"[0-9a-f]{32}", making):
        yield from (unsent_of(spec) / spec.name).glob(f"{making}.*")


def require_idle(storage: RetryingStorage, study: StoredStudy, url: str) -> None:
    """Raise InputError where workers train the study; it says which, and until when their leases hold."""
    trials = [t for t in storage.get_all_trials(study._study_id, deepcopy=False) if wrong_row(t) is None]
    held = at_work(trials, study.system_attrs, stored_spec(study, url).grace, time.time())
    if held:
        at = {worker: f"{datetime.fromtimestamp(until):%H:%M:%S}" for worker, until in held.items()}
        lines = (f"\n  {worker}, whose lease holds until {until}" for worker, until in at.items())
        raise InputError(
            f"study {study.study_name!r} in {masked(url)} is being trained:{''.join(lines)}\n"
            "stop these workers first; one that was killed counts until its lease has run out"
        )


def delete(study: Named, *, bundle: bool = False, force: bool = False) -> list[str]:
    """Delete a study from its storage, with its checkpoints, and with `bundle` its bundle; say what is gone.

    Raises InputError where there is no such study, hpo has not made it, or (but with `force`) workers train it.
    """
    with opened(study.storage, study.outage) as storage, locked(storage, study.storage):
        there = found(storage, study.storage, study.name)
        spec = stored_spec(there, study.storage)
        if not force:
            require_idle(storage, there, study.storage)
        storage.patiently(lambda: delete_study(storage.inner, there._study_id))
    with suppress(OSError):
        claim_of(spec).unlink(missing_ok=True)
    return [
        f"deleted: study {spec.name} in {masked(study.storage)}",
        _remove(checkpoints_of(spec), ["place-*", "best*.pt", "best*.part"], "checkpoints"),
        *_bundle_lines(spec, bundle),
        *([] if spec.tracking == "off" else [f"kept: its runs in {masked(spec.tracking)}"]),
    ]


def _bundle_lines(spec: StudySpec, remove: bool) -> list[str]:
    folder = bundle_of(spec)
    if not folder.is_dir():
        return []
    return (
        [_remove(folder, [*FILES, *MORE_FILES], "bundle")]
        if remove
        else [f"kept: its bundle in {folder} (--bundle deletes it)"]
    )


def _remove(folder: Path, patterns: Collection[str], what: str) -> str:
    """Remove a folder's files of these `patterns`, and the folder unless it holds others; return that in words."""
    if folder.is_symlink() or not folder.is_dir():
        return f"no {what} in {folder}"
    try:
        files = [file for pattern in patterns for file in folder.glob(pattern)]
        for file in files:
            file.unlink(missing_ok=True)
        folder.with_name(f".{folder.name}.lock").unlink(missing_ok=True)
        if any(folder.iterdir()):
            return f"deleted: {what} in {folder}, but for files that are not hpo's"
        folder.rmdir()
    except OSError as error:
        return f"kept: {folder}, which cannot be deleted ({error.strerror})"
    return f"deleted: {what} in {folder}"
