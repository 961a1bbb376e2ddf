"""What is written of several trials, in one transaction of a database: Optuna's interface has one transaction a write.

It knows Optuna's tables, and writes what `optuna.storages.RDBStorage` would: `tests/test_batch.py` compares the two by
Optuna's own reader. Other storages are written through Optuna's interface.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from optuna.distributions import BaseDistribution, distribution_to_json
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage, RDBStorage
from optuna.storages._rdb import models
from optuna.trial import TrialState
from sqlalchemy import Connection, Table, bindparam, func, insert, select, update

from hpo.log import log
from hpo.search.away import line, may_pass
from hpo.search.schema import LEASE

_MOST_IDS = 500
"""How many ids are asked for in one statement: databases have a limit."""
_STUDIES: Table = models.StudyModel.__table__
_TRIALS: Table = models.TrialModel.__table__
_VALUES: Table = models.TrialValueModel.__table__
_REPORTS: Table = models.TrialIntermediateValueModel.__table__
_PARAMS: Table = models.TrialParamModel.__table__
_USER_ATTRS: Table = models.TrialUserAttributeModel.__table__
_SYSTEM_ATTRS: Table = models.TrialSystemAttributeModel.__table__


@dataclass(kw_only=True)
class Batch:
    """What is to be written of unfinished trials, by their ids; each trial's end comes after all else of it."""

    params: dict[tuple[int, str], tuple[float, BaseDistribution]] = field(default_factory=dict)
    """By name: the value as Optuna stores it, and what it was drawn from."""
    reports: dict[tuple[int, int], float] = field(default_factory=dict)
    """By step."""
    user_attrs: dict[tuple[int, str], Any] = field(default_factory=dict)
    system_attrs: dict[tuple[int, str], Any] = field(default_factory=dict)
    ends: dict[int, tuple[TrialState, Sequence[float] | None]] = field(default_factory=dict)
    """WAITING for a trial that is paused."""

    @property
    def ids(self) -> list[int]:
        """The trials that something is written of."""
        parts: Iterable[Mapping[tuple[int, Any], Any]] = (self.params, self.reports, self.user_attrs, self.system_attrs)
        return sorted({trial_id for part in parts for trial_id, _ in part} | self.ends.keys())

    @property
    def has_reports_only(self) -> bool:
        return not (self.params or self.user_attrs or self.system_attrs or self.ends)


def write_to_database(database: RDBStorage, batch: Batch) -> set[int]:
    """Write `batch` in one transaction; return the ids of trials that were ended before, which are left as they are.

    A report of a step that is there already replaces it, as in Optuna. Raises KeyError where a trial is not there, and
    what SQLAlchemy raises.
    """
    ids = batch.ids
    with database.engine.begin() as connection:
        states = dict(_locked_states(connection, ids))
        if missing := set(ids) - states.keys():
            raise KeyError(f"no trials with the ids {sorted(missing)}")
        over = {trial_id for trial_id, state in states.items() if state.is_finished()}
        _write_params(connection, {key: param for key, param in batch.params.items() if key[0] not in over})
        _write_reports(connection, {key: value for key, value in batch.reports.items() if key[0] not in over})
        for table, attrs in ((_USER_ATTRS, batch.user_attrs), (_SYSTEM_ATTRS, batch.system_attrs)):
            rows = {key: {"value_json": json.dumps(value)} for key, value in attrs.items() if key[0] not in over}
            _upsert(connection, table, "key", rows)
        _write_ends(connection, {trial_id: end for trial_id, end in batch.ends.items() if trial_id not in over})
    return over


def write_one_by_one(storage: BaseStorage, batch: Batch) -> set[int]:
    """Write `batch` through Optuna's interface; return the ids of trials that were ended before."""
    over: set[int] = set()

    def write(trial_id: int, method: Any, *arguments: Any) -> None:
        try:
            method(trial_id, *arguments)
        except UpdateFinishedTrialError:
            over.add(trial_id)

    for (trial_id, name), (value, distribution) in batch.params.items():
        write(trial_id, storage.set_trial_param, name, value, distribution)
    for (trial_id, step), value in batch.reports.items():
        write(trial_id, storage.set_trial_intermediate_value, step, value)
    for (trial_id, key), value in batch.user_attrs.items():
        try:
            write(trial_id, storage.set_trial_user_attr, key, value)
        except Exception as error:  # a database, or gRPC, that takes no text of that length: the trial counts without
            if may_pass(error) or isinstance(error, KeyError):
                raise
            log.warning(f"{key} of the trial with the id {trial_id} is not stored: {line(error)}")
    for (trial_id, key), value in batch.system_attrs.items():
        write(trial_id, storage.set_trial_system_attr, key, value)
    for trial_id, (state, values) in batch.ends.items():
        write(trial_id, storage.set_trial_state_values, state, values)
    return over


def claim(database: RDBStorage, leases: Mapping[int, Mapping[str, Any]]) -> list[int]:
    """Make those of the trials RUNNING that are WAITING, each with its lease, in one transaction; return their ids.

    One that is RUNNING with that very lease is ours too: the connection was cut when it was claimed.
    """
    with database.engine.begin() as connection:
        states = _locked_states(connection, list(leases))
        waiting = [trial_id for trial_id, state in states if state == TrialState.WAITING]
        if waiting:
            now = _utc_now()
            where = _TRIALS.c.trial_id.in_(waiting)
            connection.execute(update(_TRIALS).where(where).values(state=TrialState.RUNNING, datetime_start=now))
            rows = {(trial_id, LEASE): {"value_json": json.dumps(leases[trial_id])} for trial_id in waiting}
            _upsert(connection, _SYSTEM_ATTRS, "key", rows)
        running = [trial_id for trial_id, state in states if state == TrialState.RUNNING]
        if running:
            table = _SYSTEM_ATTRS
            query = select(table.c.trial_id, table.c.value_json).where(table.c.trial_id.in_(running))
            found = connection.execute(query.where(table.c.key == LEASE))
            waiting += [trial_id for trial_id, text in found if json.loads(text) == leases[trial_id]]
    return waiting


