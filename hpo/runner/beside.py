"""What a study's result is looked at beside: fitted before the test rows are read, measured in the same reading."""

import math
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from hpo.log import log
from hpo.runner.baselines import (
    LOOKED_AT,
    MOST_MEASURED,
    Fitted,
    fit_baselines,
    form_seen,
    some_rows,
    taken,
    value_of,
    why,
)
from hpo.runner.default import Trained
from hpo.runner.prepare import Plan
from hpo.search.beside import Baseline, Beside, Default, Difference
from hpo.search.certainty import interval_of_difference
from hpo.seeds import derive
from hpo.study.data import Split, prediction
from hpo.training.batches import Batches
from hpo.training.evaluation import outputs_of
from hpo.training.stack import Task

GROUPS = 20
"""Into so many groups the test rows are divided to see how much of a difference is chance."""
_MOST_SECONDS = 0.03
"""A metric that takes longer is not measured again without each group."""


class Contest:
    """A network of `params` that was trained on the rows `train`, and what it is compared with, fitted on the same.

    It is made before the test rows are read. `default` is the default configuration; None: nobody asks for it.
    """

    def __init__(
        self,
        plan: Plan,
        task: Task,
        params: Mapping[str, Any],
        network: nn.Module,
        train: Split,
        preprocess: nn.Module,
        default: Trained | None,
    ) -> None:
        self._plan, self._task, self._params = plan, task, params
        self._preprocess, self._default = preprocess, default
        self._fitted: list[Fitted] = []
        start, seed = time.perf_counter(), plan.spec.seed
        try:
            few = taken(train, some_rows(len(train), LOOKED_AT, seed)).through(preprocess)
            form = form_seen(task, params, network, few, task.device)
            self._fitted, self._absent = fit_baselines(form, train, preprocess, seed)
            log.info(f"baselines were fitted in {time.perf_counter() - start:.1f} s")
        except (Exception, SystemExit) as error:  # none of it is needed for the study's result
            self._absent = [f"no baselines: {why(error)}"]

    def measured(self, test: Split, batches: Batches, outputs: Any, first: Any) -> Beside | None:
        """Return how all compare on the test rows; `batches` are these, prepared.

        `outputs` are those of the exported network, `first` those of a single network of the same params, with which
        the default configuration's is compared. None: the network's own value is no number.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of metrics of a few rows
            try:
                return _Measuring(self._plan, self._params, test, batches, self._preprocess).all(
                    outputs, first, self._fitted, self._absent, self._of_default(batches)
                )
            except (Exception, SystemExit) as error:
                log.warning(f"the result is compared with nothing: {why(error)}")
                return None

    def _of_default(self, batches: Batches) -> tuple[Default, Any] | None:
        """Return what is known of the default configuration, and its outputs for the test rows, if there are any."""
        if self._default is None:
            return None
        network = self._default.network
        if network is None:
            return self._default.known, None
        return self._default.known, outputs_of(self._task, network, batches)


class _Measuring:
    """Measures several outputs on the same test rows by the study's metric."""

    def __init__(
        self, plan: Plan, params: Mapping[str, Any], test: Split, batches: Batches, preprocess: nn.Module
    ) -> None:
        self._plan, self._params, self._test, self._preprocess = plan, params, test, preprocess
        self._metrics = {"loss": None} | {n: each.to(plan.device) for n, each in plan.objective.metrics().items()}
        self._rows = some_rows(len(test), MOST_MEASURED, plan.spec.seed)
        self._targets = batches.targets if self._is_whole else batches.targets[self._rows.to(plan.device)]
        self._slow = False
        """Whether a metric takes so long that there are no intervals."""
        n = len(self._rows)
        generator = torch.Generator().manual_seed(derive(plan.spec.seed, "test groups"))
        group = torch.randperm(n, generator=generator) % min(GROUPS, n)
        self._others = [(group != i).nonzero()[:, 0].to(plan.device) for i in range(min(GROUPS, n))]

    @property
    def _is_whole(self) -> bool:
        return len(self._rows) == len(self._test)

    @torch.no_grad()
    def all(
        self,
        outputs: Any,
        first: Any,
        fitted: Sequence[Fitted],
        absent: Sequence[str],
        default: tuple[Default, Any] | None,
    ) -> Beside | None:
        """Return how a network's `outputs` compare with what the others give."""
        is_tensor, outputs = isinstance(outputs, Tensor), self._of(outputs)
        start = time.perf_counter()
        value = self._value(outputs)
        self._slow = time.perf_counter() - start > _MOST_SECONDS
        if not math.isfinite(value):
            return None
        theirs, failed = self._predicted(fitted, prediction(outputs))
        baselines = [
            Baseline(name=each.name, metrics=self._all(made, loss=is_tensor), seconds=each.seconds, note=each.note)
            for each, made in theirs
        ]
        plan = self._plan
        found = Beside(
            metric=plan.metric,
            maximize=plan.maximize,
            network=value,
            rows=len(self._rows),
            of_rows=len(self._test),
            baselines=baselines,
            absent=[*absent, *failed],
        )
        best = found.best_baseline
        if best is not None:
            made = next(made for each, made in theirs if each.name == best.name)
            found = replace(found, difference=self._difference(outputs, made))
        return found if default is None else replace(found, default=self._with(first, *default))

    def _with(self, first: Any, known: Default, outputs: Any) -> Default:
        """Return what is known of the default configuration, with its test metrics where it was trained."""
        if outputs is None:
            return known
        first, outputs = self._of(first), self._of(outputs)
        metrics = self._all(outputs)
        if self._plan.metric not in metrics:
            return replace(known, why=f"its test {self._plan.metric} is no number")
        found = self._difference(first, outputs)
        return replace(known, metrics=metrics, network=self._value(first), difference=found)

    def _of(self, outputs: Any) -> Any:
        """Return the outputs for the rows that are measured."""
        return outputs if self._is_whole else tree_map(lambda x: x[self._rows.to(x.device)], outputs)

    def _predicted(self, fitted: Sequence[Fitted], like: Tensor) -> tuple[list[tuple[Fitted, Tensor]], list[str]]:
        """Return the baselines with their outputs for the rows that are measured, on the device; and what failed."""
        rows = self._test if self._is_whole else taken(self._test, self._rows)
        if len(fitted) > 1:  # the first needs no inputs
            rows = rows.through(self._preprocess)
        made, failed = [], []
        for each in fitted:
            try:
                made.append((each, each.predict(rows).to(like)))
            except Exception as error:
                failed.append(f"no {each.name}: {why(error)}")
        return made, failed

    def _value(self, outputs: Any, name: str = "", rows: Tensor | None = None) -> float:
        name, targets = name or self._plan.metric, self._targets
        if rows is not None:
            outputs, targets = tree_map(lambda x: x[rows], outputs), targets[rows]
        return value_of(self._plan.objective, name, outputs, targets, self._params, self._metrics[name])

    def _all(self, outputs: Any, *, loss: bool = True) -> dict[str, float]:
        """Return those of the study's metrics that can be measured of `outputs`; `loss` may need several of them."""
        found: dict[str, float] = {}
        for name in self._metrics if loss else [name for name in self._metrics if name != "loss"]:
            try:
                value = self._value(outputs, name)
            except Exception:  # the user's own code, which knows networks only
                continue
            found |= {name: value} if math.isfinite(value) else {}
        return found

    def _difference(self, ours: Any, theirs: Any) -> Difference:
        sign = 1 if self._plan.maximize else -1
        by = sign * (self._value(ours) - self._value(theirs))
        try:
            others = [] if self._slow else self._others
            without = [sign * (self._value(ours, rows=each) - self._value(theirs, rows=each)) for each in others]
        except Exception:  # a metric that does not take so few rows
            without = []
        return Difference(by=by, interval=interval_of_difference(by, without))
