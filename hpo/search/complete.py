"""The complete trials of a study in a database, which pruners ask for at each epoch: only new ones are read."""

from optuna.storages import BaseStorage, RDBStorage
from optuna.trial import FrozenTrial, TrialState

from hpo.search.storage import complete_ids

_AT_ONCE = 8
"""From how many new trials on all are read at once, not one by one."""


class CompleteTrialsCache:
    """The complete trials of each study that were read so far; a complete trial never changes."""

    def __init__(self, database: RDBStorage, storage: BaseStorage) -> None:
        """`storage` reads from that database (Optuna's own cache of finished trials)."""
        self._database, self._storage = database, storage
        self._known: dict[int, dict[int, FrozenTrial]] = {}

    def trials(self, study_id: int) -> list[FrozenTrial]:
        """Return all complete trials of a study, in the order of their numbers. Raises what the storage does."""
        known = self._known.get(study_id, {})
        ids = complete_ids(self._database, study_id, len(known))
        new = set(ids or ()) - known.keys()
        if new:
            read = [trial for trial in self._read(study_id, new) if trial._trial_id not in known]
            known = {t._trial_id: t for t in sorted([*known.values(), *read], key=lambda trial: trial.number)}
            self._known[study_id] = known
        return list(known.values())

    def _read(self, study_id: int, ids: set[int]) -> list[FrozenTrial]:
        """Return the trials of these ids, and maybe more of the study's complete ones."""
        if len(ids) > _AT_ONCE:
            return self._storage.get_all_trials(study_id, deepcopy=False, states=(TrialState.COMPLETE,))
        return [self._storage.get_trial(trial_id) for trial_id in ids]
