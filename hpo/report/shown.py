"""A study as `hpo ui` shows it in optuna-dashboard: its params under their own names, its best trial, its files.

Nothing of this is stored: the storage and the bundle's folder are read, and shown in another way.
"""

import copy
import json
import mimetypes
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from optuna.artifacts.exceptions import ArtifactNotFound
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.study._frozen import FrozenStudy
from optuna.trial import FrozenTrial, TrialState

from hpo.report.rows import OR, params_of, ranked

_ARTIFACT = "artifacts:"
"""How the key of an artifact's description begins, with its id behind it (Optuna's, as `upload_artifact` writes it)."""


class StudyFiles:
    """The files that a study has left, as a store of artifacts (Optuna's contract) that can only be read."""

    def __init__(self, files: Iterable[Path]) -> None:
        self._files = {str(uuid.uuid5(uuid.NAMESPACE_OID, file.name)): file for file in files}

    def described(self) -> dict[str, str]:
        """Return the study's attributes that describe those files which are there."""
        return {
            f"{_ARTIFACT}{key}": json.dumps(
                {
                    "artifact_id": key,
                    "filename": file.name,
                    "mimetype": mimetypes.guess_type(file.name)[0] or "application/octet-stream",
                    "encoding": None,
                }
            )
            for key, file in self._files.items()
            if file.is_file()
        }

    def open_reader(self, artifact_id: str) -> BinaryIO:
        try:
            return self._files[artifact_id].open("rb")
        except (KeyError, OSError) as error:
            raise ArtifactNotFound(f"there is no file {artifact_id} any more") from error

    def write(self, artifact_id: str, content_body: BinaryIO) -> None:
        raise PermissionError("hpo ui shows the files that a study has left, and takes none")

    def remove(self, artifact_id: str) -> None:
        """Leave it: the bundle is whole or not at all."""


def _handed_on(name: str) -> Callable[..., Any]:
    def call(self: Any, /, *args: Any, **keys: Any) -> Any:
        return getattr(self._inner, name)(*args, **keys)

    return call


_CONTRACT = BaseStorage.__abstractmethods__ | {"check_trial_is_updatable", "remove_session"}
_HandedOn: Any = type("_HandedOn", (BaseStorage,), {name: _handed_on(name) for name in _CONTRACT})
"""All of Optuna's contract, handed on to the storage within."""


class ShownStorage(_HandedOn):  # type: ignore[misc]  # made of the contract's names
    """A storage whose trials have their params under their own names, and whose study `study_id` has `files`.

    `weight_decay:or` is to Optuna a parameter of its own: here its value is one of `weight_decay`, whose range is as
    wide as that needs, and is no longer logarithmic where the value is not above 0.
    """

    def __init__(self, inner: BaseStorage, study_id: int, files: StudyFiles) -> None:
        self._inner, self._study_id, self._files = inner, study_id, files

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Iterable[TrialState] | None = None
    ) -> list[FrozenTrial]:
        trials = self._inner.get_all_trials(study_id, deepcopy=False)
        wide = _ranges(trials)
        wanted = None if states is None else set(states)
        return [_renamed(trial, wide) for trial in trials if wanted is None or trial.state in wanted]

    def get_trial(self, trial_id: int) -> FrozenTrial:
        trial = self._inner.get_trial(trial_id)
        return _renamed(trial, _ranges([trial]))

    def get_best_trial(self, study_id: int) -> FrozenTrial:
        maximize = self.get_study_directions(study_id)[0] == StudyDirection.MAXIMIZE
        best = ranked(self.get_all_trials(study_id), maximize=maximize)
        if not best:
            raise ValueError("No trials are completed yet.")
        return best[0]

    def get_all_studies(self) -> list[FrozenStudy]:
        studies: list[FrozenStudy] = copy.deepcopy(self._inner.get_all_studies())
        for study in studies:
            study.system_attrs = self._with_files(study._study_id, study.system_attrs)
        return sorted(studies, key=lambda study: study._study_id)

    def get_study_system_attrs(self, study_id: int) -> dict[str, Any]:
        return self._with_files(study_id, self._inner.get_study_system_attrs(study_id))

    def _with_files(self, study_id: int, attrs: Mapping[str, Any]) -> dict[str, Any]:
        return {**attrs, **(self._files.described() if study_id == self._study_id else {})}


def _ranges(trials: Iterable[FrozenTrial]) -> dict[str, BaseDistribution]:
    """Return the distribution of each parameter that has an `or`, by its own name, with that value in it."""
    wide: dict[str, BaseDistribution] = {}
    others: dict[str, Any] = {}
    for trial in trials:
        for branch in trial.distributions:
            if not branch.endswith(OR):
                continue
            name = branch.removesuffix(OR)
            if name in trial.distributions:
                wide[name] = trial.distributions[name]
            else:
                others[name] = trial.params[branch]
    return {**wide, **{name: _with_value(wide.get(name), value) for name, value in others.items()}}


def _with_value(known: BaseDistribution | None, value: Any) -> BaseDistribution:
    if isinstance(known, IntDistribution) and isinstance(value, int):
        return IntDistribution(min(known.low, value), max(known.high, value), log=known.log and value > 0)
    if isinstance(known, IntDistribution | FloatDistribution):
        low, high = min(float(known.low), value), max(float(known.high), value)
        return FloatDistribution(low, high, log=known.log and value > 0)
    return CategoricalDistribution((value,))


def _renamed(trial: FrozenTrial, wide: Mapping[str, BaseDistribution]) -> FrozenTrial:
    if not any(name.endswith(OR) for name in trial.distributions):
        return trial
    renamed = copy.copy(trial)
    renamed.params, known = params_of(trial), {**trial.distributions, **wide}
    renamed.distributions = {name: known[name] for name in renamed.params}
    return renamed
