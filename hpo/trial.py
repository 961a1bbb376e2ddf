"""The claimed trials of a worker: what their epochs are reported to, and how their end is told."""

import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hpo.errors import HpoError
from hpo.plan import OUTPUT, Plan
from hpo.processes import this_process
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
        self.ended = False
        self._improved = 0
        self._file = checkpoints(plan) / f"place-{claim.place}.pt"
        self._checkpointed = time.monotonic()
        run_id = tracker.start_trial(claim.number, claim.params)
        if run_id is not None:
            search.annotate(claim.number, mlflow_run_id=run_id)
        progress.trial_started(claim.number, plan.space.searched(claim.params))
        if claim.is_retry:
            self._resume()

    def _resume(self) -> None:
        """Go on from the checkpoint of the trial that this one succeeds, if it can be reached; else from the start."""
        claim, member = self._claim, self.member
        try:
            kept = torch.load(self._file, weights_only=True)
            if (kept["seed"], kept["params"]) != (claim.seed, dict(claim.params)):
                return
            member.resume, member.epoch, member.joined = kept["training"], kept["epoch"], kept["joined"]
            member.history[:] = kept["history"]
            self._best, self._kept = kept["best"], kept["kept"]
            self._peak, self._improved = kept["peak"], kept["improved"]
        except FileNotFoundError:
            return
        except Exception as error:  # torch.load raises a dozen kinds for a file that is damaged
            why = f"{self._file} cannot be read ({type(error).__name__})"
            self._progress.note(f"{why}: trial {claim.number} begins anew")
            return
        self._progress.note(f"trial {claim.number} goes on after epoch {member.epoch}")
        self._search.repeat(claim.number, [epoch[self._plan.metric_key] for epoch in member.history])
        for epoch, metrics in enumerate(member.history):
            self._tracker.log_metrics(claim.number, epoch, metrics)

    def checkpoint(self, stack: Stack) -> None:
        """Write all that the trial goes on from, whole or not at all. A disk that is full costs the checkpoint only."""
        member = self.member
        content = {
            "seed": self._claim.seed,
            "params": dict(self._claim.params),
            "epoch": member.epoch,
            "joined": member.joined,
            "history": member.history,
            "best": self._best,
            "kept": {name: x.cpu() for name, x in self._kept.items()},
            "peak": self._peak,
            "improved": self._improved,
            "training": stack.checkpoint(member),
        }
        self._checkpointed = time.monotonic()
        try:
            _write(self._file, content)
        except HpoError as error:
            self._progress.note(f"no checkpoint: {error}")

    @property
    def checkpoint_is_due(self) -> bool:
        """Whether the last checkpoint, or the trial's beginning, is `checkpoint_every` ago."""
        return time.monotonic() - self._checkpointed >= self._plan.spec.checkpoint_every

    def report(self, metrics: dict[str, float], stack: Stack | None) -> bool:
        """Take the metrics of the epoch that has ended; return whether the trial goes on. If not, its end is told.

        `stack` is the one that the trial's member is in; None where an objective trains in its own way.
        """
        plan, member = self._plan, self.member
        epoch, value = member.epoch - 1, metrics.get(plan.metric_key, math.nan)
        self.log(epoch, metrics)
        for name in dict.fromkeys(["train_loss", "valid_loss", plan.metric_key]):
            each = metrics.get(name, math.nan if plan.objective.train is None else 0.0)
            if member.fault is None and not math.isfinite(each):
                member.fault = f"{name} became {each} in epoch {member.epoch}"
        if member.fault is not None:
            self.end("FAIL", fault=member.fault)
            return False
        if self._peak is None or self._better(value, self._peak):
            self._peak, self._improved = value, epoch
        if self._best is None or plan.spec.value == "last" or self._improved == epoch:
            self._best = (value, epoch, dict(metrics))
            self._kept = {} if stack is None else stack.state(member)
        go_on = self._search.report(member.number, epoch, value)
        patience = plan.spec.patience
        last = member.epoch >= plan.spec.epochs or (patience is not None and epoch - self._improved >= patience)
        if last or not go_on:
            self.conclude(pruned=not last)  # after the last epoch pruning would save nothing
        return go_on and not last

    def log(self, epoch: int, metrics: dict[str, float]) -> None:
        """Log and show metrics at an epoch (counted from 0)."""
        self._tracker.log_metrics(self.member.number, epoch, metrics)
        self._progress.epoch_ended(self.member.number, epoch + 1, self._plan.spec.epochs, metrics)

    def conclude(self, pruned: bool = False) -> None:
        """Tell that the trial has ended, with the best (or the last) that was reported of it."""
        assert self._best is not None
        value, epoch, metrics = self._best
        self._search.annotate(self.member.number, best_epoch=epoch, metrics=metrics)
        if self.member.joined:  # the round whose data order its first epoch had
            self._search.annotate(self.member.number, joined=self.member.joined)
        self.end("PRUNED" if pruned else "COMPLETE", value)

    @property
    def has_reported(self) -> bool:
        """Whether there is an epoch to conclude the trial with."""
        return self._best is not None

    def end(self, state: str, value: float | None = None, fault: str | None = None) -> None:
        """Tell that the trial is COMPLETE with that `value`, PRUNED, or FAIL with that `fault`."""
        number, search = self.member.number, self._search
        self.ended = True
        if state == "COMPLETE":
            assert value is not None
            ours = search.complete(number, value)
        else:
            ours = search.prune(number) if state == "PRUNED" else search.fail(number, str(fault))
        if not ours:
            state, value = "INTERRUPTED", None
            fault = "another worker took this trial over, since this one was not heard of for too long"
        if state == "COMPLETE" and self._kept:
            self._keep_if_best(value)
        if ours:
            self._file.unlink(missing_ok=True)
        self._tracker.end_trial(number, state, fault)
        self._progress.trial_ended(number, state, value, fault)

    def _better(self, value: float, than: float) -> bool:
        return value > than if self._plan.maximize else value < than

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
        _write(folder / "best.pt", content)

    def give_back(self, reason: str) -> None:
        """End the trial, and queue a successor for it."""
        if not self._search.give_back(self._claim.number, reason):
            return  # its end was told already
        self._tracker.end_trial(self._claim.number, "INTERRUPTED", reason)
        self._progress.trial_ended(self._claim.number, "INTERRUPTED", None, reason)


