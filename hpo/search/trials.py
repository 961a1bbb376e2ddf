"""The trials of studies in a database, read once: what cannot have changed is not read again.

Optuna's own cache reads every unfinished trial at each call, through SQLAlchemy's objects. Here a finished trial is
read once, a waiting one when it is claimed or paused, one that this process trains never: what is written of it is
known. `tests/test_trials.py` compares what is read with Optuna's own reader.
"""

import copy
import json
import threading
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any

from optuna.distributions import BaseDistribution, json_to_distribution
from optuna.storages import RDBStorage
from optuna.storages._rdb import models
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import Column, ColumnElement, Connection, Enum, Row, String, Table, select, type_coerce

from hpo.garbage import uncollected
from hpo.search.batch import parts

_from_json = json.JSONDecoder().decode
_TRIALS: Table = models.TrialModel.__table__
_STUDIES: Table = models.StudyModel.__table__
_FINITE = models.TrialIntermediateValueModel.TrialIntermediateValueType.FINITE.name
_AT_ONCE = 10_000
_ALL_FROM = 2000
"""From how many trials on the tables are read whole, not by ids."""


@dataclass
class _Study:
    finished: dict[int, FrozenTrial] = field(default_factory=dict)
    """By id, in the order of their numbers."""
    unfinished: dict[int, FrozenTrial | None] = field(default_factory=dict)
    """By id; None: it is not known how it is now."""
    last: int = 0
    """The highest id that was seen."""
    of_states: dict[frozenset[TrialState], list[FrozenTrial]] = field(default_factory=dict)
    """Finished trials by their states, as far as they were asked for: pruners do for each member and epoch."""

    def add(self, finished: Sequence[FrozenTrial]) -> None:
        if finished:
            both = [*self.finished.values(), *finished]
            self.finished = {trial._trial_id: trial for trial in sorted(both, key=lambda trial: trial.number)}
            self.of_states.clear()

    def finished_of(self, states: frozenset[TrialState]) -> list[FrozenTrial]:
        if states not in self.of_states:
            self.of_states[states] = [trial for trial in self.finished.values() if trial.state in states]
        return self.of_states[states]


class TrialCache:
    """The trials of a database, as they were when they were read last."""

    def __init__(self, database: RDBStorage) -> None:
        self._lock = threading.Lock()
        self._studies: dict[int, _Study] = {}
        self._ours: dict[int, FrozenTrial] = {}
        alone = {} if database.engine.dialect.name == "sqlite" else {"isolation_level": "AUTOCOMMIT"}
        self._engine = database.engine.execution_options(**alone)

    def all(self, study_id: int, states: Collection[TrialState] | None = None, fresh: bool = True) -> list[FrozenTrial]:
        """Return the study's trials of those states by their numbers; not `fresh`: as they were read last, if so.

        Raises KeyError: there is no such study, and what SQLAlchemy raises.
        """
        only_finished = states is not None and all(state.is_finished() for state in states)
        with self._lock:
            study = self._studies.get(study_id)
            unread = study is None or (not only_finished and None in study.unfinished.values())
            if fresh or unread:
                study = self._refresh(study_id, only_finished)
            assert study is not None
            if states is not None and only_finished:
                return list(study.finished_of(frozenset(states)))
            unfinished = [trial for trial in study.unfinished.values() if trial is not None]
            trials = sorted([*study.finished.values(), *unfinished], key=lambda trial: trial.number)
            return [trial for trial in trials if states is None or trial.state in states]

    def one(self, trial_id: int) -> FrozenTrial:
        """Return a trial; one of ours is the very object that is kept up to date. Raises KeyError, as `all`."""
        with self._lock:
            for known in (self._ours, *(study.finished for study in self._studies.values())):
                if trial_id in known:
                    return known[trial_id]
            with self._engine.connect() as connection:
                found = _read(connection, [trial_id])
        if not found:
            raise KeyError(f"no trial with the id {trial_id}")
        return found[0]

    def take(self, trial_ids: Sequence[int]) -> None:
        """Have trials that this process has claimed be its own: nobody else writes to them now but their end."""
        with self._lock, self._engine.connect() as connection:
            self._ours |= {trial._trial_id: trial for trial in _read(connection, trial_ids)}

    def let_go(self, trial_ids: Iterable[int]) -> None:
        """Have trials be read again that were ended."""
        for trial_id in trial_ids:
            self._ours.pop(trial_id, None)

    def note(self, trial_id: int, key: str, value: Any) -> None:
        """Note one of the `system_attrs` of a trial of ours, which Optuna's own object does not.

        In a copy: a pruner of rungs compares the trial with a list that it has taken before.
        """
        if trial_id in self._ours:
            trial = self._ours[trial_id] = copy.copy(self._ours[trial_id])
            trial.system_attrs = {**trial.system_attrs, key: value}

    def _refresh(self, study_id: int, only_finished: bool) -> _Study:
        """Read what may have changed; with `only_finished`, of no trial that is unfinished."""
        study = self._studies.setdefault(study_id, _Study())
        with self._engine.connect() as connection:
            if connection.execute(select(_STUDIES.c.study_id).where(_STUDIES.c.study_id == study_id)).first() is None:
                del self._studies[study_id]
                raise KeyError(f"no study with the id {study_id}")
            states = _states(connection, study_id, study)
            unfinished = {
                i: self._known(study, i, state, claimed_at)
                for i, (state, claimed_at) in states.items()
                if not state.is_finished()
            }
            wanted = [i for i in states if unfinished.get(i) is None and not (only_finished and i in unfinished)]
            with uncollected():
                read = _read(connection, wanted, study_id)
        study.unfinished = unfinished | {trial._trial_id: trial for trial in read if not trial.state.is_finished()}
        for trial in read:
            if trial.state.is_finished():
                study.unfinished.pop(trial._trial_id, None)
        study.add([trial for trial in read if trial.state.is_finished()])
        study.last = max(study.last, *states, 0)
        return study

    def _known(
        self, study: _Study, trial_id: int, state: TrialState, claimed_at: datetime | None
    ) -> FrozenTrial | None:
        """Return an unfinished trial, if it is known how it is now."""
        if trial_id in self._ours:
            return self._ours[trial_id]
        known = study.unfinished.get(trial_id)
        if known is None or not state == known.state == TrialState.WAITING:
            return None
        return known if known.datetime_start == _local(claimed_at) else None  # else it was resumed, and paused again


