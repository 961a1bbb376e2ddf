"""Trials that are not trained by the engine's loop: an objective's own `train`, and a plain Optuna objective."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from typing import Any

import torch
from torch import Tensor, nn

from hpo.errors import InputError, Interrupted
from hpo.export.copying import copied
from hpo.runner.checkpoints import OWN
from hpo.runner.launch import LAUNCHED
from hpo.runner.prepare import Plan
from hpo.runner.returned import FewRows, few_rows, try_export, try_network
from hpo.runner.trial import TrialRun
from hpo.runner.trials import Trials
from hpo.search.claim import TakenOver
from hpo.search.pruning import settle_pruner
from hpo.search.search import Search
from hpo.stopping import StopToken
from hpo.study.constraints import OF_ANY_TRIAL
from hpo.study.data import Data, Split, require_unchanged, versions
from hpo.study.loading import origin
from hpo.study.objective import Function, Objective, Params, resumes
from hpo.tracking.base import Tracker
from hpo.training.faults import ended_the_process, fault_of

Told = Callable[[dict[str, float], Mapping[str, Any] | None], bool]
"""Takes an epoch's metrics, and the state that was reported with them; returns whether to continue."""


class TrialReporter:
    """What an objective's own `train` is given (`hpo.study.objective.Reporter`)."""

    def __init__(self, plan: Plan, train: Split, valid: Split, epochs: int, seed: int, told: Told) -> None:
        self.train, self.valid, self.epochs, self.seed = train, valid, epochs, seed
        self._plan, self._told, self._over = plan, told, False
        self._looked_at_state = False
        self.raised: Exception | None = None
        """What it has raised, which `train` may have caught: a stop, or bad input, is none of its own errors."""

    def __call__(self, metrics: Mapping[str, float], state: Mapping[str, Any] | None = None) -> bool:
        try:
            return self._report(metrics, state)
        except Exception as error:
            self.raised = self.raised or error
            raise

    def _report(self, metrics: Mapping[str, float], state: Mapping[str, Any] | None) -> bool:
        where = f"objective {self._plan.spec.objective}: train"
        if self._over:
            raise InputError(f"{where} continued after report returned False; return when it gives False")
        try:
            named = {n if n.startswith("train_") else f"valid_{n}": float(value) for n, value in metrics.items()}
        except (AttributeError, TypeError, ValueError):
            raise InputError(f"{where} must report numbers by name, but reported {metrics!r:.200}") from None
        if self._plan.metric_key not in named:
            raise InputError(
                f"{where} reported {', '.join(metrics) or 'nothing'}, but the study's metric is {self._plan.metric}"
            )
        reported = [name for name in self._plan.measured if name not in OF_ANY_TRIAL]
        if lacking := [name for name in reported if f"valid_{name}" not in named]:
            raise InputError(
                f"{where} reported {', '.join(metrics)}, but the study needs {', '.join(lacking)} of each trial, too"
            )
        if state is not None and not isinstance(state, Mapping):
            raise InputError(f"{where} must report its state as a mapping, but reported {state!r:.100}")
        if state is not None and not self._looked_at_state:
            _require_storable(where, state)
            self._looked_at_state = True
        self._over = not self._told(named, state)
        return not self._over


def _require_storable(where: str, state: Mapping[str, Any]) -> None:
    """Raise InputError with what of a state could not be read back from a checkpoint, where nothing is unpickled."""
    for name, value in state.items():
        file = BytesIO()
        try:
            torch.save({name: value}, file)
            file.seek(0)
            torch.load(file, weights_only=True)
        except Exception as error:  # pickle, torch, or an object's own code
            raise InputError(
                f"{where} must report its state in tensors, numbers and texts, in mappings and lists, but {name!r} is "
                f"or holds something else ({type(value).__name__}); of networks and optimizers report state_dict()"
            ) from error


def train_outside(
    plan: Plan,
    params: Params,
    seed: int,
    data: Data,
    preprocess: nn.Module,
    *,
    epochs: int,
    enough: Callable[[Sequence[Mapping[str, float]]], bool],
    stopping: Callable[[], bool],
) -> tuple[nn.Module | None, list[dict[str, float]]]:
    """Train `params` by the objective's own `train`, outside the search, until what it has reported is `enough`.

    It is given `epochs` as the number of epochs. Return its network, if any, and what it has reported. Raises
    Interrupted as soon as `stopping` says so.
    """
    train, valid = (split.through(preprocess).to(plan.device) for split in (data.train, data.valid))
    reports: list[dict[str, float]] = []

    def told(metrics: dict[str, float], state: Mapping[str, Any] | None) -> bool:
        if stopping():
            raise Interrupted()
        reports.append(metrics)
        return not enough(reports)

    return train_custom(plan, params, TrialReporter(plan, train, valid, epochs, seed, told)), reports


