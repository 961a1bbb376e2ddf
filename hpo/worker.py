"""Ask, train, tell, until the budget is spent: one process's share of a study."""

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hpo.data import Data, Split
from hpo.errors import Interrupted
from hpo.plan import OUTPUT, Plan
from hpo.search import Claim, Search
from hpo.stack import LoopStack, Member, Stack
from hpo.tracking import Tracker
from hpo.training import train

WAIT_SECONDS = 1.0
"""How often to look again while all that is left of a study is with other workers."""


class Progress(ABC):
    """What a person is shown of a study that runs (`hpo.console`)."""

    @abstractmethod
    def trial_started(self, number: int, params: Mapping[str, Any]) -> None:
        """A trial was claimed; `params` are those that were searched."""

    @abstractmethod
    def epoch_ended(self, number: int, epoch: int, epochs: int, metrics: Mapping[str, float]) -> None:
        """A trial has `epoch` of its `epochs` behind it."""

    @abstractmethod
    def trial_ended(self, number: int, state: str, value: float | None, reason: str | None) -> None:
        """A trial is COMPLETE, PRUNED, FAIL, or INTERRUPTED."""

    @abstractmethod
    def note(self, text: str) -> None:
        """Something is to be said once."""


def work(
    plan: Plan,
    data: Data,
    search: Search,
    tracker: Tracker,
    progress: Progress,
    stopping: Callable[[], bool] = lambda: False,
) -> None:
    """Train trials until the budget or the time is spent. Raises Interrupted as soon as `stopping` says so.

    A trial's own fault (NaN, out of memory) fails that trial; any other error gives the trial back and is raised.
    """
    preprocess = plan.objective.preprocess(data.train)
    train_split, valid_split = (split.through(preprocess).to(plan.device) for split in (data.train, data.valid))
    deadline = _deadline(plan, search)

    def out_of_time() -> bool:
        return time.monotonic() >= deadline

    while not out_of_time():
        if stopping():
            raise Interrupted("interrupted; run the same command again to go on")
        claim = search.ask()
        for number, reason in search.drain_lost():
            tracker.end_trial(number, "FAIL", reason)
            progress.note(f"trial {number} is taken up anew: {reason}")
        if claim is None:
            if search.counts().running == 0:
                return
            time.sleep(WAIT_SECONDS)  # others still train; should they die, their trials are ours to take up
            continue
        trial = _Trial(plan, claim, LoopStack(plan.objective, data.info, plan.device), search, tracker, progress)
        try:
            trial.run(train_split, valid_split, lambda: stopping() or out_of_time())
        except Interrupted:
            if stopping():
                trial.give_back("interrupted")
                raise Interrupted(
                    "interrupted; the running trial was given back, run the same command again to go on"
                ) from None
            trial.give_back("the study's time was over")
        except BaseException as error:
            trial.give_back(f"{type(error).__name__}: {error}")
            raise
    progress.note(
        f"the study's time ({plan.spec.timeout:g} s) is over: no new trial is begun; raise `timeout` to go on"
    )


def _deadline(plan: Plan, search: Search) -> float:
    if plan.spec.timeout is None:
        return math.inf
    return time.monotonic() + plan.spec.timeout - search.seconds_used()


class _Trial:
    """One claimed trial: trains it as a stack of its own, and tells storage, tracker and progress of it."""

    def __init__(
        self, plan: Plan, claim: Claim, stack: Stack, search: Search, tracker: Tracker, progress: Progress
    ) -> None:
        self._plan, self._claim, self._stack, self._search = plan, claim, stack, search
        self._tracker, self._progress = tracker, progress
        self._member = Member(number=claim.number, seed=claim.seed, params=claim.params)
        self._best: tuple[float, int, dict[str, float]] | None = None
        self._kept: dict[str, Tensor] = {}
        self._pruned = False

    def run(self, train_split: Split, valid_split: Split, stopping: Callable[[], bool]) -> None:
        """Train the trial to its end and tell the outcome."""
        number, plan = self._claim.number, self._plan
        run_id = self._tracker.start_trial(number, self._claim.params)
        if run_id is not None:
            self._search.annotate(number, mlflow_run_id=run_id)
        self._progress.trial_started(number, plan.space.searched(self._claim.params))
        queue = [self._member]
        train(
            self._stack,
            train_split,
            valid_split,
            batch_size=self._claim.params["batch_size"],
            epochs=plan.spec.epochs,
            seed=plan.spec.seed,
            ask=lambda n: [queue.pop()] if queue and n else [],
            report=self._report,
            stopping=stopping,
        )
        self._tell()

    def _report(self, member: Member, metrics: dict[str, float]) -> bool:
        """Take one epoch's metrics; return whether the trial goes on."""
        plan, number, epoch = self._plan, member.number, member.epoch - 1
        value = metrics.get(plan.metric_key, math.nan)
        self._tracker.log_metrics(number, epoch, metrics)
        self._progress.epoch_ended(number, member.epoch, plan.spec.epochs, metrics)
        for name, number_ in (("train_loss", metrics["train_loss"]), (plan.metric_key, value)):
            if member.fault is None and not math.isfinite(number_):
                member.fault = f"{name} became {number_} in epoch {member.epoch}"
        if member.fault is not None:
            return False
        if self._best is None or plan.spec.value == "last" or self._better(value, self._best[0]):
            self._best = (value, epoch, dict(metrics))
            self._kept = self._stack.state(member)
        go_on = self._search.report(number, epoch, value)
        self._pruned = not go_on and member.epoch < plan.spec.epochs  # after the last epoch nothing is left to save
        return go_on

    def _better(self, value: float, than: float) -> bool:
        return value > than if self._plan.maximize else value < than

    def _tell(self) -> None:
        number, fault = self._claim.number, self._member.fault
        value = None
        if fault is not None:
            state, ours = "FAIL", self._search.fail(number, fault)
        else:
            assert self._best is not None
            value, epoch, metrics = self._best
            self._search.annotate(number, best_epoch=epoch, metrics=metrics)
            if self._pruned:
                state, ours = "PRUNED", self._search.prune(number)
            else:
                state, ours = "COMPLETE", self._search.complete(number, value)
        if not ours:
            state, fault = "FAIL", "another worker took this trial over, since this one was not heard of for too long"
        if state == "COMPLETE":
            self._keep_if_best()
        self._tracker.end_trial(number, state, fault)
        self._progress.trial_ended(number, state, value, fault)

    def _keep_if_best(self) -> None:
        """Keep the weights of the study's best trial, those of its best epoch, in place of the one before."""
        best = self._search.best()
        if best is None or best.number != self._claim.number:
            return
        folder = checkpoints(self._plan)
        folder.mkdir(parents=True, exist_ok=True)
        content = {
            "model_state_dict": {name: x.cpu() for name, x in self._kept.items()},
            "model_hyperparameters": dict(best.params),
            "trial": best.number,
            "value": best.value,
            "epoch": best.epoch,
        }
        unfinished = folder / "best.pt.part"
        torch.save(content, unfinished)
        unfinished.replace(folder / "best.pt")

    def give_back(self, reason: str) -> None:
        """End the trial, and queue a successor for it."""
        self._search.give_back(self._claim.number, reason)
        self._tracker.end_trial(self._claim.number, "INTERRUPTED", reason)
        self._progress.trial_ended(self._claim.number, "INTERRUPTED", None, reason)


def checkpoints(plan: Plan) -> Path:
    """Return the study's folder of weights: `best.pt` holds those of the best trial's best epoch."""
    return OUTPUT / "checkpoints" / plan.spec.name
