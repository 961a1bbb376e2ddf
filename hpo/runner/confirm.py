"""After the search: its best configurations are trained again with fresh seeds, and the best mean is chosen.

A search picks the luckiest of many noisy numbers. What is printed of the chosen one is a mean over seeds that the
search never saw, on splits that are its own, or drawn again (`resplit`, `folds`). Each result is stored as it comes, so
that none is trained twice.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

from hpo.errors import HpoError, Interrupted
from hpo.log import log
from hpo.runner.again import train_members
from hpo.runner.custom import train_outside
from hpo.runner.prepare import Plan
from hpo.search import schema
from hpo.search.confirmed import Result, chosen, confirmed_in, note_end, note_results, results_in, sentences, top_of
from hpo.search.search import Search
from hpo.search.view import Best, StudyView
from hpo.seeds import derive
from hpo.study.data import Data
from hpo.study.loading import origin
from hpo.study.sealed import sealed, sealing
from hpo.study.spec_parts import Confirm
from hpo.study.splits import fold, resplit
from hpo.study.value import value_of
from hpo.training.batches import Batches, make_batches
from hpo.training.faults import fault_of
from hpo.training.loop import Results
from hpo.training.stack import Member, Stack


def confirm(plan: Plan, data: Data, search: Search, seen: StudyView, stopping: Callable[[], bool]) -> Best:
    """Train the best configurations of the search again, as far as that is not done, and return the chosen one.

    Its `epoch` is the median of its runs' best epochs. Raises HpoError where none of them could be trained again,
    Interrupted.
    """
    how, data = plan.spec.confirm, sealed(data)
    assert how is not None
    top = top_of(search, seen, how)
    stored = search.attrs.get(schema.CONFIRMED)
    left = {(key, run) for key in top for run in range(how.runs)}
    left -= {(key, run) for key in top for run in results_in(stored, key)}
    if left:
        n = len(top) * how.runs
        log.info(f"confirming: the {len(top)} best configurations are trained with {how.seeds} fresh seeds each")
        if len(left) < n:
            log.info(f"  {n - len(left)} of {n} trainings were done before")
    prepared = None
    for run in sorted({run for _, run in left}):
        part = _split(data, how, plan.spec.seed, run)
        with sealing(plan.given), _resumable():
            if prepared is None or prepared.data is not part:
                prepared = None  # so that there is one at a time
                prepared = _Prepared.of(plan, part)
            wanted = [key for key in top if (key, run) in left]
            _Run(plan, search, top, run, wanted, prepared, stopping).train()
        log.info(f"  run {run + 1} of {how.runs} done: {len(wanted)} trainings")
    note_end(search, top, how, _overlap(data, how))
    found = confirmed_in(search.attrs.get(schema.CONFIRMED), maximize=search.maximize)
    best = chosen(search, seen)
    if found is None or best is None:
        faults = [result.fault for key in top for result in results_in(search.attrs[schema.CONFIRMED], key).values()]
        raise HpoError(f"none of the {len(top)} best configurations could be trained again: {faults[0]}")
    log.info(sentences(found, plan.metric)[0])
    return best


@contextmanager
def _resumable() -> Iterator[None]:
    """Say of an interruption how the confirmation resumes."""
    try:
        yield
    except Interrupted:
        raise Interrupted(
            "interrupted; each seed that was done is stored, run the same command again to resume"
        ) from None


def _split(data: Data, how: Confirm, seed: int, run: int) -> Data:
    """Return the data of a run: on the study's own split, or another one, which all configurations have."""
    k = run // (how.folds or 1)
    if how.folds is not None:
        return fold(data, how.folds, run % how.folds, derive(seed, "confirm split", k))
    return resplit(data, derive(seed, "confirm split", k)) if how.resplit else data


def _overlap(data: Data, how: Confirm) -> float:
    if how.folds is not None:
        return 1 / (how.folds - 1)
    return len(data.valid) / len(data.train) if how.resplit else 0.0


