"""Ask, train, tell, until the budget is spent: one process's share of a study."""

import math
import os
import platform
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial

import torch

from hpo.errors import Interrupted
from hpo.log import Once, log
from hpo.runner import checkpoints
from hpo.runner.custom import CustomTraining
from hpo.runner.deadline import SHORT_SECONDS, Deadline
from hpo.runner.launch import LAUNCHED
from hpo.runner.outcome import stack_paths
from hpo.runner.prepare import Plan
from hpo.runner.progress import Progress
from hpo.runner.trials import Trials
from hpo.search import schema
from hpo.search.away import StorageAway
from hpo.search.pruning import settle_pruner
from hpo.search.search import Search
from hpo.search.timed import TimedHalving
from hpo.stacks.draws import looked_at
from hpo.stacks.kept import kept_in_objective
from hpo.stacks.padding import Padding, PaddingPlan
from hpo.stacks.pool import Pool
from hpo.stacks.sizing import AS_GIVEN, Sizing, StackSize
from hpo.stopping import StopToken
from hpo.study.data import Data
from hpo.study.sealed import sealed, sealing
from hpo.tracking.base import Tracker
from hpo.training.batches import make_batches
from hpo.training.faults import TrialError
from hpo.training.loop import Results, train
from hpo.training.loop_stack import LoopStack
from hpo.training.memory import free_all, free_if_cuda, is_out_of_memory
from hpo.training.stack import Member, SingleStack, Stack, Stacks
from hpo.training.torch_settings import torch_settings

WAIT_SECONDS = 1.0
"""How often to look again while all that is left of a study is with other workers."""
ROUNDS = 4
"""Into how many rounds `stack: auto` divides a study at the least whose sampler learns from the trials before."""
EXAMPLE_ROWS = 8
"""How many rows networks are tried on before they join a stack."""
_KEPT_DRAWS = 4
"""So many configurations are drawn, of which two are built to see what the objective keeps of each."""
_DRAWS = 64
INTERRUPTED = "interrupted; the running trials were given back, run the same command again to resume"


def work(
    plan: Plan,
    data: Data | None,
    search: Search,
    tracker: Tracker,
    progress: Progress,
    stop: StopToken | None = None,
) -> None:
    """Train trials until the budget or the time is spent.

    Raises Interrupted once `stop` says so: at the end of the epoch, with a checkpoint of every trial, or, when it says
    that at once, between two batches.

    A trial's own fault (NaN, out of memory) fails that trial; any other error gives the trials back and is raised.
    torch's process-wide settings are as before at the end.
    """
    stop = stop or StopToken()
    limited = stop.limited()
    data = None if data is None else sealed(data)
    with torch_settings(plan.device), sealing(plan.given):
        task = None if data is None or plan.trains_itself else plan.task(data.info, len(data.train))
        trials = Trials(plan, search, tracker, progress, task, limited.requested)
        checkpoints.settle_weights(plan, search)
        worker: _Worker | CustomTraining
        if data is None or plan.trains_itself:
            worker = CustomTraining(plan, data, search, tracker, trials, limited)
        else:
            worker = _Worker(plan, data, search, tracker, trials, limited)
        try:
            worker.choose()
        except Interrupted:
            raise Interrupted(INTERRUPTED) from None
        deadline = Deadline(plan, search, worker.stacked)  # of a `timeout`, measuring is not counted: no trial runs
        limited.look, trials.limits.must_end = deadline, deadline.must_end
        if isinstance(search.halving, TimedHalving):
            search.halving.left = deadline.left
        while not limited.out_of_time():
            _train_some(worker, trials, search, stop)
            free_if_cuda(plan.device)
            if limited.out_of_time():
                break
            seen = search.view()
            if seen.counts.unfinished == 0:
                search.tidy(seen)
                checkpoints.remove_old(plan)
                return
            time.sleep(WAIT_SECONDS)  # others still train; should they die, their trials are ours to take up
    search.remember(schema.TIMED_OUT, plan.spec.limit)
    key = "timeout" if plan.spec.limit == plan.spec.timeout else "time"
    log.info(f"the study's time ({plan.spec.limit:g} s) is over: no new trial is started; raise `{key}` to train more")


def _train_some(worker: "_Worker | CustomTraining", trials: Trials, search: Search, stop: StopToken) -> None:
    """Train until there is no trial left to claim, or the time is over; give trials back where it ends otherwise."""
    try:
        worker.train()
    except Interrupted:
        if stop.requested():
            trials.give_back("interrupted")
            raise Interrupted(INTERRUPTED) from None
        trials.give_back("the study's time was over")
    except StorageAway:
        raise  # nobody could be told
    except BaseException as error:
        with suppress(StorageAway), search.storage.at_once():  # if nobody can be told, the lease runs out
            trials.give_back(f"{type(error).__name__}: {error}")
        raise


