"""The budget as a queue: WAITING trials are queued for its free slots, claimed, withdrawn, retried.

A claim is the storage's own compare-and-set WAITING -> RUNNING. A trial whose worker died, or that was interrupted,
becomes FAIL, and a successor that names it (`retry_of`) gets its slot of the budget, its params and its seed.
"""

import math
import random
from collections import deque
from collections.abc import Container, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from hpo.errors import masked
from hpo.log import log
from hpo.processes import this_process
from hpo.search import schema
from hpo.search.batch import Queued
from hpo.search.budget import held_until, holders, is_new, is_paused, is_retry, lease_of, refill, trained, worker_of
from hpo.search.clock import Clock
from hpo.search.front import maximizes, others_in
from hpo.search.halving import Halving
from hpo.search.lease import LeaseKeeper, LeaseMonitor
from hpo.search.retrying import RetryingStorage, locked
from hpo.search.starts import NONE, Starts, starts_in
from hpo.search.stop import Stopped, StopRules, budget
from hpo.search.view import TrialReader
from hpo.seeds import derive
from hpo.study.space import Space
from hpo.study.spec import UNBOUNDED, StudySpec

_CHUNK = 16
"""How many trials are queued at a time: who asks for all trials reads those that wait again each time."""


@dataclass(frozen=True, kw_only=True)
class Lost:
    """A trial that was ended though nobody trained it: INTERRUPTED or FAIL where its worker died, PRUNED while paused.

    Of one that is INTERRUPTED a successor has the slot; one that is FAIL has used up its retries.
    """

    number: int
    state: str
    reason: str | None = None
    params: Mapping[str, Any] = field(default_factory=dict)
    """Those of one that was paused, and for how many seconds it was trained."""
    seconds: float | None = None


