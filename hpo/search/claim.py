"""A claimed trial: what its worker is told of it, and Optuna's object of it."""

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from optuna import Study, TrialPruned
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import Trial

from hpo.errors import InputError
from hpo.log import log
from hpo.search import schema
from hpo.search.clock import Clock
from hpo.search.front import alone


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A trial that is ours to train. `number` is Optuna's; `seed` is the one its weights are drawn from."""

    number: int
    seed: int
    params: Mapping[str, Any]
    attempt: int
    slot: int
    """Its slot of the budget, which its successors inherit."""
    lineage: int
    """The number of the first trial that had its params and seed: a retry's checkpoint is of its own lineage only."""
    retry_of: int | None
    """The number of the trial that it succeeds, which was interrupted or whose worker died; None: of none."""
    is_resumed: bool = False
    """Whether it was paused."""
    n_reported: int = 0
    """How many epochs it has reported before."""
    n_restarts: int = 0
    """How often it was resumed from scratch."""
    paused_at: int = 0
    """After how many epochs it, or the one that it succeeds, was paused last; 0: never."""
    seconds: float = 0.0
    """For how long it was trained before it was paused."""

    @property
    def is_retry(self) -> bool:
        return self.retry_of is not None


class TakenOver(Exception):
    """A peer has ended this trial: its lease had expired. Stop training it."""


class ClaimedTrial(Trial):
    """Optuna's trial, which passes on what a plain Optuna objective reports."""

    on_report: Callable[[int, float], None] = staticmethod(lambda step, value: None)
    SET_SECONDS = 60.0
    """By how much date and monotonic clock differ where the date was set; less is the daily work of NTP."""

    def __init__(self, study: Study, trial_id: int, clock: Clock) -> None:
        super().__init__(study, trial_id)
        self._clock, self._since = clock, (clock.now(), clock.monotonic())

    def _seconds(self) -> float | None:
        """Return for how long it was trained where the date was set since it was claimed; None: the date says it."""
        dated, seconds = self._clock.now() - self._since[0], self._clock.monotonic() - self._since[1]
        return seconds if abs(dated - seconds) > self.SET_SECONDS else None

    def span(self) -> list[float]:
        """Return from when until when it was trained since it was claimed, in seconds since 1970."""
        claimed, seconds = self._cached_frozen_trial.datetime_start, self._seconds()
        assert claimed is not None
        start = claimed.timestamp()
        return [start, self._clock.now() if seconds is None else start + seconds]

    def note_seconds(self) -> None:
        """Have it known for how long it was trained, before it ends, where its dates say something else."""
        if (seconds := self._seconds()) is not None:
            with suppress(UpdateFinishedTrialError):
                self.set_user_attr(schema.SECONDS, round(seconds, 3))

    def annotate(self, key: str, value: Any) -> None:
        """Set an attribute of the trial, a key of `hpo.search.schema`: Optuna's own of constraints, or a user's."""
        if key.startswith(schema.CONSTRAINT):
            self.storage.set_trial_system_attr(self._trial_id, key, value)
        else:
            self.set_user_attr(key, value)

    def report(self, value: float, step: int) -> None:
        with self._of_leading_metric():
            super().report(value, step)
        self.on_report(step, float(value))

    def should_prune(self) -> bool:
        with self._of_leading_metric():
            return super().should_prune()

    @contextmanager
    def _of_leading_metric(self) -> Iterator[None]:
        """Within this, the study has one metric, which is reported and pruned on: Optuna refuses both of several."""
        study = self.study
        self.study = alone(study)
        try:
            yield
        finally:
            self.study = study

    def run(
        self,
        function: Callable[[Trial], Any],
        names: Sequence[str],
        on_report: Callable[[int, float], None],
        objective: str,
    ) -> tuple[Mapping[str, Any], Mapping[str, float] | None]:
        """Return the params that `function`, a plain Optuna objective, asked for, and its values; None: it pruned.

        `names` are those of its values; `on_report` is called with each step and value that it reports; `objective` is
        the function's name. Raises InputError where it returns no number for each or ends the study, TakenOver where a
        peer has ended the trial meanwhile.
        """
        self.on_report = on_report
        try:
            value = function(self)
        except TrialPruned:
            return self.params, None
        except Exception as error:
            if _says_finished(error):
                raise TakenOver from error
            if isinstance(error, RuntimeError) and "`Study.stop`" in str(error):
                raise InputError(
                    f"objective {objective}: calls study.stop(), which is Optuna's for its own loop; write in the "
                    "study file when the search is to end: `stop: {no_gain: 20}`, `timeout` or `trials`"
                ) from error
            raise
        self._see_fixed()
        try:
            return self.params, _numbers(value, names)
        except (TypeError, ValueError, OverflowError):
            what = "one number, a trial's value" if len(names) == 1 else f"{len(names)} numbers, {', '.join(names)}"
            if len(names) == 1 and isinstance(value, list | tuple) and len(value) > 1:
                what += " (of several metrics: name them in the study file, `metric: [a, b]`)"
            raise InputError(f"objective {objective}: must return {what}, but returned {value!r:.100}") from None

    def _see_fixed(self) -> None:
        """Say so where `start_with` has what the function does not ask for, or asks for within other bounds."""
        for name, value in self._cached_frozen_trial.system_attrs.get(schema.FIXED_PARAMS, {}).items():
            what = f"start_with: trial {self.number} has {name} = {value!r}"
            if name not in self.params:
                log.warning(f"{what}, which the function does not ask for: it is without effect")
            elif not _has(self.distributions[name], value):
                log.warning(
                    f"{what}, but the function asks for {self.distributions[name]}: the trial counts as any other; "
                    "correct the entry or the function"
                )


def _has(asked: BaseDistribution, value: Any) -> bool:
    """Whether a value is one of those that were asked for."""
    if isinstance(asked, CategoricalDistribution):
        return value in asked.choices
    assert isinstance(asked, FloatDistribution | IntDistribution)
    return bool(asked.low <= value <= asked.high)


def _numbers(value: Any, names: Sequence[str]) -> dict[str, float]:
    """Return what a function has returned, a number for each of `names`. Raises TypeError and the like: it has not."""
    if len(names) > 1 and isinstance(value, str | bytes | Set | Mapping):  # which number is which is not clear
        raise TypeError
    values = [value] if len(names) == 1 else list(value)
    return {name: float(each) for name, each in zip(names, values, strict=True)}


def _says_finished(error: BaseException | None) -> bool:
    """Whether an error, or what it was raised from, is that the trial was ended already."""
    return error is not None and (
        isinstance(error, UpdateFinishedTrialError) or _says_finished(error.__cause__ or error.__context__)
    )
