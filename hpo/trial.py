"""One claimed trial in training: what its epochs are reported to, and how its end is told."""

import math
from pathlib import Path

import torch
from torch import Tensor

from hpo.errors import HpoError
from hpo.plan import OUTPUT, Plan
from hpo.progress import Progress
from hpo.search import Claim, Search
from hpo.stack import Member, Stack
from hpo.tracking import Tracker


class TrialRun:
    """Tells storage, tracker and progress of one trial, from its claim to its end."""

    def __init__(self, plan: Plan, claim: Claim, search: Search, tracker: Tracker, progress: Progress) -> None:
        self._plan, self._claim, self._search = plan, claim, search
        self._tracker, self._progress = tracker, progress
        self.member = Member(number=claim.number, seed=claim.seed, params=claim.params)
        self._best: tuple[float, int, dict[str, float]] | None = None
        self._kept: dict[str, Tensor] = {}
        self._peak: float | None = None
        self._improved = 0
        run_id = tracker.start_trial(claim.number, claim.params)
        if run_id is not None:
            search.annotate(claim.number, mlflow_run_id=run_id)
        progress.trial_started(claim.number, plan.space.searched(claim.params))

    def report(self, stack: Stack, metrics: dict[str, float]) -> bool:
        """Take the metrics of the epoch that has ended; return whether the trial goes on. If not, its end is told."""
        plan, member = self._plan, self.member
        epoch, value = member.epoch - 1, metrics.get(plan.metric_key, math.nan)
        self._tracker.log_metrics(member.number, epoch, metrics)
        self._progress.epoch_ended(member.number, member.epoch, plan.spec.epochs, metrics)
        told = {
            "train_loss": metrics["train_loss"],
            "valid_loss": metrics.get("valid_loss", math.nan),
            plan.metric_key: value,
        }
        for name, each in told.items():
            if member.fault is None and not math.isfinite(each):
                member.fault = f"{name} became {each} in epoch {member.epoch}"
        if member.fault is not None:
            self._tell(pruned=False)
            return False
        if self._peak is None or self._better(value, self._peak):
            self._peak, self._improved = value, epoch
        if self._best is None or plan.spec.value == "last" or self._improved == epoch:
            self._best = (value, epoch, dict(metrics))
            self._kept = stack.state(member)
        go_on = self._search.report(member.number, epoch, value)
        patience = plan.spec.patience
        last = member.epoch >= plan.spec.epochs or (patience is not None and epoch - self._improved >= patience)
        if last or not go_on:
            self._tell(pruned=not last)  # after the last epoch pruning would save nothing
        return go_on and not last

    def _better(self, value: float, than: float) -> bool:
        return value > than if self._plan.maximize else value < than

    def _tell(self, pruned: bool) -> None:
        number, fault = self._claim.number, self.member.fault
        value = None
        if fault is not None:
            state, ours = "FAIL", self._search.fail(number, fault)
        else:
            assert self._best is not None
            value, epoch, metrics = self._best
            self._search.annotate(number, best_epoch=epoch, metrics=metrics)
            if self.member.joined:  # the round whose data order its first epoch had
                self._search.annotate(number, joined=self.member.joined)
            if pruned:
                state, ours = "PRUNED", self._search.prune(number)
            else:
                state, ours = "COMPLETE", self._search.complete(number, value)
        if not ours:
            state, fault = "FAIL", "another worker took this trial over, since this one was not heard of for too long"
        if state == "COMPLETE":
            self._keep_if_best(value)
        self._tracker.end_trial(number, state, fault)
        self._progress.trial_ended(number, state, value, fault)

    def _keep_if_best(self, value: float) -> None:
        """Keep the weights of the study's best trial, those of its best epoch, in place of the one before."""
        if not self._search.may_be_best(value):
            return
        best = self._search.best()
        if best is None or best.number != self._claim.number:
            return
        folder = checkpoints(self._plan)
        content = {
            "model_state_dict": {name: x.cpu() for name, x in self._kept.items()},
            "model_hyperparameters": dict(best.params),
            "trial": best.number,
            "value": best.value,
            "epoch": best.epoch,
        }
        try:
            folder.mkdir(parents=True, exist_ok=True)
            unfinished = folder / "best.pt.part"
            torch.save(content, unfinished)
            unfinished.replace(folder / "best.pt")
        except (OSError, RuntimeError) as error:  # torch.save: a full disk is a RuntimeError
            raise HpoError(f"{folder} cannot be written ({str(error).splitlines()[0]}); no trial is lost") from error

    def give_back(self, reason: str) -> None:
        """End the trial, and queue a successor for it."""
        if not self._search.give_back(self._claim.number, reason):
            return  # its end was told already
        self._tracker.end_trial(self._claim.number, "INTERRUPTED", reason)
        self._progress.trial_ended(self._claim.number, "INTERRUPTED", None, reason)


def checkpoints(plan: Plan) -> Path:
    """Return the study's folder of weights: `best.pt` holds those of the best trial's best epoch."""
    return OUTPUT / "checkpoints" / plan.spec.name