class CustomTraining:
    """One process's share of a study whose trials train themselves, one after the other."""

    stacked = False

    def __init__(
        self,
        plan: Plan,
        data: Data | None,
        search: Search,
        tracker: Tracker,
        trials: Trials,
        stop: StopToken,
    ) -> None:
        self._plan, self._search, self._tracker, self._trials = plan, search, tracker, trials
        self._token = stop
        self._data = data
        self._untried: FewRows | None = None
        """On what the first network that `train` returns is tried."""
        if data is not None:
            preprocess = plan.objective.preprocess(data.train)
            if type(plan.objective).preview is Objective.preview:  # else it was tried before anything ran
                self._untried = few_rows(plan, data, preprocess)
            self._train, self._valid = (x.through(preprocess).to(plan.device) for x in (data.train, data.valid))
            trials.limits.rows = lambda n: self._train  # `latency` takes as many as it needs

    def choose(self) -> None:
        """Choose how trials are pruned; they are never stacked."""
        settle_pruner(self._search, int(os.environ.get(LAUNCHED, 1)), stacked=False)

    def train(self) -> None:
        """Train until there is no trial left to claim. Raises Interrupted."""
        while not self._stop() and (trials := self._trials.claim_up_to(1)):
            (trial,) = trials
            try:
                if self._plan.function is not None:
                    self._call(self._plan.function, trial)
                else:
                    self._train_one(trial)
            except TakenOver:
                trial.let_go()
            except SystemExit as error:
                raise ended_the_process(origin(error)) from error
            except Exception as error:
                self._end_by(error, trial)
            self._trials.done(trial.member.number)

    def _end_by(self, error: Exception, trial: TrialRun) -> None:
        """End a trial by an error that is its own; raise any other again."""
        fault = fault_of(error, self._plan.spec.catch, origin(error))
        if fault is None or trial.ending is not None:
            raise error
        with self._trials.together():
            trial.end_by(fault, error)

    def _stop(self) -> bool:
        if self._token.requested():
            raise Interrupted()
        return False

    def _train_one(self, trial: TrialRun) -> None:
        plan, member = self._plan, trial.member

        def told(metrics: dict[str, float], state: Mapping[str, Any] | None) -> bool:
            member.epoch += 1
            member.history.append(metrics)  # what a checkpoint has of the epochs before it
            training = None if state is None else {OWN: dict(state)}
            with self._trials.together():
                trial.report(metrics, None, training)
            if trial.is_over:
                return False
            stops = self._token.requested()
            if training is not None and (stops or trial.checkpoint_is_due):
                trial.checkpoint(training)
            if stops:
                raise Interrupted()
            return True

        report = TrialReporter(plan, self._train, self._valid, plan.spec.epochs, member.seed, told)
        network = train_custom(plan, member.params, report, member.resume and member.resume.get(OWN))
        if network is not None and self._untried is not None:
            self._try(network, self._untried, member.params)
            self._untried = None
        if self._trials.limits.wants_network and trial.ending is None:
            if network is None:
                names = ", ".join(name for name in plan.measured if name in OF_ANY_TRIAL)
                where = f"objective {plan.spec.objective}: train"
                raise InputError(f"{where} must return its network, since the study measures {names} of it")
            with self._trials.together():
                trial.take_network(network)
        if trial.ending is not None:  # by its last epoch, the pruner, or a fault of its first epoch
            return
        if not trial.has_reported:
            raise InputError(f"objective {plan.spec.objective}: train returned without having called report")
        with self._trials.together():
            trial.conclude()  # it had enough before its epochs were over

    def _try(self, network: nn.Module, rows: FewRows, params: Params) -> None:
        """Raise InputError for a network that could be neither tested nor exported after the last trial."""
        assert self._data is not None
        ours = copied(network).cpu().eval()
        try_network(self._plan, self._data, rows, ours, measures=True)
        try_export(self._plan, self._data, rows, ours, params)

    def _call(self, function: Function, trial: TrialRun) -> None:
        plan, number = self._plan, trial.member.number

        reported: set[str] = set()
        stopped = False

        def told(step: int, value: float) -> None:
            nonlocal stopped
            reported.add(plan.metric)
            trial.log(step, {plan.metric: value})
            stopped = self._token.requested()
            self._stop()

        names = plan.spec.metric if isinstance(plan.spec.metric, tuple) else (plan.metric,)
        params, values = self._search.call(number, function.call, names, told)
        if stopped:  # the function has caught it
            self._stop()
        self._tracker.log_params(number, params)
        with self._trials.together():
            if values is None:
                trial.end("PRUNED")
            elif not_finite := [f"{name} became {value}" for name, value in values.items() if not math.isfinite(value)]:
                trial.end("FAIL", fault=", ".join(not_finite))
            else:
                trial.values = {name: value for name, value in values.items() if name not in reported}
                trial.end("COMPLETE", values[plan.metric])


def train_custom(
    plan: Plan, params: Params, report: TrialReporter, resume: Mapping[str, Any] | None = None
) -> nn.Module | None:
    """Return the network that the objective's own `train` gives, if any; `resume` is what it resumes from."""
    assert plan.objective.train is not None
    torch.manual_seed(report.seed)
    more = {"resume": resume} if resumes(plan.objective.train) else {}
    before = versions(_columns(report))
    network = plan.objective.train(params, report, **more)
    if report.raised is not None:
        raise report.raised
    require_unchanged(_columns(report), before, f"objective {plan.spec.objective}: train")
    if network is not None and not isinstance(network, nn.Module):
        where = f"objective {plan.spec.objective}"
        raise InputError(f"{where}: train must return a network (nn.Module) or None, but got {network!r:.100}")
    return network


def _columns(report: TrialReporter) -> dict[str, Tensor]:
    """Return the tensors of the data, by how `train` calls them."""
    parts = {"train": report.train, "valid": report.valid}
    targets = {f"report.{part}.targets": split.targets for part, split in parts.items()}
    return targets | {f"report.{p}.inputs[{n!r}]": x for p, split in parts.items() for n, x in split.inputs.items()}
