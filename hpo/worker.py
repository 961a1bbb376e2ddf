"""Ask, train, tell, until the budget is spent: one process's share of a study."""

import math
import time
from collections.abc import Callable

from hpo.data import Data, Split
from hpo.errors import Interrupted
from hpo.plan import Plan
from hpo.progress import Progress
from hpo.search import TIMED_OUT, Search
from hpo.sizing import Choice, choose
from hpo.stack import LoopStack, Member, Stack, is_out_of_memory
from hpo.tracking import Tracker
from hpo.training import batches, order, train
from hpo.trial import TrialRun
from hpo.vmap_stack import How, NotStackable, Padding, VmapStack, padding, stackable

WAIT_SECONDS = 1.0
"""How often to look again while all that is left of a study is with other workers."""
WORTH_COMPILING = 10_000
"""How many steps of a stack pay for compiling it: that takes some 5 s, and saves about half a millisecond a step."""
ROUNDS = 4
"""Into how many rounds `stack: auto` divides a study at the least whose sampler learns from the trials before."""


def work(
    plan: Plan,
    data: Data,
    search: Search,
    tracker: Tracker,
    progress: Progress,
    stopping: Callable[[], bool] = lambda: False,
) -> None:
    """Train trials until the budget or the time is spent. Raises Interrupted as soon as `stopping` says so.

    A trial's own fault (NaN, out of memory) fails that trial; any other error gives the trials back and is raised.
    """
    deadline = _deadline(plan, search)

    def out_of_time() -> bool:
        return time.monotonic() >= deadline

    worker = _Worker(plan, data, search, tracker, progress, lambda: stopping() or out_of_time())
    while not out_of_time():
        if stopping():
            worker.give_back("interrupted")
            raise Interrupted("interrupted; run the same command again to go on")
        first = worker.next()
        if first is None:
            if search.counts().running == 0:
                return
            time.sleep(WAIT_SECONDS)  # others still train; should they die, their trials are ours to take up
            continue
        try:
            worker.train_with(first)
        except Interrupted:
            if stopping():
                worker.give_back("interrupted")
                raise Interrupted(
                    "interrupted; the running trial was given back, run the same command again to go on"
                ) from None
            worker.give_back("the study's time was over")
        except BaseException as error:
            worker.give_back(f"{type(error).__name__}: {error}")
            raise
    worker.give_back("the study's time was over")
    search.remember(TIMED_OUT, plan.spec.timeout)
    progress.note(
        f"the study's time ({plan.spec.timeout:g} s) is over: no new trial is begun; raise `timeout` to go on"
    )


def _deadline(plan: Plan, search: Search) -> float:
    if plan.spec.timeout is None:
        return math.inf
    return time.monotonic() + search.seconds_left(plan.spec.timeout)