def chosen_before(plan: Plan, search: Search) -> StackSize | None:
    """Return what `stack: auto` has chosen for this study on this machine; None where it has not."""
    if plan.spec.stack != "auto":
        return None
    with suppress(AttributeError, KeyError, TypeError):  # there is none, or one that a later version wrote
        stored = search.attrs[schema.STACK]
        return StackSize.stored(stored["choice"]) if stored["where"] == _where(plan) else None
    return None


def _where(plan: Plan) -> str:
    return f"{platform.node()} {plan.device}"


class _Worker:
    """The trials that this process has claimed, and the stacks that they are trained in."""

    def __init__(
        self, plan: Plan, data: Data, search: Search, tracker: Tracker, trials: Trials, stop: StopToken
    ) -> None:
        self._plan, self._stop = plan, stop
        self._search, self._tracker = search, tracker
        self._task = plan.task(data.info, len(data.train))
        preprocess = plan.objective.preprocess(data.train)
        self._train, self._valid = (
            make_batches(split, preprocess, plan.device, plan.spec.loading) for split in (data.train, data.valid)
        )
        self._example = self._train.head(EXAMPLE_ROWS)
        self._trials = trials
        trials.limits.rows = self._train.head
        self._once = Once()
        self._paths: dict[str, bool] = {}
        """How stacks have run, and whether that is stored."""
        self._stacks: Stacks | None = None

    @property
    def stacked(self) -> bool:
        """Whether trials are trained in stacks, as it was chosen."""
        return self._choice.stacked

    @property
    def _active(self) -> Sequence[Stack]:
        return [] if self._stacks is None else self._stacks.active

    def train(self) -> None:
        """Train until there is no trial left to claim. Raises Interrupted.

        Where the device has no memory for a stack, its trials are given back and stacks are half as large from then on.
        """
        while True:
            try:
                self._stacks = self._new_stacks()
                train(
                    self._stacks,
                    self._train,
                    self._valid,
                    epochs=self._plan.spec.epochs,
                    seed=self._plan.spec.seed,
                    ask=self._ask,
                    report=self._report,
                    stopping=self._stop.immediate,
                )
                return
            except (RuntimeError, MemoryError) as error:
                if not (self._choice.stacked and is_out_of_memory(error)):
                    raise
                retreat = self._halve
            except TrialError as error:
                if not self._choice.stacked:
                    raise
                retreat = partial(self._unstack, str(error))
            finally:
                self._stacks = None  # they know this worker, as it does them, and what comes next needs their memory
            retreat()  # the error is gone by now, and with it the tensors that its traceback held

    def _ask(self, n: int) -> list[Member]:
        """Claim up to `n` trials; all stacks are at the end of an epoch then."""
        away = self._search.storage.away_for_good
        if self._stop.requested() or away:
            for stack in self._active:
                for member in stack.members:
                    self._trials[member.number].checkpoint(stack.checkpoint(member))
            if away:
                raise StorageAway(
                    f"the storage has been away for {self._plan.spec.outage:g} s: the running trials are kept in "
                    "checkpoints; run the same command again to resume"
                )
            raise Interrupted()
        training = any(stack.members for stack in self._active)
        return [trial.member for trial in self._trials.claim_up_to(n, wait=not training)]

    def _report(self, stack: Stack, results: Results) -> list[Member]:
        """Report an epoch of all members of a stack; return those that go on."""
        self._note_path(stack)
        kept = []
        with self._trials.together():
            trials = [self._trials[member.number] for member in results]
            for trial, metrics in zip(trials, results.values(), strict=True):
                trial.report(metrics, stack)
        for trial in trials:
            if trial.ending is not None:
                self._trials.done(trial.member.number)
                continue
            if trial.checkpoint_is_due:
                trial.checkpoint(stack.checkpoint(trial.member))
            kept.append(trial.member)
        return kept

    def _note_path(self, stack: Stack) -> None:
        """Say once how the steps of stacks run, and keep it with the study: what is slow has its reason there."""
        path = stack.path
        if path is None:
            return
        if path not in self._paths:
            self._paths[path] = False
            log.info(f"stacks run {path}")
            self._tracker.tag_study({"hpo.stack_path": " | ".join(self._paths)})
        if not self._paths[path]:
            with suppress(StorageAway), self._search.storage.at_once():  # no training waits for this
                known = stack_paths(self._search)
                if path not in known:
                    self._search.remember(schema.STACK_PATHS, [*known, path])
                self._paths[path] = True

    def _new_stacks(self) -> Stacks:
        """Return new, empty stacks of the size that was chosen."""
        if not self._choice.stacked:
            return SingleStack(LoopStack(self._task))
        return Pool(
            self._task,
            self._choice.capacity,
            self._example,
            self._padding_plan(self._choice.padding),
            once=self._once,
            ahead=lambda: self._search.counts().waiting,
            shared=self._choice.shared,
            left=self._left,
        )

    def _left(self) -> float:
        limit = self._plan.spec.limit
        return math.inf if limit is None else self._search.seconds_left(limit)

    def _padding_plan(self, padding: Padding) -> PaddingPlan:
        return PaddingPlan(self._plan.space, self._task.network, padding)

    def choose(self) -> None:
        """Choose the size of the stacks, measured where the study says `auto`. Raises Interrupted."""
        self._choice = self._chosen_size()
        if self._choice.stacked and (kept := self._kept()):
            self._choice = StackSize(why=f"one trial at a time: {kept}")
        capacity = self._choice.capacity if self._choice.stacked else 1
        if settle_pruner(self._search, capacity * int(os.environ.get(LAUNCHED, 1)), stacked=capacity > 1):
            log.info(
                f"pruner: halving, since {capacity} trials are trained at once, and median compares with "
                "trials that have ended before; `pruner: median` in the study file has that one nevertheless"
            )
            self._tracker.tag_study({"hpo.pruner": "halving"})
        if self._choice.threads is not None:
            torch.set_num_threads(self._choice.threads)
        if self._choice.why != AS_GIVEN:
            log.info(f"stack: {self._choice.why}")
            self._tracker.tag_study({"hpo.stack": self._choice.why})

    def _kept(self) -> str:
        """Return why trials cannot train at once without reading each other's numbers; nothing: they can."""
        drawn = self._plan.space.draw(_KEPT_DRAWS, self._plan.spec.seed)
        some, _ = looked_at(drawn, self._trials.limits.network)
        if not some:
            return ""
        one, other = some[0], some[-1]
        names = ", ".join(kept_in_objective(self._task, one, other, self._example))
        return f"the objective's build or loss keeps {names}, which would be another trial's" if names else ""

    def _chosen_size(self) -> StackSize:
        spec = self._plan.spec
        counts = self._search.counts()
        n_trials = math.ceil((counts.waiting + counts.paused) / int(os.environ.get(LAUNCHED, 1)))
        if n_trials == 0:
            return StackSize(why=AS_GIVEN)
        before = chosen_before(self._plan, self._search)
        if before is not None:
            return before
        if spec.stack == "auto" and spec.time is not None and spec.time < SHORT_SECONDS:
            return StackSize(why=f"one trial at a time: in {spec.time:g} s to measure would not pay")
        if spec.stack == 1 and spec.limit is not None and spec.limit < SHORT_SECONDS:  # nor to compile
            return StackSize(why=AS_GIVEN)
        rounds = 1 if spec.sampler.name in ("random", "grid", "qmc", "brute_force") else ROUNDS
        several = self._plan.space.draw(min(_DRAWS, n_trials), spec.seed)
        draws, n_too_large = looked_at(several, self._trials.limits.network)
        sizing = Sizing(
            task=self._task,
            batches=self._train,
            example=self._example,
            plan_of=self._padding_plan,
            draws=draws,
            n_too_large=n_too_large,
            n_trials=n_trials,
            most=max(1, n_trials // rounds),
            seconds=self._left(),
            rounds=rounds,
            stopping=self._stop.requested,
        )
        if spec.stack != "auto":
            return sizing.given(spec.stack)
        choice = sizing.choose()
        self._search.remember(schema.STACK, {"where": _where(self._plan), "choice": asdict(choice)})
        return choice

    def _halve(self) -> None:
        """Give the trials back, and go on with stacks half as large; after those of one, without stacks."""
        capacity = self._choice.capacity
        free_all(self._plan.device)
        self._trials.give_back(f"out of memory in a stack of {capacity}")
        self._choice = replace(self._choice, capacity=max(1, capacity // 2), stacked=capacity > 1)
        at_once = f"from now on {self._choice.capacity} trials at once; running trials restart from scratch"
        self._once.warning("out of memory", at_once)

    def _unstack(self, error: str) -> None:
        """Give the trials back, and train one at a time from now on: an error in a stack may be any member's."""
        self._trials.give_back(f"an error in a stack: {error}")
        self._choice = replace(self._choice, capacity=1, stacked=False)
        what = "an error in a stack, of a kind that ends one trial"
        self._once.warning(what, f"from now on one trial at a time ({error})")