class Queue:
    """The queued trials of one study, shared with its other workers."""

    halving: Halving | None = None
    """What decides which trial is claimed next; None: they are in the order in which they were queued."""

    def __init__(
        self,
        study: optuna.Study,
        storage: RetryingStorage,
        spec: StudySpec,
        space: Space,
        reader: TrialReader,
        lease: LeaseKeeper,
        ours: Container[int],
        clock: Clock,
    ) -> None:
        """`ours` are the numbers of the trials that this process has claimed and not ended."""
        self._study, self._storage, self._spec, self._space = study, storage, spec, space
        self._reader, self._lease, self._ours, self._clock = reader, lease, ours, clock
        others = others_in(study.user_attrs.get(schema.IDENTITY))
        self._rules = StopRules(spec, maximize=maximizes(study), others=tuple(others.values()))
        self._monitor = LeaseMonitor(spec.grace, clock)
        self._waiting: deque[FrozenTrial] = deque()
        self._lost: list[Lost] = []
        self._look_at = -math.inf
        self._starts_are_queued = not spec.start_with

    # Claims.

    def take(self, n: int) -> list[FrozenTrial]:
        """Claim up to `n` trials: from now on they are RUNNING, and ours. None of them: there is none left to claim."""
        self._queue_starts(n)
        while True:
            if self._stop_if_due() is not None:
                self._waiting = deque(self._left())
            elif self.halving is not None:
                self._waiting = deque(self._chosen(self.halving, n))
            elif not self._waiting:
                self._look_for_waiting(n)
            if not self._waiting:
                return []
            tried = [self._waiting.popleft() for _ in range(min(n, len(self._waiting)))]
            attempts = {trial._trial_id: trial.user_attrs.get(schema.ATTEMPT, 1) for trial in tried}
            leases = self._storage.patiently(
                lambda: {trial_id: self._lease.lease(attempt) for trial_id, attempt in attempts.items()}  # noqa: B023
            )
            claimed = set(self._storage.claim(leases))
            if claimed:  # else peers were faster; there may be more
                return [self._as_claimed(trial) for trial in tried if trial._trial_id in claimed]

    def _as_claimed(self, trial: FrozenTrial) -> FrozenTrial:
        """Return a trial as it was when it was claimed: a peer may have trained and paused it since it was read."""
        return trial if self.halving is None else self._storage.get_trial(trial._trial_id)

    def _look_for_waiting(self, n: int) -> None:
        """Read which trials wait, and queue more where there are none; reading is what claims of a large study cost."""
        taken = holders(self._reader.read())
        if len(taken) > self._spec.trials or all(trial.state != TrialState.WAITING for trial in taken):
            taken = holders(self.fill(n))
        waiting = [trial for trial in taken if trial.state == TrialState.WAITING]
        # what was interrupted comes first, as it would have come: samplers learn of it before they draw more
        waiting.sort(key=lambda trial: (not is_retry(trial), schema.START_WITH not in trial.user_attrs))
        self._waiting = deque(_share(waiting, _n_peers(taken)))

    def _chosen(self, halving: Halving, n: int) -> Sequence[FrozenTrial]:
        """Return up to `n` trials to be claimed now; where there will be none any more, prune those that are paused."""
        taken = holders(self._reader.read())
        n_peers = _n_peers(taken)
        several = n * (1 + n_peers)
        choice = halving.choose(taken, several, self._spec.trials)
        others = any(trial.state == TrialState.RUNNING and trial.number not in self._ours for trial in taken)
        is_held_up = others and not choice.claim  # by who may have died
        if choice.n_to_queue or is_held_up or len(taken) > self._spec.trials:
            taken = holders(self.fill(several))
            choice = halving.choose(taken, several, self._spec.trials)
        if choice.over and any(map(is_paused, taken)):
            self._prune_paused(halving)
        if doubt := halving.doubt(taken):
            log.warning(doubt)
        return _share(choice.claim, n_peers)

    def _prune_paused(self, halving: Halving) -> None:
        """End all paused trials, unless there is something to be trained by now."""
        with locked(self._storage, self._spec.storage):
            taken = holders(self._reader.read())
            if not self._is_over(halving, taken):
                return
            paused = [trial for trial in taken if is_paused(trial)]
            with self._storage.together() as over:
                for trial in paused:
                    last = trial.intermediate_values[max(trial.intermediate_values)]
                    values = None if math.isnan(last) else [last]
                    self._storage.set_trial_state_values(trial._trial_id, TrialState.PRUNED, values)
        self._lost += [
            Lost(number=trial.number, state="PRUNED", params=trial.params, seconds=trained(trial))
            for trial in paused
            if trial._trial_id not in over
        ]

    def _is_over(self, halving: Halving, taken: Sequence[FrozenTrial]) -> bool:
        """Whether of the trials that hold the slots only paused ones are left, none of which is to be resumed."""
        if self._reader.stopped() is None:
            return halving.choose(taken, 1, self._spec.trials).over
        return not any(trial.state == TrialState.RUNNING or is_retry(trial) for trial in taken)

    # The end of a search before its budget is spent (`stop`).

    def settle_stop(self) -> None:
        """Ask the rules of `stop` before anything is trained; say what has ended the search, now or in another run."""
        if self._study.user_attrs.get(schema.STOPPED) is not None:
            if (before := self._reader.stopped()) is not None:
                log.info(f"the search was {before.text()}; change or remove `stop` to search on")
                return
            self._study.set_user_attr(schema.STOPPED, None)
        self._stop_if_due()

    def _stop_if_due(self) -> Stopped | None:
        """Return what has ended the search; where nothing has, ask the rules."""
        found = self._reader.stopped()
        if self._spec.stop is None or found is not None:
            return found
        found = self._rules.ask(holders(self._reader.read()))
        if found is None:
            return None
        with locked(self._storage, self._spec.storage):
            if (before := self._reader.stopped()) is not None:
                return before
            self._study.set_user_attr(schema.STOPPED, found.as_dict())
        log.info(f"the search is {found.text()}; no new trial is started")
        self.fill()
        return found

    def _left(self) -> Sequence[FrozenTrial]:
        """Return what is still to be trained of a search that was stopped: retries. At its end prune the paused."""
        taken = holders(self._reader.read())
        others = any(trial.state == TrialState.RUNNING and trial.number not in self._ours for trial in taken)
        if others or any(map(is_new, taken)):  # who may have died; what who stopped it was killed before withdrawing
            taken = holders(self.fill())
        if self.halving is not None and any(map(is_paused, taken)) and self._is_over(self.halving, taken):
            self._prune_paused(self.halving)
        return _share([trial for trial in taken if is_retry(trial)], _n_peers(taken))

    # The budget.

    def fill(self, n: int = 1) -> Sequence[FrozenTrial]:
        """Queue trials up to the budget (`n` or a chunk at a time), or withdraw those that are queued beyond it.

        Trials whose worker died are retried too. Return all trials of the study as they are now.
        """
        with locked(self._storage, self._spec.storage):
            everything: Sequence[FrozenTrial] = self._reader.read()
            if any(self._reclaim(everything).values()):
                everything = self._reader.read()
            trials = budget(self._spec.trials, holders(everything), self._reader.stopped())
            most = max(n, _CHUNK) - (sum(map(is_new, everything)) if trials == UNBOUNDED else 0)
            change = refill(everything, trials, self._starts(everything), max(0, most))
            if change.queue:
                self._storage.enqueue(self._study._study_id, [self._new(slot, start) for slot, start in change.queue])
            self._withdraw(change.withdraw)
        return self._reader.read() if change.queue or change.withdraw else everything

    def _starts(self, everything: Sequence[FrozenTrial]) -> Starts:
        entries = [self._space.queued(each) for each in self._spec.start_with]
        return starts_in(everything, holders(everything), entries) if entries else NONE

    def _queue_starts(self, n: int) -> None:
        """See once that entries of `start_with` that are new in a resumed study are queued, as far as there is room."""
        if not self._starts_are_queued:
            self._starts_are_queued = True
            if self._starts(self._reader.read()).untried:
                self.fill(n)

    def _new(self, slot: int, start: int | None) -> Queued:
        """Return a new trial for a free slot, with the params of that `start_with` entry, if any."""
        attrs = {schema.SLOT: slot, schema.SEED: derive(self._spec.seed, "init", slot)}
        if start is None:
            return attrs, {}
        return attrs | {schema.START_WITH: start}, _fixed(self._space.queued(self._spec.start_with[start]))

    def _withdraw(self, trials: Sequence[FrozenTrial]) -> None:
        """End WAITING trials that the budget has no slot for."""
        for trial in trials:
            with suppress(UpdateFinishedTrialError):  # claimed and finished by a peer just now
                self._storage.set_trial_user_attr(trial._trial_id, schema.WITHDRAWN, True)
                self._storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)

    # Trials whose worker died, or that were interrupted.

    def look_for_the_dead(self) -> None:
        """Now and then, retry the trials whose worker died, even while there is other work."""
        if self._clock.monotonic() < self._look_at:
            return
        self._look_at = self._clock.monotonic() + self._spec.grace / 4
        if any(self._judge(holders(self._reader.read())).values()):
            self.repair()

    def repair(self) -> bool:
        """Retry the trials whose worker died, as every worker does when it looks for work.

        Return whether it is not known yet of any trial: call it again in a moment then.
        """
        with locked(self._storage, self._spec.storage):
            return None in self._reclaim(self._reader.read()).values()

    def _reclaim(self, everything: Sequence[FrozenTrial]) -> dict[int, bool | None]:
        """Retry those of `everything` whose worker died; return what `_judge` does. The storage's lock must be held."""
        counted = {trial.number for trial in holders(everything)}
        judged = self._judge(everything)
        for trial in everything:
            if judged.get(trial.number):
                attempt = lease_of(trial).get(schema.LEASE_ATTEMPT, 1)
                if trial.number not in counted:  # it has a successor
                    attempt = math.inf
                until = held_until(trial, self._reader.leases())
                self._replace(trial, f"worker {worker_of(trial)} died", attempt, until)
        return judged

    def _judge(self, trials: Sequence[FrozenTrial]) -> dict[int, bool | None]:
        """Return the numbers of those of `trials` that other workers train; whether each is dead (`LeaseMonitor`)."""
        trouble = max(self._storage.back_at, self._lease.failed_at)
        others = [t for t in trials if t.state == TrialState.RUNNING and t.number not in self._ours]
        leases = self._reader.leases() if others else {}
        return {trial.number: self._monitor.is_dead(trial, leases, trouble) for trial in others}

    def give_back(self, trial_id: int, reason: str) -> None:
        """End a trial of ours that was interrupted, unless a peer has ended it, and queue its successor."""
        with locked(self._storage, self._spec.storage):
            self._storage.let_go([trial_id])
            frozen = self._storage.get_trial(trial_id)
            if frozen.state == TrialState.RUNNING:
                self._replace(frozen, reason, attempt=0)  # an interruption is nobody's fault: it costs no attempt

    def _replace(self, trial: FrozenTrial, reason: str, attempt: float, until: float | None = None) -> None:
        """End `trial` as FAIL and queue its successor; the successor first, so that a crash between loses nothing.

        `until` is when the lease of a worker that died ended: the trial used the time until then (`seconds_used`).
        """
        succeeded = attempt <= self._spec.retries
        if succeeded:
            self._enqueue_successor(trial, attempt + 1)
        with suppress(UpdateFinishedTrialError):  # a peer was faster
            if until is not None:
                lease = {**lease_of(trial), schema.LEASE_UNTIL: until}
                self._storage.set_trial_system_attr(trial._trial_id, schema.LEASE, lease)
            self._storage.set_trial_user_attr(trial._trial_id, schema.ERROR, masked(reason))
            self._storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
            if trial.number not in self._ours:
                state = "INTERRUPTED" if succeeded or attempt == math.inf else "FAIL"
                self._lost.append(Lost(number=trial.number, state=state, reason=reason))

    def _enqueue_successor(self, trial: FrozenTrial, attempt: float) -> None:
        attrs = {
            schema.RETRY_OF: trial.number,
            schema.ATTEMPT: attempt,
            schema.LINEAGE: trial.user_attrs.get(schema.LINEAGE, trial.number),
        }
        kept = (schema.SLOT, schema.SEED, schema.START_WITH, schema.PAUSED_AT)
        attrs |= {key: trial.user_attrs[key] for key in kept if key in trial.user_attrs}
        of_the_grid = (schema.GRID_ID, schema.SEARCH_SPACE)
        grid = {key: trial.system_attrs[key] for key in of_the_grid if key in trial.system_attrs}
        params = {**trial.system_attrs.get(schema.FIXED_PARAMS, {}), **trial.params}  # it may have ended before it drew
        self._storage.enqueue(self._study._study_id, [(attrs, grid | _fixed(params))])

    def drain_lost(self) -> list[Lost]:
        """Return the trials that were ended here since the last call though this worker did not train them."""
        lost, self._lost = self._lost, []
        return lost


def _n_peers(taken: Sequence[FrozenTrial]) -> int:
    """Return how many other processes train some of these trials."""
    training = {worker_of(trial) for trial in taken if trial.state == TrialState.RUNNING and lease_of(trial)}
    return len(training - {this_process()})


def _share(waiting: Sequence[FrozenTrial], n_peers: int) -> Sequence[FrozenTrial]:
    """Return all that wait, or, beside peers, a share drawn at random: to try what a peer takes is time lost."""
    return random.sample(waiting, math.ceil(len(waiting) / (1 + n_peers))) if n_peers else waiting


def _fixed(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what has a queued trial take the params of `config`; the others are sampled when it is claimed."""
    return {schema.FIXED_PARAMS: dict(config)} if config else {}  # not {}: see grid
