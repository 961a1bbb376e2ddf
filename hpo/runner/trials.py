"""The claimed trials of a worker: claimed, reported and told together, given back."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from hpo.log import log
from hpo.runner import checkpoints
from hpo.runner.checkpoints import Origin
from hpo.runner.constrained import Limits
from hpo.runner.paused import PausedTrials
from hpo.runner.prepare import Plan
from hpo.runner.progress import Progress
from hpo.runner.trial import TrialRun
from hpo.search.away import StorageAway
from hpo.search.claim import Claim
from hpo.search.halving import MEMORY, HalvingPruner
from hpo.search.search import Search
from hpo.tracking.base import Tracker
from hpo.training.faults import all_alike
from hpo.training.stack import Task


class Trials:
    """The trials that this process has claimed and that are not done."""

    def __init__(
        self,
        plan: Plan,
        search: Search,
        tracker: Tracker,
        progress: Progress,
        task: Task | None = None,
        stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        """`task` is what the engine's loop trains; None: trials are trained in another way.

        `stopping`: whether no more trials are to be claimed in place of those that break a constraint.
        """
        self._plan, self._search, self._tracker, self._progress = plan, search, tracker, progress
        self._task, self._stopping = task, stopping
        self.limits = Limits(plan, task)
        """What trials are held to; it is to be given rows by who has the data."""
        self._origin = Origin.of(plan, search)
        self._active: dict[int, TrialRun] = {}
        pruner = search.study.pruner
        self._paused = PausedTrials(pruner.memory if isinstance(pruner, HalvingPruner) else MEMORY)

    def __getitem__(self, number: int) -> TrialRun:
        return self._active[number]

    @contextmanager
    def together(self) -> Iterator[None]:
        """Within this, trials report and end; at its end that is written, in one transaction if it can be.

        Raises the error of a trial where all trials so far have failed alike, HpoError where weights could not be kept.
        """
        with self._search.together() as elsewhere:
            with self._tracker.together():
                yield
            ended = [trial for trial in self._active.values() if trial.ending is not None]
            best = self._best_of(ended)
            failed = best.keep_weights() if best is not None else None
            for trial in ended:
                trial.tell()
        with self._tracker.together():
            for trial in ended:
                if trial.member.number not in elsewhere:
                    trial.told()
        if best is not None:
            checkpoints.settle_weights(self._plan, self._search)
        for number in elsewhere & self._active.keys():
            self._active[number].let_go()
        caught = [trial.caught for trial in ended if trial.caught is not None]
        going_well = any(trial.has_reported for trial in self._active.values() if trial.ending is None)
        if caught and not going_well and all_alike(self._search.view().failures):
            raise caught[0]
        if failed is not None:
            raise failed

    def _best_of(self, ended: Sequence[TrialRun]) -> TrialRun | None:
        """Return the trial that may be the best of the study, of those that end complete; None: it is none of them."""
        ranks = {trial: rank for trial in ended if (rank := trial.rank) is not None}
        best = min(ranks, key=ranks.__getitem__, default=None)
        if best is None or best.ending is None or best.ending.value is None:
            return None
        return best if self._search.may_be_best(best.ending.value) else None

    def claim_up_to(self, n: int, wait: bool = True) -> list[TrialRun]:
        """Claim up to `n` trials. Without `wait`, neither peers nor a storage that is away are waited for.

        Those that end at once, since their networks break a constraint, cost nothing, and others are claimed for them.
        """
        claimed: list[TrialRun] = []
        while len(claimed) < n:
            some = self._claim(n - len(claimed), wait and not claimed)
            trained = self._without_those_to_end(some)
            claimed += trained
            if len(trained) == len(some) or self._stopping():
                break
        return claimed

    def _claim(self, n: int, wait: bool) -> list[TrialRun]:
        try:
            claims = self._search.ask_up_to(n, wait)
        except StorageAway:
            if wait:
                raise
            claims = []
        for lost in self._search.drain_lost():
            self._tracker.end_trial(lost.number, lost.state, lost.reason)
            if lost.state == "PRUNED":
                # a peer may have trained and paused it
                self._progress.trial_started(lost.number, self._plan.space.searched(lost.params))
                self._progress.trial_ended(lost.number, lost.state, None, None, lost.seconds)
                continue
            what = "its retries are spent" if lost.state == "FAIL" else "it is retried"
            log.warning(f"trial {lost.number} was lost ({lost.reason}): {what}")
        if not claims:
            return []
        with self._search.storage.together(), self._tracker.together():
            return [self._begun(claim) for claim in claims]

    def _without_those_to_end(self, begun: Sequence[TrialRun]) -> list[TrialRun]:
        """End those that break a constraint; pause those that succeed a trial whose worker died as it was to be paused.

        Return the others.
        """
        due = [trial for trial in begun if trial.ending is not None or trial.is_at_its_pause]
        if due:
            with self.together():
                for trial in due:
                    if trial.ending is None:
                        trial.end("PAUSED")
            for trial in due:
                self.done(trial.member.number)
        return [trial for trial in begun if trial not in due]

    def _begun(self, claim: Claim) -> TrialRun:
        trial = TrialRun(
            self._plan,
            self._origin,
            claim,
            self._search,
            self._tracker,
            self._progress,
            self._paused,
            self._task,
            self.limits,
        )
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
