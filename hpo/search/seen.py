"""What a sampler sees of a study whose trials are paused at rungs: only trials that compare.

Optuna's samplers take the trials that have ended, each with its last value. Under halving few have ended, after as many
epochs as they were worth, so they would learn that what starts fast is good. Here they see the trials of the highest
rung that enough of them have reached, each with its score there (`Halving.score`), or at the end with its own value.
"""

import copy
from collections.abc import Callable, Collection, Container, Hashable, Sequence

import optuna
from optuna.trial import FrozenTrial, TrialState

from hpo.search import schema
from hpo.search.budget import holders
from hpo.search.constraints import is_untrained
from hpo.search.halving import ENOUGH, Halving
from hpo.search.view import own

LEARNING = ("tpe", "gp")
"""The samplers that learn from the values of trials, one by one."""
EVERY = 3
"""Every so many-th draw of a sampler that learns is random: it learns from what it has chosen itself."""


class AtOneRung:
    """Gives of a study's trials those that compare, as complete ones."""

    def __init__(self, halving: Halving, epochs: int, constraints: Collection[str] = (), *, maximize: bool) -> None:
        """`constraints`: the names of the study's; what is not known to hold to each of them, or not, is not seen."""
        self._halving, self._rungs = halving, (*halving.rungs, epochs)
        self._constraints = set(constraints)
        self._sign = -1 if maximize else 1
        self._made: dict[Hashable, FrozenTrial] = {}
        self._last: tuple[Sequence[FrozenTrial] | None, list[FrozenTrial]] = (None, [])

    def __call__(self, trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
        """Return adopted trials as they are, those at the highest rung with ENOUGH, and the running ones that are new.

        And those that were not trained, since they break a constraint.

        A running trial that was resumed counts with its value, not as one of which nothing is known, which TPE takes
        for a bad one. The same list is ranked once, however often a sampler asks (`Search.ask_up_to` reads it once).
        """
        if self._last[0] is not trials:
            self._last = (trials, self._of(trials))
        return self._last[1]

    def _of(self, trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
        of_budget = holders(own(trials))
        adopted = [trial for trial in trials if schema.ADOPTED in trial.user_attrs]
        running = [t for t in of_budget if t.state == TrialState.RUNNING and not t.intermediate_values]
        seen = [*self._at_highest(of_budget), *running, *filter(is_untrained, of_budget)]
        return [*adopted, *sorted(seen, key=lambda trial: trial.number)]

    def _at_highest(self, trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
        known = [t for t in trials if t.state != TrialState.FAIL and self._constraints <= t.constraints.keys()]
        for rung in reversed(self._rungs):
            at = self._halving.at(known, rung)
            if len(at) >= ENOUGH:
                return [self._as_complete(trial, rung) for trial in at]
        return []

    def _as_complete(self, trial: FrozenTrial, rung: int) -> FrozenTrial:
        key = trial.number, rung, tuple(trial.constraints.items())
        if key not in self._made:
            made = copy.copy(trial)
            made.state = TrialState.COMPLETE
            if trial.state != TrialState.COMPLETE or rung < self._rungs[-1]:  # else its own value is what it came to
                made.values = [self._sign * self._halving.score(trial, rung)]
            self._made[key] = made
        return self._made[key]


class SeenStudy(optuna.Study):
    """A study of which a sampler sees only some trials, as that of Optuna's `HyperbandPruner`."""

    def __init__(self, study: optuna.Study, see: Callable[[Sequence[FrozenTrial]], list[FrozenTrial]]) -> None:
        self.__dict__ |= object.__getattribute__(study, "__dict__")  # Hyperband's own study hides it
        self._see = see

    def _get_trials(
        self, deepcopy: bool = True, states: Container[TrialState] | None = None, use_cache: bool = False
    ) -> list[FrozenTrial]:
        whole = super()._get_trials(deepcopy=False, states=None, use_cache=True)  # the same list for all that are asked
        seen = [trial for trial in self._see(whole) if states is None or trial.state in states]
        return copy.deepcopy(seen) if deepcopy else seen
