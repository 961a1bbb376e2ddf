"""The default configuration, trained as the best of a search was: what the search has gained over it."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from hpo.errors import HpoError, Interrupted
from hpo.log import log
from hpo.runner.again import train_members
from hpo.runner.baselines import why
from hpo.runner.confirm import Prepared, result_of
from hpo.runner.params import default_params
from hpo.runner.prepare import Plan
from hpo.runner.table_models import Absent
from hpo.search import schema
from hpo.search.beside import Default
from hpo.search.clock import duration
from hpo.search.confirmed import digest, results_in
from hpo.search.retrained import Configuration, Result
from hpo.search.search import Search
from hpo.search.view import NO_TRIAL, Best, StudyView
from hpo.seeds import derive
from hpo.study.data import Data
from hpo.study.value import BEST
from hpo.training.loop import Results
from hpo.training.stack import Member, Stack

SHARE, SECONDS = 0.1, 2.0
"""The default configuration is trained where that takes at most this share of the search's time, or so many seconds."""
Refit = Callable[[Best, int], nn.Module]
"""Trains a configuration from scratch on train + validation, for so many epochs."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What was found of the default configuration before the test rows are read, and its network, if there is one."""

    known: Default
    network: nn.Module | None = None


def train_default(
    plan: Plan,
    search: Search,
    seen: StudyView,
    best: Best,
    data: Data,
    refit: Refit,
    took: tuple[float, int],
    stopping: Callable[[], bool],
) -> Trained:
    """Train the default configuration as `best` was, where that costs little beside the search.

    `took` are the seconds and the epochs of `best`'s own refit. For how many epochs it is trained is known of its
    trial, or of its confirmation; else it is trained once on the train split, as a trial. Raises Interrupted.
    """
    try:
        params = default_params(plan.objective, plan.spec, plan.space)
    except KeyError as error:
        return Trained(known=Default(why=f"{error.args[0]} has no default"))
    trial = seen.complete_with(params)
    if params == best.params:
        return Trained(known=Default(number=best.number, is_best=True))
    value = None if trial is None else trial.value
    known = Default(number=None if trial is None else trial.number)
    start, network, failed = time.perf_counter(), None, ""
    try:
        epochs = _epochs_of(plan, search, trial, params if trial is None else trial.params)
        _require_cheap(plan, search, seen, took, epochs)
        log.info("training the default configuration, to compare the best of the search with it")
        if epochs is None:
            found = _as_a_trial(plan, search, params, data, stopping)
            value, epochs = found.value, found.epoch + 1
        seed = derive(plan.spec.seed, "default") if trial is None else trial.seed
        of_default = Best(
            number=NO_TRIAL,
            value=0.0,
            params=params if trial is None else trial.params,
            epoch=epochs - 1,
            seed=seed,
            metrics={},
        )
        network = refit(of_default, epochs)
        known = replace(known, epochs=epochs, seconds=time.perf_counter() - start)
    except Interrupted:
        raise
    except (Absent, HpoError) as error:
        failed = why(error)
    gain = None if value is None else (best.value - value) * (1 if search.maximize else -1)
    return Trained(known=replace(known, gain_on_validation=gain, why=failed), network=network)


def _epochs_of(plan: Plan, search: Search, trial: Best | None, params: Mapping[str, Any]) -> int | None:
    """Return for how many epochs a configuration is refitted, by the rules for the best; None: not known yet."""
    if has_all_epochs(plan):
        return plan.spec.epochs
    if (how := plan.spec.confirm) is not None:
        results = results_in(search.attrs.get(schema.CONFIRMED), digest(params, how))
        if any(result.value is not None for result in results.values()):
            return Configuration(number=NO_TRIAL, value=0.0, results=list(results.values())).epoch + 1
    return None if trial is None else trial.epoch + 1


def has_all_epochs(plan: Plan) -> bool:
    """Whether a refit has all epochs of the study, whichever was the best."""
    return plan.spec.value != BEST and plan.spec.patience is None


def _require_cheap(plan: Plan, search: Search, seen: StudyView, took: tuple[float, int], epochs: int | None) -> None:
    """Raise Absent where training would take long beside the search; `epochs` None: it is trained as a trial first."""
    needed = took[0] / max(1, took[1]) * (2 * plan.spec.epochs if epochs is None else epochs)
    if needed > max(SECONDS, SHARE * search.seconds_used(seen)):
        raise Absent(f"to train it takes about {duration(needed)}, which is more than a tenth of the search")


def _as_a_trial(
    plan: Plan, search: Search, params: Mapping[str, Any], data: Data, stopping: Callable[[], bool]
) -> Result:
    """Return what a training on the train split comes to. Raises Absent where it fails, Interrupted."""
    prepared = Prepared.of(plan, data)
    assert prepared.batches is not None
    ended: list[Result] = []

    def left() -> list[Member]:
        return [] if ended else [Member(number=NO_TRIAL, seed=derive(plan.spec.seed, "default"), params=params)]

    def report(stack: Stack, results: Results) -> list[Member]:
        ended.extend(end for member in results if (end := result_of(plan, member)) is not None)
        return [] if ended else list(results)

    train_members(
        plan,
        search,
        plan.task(data.info, len(data.train)),
        prepared.batches,
        left,
        report,
        epochs=plan.spec.epochs,
        seed=plan.spec.seed,
        stopping=stopping,
    )
    if not ended or ended[0].fault is not None:
        raise Absent(f"its training failed: {ended[0].fault if ended else 'it has no epoch'}")
    return ended[0]
