"""The refit of a study that asks for several networks of the chosen params: as many seeds, one model or an ensemble."""

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from torch import nn

from hpo.errors import ExportError
from hpo.export.copying import copied
from hpo.export.ensemble import Ensemble, link_of
from hpo.runner.again import train_members
from hpo.runner.outcome import networks_of
from hpo.runner.prepare import Plan
from hpo.runner.returned import FewRows, link_in
from hpo.search.search import Search
from hpo.search.view import Best
from hpo.seeds import derive
from hpo.study.data import Data
from hpo.training.batches import make_batches
from hpo.training.loop import Results
from hpo.training.stack import Member, Stack


def seeds_of(plan: Plan, best: Best) -> list[int]:
    """Return the seeds of the refit: that of the trial, which a single network has, and fresh ones."""
    n, _ = networks_of(plan.spec)
    return [best.seed, *(derive(plan.spec.seed, "refit", i) for i in range(1, n))]


def train_several(
    plan: Plan,
    search: Search,
    best: Best,
    data: Data,
    preprocess: nn.Module,
    epochs: int,
    stopping: Callable[[], bool],
) -> list[nn.Module]:
    """Return a network of `best`'s params for each seed, trained on `data.train` in stacks, each as alone.

    Raises ExportError where one of them fails, Interrupted.
    """
    batches = make_batches(data.train, preprocess, plan.device, plan.spec.loading)
    seeds = seeds_of(plan, best)
    networks: dict[int, nn.Module] = {}

    def left() -> list[Member]:
        new = [seed for seed in seeds if seed not in networks]
        return [Member(number=best.number, seed=seed, params=best.params) for seed in new]

    def report(stack: Stack, results: Results) -> Results:
        for member, metrics in results.items():
            loss = metrics.get("train_loss", math.nan)
            why = member.fault or (None if math.isfinite(loss) else f"train_loss became {loss} in epoch {member.epoch}")
            if why is not None:
                what = f"trial {best.number}, trained from scratch on train + validation with seed {member.seed}"
                raise ExportError(f"{what}, failed: {why}")
            if member.epoch == epochs:
                networks[member.seed] = copied(stack.module(member))
        return results

    train_members(
        plan,
        search,
        plan.task(data.info, len(data.train)),
        (batches, None),
        left,
        report,
        epochs=epochs,
        seed=plan.spec.seed,
        stopping=stopping,
    )
    return [networks[seed] for seed in seeds]


def exported(
    plan: Plan, networks: Sequence[nn.Module], data: Data, rows: FewRows, params: Mapping[str, Any]
) -> nn.Module:
    """Return the network that is tested and exported: the first, or the ensemble of as many as the study asks for."""
    if plan.spec.ensemble == 1:
        return networks[0]
    link = link_of(plan.objective.head(), data.info.n_classes, link_in(plan, rows, networks[0], params))
    return Ensemble(networks[: plan.spec.ensemble], link).to(plan.device)


def over_seeds(tests: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Return `n`, and `mean` and `std` of each metric over the test metrics of several networks; empty: of one."""
    if len(tests) < 2:
        return {}
    values = {name: [test[name] for test in tests] for name in tests[0]}
    return {
        "n": len(tests),
        "mean": {name: fmean(each) for name, each in values.items()},
        "std": {name: stdev(each) for name, each in values.items()},
    }