class _Worker:
    """The trials that this process has claimed: those in the stack that is trained, and those held for a later one."""

    def __init__(
        self,
        plan: Plan,
        data: Data,
        search: Search,
        tracker: Tracker,
        progress: Progress,
        stopping: Callable[[], bool],
    ) -> None:
        self._plan, self._info, self._stopping = plan, data.info, stopping
        self._search, self._tracker, self._progress = search, tracker, progress
        preprocess = plan.objective.preprocess(data.train)
        self._train, self._valid = (split.through(preprocess).to(plan.device) for split in (data.train, data.valid))
        self._example = Split(inputs={n: x[:8] for n, x in self._train.inputs.items()}, targets=self._train.targets[:8])
        self._capacity = 0 if plan.spec.stack == "auto" else plan.spec.stack
        self._widest: Padding = {}
        if plan.spec.stack != 1:
            corners = plan.space.corners()
            self._widest = padding([stackable(plan.objective.build(params, data.info)) for params in corners])
        self._stackable = plan.spec.stack not in ("auto", 1)
        self._active: dict[int, TrialRun] = {}
        self._held: list[TrialRun] = []
        self._said: set[str] = set()

    def next(self) -> TrialRun | None:
        """Return a trial to begin a stack with: one that was held, else a new claim; None where there is none."""
        return self._held.pop(0) if self._held else self._claim()

    def _claim(self) -> TrialRun | None:
        claim = self._search.ask()
        for number, reason in self._search.drain_lost():
            self._tracker.end_trial(number, "FAIL", reason)
            self._progress.note(f"trial {number} is taken up anew: {reason}")
        return None if claim is None else TrialRun(self._plan, claim, self._search, self._tracker, self._progress)

    def train_with(self, first: TrialRun) -> None:
        """Train a stack that begins with `first`, refilled with trials of its kind as others leave, until it is empty.

        Where the device has no memory for it, its trials are given back and stacks are half as large from then on.
        """
        self._active[first.member.number] = first
        joining = [first]

        def ask(n: int) -> list[Member]:
            joining.extend(self._more(stack, n - len(joining)))
            members = [trial.member for trial in joining]
            joining.clear()
            return members

        def report(member: Member, metrics: dict[str, float]) -> bool:
            go_on = self._active[member.number].report(stack, metrics)
            if not go_on:
                del self._active[member.number]
            return go_on

        try:
            stack = self._stack_for(first.member)
            train(
                stack,
                self._train,
                self._valid,
                batch_size=first.member.params["batch_size"],
                epochs=self._plan.spec.epochs,
                seed=self._plan.spec.seed,
                ask=ask,
                report=report,
                stopping=self._stopping,
            )
        except (RuntimeError, MemoryError) as error:
            if not (self._stackable and is_out_of_memory(error)):
                raise
            self.give_back(f"out of memory in a stack of {self._capacity}")
            self._stackable = self._capacity > 1  # not even one: what is out of memory alone, fails alone
            self._capacity = max(1, self._capacity // 2)
            self._say(f"out of memory: from now on {self._capacity} trials a stack, and those in this one begin anew")

    def _stack_for(self, member: Member) -> Stack:
        if self._capacity == 0:
            choice = self._choose(member)
            self._capacity = choice.capacity
            self._progress.note(f"stack: {choice.why}")
            self._search.remember("hpo:stack", choice.why)
            self._stackable = choice.stack is not None
            if choice.stack is not None:
                return choice.stack
        if self._stackable:
            stack = self._vmap_stack(self._capacity, self._how(member))
            try:
                stack.admit(member)
            except NotStackable as error:
                self._say(f"trials like trial {member.number} are trained one at a time: {error}")
            else:
                return stack
        return self._loop_stack()

    def _choose(self, member: Member) -> Choice:
        """Measure which size of stack trains trials like `member` fastest."""
        spec = self._plan.spec
        batch_size, n_trials = member.params["batch_size"], self._search.counts().waiting + 1
        batch = next(batches(self._train, batch_size, order(len(self._train), spec.seed, 0)))
        most = n_trials if spec.sampler.name in ("random", "grid", "qmc", "brute_force") else n_trials // ROUNDS
        return choose(
            lambda k: self._vmap_stack(k, "compiled"),
            self._loop_stack(),
            member,
            (list(batch[0]), batch[1]),
            n_steps=n_trials * spec.epochs * math.ceil(len(self._train) / batch_size),
            most=most,
        )

    def _loop_stack(self) -> LoopStack:
        return LoopStack(self._plan.objective, self._info, self._plan.device)

    def _vmap_stack(self, capacity: int, how: How) -> VmapStack:
        plan = self._plan
        return VmapStack(plan.objective, self._info, plan.device, capacity, self._example, how, self._widest)

    def _how(self, member: Member) -> How:
        epochs = self._plan.spec.epochs * math.ceil(self._search.counts().waiting / self._capacity)
        steps = epochs * math.ceil(len(self._train) / member.params["batch_size"])
        return "compiled" if steps >= WORTH_COMPILING else "graph"

    def _more(self, stack: Stack, n: int) -> list[TrialRun]:
        """Return up to `n` trials that may join `stack`, of those held and then of new claims; hold what may not."""
        if not isinstance(stack, VmapStack):
            return []
        held, self._held = self._held, []
        taken: list[TrialRun] = []
        while len(taken) < n and len(self._held) < self._capacity:
            trial = held.pop(0) if held else self._claim()
            if trial is None:
                break
            self._active[trial.member.number] = trial
            try:
                stack.admit(trial.member)
            except NotStackable:
                self._held.append(self._active.pop(trial.member.number))
            else:
                taken.append(trial)
        self._held += held
        return taken

    def give_back(self, reason: str) -> None:
        """End all trials that are not done, and queue a successor for each."""
        for trial in [*self._active.values(), *self._held]:
            trial.give_back(reason)
        self._active.clear()
        self._held.clear()

    def _say(self, text: str) -> None:
        if text.partition(": ")[2] not in self._said:
            self._said.add(text.partition(": ")[2])
            self._progress.note(text)
