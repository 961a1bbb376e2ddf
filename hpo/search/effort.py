"""How much a study has trained, and what pruning has saved of it."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from optuna.trial import FrozenTrial, TrialState

from hpo.search import schema
from hpo.search.budget import is_paused
from hpo.search.constraints import is_untrained

_WHOLE = (TrialState.COMPLETE, TrialState.FAIL)
"""Trials of which pruning has saved nothing."""


@dataclass(frozen=True, kw_only=True)
class Effort:
    """Of all trials that have been started; `paused` and `resumed` count times, `promoted` and `restarted` trials."""

    epochs: int
    """Trained, as far as they were reported."""
    without: int
    """What these trials would have been trained without pruning."""
    paused: int
    resumed: int
    promoted: int
    """Trials that were resumed at least once."""
    restarted: int
    """Those of which a checkpoint could not be reached, so that epochs were trained twice."""

    @property
    def share(self) -> float:
        """The share of the epochs without pruning that was trained."""
        return self.epochs / self.without if self.without else 1.0

    def text(self) -> str:
        """Return what a person reads of it; empty where nothing was saved."""
        if self.epochs >= self.without:
            return ""
        parts = [f"{self.epochs} of {self.without} epochs trained ({self.share:.0%})"]
        if self.paused:
            parts.append(f"{self.paused} times paused, {self.resumed} times resumed, {self.promoted} trials promoted")
        if self.restarted:
            parts.append(f"{self.restarted} resumed from scratch")
        return "; ".join(parts)

    def as_dict(self) -> dict[str, int]:
        """Return the counts by name."""
        return asdict(self)


def effort(trials: Sequence[FrozenTrial], epochs: int) -> Effort:
    """Return the effort of these `trials`, each of which has so many `epochs` without pruning.

    One that is complete after fewer (`patience`), or has failed, would have had no more. One whose network breaks a
    constraint, and is not trained, is none of them: pruning has saved nothing of it.
    """
    asked_for = [trial for trial in trials if trial.state != TrialState.WAITING or is_paused(trial)]
    started = [trial for trial in asked_for if not is_untrained(trial)]
    trained = {trial.number: len(trial.intermediate_values) for trial in started}
    n_paused = {trial.number: len(trial.user_attrs.get(schema.TRAINED, ())) for trial in started}
    n_resumed = {trial.number: n_paused[trial.number] - _is_still(trial) for trial in started if n_paused[trial.number]}
    return Effort(
        epochs=sum(trained.values()),
        without=sum(trained[t.number] if t.state in _WHOLE else max(epochs, trained[t.number]) for t in started),
        paused=sum(n_paused.values()),
        resumed=sum(n_resumed.values()),
        promoted=sum(n > 0 for n in n_resumed.values()),
        restarted=sum(bool(trial.user_attrs.get(schema.RESTARTED)) for trial in started),
    )


def _is_still(trial: FrozenTrial) -> bool:
    """Whether a trial was not resumed after its last pause: it is paused, or was pruned so."""
    at: int | None = trial.user_attrs.get(schema.PAUSED_AT)
    ended = is_paused(trial) or trial.state == TrialState.PRUNED
    return ended and at == len(trial.intermediate_values)
