"""What is known of the params that were searched: their ranges, and how important each is."""

import warnings
from collections.abc import Sequence
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from hpo.errors import masked
from hpo.export.files import finite
from hpo.report.rows import OR, plain
from hpo.search.front import leading

FEWEST_FOR_IMPORTANCE = 4
"""How many complete trials it takes to say anything of a param's importance."""


def distributions(trials: Sequence[FrozenTrial]) -> dict[str, dict[str, Any]]:
    """Return what is known of each searched param; where trials differ (a function's may), the widest of all."""
    found: dict[str, dict[str, Any]] = {}
    for name, distribution in {pair for trial in trials for pair in trial.distributions.items()}:
        own = found.setdefault(name.removesuffix(OR), {})
        if name.endswith(OR):
            own["otherwise"] = next(iter(getattr(distribution, "choices", ())), None)
        elif isinstance(distribution, optuna.distributions.CategoricalDistribution):
            choices = [*own.get("choices", ()), *distribution.choices]
            own["choices"] = list({repr(each): each for each in choices}.values())  # True and 1 are two
        elif isinstance(distribution, optuna.distributions.FloatDistribution | optuna.distributions.IntDistribution):
            own["low"] = min(own.get("low", distribution.low), distribution.low)
            own["high"] = max(own.get("high", distribution.high), distribution.high)
            own["log"] = own.get("log", True) and distribution.log
    return {masked(name): plain(own) for name, own in sorted(found.items())}


def importances(trials: Sequence[FrozenTrial], *, maximize: bool) -> dict[str, float]:
    """Return each param's share of what Optuna's PED-ANOVA finds, a branch (`or`) counted with its param."""
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE and finite(leading(trial)) is not None]
    if len(complete) < FEWEST_FOR_IMPORTANCE:
        return {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there are few trials, say
            copy = optuna.create_study(direction="maximize" if maximize else "minimize")  # with no adopted trials
            copy.add_trials([_light(trial) for trial in complete])
            evaluator = optuna.importance.PedAnovaImportanceEvaluator()
            found = optuna.importance.get_param_importances(copy, evaluator=evaluator)
    except (RuntimeError, ValueError):  # params that differ in kind between trials
        return {}
    summed: dict[str, float] = {}
    for name, share in found.items():
        own = masked(name.removesuffix(OR))
        summed[own] = summed.get(own, 0.0) + float(share)
    if not any(finite(share) for share in summed.values()):
        return {}
    return dict(sorted(summed.items(), key=lambda each: -each[1]))


def _light(trial: FrozenTrial) -> FrozenTrial:
    """Return a trial without its epochs, which take long to copy."""
    return optuna.trial.create_trial(value=leading(trial), params=trial.params, distributions=trial.distributions)
