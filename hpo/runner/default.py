"""The default configuration, trained as the best of a search was: what the search has gained over it."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from hpo.errors import HpoError, Interrupted
from hpo.log import log
from hpo.runner.again import train_members
from hpo.runner.baselines import Absent, why
from hpo.runner.confirm import Prepared, result_of
from hpo.runner.prepare import Plan
from hpo.search import schema
from hpo.search.beside import Default
from hpo.search.clock import duration
from hpo.search.confirmed import Configuration, Result, digest, results_in
from hpo.search.search import Search
from hpo.search.view import Best, StudyView
from hpo.seeds import derive
from hpo.study.data import Data
from hpo.training import optim
from hpo.training.loop import Results
from hpo.training.stack import Member, Stack

SHARE, SECONDS = 0.1, 2.0
"""The default configuration is trained where that takes at most this share of the search's time, or so many seconds."""
NO_TRIAL = -1
"""In place of a trial's number: the default configuration need not be a trial of the study."""
Refit = Callable[[Best, int], nn.Module]
"""Trains a configuration from scratch on train + validation, for so many epochs."""


def default_params(plan: Plan) -> dict[str, Any]:
    """Return the default configuration: the first of `start_with` over the objective's and the engine's defaults.

    What the study file fixes is fixed here too; a searched param of the engine that has no default is left to torch.
    Raises Absent where a param has none.
    """
    known = {**optim.DEFAULTS, **plan.objective.defaults, **(plan.spec.start_with[0] if plan.spec.start_with else {})}
    params = dict(plan.space.fixed)
    for each in plan.space.dimensions:
        if not each.applies(params):
            continue
        if each.name in known:
            params[each.name] = known[each.name]
        elif each.name not in optim.NAMES:
            raise Absent(f"{each.name} has no default")
    return params


def trial_of(seen: StudyView, params: Mapping[str, Any]) -> Best | None:
    """Return the first complete trial of these params; None: there is none."""
    return next((b for t in seen.complete if (b := seen.best(t.number)) is not None and b.params == params), None)


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What was found of the default configuration before the test rows are read, and its network, if there is one."""

    known: Default
    params: Mapping[str, Any]
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
        params = default_params(plan)
    except Absent as reason:
        return Trained(known=Default(why=str(reason)), params={})
    trial = trial_of(seen, params)
    if params == best.params:
        return Trained(known=Default(number=best.number, is_best=True), params=params)
    value = None if trial is None else trial.value
    known = Default(number=None if trial is None else trial.number)
    start, network, failed = time.perf_counter(), None, ""
    try:
        epochs = _epochs_of(plan, search, trial, params)
        _require_cheap(plan, search, seen, took, epochs)
        log.info("training the default configuration, to compare the best of the search with it")
        if epochs is None:
            found = _as_a_trial(plan, search, params, data, stopping)
            value, epochs = found.value, found.epoch + 1
        seed = derive(plan.spec.seed, "default") if trial is None else trial.seed
        of_default = Best(number=NO_TRIAL, value=0.0, params=params, epoch=epochs - 1, seed=seed, metrics={})
        network = refit(of_default, epochs)
        known = replace(known, epochs=epochs, seconds=time.perf_counter() - start)
    except Interrupted:
        raise
    except (Absent, HpoError) as error:
        failed = why(error)
    gain = None if value is None else (best.value - value) * (1 if search.maximize else -1)
    return Trained(known=replace(known, gain_on_validation=gain, why=failed), params=params, network=network)


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
    return plan.spec.value == "last" and plan.spec.patience is None


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
