"""Members trained outside the search, all at once in stacks of the size that the search has: each as it would be alone.

They are nobody's trials: nothing is claimed, reported to a pruner or tracked.
"""

import math
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial

from hpo.log import Once, log
from hpo.runner.outcome import stack_paths
from hpo.runner.prepare import Plan
from hpo.runner.worker import EXAMPLE_ROWS, chosen_before
from hpo.search import schema
from hpo.search.away import StorageAway
from hpo.search.search import Search
from hpo.stacks.padding import Padding, PaddingPlan
from hpo.stacks.pool import Pool
from hpo.stacks.sizing import Sizing, StackSize
from hpo.training.batches import Batches
from hpo.training.faults import TrialError
from hpo.training.loop import Results, train
from hpo.training.loop_stack import LoopStack
from hpo.training.memory import free_all, is_out_of_memory
from hpo.training.stack import Member, SingleStack, Stack, Stacks, Task

PaddingOf = Callable[[Padding], PaddingPlan]
"""Gives how networks that were drawn from the study's space are padded."""
Report = Callable[[Stack, Results], Collection[Member]]
"""Takes an epoch of all members of a stack; returns those that are to be trained further."""


def train_members(
    plan: Plan,
    search: Search,
    task: Task,
    batches: tuple[Batches, Batches | None],
    left: Callable[[], list[Member]],
    report: Report,
    *,
    epochs: int,
    seed: int,
    stopping: Callable[[], bool],
) -> None:
    """Train the members that are `left` on `batches` (train, validation) for so many `epochs`, as `train` does.

    `left` gives them as new ones, and is asked again where a stack had no memory: then those that are still left are
    trained from scratch, in stacks half as large. `seed` is that of the order of rows. Raises Interrupted.
    """
    padding_of: PaddingOf = partial(PaddingPlan, plan.space, task.network)
    size = _size(plan, search, replace(task, epochs=epochs), batches[0], left(), padding_of, stopping)
    once = Once()
    while True:
        queue = left()
        if not queue:
            return

        def ask(n: int, queue: list[Member] = queue) -> list[Member]:
            return [queue.pop(0) for _ in range(min(n, len(queue)))]

        try:
            train(
                _stacks(task, size, batches[0], padding_of, once, queue),
                *batches,
                epochs=epochs,
                seed=seed,
                ask=ask,
                report=saying_path(search, report),
                stopping=stopping,
            )
            return
        except (RuntimeError, MemoryError) as error:
            if not (size.stacked and is_out_of_memory(error)):
                raise
            size = replace(size, capacity=max(1, size.capacity // 2), stacked=size.capacity > 1)
            why = f"from now on {size.capacity} at once"
        except TrialError as error:
            if not size.stacked:
                raise
            size, why = replace(size, capacity=1, stacked=False), f"from now on one at a time ({error})"
        free_all(plan.device)
        once.warning("training in a stack failed", why)


def saying_path(search: Search, report: Report) -> Report:
    """Return `report`, which says and keeps besides how stacks run, as the search does: once, and if it did not."""

    seen: set[str | None] = {None}

    def said(stack: Stack, results: Results) -> Collection[Member]:
        if (path := stack.path) not in seen:
            seen.add(path)
            with suppress(StorageAway), search.storage.at_once():  # no training waits for this
                if path not in (known := stack_paths(search)):
                    log.info(f"stacks run {path}")
                    search.remember(schema.STACK_PATHS, [*known, path])
        return report(stack, results)

    return said


def _stacks(
    task: Task, size: StackSize, batches: Batches, padding_of: PaddingOf, once: Once, queue: Sequence[Member]
) -> Stacks:
    if not size.stacked:
        return SingleStack(LoopStack(task))
    example = batches.head(EXAMPLE_ROWS)
    return Pool(task, size.capacity, example, padding_of(size.padding), once=once, ahead=lambda: len(queue))


def _size(
    plan: Plan,
    search: Search,
    task: Task,
    batches: Batches,
    members: Sequence[Member],
    padding_of: PaddingOf,
    stopping: Callable[[], bool],
) -> StackSize:
    """Return the size of the stacks: what the search had on this machine, else what suits these members.

    At the end of a study's `time` nothing is measured: to compile may take longer than what it is for.
    """
    if not members:
        return StackSize(why="there is nothing to train")
    if (before := chosen_before(plan, search)) is not None:
        return before
    n = len(members)
    sizing = Sizing(
        task=task,
        batches=batches,
        example=batches.head(EXAMPLE_ROWS),
        plan_of=padding_of,
        draws=[member.params for member in members],
        n_trials=n,
        most=n,
        seconds=math.inf if plan.spec.time is None else search.seconds_left(plan.spec.time),
        stopping=stopping,
    )
    return sizing.given(plan.spec.stack) if plan.spec.stack != "auto" else sizing.choose()
