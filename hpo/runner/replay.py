"""A trial trained once more, alone, and compared epoch by epoch with what was recorded of it."""

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from torch import nn

from hpo.errors import InputError
from hpo.export.environment import git_commit, user, versions
from hpo.log import log
from hpo.runner.custom import train_outside
from hpo.runner.prepare import Plan
from hpo.runner.worker import EXAMPLE_ROWS
from hpo.search import schema
from hpo.search.codes import code_of
from hpo.search.curves import Curves, curves_of
from hpo.search.search import Search
from hpo.search.view import StudyView
from hpo.stacks.alone import NotStackable
from hpo.stacks.vmap_stack import VmapStack
from hpo.stopping import StopToken, signals
from hpo.study.data import Data
from hpo.study.sealed import sealed, sealing
from hpo.training.batches import make_batches
from hpo.training.faults import TrialError
from hpo.training.loop import Results, train
from hpo.training.loop_stack import LoopStack
from hpo.training.stack import Member, SingleStack, Stack

FIRST, LATER = 1e-4, 2e-2
"""By how much curves may differ that are still the same, in the first epoch and in later ones: of the largest number in
the curve, or of 1.

What was trained alone on a CPU is the same to the last bit. A stack adds its numbers up in another order: float32 has 7
digits, and from the step on in which a unit is switched on here and off there, curves part by 1e-3 or so. Another seed,
another row or other code make more of a difference in the first epoch already.
"""


@dataclass(frozen=True, kw_only=True)
class Replay:
    """What a replay came to; the curves have one value an epoch, NaN where one has none."""

    number: int
    recorded: Curves
    replayed: Curves
    changed: Sequence[str]
    """What is not as it was when the trial was trained: versions, commit, device, code, data."""

    @property
    def epochs(self) -> int:
        """How many epochs there are to compare."""
        return min((len(values) for values in (*self.recorded.values(), *self.replayed.values())), default=0)

    def difference(self, epoch: int) -> float:
        """Return the largest difference in an epoch, counted from 0: of a metric's largest number, or of 1."""
        return max((self._of(name, epoch) for name in self.recorded if name in self.replayed), default=math.inf)

    def _of(self, name: str, epoch: int) -> float:
        before, now = self.recorded[name], self.replayed[name]
        if before[epoch] == now[epoch] or (math.isnan(before[epoch]) and math.isnan(now[epoch])):
            return 0.0
        scale = max([1.0, *(abs(x) for x in before if math.isfinite(x))])
        difference = abs(before[epoch] - now[epoch]) / scale
        return difference if math.isfinite(difference) else math.inf

    @property
    def differences(self) -> list[float]:
        """The largest difference of each epoch."""
        return [self.difference(epoch) for epoch in range(self.epochs)]

    @property
    def first_other(self) -> int | None:
        """The first epoch, counted from 1, that differs by more than is allowed; None: there is none."""
        for epoch, difference in enumerate(self.differences, start=1):
            if difference > (FIRST if epoch == 1 else LATER):
                return epoch
        return None

    @property
    def agrees(self) -> bool:
        """Whether there is something to compare, and all of it is the same."""
        return self.epochs > 0 and self.first_other is None


def made_with(plan: Plan) -> dict[str, Any]:
    """Return what a study is run with, to be stored: `since` (seconds since 1970), versions, commit, user, device."""
    return {
        "since": time.time(),
        "versions": versions(),
        "commit": git_commit(),
        "user": user(),
        "device": str(plan.device),
    }


def note_environment(plan: Plan, search: Search) -> None:
    """Store what the study is run with from now on, unless it is what it was run with before."""
    stored, now = search.attrs.get(schema.MADE_WITH), made_with(plan)
    known = stored if isinstance(stored, list) else []
    if not known or any(known[-1].get(key) != value for key, value in now.items() if key != "since"):
        search.remember(schema.MADE_WITH, [*known, now])


def replay(plan: Plan, search: Search, seen: StudyView, number: int, epochs: int | None) -> Replay:
    """Train trial `number` once more for so many epochs (None: as many as are recorded), and compare.

    Raises InputError where there is no such trial, it has reported nothing, or it is a plain function's; Interrupted.
    """
    recorded = _recorded(plan, seen, number)
    n_recorded = max(map(len, recorded.values()))
    if epochs is not None and not 1 <= epochs <= n_recorded:
        raise InputError(f"--epochs {epochs}: must be 1 to {n_recorded}, as many as trial {number} has reported")
    data = plan.load_data()
    assert data is not None
    log.info("training trial %d once more, alone", number)
    changed = _changed(plan, search, seen, data, number)

    def played_back(in_a_stack: bool = False) -> Replay:
        trained = _trained(plan, sealed(data), _member(seen, number), epochs or n_recorded, stopping, in_a_stack)
        names = [name for name in recorded if name in trained]
        n = min(len(trained[name]) for name in names) if names else 0
        return Replay(
            number=number,
            recorded={name: list(recorded[name])[:n] for name in names},
            replayed={name: list(trained[name])[:n] for name in names},
            changed=changed,
        )

    with signals() as stopping, sealing(plan.given):
        found = played_back()
        if not found.agrees and _has_dropout(plan, data, _member(seen, number)):
            log.info("it is another one alone; in a stack dropout has other masks, so once more in a stack of one")
            with suppress(NotStackable, TrialError):
                in_a_stack = played_back(in_a_stack=True)
                found = in_a_stack if in_a_stack.agrees else found
    return found