@dataclass(frozen=True)
class _Prepared:
    """A split as networks take it, with `preprocess` fitted on its train rows; None: an objective trains itself."""

    data: Data
    preprocess: nn.Module
    batches: tuple[Batches, Batches] | None

    @classmethod
    def of(cls, plan: Plan, data: Data) -> "_Prepared":
        preprocess = plan.objective.preprocess(data.train)
        if plan.objective.train is not None:
            return cls(data, preprocess, None)
        train, valid = (make_batches(x, preprocess, plan.device, plan.spec.loading) for x in (data.train, data.valid))
        return cls(data, preprocess, (train, valid))


@dataclass(frozen=True)
class _Run:
    """One run of each configuration that is still `wanted`: they share its seed, its split and its order of rows."""

    plan: Plan
    search: Search
    top: Mapping[str, Best]
    run: int
    wanted: Sequence[str]
    prepared: _Prepared
    stopping: Callable[[], bool]

    def train(self) -> None:
        """Train all of them, in stacks where the objective does not train itself, and store what each comes to."""
        plan, data, batches = self.plan, self.prepared.data, self.prepared.batches
        if batches is None:
            for key in self.wanted:
                self._note({key: self._by_itself(key)})
            return
        of: dict[Member, str] = {}
        noted: set[str] = set()

        def left() -> list[Member]:
            of.clear()
            of.update({self._member(key): key for key in self.wanted if key not in noted})
            return list(of)

        def report(stack: Stack, results: Results) -> list[Member]:
            ended = {member: end for member in results if (end := result_of(plan, member)) is not None}
            self._note({of[member]: end for member, end in ended.items()})
            noted.update(of[member] for member in ended)
            return [member for member in results if member not in ended]

        train_members(
            plan,
            self.search,
            plan.task(data.info, len(data.train)),
            batches,
            left,
            report,
            epochs=plan.spec.epochs,
            seed=derive(plan.spec.seed, "confirm order", self.run),
            stopping=self.stopping,
        )

    def _member(self, key: str) -> Member:
        best = self.top[key]
        return Member(number=best.number, seed=derive(self.plan.spec.seed, "confirm", self.run), params=best.params)

    def _note(self, results: Mapping[str, Result]) -> None:
        for key, result in results.items():
            note_results(self.search, key, self.top[key], {self.run: result})

    def _by_itself(self, key: str) -> Result:
        """Have the objective's own `train` train one of them."""
        plan, member = self.plan, self._member(key)

        def enough(reports: Sequence[Mapping[str, float]]) -> bool:
            member.epoch = len(reports)
            member.history[:] = [dict(each) for each in reports]
            return result_of(plan, member) is not None

        try:
            train_outside(
                plan,
                member.params,
                member.seed,
                self.prepared.data,
                self.prepared.preprocess,
                epochs=plan.spec.epochs,
                enough=enough,
                stopping=self.stopping,
            )
        except Exception as error:
            fault = fault_of(error, plan.spec.catch, origin(error))
            if fault is None:
                raise
            return Result(fault=fault.text)
        ended = result_of(plan, member, over=True)
        return ended if ended is not None else Result(fault="train returned without having called report")


def result_of(plan: Plan, member: Member, over: bool = False) -> Result | None:
    """Return what a member's training came to by the study's `value`, `patience` and `epochs`; None: it is not over.

    With `over` it is, whatever these say. A metric that is no number is a fault, as it is in the search.
    """
    spec, history = plan.spec, member.history
    if member.fault is not None:
        return Result(fault=member.fault, epoch=max(0, len(history) - 1))
    if not history:
        return None
    if (fault := plan.fault_in(history[-1], len(history))) is not None:
        return Result(fault=fault, epoch=len(history) - 1)
    curve = [metrics[plan.metric_key] for metrics in history]
    peak = curve.index(max(curve) if plan.maximize else min(curve))
    waited = spec.patience is not None and len(curve) - 1 - peak >= spec.patience
    if not (over or waited or len(curve) >= spec.epochs):
        return None
    value, epoch = value_of(curve, spec.value, maximize=plan.maximize)
    return Result(value=value, epoch=epoch)
