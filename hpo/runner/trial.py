"""A claimed trial: what its epochs are reported to, how it is paused and resumed, and how its end is told."""

import math
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import nn

from hpo.errors import HpoError
from hpo.log import log
from hpo.runner import checkpoints
from hpo.runner.checkpoints import Checkpoint, Origin
from hpo.runner.constrained import Limits
from hpo.runner.paused import PausedTrials
from hpo.runner.prepare import Plan
from hpo.runner.progress import Ending, Progress
from hpo.search import schema
from hpo.search.budget import Rank, rank_of
from hpo.search.claim import Claim
from hpo.search.curves import curves_of, to_json
from hpo.search.search import Search
from hpo.study.value import value_of
from hpo.tracking.base import Tracker
from hpo.training import schedules
from hpo.training.faults import TrialFault
from hpo.training.memory import used_mib
from hpo.training.stack import Kept, Member, Stack, Task

TAKEN_OVER = "another worker took this trial over, since this one was not heard of for too long"


class TrialRun:
    """Tells storage, tracker and progress of one trial, from its claim to its end."""

    caught: BaseException | None = None
    """The error that it ends by, where `catch` names it."""
    _end: Callable[[], None] | None = None
    """What ends the trial once its network is there, where that is waited for."""

    def __init__(
        self,
        plan: Plan,
        origin: Origin,
        claim: Claim,
        search: Search,
        tracker: Tracker,
        progress: Progress,
        paused: PausedTrials,
        task: Task | None,
        limits: Limits,
    ) -> None:
        """`task` is what the engine's loop trains; None: trials are trained in another way.

        A trial whose network breaks one of the `limits` ends at once.
        """
        self._plan, self._origin, self._claim, self._search = plan, origin, claim, search
        self._tracker, self._progress, self._paused = tracker, progress, paused
        pause = None if search.halving is None else search.halving.next_pause(claim.paused_at)
        self.member = Member(number=claim.number, seed=claim.seed, params=claim.params, pause=pause)
        self._logged: list[dict[str, float]] = []
        """The metrics of each epoch, those before a checkpoint that it resumes from too."""
        self._curve: list[float] = []
        """The study's metric in each of these."""
        self._best: tuple[float, int, dict[str, float]] | None = None
        self._kept: Kept | None = None
        self._peak: float | None = None
        self.ending: Ending | None = None
        """How the trial ends, once that is known."""
        self._improved = 0
        self._limits, self._known = limits, limits.values_at_claim(claim.params)
        self.values = self._known
        """Of what the study constrains, and of its other metrics, as far as they are known."""
        self._task = task
        steps = None if task is None else task.steps_per_epoch(claim.params)
        self._rates = None if steps is None else schedules.rates(claim.params, steps, plan.spec.epochs)
        self._started = self._checkpointed = time.monotonic()
        if claim.is_resumed:
            tracker.resume_trial(claim.number)
        else:
            lineage = {"hpo.retry_of": str(claim.retry_of), "hpo.attempt": str(claim.attempt)} if claim.is_retry else {}
            # a trial is claimed once, unless it is paused
            tracker.start_trial(claim.number, claim.params, is_new=True, tags=lineage)
        progress.trial_started(claim.number, plan.space.searched(claim.params))
        if broken := limits.broken(self.values):
            self.end("PRUNED", fault=broken)
        elif claim.is_retry or claim.is_resumed:
            self._resume()

    def _resume(self) -> None:
        """Resume from the checkpoint of this trial, or of the one that it succeeds, if it can be reached.

        Else from scratch: what was reported is not reported again.
        """
        claim, member = self._claim, self.member
        why = f"there is no {checkpoints.file_of(self._plan, claim)} on this machine" if claim.is_resumed else None
        try:
            kept = self._paused.take(claim) or checkpoints.load(self._plan, self._origin, claim)
        except checkpoints.Refused as error:
            kept, why = None, f"{checkpoints.file_of(self._plan, claim)} is not resumed from: {error}"
        if kept is None:
            if why is not None:
                log.warning(f"{why}; trial {claim.number} starts from scratch")
            if claim.is_resumed:
                self._search.annotate(claim.number, {schema.RESTARTED: claim.n_restarts + 1})
            return
        self._take_up(kept)
        if claim.is_resumed:
            return
        log.info(f"trial {claim.number} resumes after epoch {member.epoch}")
        self._search.repeat(claim.number, [epoch[self._plan.metric_key] for epoch in member.history])
        for epoch, metrics in enumerate(member.history):
            self._log(epoch, metrics)

    def _take_up(self, kept: Checkpoint) -> None:
        member = self.member
        member.resume, member.epoch, member.joined = kept.training, kept.epoch, kept.joined
        member.history[:], member.rounds[:] = kept.history, kept.rounds
        self._logged[:] = kept.history
        self._curve[:] = [metrics[self._plan.metric_key] for metrics in kept.history]
        weights = kept.kept
        self._best, self._kept = kept.best, (lambda: weights) if weights else None
        self._peak, self._improved = kept.peak, kept.improved

    def checkpoint(self, training: Mapping[str, Any]) -> Checkpoint:
        """Write all that the trial resumes from, and return it. A disk that is full costs the checkpoint only.

        `training` is `Checkpoint.training`.
        """
        member = self.member
        self._checkpointed = time.monotonic()
        content = Checkpoint(
            epoch=member.epoch,
            joined=member.joined,
            history=list(member.history),
            best=self._best,
            kept={} if self._kept is None else {name: x.cpu() for name, x in self._kept().items()},
            peak=self._peak,
            improved=self._improved,
            training=training,
            rounds=list(member.rounds),
        )
        try:
            checkpoints.save(self._plan, self._origin, self._claim, content)
        except HpoError as error:
            log.warning(f"no checkpoint: {error}")
        return content

    @property
    def is_at_its_pause(self) -> bool:
        """Whether a checkpoint that it resumes from was made to pause it."""
        pause = self.member.pause
        return pause is not None and self.member.epoch >= pause

    @property
    def checkpoint_is_due(self) -> bool:
        """Whether the last checkpoint, or the trial's beginning, is `checkpoint_every` ago."""
        return time.monotonic() - self._checkpointed >= self._plan.spec.checkpoint_every

    def report(self, metrics: dict[str, float], stack: Stack | None, training: Mapping[str, Any] | None = None) -> None:
        """Take the metrics of the epoch that has ended, which may end the trial (`ending`).

        `stack` is the one that the trial's member is in; None where an objective trains in its own way, and `training`
        is what that resumes from. Call it within `Trials.together`.
        """
        plan, member = self._plan, self.member
        epoch, value = member.epoch - 1, metrics.get(plan.metric_key, math.nan)
        self.log(epoch, metrics)
        member.fault = member.fault or plan.fault_in(metrics, member.epoch)
        if member.fault is not None:
            if member.error is None:
                self.end("FAIL", fault=member.fault)
            else:
                self.end_by(member.error.fault, member.error.__cause__ or member.error)
            return
        if self._peak is None or self._better(value, self._peak):
            self._peak, self._improved = value, epoch
        self._curve.append(value)
        of_trial, at = value_of(self._curve, plan.spec.value, maximize=plan.maximize)
        if at == epoch:
            self._best = (of_trial, epoch, dict(metrics))
            self._kept = None if stack is None else stack.keep(member)
        go_on = self._search.report(member.number, epoch, value)
        last = member.epoch >= plan.spec.epochs or epoch - self._improved >= (plan.spec.patience or math.inf)
        last = last or self._limits.must_end(member, of_trial, self._started)
        if last or not go_on:
            self._end_by_then(partial(self.conclude, pruned=not last))  # after the last epoch pruning saves nothing
        elif member.epoch == member.pause:
            self._end_by_then(partial(self._pause, training if stack is None else stack.checkpoint(member)))

    def _end_by_then(self, end: Callable[[], None]) -> None:
        """End the trial by `end`, as soon as all is known that it is held to."""
        if self._limits.wants_network:
            self._end = end
        else:
            end()

    @property
    def is_over(self) -> bool:
        """Whether there is no further epoch to train."""
        return self.ending is not None or self._end is not None

    def take_network(self, network: nn.Module) -> None:
        """Take the network that an objective's own training has given, which ends the trial if it is over."""
        self._known = self._limits.values_of_network(network)
        if self._end is not None:
            self._end()

    def _pause(self, training: Mapping[str, Any] | None) -> None:
        """Have the trial leave its slot until it is resumed: its checkpoint is there before anybody can claim it."""
        assert self._best is not None
        self.values = self._known | self._limits.values(self.member.params, self._best[2])
        if training is not None:
            self._paused.keep(self.member.number, self.checkpoint(training))
        self.ending = Ending(state="PAUSED")

    def end_by(self, fault: TrialFault, error: BaseException) -> None:
        """End the trial by `error`, which is raised again where all trials so far have failed by it, as by a bug."""
        self.end(fault.state, fault=fault.text)
        self.caught = error if fault.caught else None

    def log(self, epoch: int, metrics: dict[str, float]) -> None:
        """Log and show metrics at an epoch (counted from 0)."""
        self._logged.append(dict(metrics))
        if epoch >= self._claim.n_reported:  # else it is trained from scratch, and was logged before
            self._log(epoch, metrics)
        self._progress.epoch_ended(self.member.number, epoch + 1, self._plan.spec.epochs, metrics)

    def _log(self, epoch: int, metrics: Mapping[str, float]) -> None:
        if self._rates is not None:
            metrics = {**metrics, "learning_rate": self._rates[epoch]}
        self._tracker.log_metrics(self.member.number, epoch, metrics)

    def _effort(self) -> dict[str, float]:
        """Return what training has taken so far: seconds before and since a pause, rows a second, memory."""
        here, epochs = time.monotonic() - self._started, self.member.epoch
        effort = {"seconds": round(self._claim.seconds + here, 3)}
        if self._task is not None and epochs > self._claim.n_reported and here > 0:
            effort["samples_per_second"] = round((epochs - self._claim.n_reported) * self._task.n_rows / here, 1)
        if self.member.n_parameters is not None:
            effort["n_parameters"] = float(self.member.n_parameters)
        effort["memory_mib"] = round(used_mib(self._plan.device), 1)
        return effort | self._limits.logged(self.values, self.ending is not None and self.ending.state == "COMPLETE")

    def conclude(self, pruned: bool = False) -> None:
        """End the trial with its value (`value_of`) of what was reported of it."""
        assert self._best is not None
        value, epoch, metrics = self._best
        self.values = self._known | self._limits.values(self.member.params, metrics, timed=not pruned)
        if pruned:
            self.end("PRUNED", value)
        elif unknown := self._limits.unknown(self.values):
            self.end("FAIL", fault=f"{unknown} is not known in epoch {epoch + 1}, and the study needs it of each trial")
        else:
            self.end("COMPLETE", value)

    @property
    def has_reported(self) -> bool:
        """Whether there is an epoch to conclude the trial with."""
        return self._best is not None

    def end(self, state: str, value: float | None = None, fault: str | None = None) -> None:
        """End the trial: COMPLETE with that `value`, PRUNED, or FAIL with that `fault`. `Trials.together` tells it."""
        self.ending = Ending(state=state, value=value, fault=fault)

    @property
    def rank(self) -> Rank | None:
        """What it is compared by with other complete trials; None: it is not complete, or breaks a constraint."""
        if self.ending is None or self.ending.state != "COMPLETE" or self.ending.value is None:
            return None
        if self._limits.broken(self.values):
            return None
        metrics = {} if self._best is None else self._best[2]
        size, number = self.member.n_parameters, self.member.number
        others = [(self.values.get(name, math.inf), more) for name, more in self._plan.others.items()]
        return rank_of(self.ending.value, metrics, size, number, maximize=self._plan.maximize, others=others)

    def keep_weights(self) -> HpoError | None:
        """Keep the weights of a trial that may be the best, before it is told; return why they could not be written."""
        ending = self.ending
        if ending is None or ending.value is None or self._best is None or self._kept is None:
            return None
        number, params, epoch = self.member.number, self.member.params, self._best[1]
        try:
            checkpoints.keep_candidate(self._plan, self._origin, number, params, ending.value, epoch, self._kept())
        except HpoError as error:
            return error
        return None

    def tell(self) -> None:
        """Tell the storage how the trial ends, or that it is paused, with its curves."""
        assert self.ending is not None
        number, search = self.member.number, self._search
        state, value, fault = self.ending.state, self.ending.value, self.ending.fault
        if self._best is not None and state in ("COMPLETE", "PRUNED", "PAUSED"):
            _, epoch, metrics = self._best
            search.annotate(number, {schema.BEST_EPOCH: epoch, schema.METRICS: metrics})
            search.annotate(number, checkpoints.orders_of(self._plan, self._claim, self.member))
        if self.member.n_parameters is not None:
            search.annotate(number, {schema.N_PARAMETERS: self.member.n_parameters})
        search.annotate(number, self._limits.attrs(self.values))
        if self._logged:
            # They are whole for a trial that was retried, too: it resumes from a checkpoint, which keeps the metrics of
            # the epochs before it, or it starts from scratch. One that is given back has none: its successor has them.
            search.annotate(number, {schema.CURVES: to_json(curves_of(self._logged))})
        if state == "PRUNED" and fault is not None:
            search.annotate(number, {schema.ERROR: fault})
        if (run := self._tracker.run_of(number)) is not None:
            search.annotate(number, {schema.RUN_ID: run})
        if state == "COMPLETE":
            assert value is not None
            search.complete(number, value, self.values)
        elif state == "PRUNED":
            search.prune(number)
        elif state == "PAUSED":
            search.pause(number)
        else:
            search.fail(number, str(fault))

    def told(self) -> None:
        """Tell tracker and progress how the trial has ended, once the storage knows it."""
        assert self.ending is not None
        number, ending, effort = self.member.number, self.ending, self._effort()
        if ending.state == "PAUSED":
            self._tracker.pause_trial(number, effort)
            self._progress.trial_paused(number, self.member.epoch)
            return
        checkpoints.drop(self._plan, self._claim)
        self._tracker.end_trial(number, ending.state, ending.fault, effort)
        broken = self._limits.broken(self.values) if ending.state == "COMPLETE" else None
        self._progress.trial_ended(number, ending.state, ending.value, ending.fault or broken, effort["seconds"])

    def _better(self, value: float, than: float) -> bool:
        return value > than if self._plan.maximize else value < than

    def let_go(self) -> None:
        """End a trial here that a peer has ended in the storage: its successor is another worker's."""
        number = self.member.number
        self.ending, self.caught = Ending(state="INTERRUPTED", fault=TAKEN_OVER), None
        self._search.forget(number)
        self._tracker.end_trial(number, "INTERRUPTED", TAKEN_OVER)
        self._progress.trial_ended(number, "INTERRUPTED", None, TAKEN_OVER)

    def give_back(self, reason: str) -> None:
        """End the trial, and queue a successor for it."""
        if not self._search.give_back(self._claim.number, reason):
            return  # its end was told already
        self._tracker.end_trial(self._claim.number, "INTERRUPTED", reason)
        self._progress.trial_ended(self._claim.number, "INTERRUPTED", None, reason)