def _states(connection: Connection, study_id: int, study: _Study) -> dict[int, tuple[TrialState, datetime | None]]:
    """Return of the trials that were not finished, or not there, when the study was read last: state, last claim."""
    columns = select(_TRIALS.c.trial_id, _TRIALS.c.state, _TRIALS.c.datetime_start)
    columns = columns.where(_TRIALS.c.study_id == study_id)
    found = list(connection.execute(columns.where(_TRIALS.c.trial_id > study.last)))
    for some in parts(list(study.unfinished)):
        found += connection.execute(columns.where(_TRIALS.c.trial_id.in_(some)))
    return {trial_id: (state, claimed_at) for trial_id, state, claimed_at in found}


def _read(connection: Connection, ids: Sequence[int], study_id: int | None = None) -> list[FrozenTrial]:
    """Return the trials of these ids, in the order of their ids; `study_id` is that of all of them, if it is one."""
    if study_id is not None and len(ids) >= _ALL_FROM:
        wanted = set(ids)
        return [trial for trial in _read_where(connection, study_id, None) if trial._trial_id in wanted]
    return [trial for some in parts(sorted(ids)) for trial in _read_where(connection, None, some)]


def _read_where(connection: Connection, study_id: int | None, ids: Sequence[int] | None) -> list[FrozenTrial]:
    """Return the trials of a study, or those of some ids."""
    of_study = select(_TRIALS.c.trial_id).where(_TRIALS.c.study_id == study_id)
    where = of_study if ids is None else ids

    def rows(model: Any, *columns: str, by: Sequence[str] = ()) -> Iterator[Any]:
        table: Table = model.__table__
        names = ("trial_id", *columns) if columns else table.c.keys()
        wanted = select(*(_plain(table.c[name]) for name in names)).where(table.c.trial_id.in_(where))
        order = [table.c[name] for name in by] or table.primary_key.columns
        found = connection.execute(wanted.order_by(*order))
        return (row for some in found.partitions(_AT_ONCE) for row in some)  # one by one takes twice as long

    trials = {row.trial_id: _empty(row) for row in rows(models.TrialModel)}
    for trial_id, name, stored, text in rows(models.TrialParamModel, "param_name", "param_value", "distribution_json"):
        if (trial := trials.get(trial_id)) is not None:  # else it was added between the two reads
            distribution = _distribution(text)
            trial.params[name] = distribution.to_external_repr(stored)
            trial.distributions[name] = distribution
    reported = models.TrialIntermediateValueModel.stored_repr_to_intermediate_value
    kinds = models.TrialIntermediateValueModel.TrialIntermediateValueType
    columns = "step", "intermediate_value", "intermediate_value_type"
    by = "trial_id", "step"  # by their index, since there are many: other orders are sorted
    for trial_id, step, value, kind in rows(models.TrialIntermediateValueModel, *columns, by=by):
        if (trial := trials.get(trial_id)) is not None:
            trial.intermediate_values[step] = value if kind == _FINITE else reported(value, kinds[kind])
    for model, of in (models.TrialUserAttributeModel, "user_attrs"), (models.TrialSystemAttributeModel, "system_attrs"):
        for trial_id, key, text in rows(model, "key", "value_json"):
            if (trial := trials.get(trial_id)) is not None:
                getattr(trial, of)[key] = _from_json(text)
    values: dict[int, dict[int, float]] = {}
    of_values = models.TrialValueModel
    for trial_id, at, value, kind in rows(of_values, "objective", "value", "value_type"):
        if trial_id in trials:
            values.setdefault(trial_id, {})[at] = of_values.stored_repr_to_value(value, of_values.TrialValueType[kind])
    for trial_id, of_trial in values.items():
        trials[trial_id].values = [of_trial[i] for i in sorted(of_trial)]
    return list(trials.values())


def _plain(column: Column[Any]) -> ColumnElement[Any]:
    """Return a column that is read as it is stored: an Enum takes SQLAlchemy longer than all else of a row."""
    return type_coerce(column, String()) if isinstance(column.type, Enum) else column


def _empty(row: Row[Any]) -> FrozenTrial:
    return FrozenTrial(
        number=row.number,
        state=TrialState[row.state],
        value=None,
        values=None,
        datetime_start=_local(row.datetime_start),
        datetime_complete=_local(row.datetime_complete),
        params={},
        distributions={},
        user_attrs={},
        system_attrs={},
        intermediate_values={},
        trial_id=row.trial_id,
    )


def _local(time: datetime | None) -> datetime | None:
    """Return a time as Optuna gives it, local and without saying so, from what its tables have (UTC)."""
    if time is None:
        return None
    return time + _offset(time.replace(minute=time.minute // 15 * 15, second=0, microsecond=0))


@lru_cache(maxsize=1000)
def _offset(time: datetime) -> timedelta:
    """Return by how much the local time is ahead of UTC, from a quarter of an hour on: no clock changes within one."""
    return time.replace(tzinfo=UTC).astimezone().replace(tzinfo=None) - time


@lru_cache(maxsize=1000)
def _distribution(text: str) -> BaseDistribution:
    return json_to_distribution(text)