def _has_dropout(plan: Plan, data: Data, member: Member) -> bool:
    """Whether a stack gives this member's network masks that it has not alone (`hpo.stacks.tensor_modules`)."""
    if plan.trains_itself:
        return False
    network = plan.task(data.info, len(data.train)).build(member)
    return any(type(module) is nn.Dropout for module in network.modules())


def _recorded(plan: Plan, seen: StudyView, number: int) -> Curves:
    if plan.function is not None:
        raise InputError(f"objective {plan.spec.objective} is a function: its seeds are its own, so it is not replayed")
    try:
        curves = seen.curves(number)
    except KeyError:
        numbers = [trial.number for trial in seen.everything]
        there = f"its trials are {min(numbers)} to {max(numbers)}" if numbers else "it has none yet"
        raise InputError(f"--trial {number}: study {plan.spec.name!r} has no such trial; {there}") from None
    if not any(curves.values()):
        raise InputError(f"--trial {number}: has reported no epoch, so there is nothing to compare with")
    return curves


def _member(seen: StudyView, number: int) -> Member:
    trial = next(each for each in seen.everything if each.number == number)
    rounds = trial.user_attrs.get(schema.ROUNDS, [])
    joined = 0 if rounds else trial.user_attrs.get(schema.JOINED, 0)
    seed, params = seen.seed_of(number), seen.params_of(number)
    return Member(number=number, seed=seed, params=params, joined=joined, rounds=list(rounds))


def _trained(plan: Plan, data: Data, member: Member, epochs: int, stopping: StopToken, in_a_stack: bool) -> Curves:
    """Return the curves of a member that is trained as the search trains it: alone, or alone `in_a_stack`.

    Raises NotStackable where it cannot be stacked.
    """
    preprocess = plan.objective.preprocess(data.train)
    if plan.objective.train is not None:
        _, reports = train_outside(
            plan,
            member.params,
            member.seed,
            data,
            preprocess,
            epochs=plan.spec.epochs,
            enough=lambda reports: len(reports) >= epochs,
            stopping=stopping.requested,
        )
        return curves_of(reports)
    batches = [make_batches(x, preprocess, plan.device, plan.spec.loading) for x in (data.train, data.valid)]
    task = plan.task(data.info, len(data.train))
    stack: Stack = VmapStack(task, 1, batches[0].head(EXAMPLE_ROWS), "graph") if in_a_stack else LoopStack(task)
    orders, member.rounds = member.rounds[:epochs], []
    queue = [member]
    told: list[Mapping[str, float]] = []

    def report(stack: Stack, results: Results) -> list[Member]:
        told.append(results[member])
        return [member] if len(told) < epochs and member.fault is None else []

    train(
        SingleStack(stack),
        batches[0],
        batches[1],
        epochs=plan.spec.epochs,
        seed=plan.spec.seed,
        ask=lambda n: [queue.pop()] if queue and n else [],
        report=report,
        stopping=stopping.requested,
        orders=orders or None,
    )
    return curves_of(told)


def _changed(plan: Plan, search: Search, seen: StudyView, data: Data, number: int) -> list[str]:
    """Return in words what is not as it was when a trial was trained, as far as that is stored."""
    changes = []
    trial = next(each for each in seen.everything if each.number == number)
    for what, there, here in (
        ("the objective's code", code_of(search.attrs, trial), plan.source),
        ("the data", search.attrs.get(schema.DATA), data.fingerprint()),
    ):
        if there not in (None, here):
            changes.append(f"{what}: fingerprint {here} here, {there} then")
    if schema.CURVES not in trial.user_attrs and plan.spec.stack != 1 and not plan.trains_itself:
        changes.append("in which order it saw the rows is not stored: it was cut short, or has not ended yet")
    then, now = _environment_of(search, seen, number), made_with(plan)
    for name, version in now["versions"].items():
        if (before := then.get("versions", {}).get(name, version)) != version:
            changes.append(f"{name} {version} here, {before} then")
    for key in ("commit", "device"):
        if (before := then.get(key, now[key])) != now[key]:
            changes.append(f"{key} {now[key]} here, {before} then")
    return changes


def _environment_of(search: Search, seen: StudyView, number: int) -> Mapping[str, Any]:
    """Return what a trial was trained with, as far as that is stored: an older version stored nothing."""
    stored = search.attrs.get(schema.MADE_WITH)
    known = [each for each in stored if isinstance(each, Mapping)] if isinstance(stored, list) else []
    start = next(trial.datetime_start for trial in seen.everything if trial.number == number)
    at = math.inf if start is None else start.timestamp()
    return next((each for each in reversed(known) if each.get("since", 0.0) <= at), known[0] if known else {})