class Trials:
    """The trials that this process has claimed and that are not done."""

    def __init__(self, plan: Plan, search: Search, tracker: Tracker, progress: Progress) -> None:
        self._plan, self._search, self._tracker, self._progress = plan, search, tracker, progress
        self._active: dict[int, TrialRun] = {}

    def __getitem__(self, number: int) -> TrialRun:
        return self._active[number]

    def claim(self, wait: bool = True) -> TrialRun | None:
        """Claim the next trial; None where there is none left. `wait` is that of `Search.ask`."""
        claim = self._search.ask(wait)
        for number, reason in self._search.drain_lost():
            self._tracker.end_trial(number, "FAIL", reason)
            self._progress.note(f"trial {number} is taken up anew: {reason}")
        if claim is None:
            return None
        trial = TrialRun(self._plan, claim, self._search, self._tracker, self._progress)
        self._active[claim.number] = trial
        return trial

    def done(self, number: int) -> None:
        """Forget a trial whose end was told."""
        del self._active[number]

    def give_back(self, reason: str) -> None:
        """End all trials that are not done, and queue a successor for each."""
        for trial in self._active.values():
            trial.give_back(reason)
        self._active.clear()


def _write(file: Path, content: dict[str, Any]) -> None:
    """Write `content`, whole or not at all. Raises HpoError."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_name(f"{file.name}.{this_process()}.part")
        torch.save(content, unfinished)
        unfinished.replace(file)
    except (OSError, RuntimeError) as error:  # torch.save: a full disk is a RuntimeError
        raise HpoError(f"{file} cannot be written ({str(error).splitlines()[0]}); no trial is lost") from error


def remove_old(plan: Plan) -> None:
    """Remove what no trial goes on from any more, once all are done: trials that others took over, writes cut short."""
    for file in checkpoints(plan).glob("place-*"):
        file.unlink(missing_ok=True)


def checkpoints(plan: Plan) -> Path:
    """Return the study's folder of weights: `best.pt` holds those of the best trial's best epoch.

    `place-N.pt` is what the trial that has that place in the budget goes on from.
    """
    return OUTPUT / "checkpoints" / plan.spec.name