Queued = tuple[Mapping[str, Any], Mapping[str, Any]]
"""The `user_attrs` and the `system_attrs` of a trial that is to wait in the queue."""


def enqueue(database: RDBStorage, study_id: int, queued: Sequence[Queued]) -> None:
    """Add WAITING trials to a study, in one transaction. Raises KeyError: there is no such study.

    The study's row is locked against others that add trials, as Optuna does it: their number is how many there are.
    """
    with database.engine.begin() as connection:
        study = select(_STUDIES.c.study_id).where(_STUDIES.c.study_id == study_id).with_for_update()
        if connection.execute(study).first() is None:
            raise KeyError(f"no study with the id {study_id}")
        n = connection.execute(select(func.count()).where(_TRIALS.c.study_id == study_id)).scalar_one()
        user_attrs: dict[tuple[int, str], Any] = {}
        system_attrs: dict[tuple[int, str], Any] = {}
        for number, (user, system) in enumerate(queued, start=n):
            row = {"study_id": study_id, "number": number, "state": TrialState.WAITING}
            key = connection.execute(insert(_TRIALS).values(row)).inserted_primary_key
            assert key is not None
            user_attrs |= {(key[0], name): {"value_json": json.dumps(value)} for name, value in user.items()}
            system_attrs |= {(key[0], name): {"value_json": json.dumps(value)} for name, value in system.items()}
        _upsert(connection, _USER_ATTRS, "key", user_attrs)
        _upsert(connection, _SYSTEM_ATTRS, "key", system_attrs)


def _locked_states(connection: Connection, ids: Sequence[int]) -> list[tuple[int, TrialState]]:
    """Return the states of trials, which nobody else changes until the transaction ends; in order, against deadlocks.

    SQLite's transaction holds its lock for writing already (`hpo.search.sqlite`).
    """
    found: list[tuple[int, TrialState]] = []
    for some in parts(sorted(ids)):
        query = select(_TRIALS.c.trial_id, _TRIALS.c.state).where(_TRIALS.c.trial_id.in_(some))
        query = query.order_by(_TRIALS.c.trial_id).with_for_update()
        found += [(trial_id, state) for trial_id, state in connection.execute(query)]
    return found


def _write_params(connection: Connection, params: Mapping[tuple[int, str], tuple[float, BaseDistribution]]) -> None:
    rows = [
        {"trial_id": i, "param_name": name, "param_value": value, "distribution_json": distribution_to_json(of)}
        for (i, name), (value, of) in params.items()
    ]
    if rows:
        connection.execute(insert(_PARAMS), rows)


def _write_reports(connection: Connection, reports: Mapping[tuple[int, int], float]) -> None:
    rows = {}
    for key, value in reports.items():
        stored, kind = models.TrialIntermediateValueModel.intermediate_value_to_stored_repr(value)
        rows[key] = {"intermediate_value": stored, "intermediate_value_type": kind}
    _upsert(connection, _REPORTS, "step", rows)


def _upsert(connection: Connection, table: Table, name: str, rows: Mapping[tuple[int, Any], Mapping[str, Any]]) -> None:
    """Write `rows` by trial and by the column `name`, over what is there. Only the trials' worker writes there."""
    there: set[tuple[int, Any]] = set()
    names = list({each for _, each in rows})
    for some in parts(sorted({trial_id for trial_id, _ in rows})):
        query = select(table.c.trial_id, table.c[name]).where(table.c.trial_id.in_(some), table.c[name].in_(names))
        there.update((trial_id, each) for trial_id, each in connection.execute(query))
    new = [{"trial_id": i, name: each, **columns} for (i, each), columns in rows.items() if (i, each) not in there]
    if new:
        connection.execute(insert(table), new)
    old = [{"of": i, "at": each, **columns} for (i, each), columns in rows.items() if (i, each) in there]
    if old:
        where = (table.c.trial_id == bindparam("of"), table.c[name] == bindparam("at"))
        connection.execute(update(table).where(*where), old)


def _write_ends(connection: Connection, ends: Mapping[int, tuple[TrialState, Sequence[float] | None]]) -> None:
    values = []
    for trial_id, (_, of_trial) in ends.items():
        for objective, value in enumerate(of_trial or ()):
            stored, kind = models.TrialValueModel.value_to_stored_repr(value)
            values.append({"trial_id": trial_id, "objective": objective, "value": stored, "value_type": kind})
    if values:
        connection.execute(insert(_VALUES), values)
    if ends:
        now = _utc_now()
        told = [
            {"of": trial_id, "state": state, "datetime_complete": now if state.is_finished() else None}
            for trial_id, (state, _) in ends.items()
        ]
        connection.execute(update(_TRIALS).where(_TRIALS.c.trial_id == bindparam("of")), told)


def _utc_now() -> datetime:
    """Return the time as Optuna's tables have it: in UTC, without saying so."""
    return datetime.now(UTC).replace(tzinfo=None)


def parts(ids: Sequence[int]) -> Iterable[Sequence[int]]:
    """Give `ids` in parts that a statement can ask for."""
    return (ids[start : start + _MOST_IDS] for start in range(0, len(ids), _MOST_IDS))
