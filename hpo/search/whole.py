"""A whole study renamed or deleted in its storage: in a database by a few statements, in one transaction.

Optuna has no way to rename one, and it deletes a study trial by trial: 8 s for 5000 of them in SQLite, while nobody
else can write. A journal only grows: there a study that is renamed is copied, with all that it has, and then deleted.
Behind gRPC that is not safe, since there is no lock against workers, so it is refused.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import optuna
from optuna.exceptions import DuplicatedStudyError
from optuna.storages import BaseStorage, RDBStorage, get_storage
from optuna.storages._rdb import models
from sqlalchemy import Table, select, update
from sqlalchemy import delete as sql_delete
from sqlalchemy.exc import IntegrityError

from hpo.errors import InputError, masked

_STUDIES: Table = models.StudyModel.__table__
_TRIALS: Table = models.TrialModel.__table__
_ATTRS: Table = models.StudyUserAttributeModel.__table__


@contextmanager
def renaming(storage: BaseStorage, url: str, old: str, new: str, attrs: Mapping[str, Any]) -> Iterator[None]:
    """Rename study `old` to `new` at this block's end, its `user_attrs` updated with `attrs`; not where it raises.

    `storage` is that at `url` as `open_storage` gives it; its lock must be held. Raises InputError where there is a
    study `new`, or the storage is a gRPC server.
    """
    try:
        if isinstance(storage, RDBStorage):
            with _in_database(storage, old, new, attrs):
                yield
        elif url.startswith("grpc:"):
            raise InputError(
                f"a study cannot be renamed through {masked(url)}; do it on the machine that runs `hpo serve`, with "
                "--storage and the address of the database"
            )
        else:
            with _as_copy(storage, old, new, attrs):
                yield
    except (IntegrityError, DuplicatedStudyError) as error:
        raise taken(url, new) from error


def delete(storage: BaseStorage, study_id: int) -> None:
    """Delete a study with all of its trials. `storage` is as `open_storage` gives it; its lock must be held."""
    if not isinstance(storage, RDBStorage):
        storage.delete_study(study_id)
        return
    trials = select(_TRIALS.c.trial_id).where(_TRIALS.c.study_id == study_id)
    with storage.engine.begin() as connection:
        for table in reversed(models.BaseModel.metadata.sorted_tables):  # what refers to others before these
            if "trial_id" in table.c and table is not _TRIALS:
                connection.execute(sql_delete(table).where(table.c.trial_id.in_(trials)))
            elif "study_id" in table.c:
                connection.execute(sql_delete(table).where(table.c.study_id == study_id))


def taken(url: str, name: str) -> InputError:
    """Return the error for a new name that a study of the storage has already."""
    return InputError(f"the storage {masked(url)} has a study named {name!r} already; give another name")


@contextmanager
def _in_database(storage: RDBStorage, old: str, new: str, attrs: Mapping[str, Any]) -> Iterator[None]:
    study_id = storage.get_study_id_from_name(old)
    storage.remove_session()  # its read transaction is over
    with storage.engine.begin() as connection:
        connection.execute(update(_STUDIES).where(_STUDIES.c.study_id == study_id).values(study_name=new))
        for key, value in attrs.items():
            row = (_ATTRS.c.study_id == study_id) & (_ATTRS.c.key == key)
            if connection.execute(select(_ATTRS.c.key).where(row)).first() is not None:
                connection.execute(update(_ATTRS).where(row).values(value_json=json.dumps(value)))
        yield


@contextmanager
def _as_copy(storage: BaseStorage, old: str, new: str, attrs: Mapping[str, Any]) -> Iterator[None]:
    whole = get_storage(storage)
    old_id = whole.get_study_id_from_name(old)
    try:
        optuna.copy_study(from_study_name=old, from_storage=whole, to_storage=whole, to_study_name=new)
        for key, value in attrs.items():
            whole.set_study_user_attr(whole.get_study_id_from_name(new), key, value)
        yield
    except DuplicatedStudyError:
        raise
    except BaseException:
        with suppress(KeyError):
            whole.delete_study(whole.get_study_id_from_name(new))
        raise
    whole.delete_study(old_id)
