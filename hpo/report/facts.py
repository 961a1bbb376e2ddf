"""All that a report says of a study, as plain data: one read of its trials and attributes, no objective, no torch.

Who can write the storage can write anything there: what has not the shape that hpo gives it is left out, and every text
is masked here, once.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from hpo.errors import masked
from hpo.export.environment import versions
from hpo.export.files import finite
from hpo.report.rows import best_of, columns_of, fixed_in, forget_masked, params_of, plain, ranked, row_of, state_of
from hpo.report.searched import distributions, importances
from hpo.search import schema
from hpo.search.budget import Counts, count, covered, held_until, holders, leases_in, seconds_used, spans_of, worker_of
from hpo.search.codes import codes_text
from hpo.search.confirmed import confirmed_in, sentences
from hpo.search.constraints import constraints_of, feasible_text, is_feasible
from hpo.search.curves import curves_in, reported, steps_in, where
from hpo.search.effort import effort
from hpo.search.front import directions_by_name, front_of, leading, maximizes, others_in
from hpo.search.stop import budget as budget_of
from hpo.search.stop import stopped_in
from hpo.search.view import Best

_FINGERPRINTS = (("data", schema.DATA), ("code", schema.CODE))


@dataclass(frozen=True, kw_only=True)
class Span:
    """A stretch of one trial's training, in seconds since 1970; `kind` is how it ended."""

    number: int
    worker: str
    start: float
    end: float
    kind: str
    """PAUSED, INTERRUPTED (a retry followed), or the trial's own state."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """A trial in the figures: its `value`, or what it last reported; None where there is no finite number."""

    number: int
    state: str
    value: float | None
    params: Mapping[str, Any]
    feasible: bool | None = None
    """Whether it holds to the study's constraints; None: there is none, or it is not known."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """Who trained when, and how much."""

    spans: Sequence[Span]
    """Of all trials, retried ones too, in the order of their starts."""
    effort: Mapping[str, int]
    effort_text: str
    seconds_used: float
    """For how long at least one trial was in training."""
    seconds_summed: float
    """The seconds of all trials, which count several times where a stack or several workers trained at once."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What a study was run from and with."""

    study_file: Mapping[str, Any]
    output: str
    """The study's folder, as its last run had it."""
    fixed: Mapping[str, Any]
    stacks: Sequence[str]
    stack_choice: str
    """Why `stack: auto` has chosen how many trials to train at once; empty where it has not."""
    fingerprints: Mapping[str, str]
    codes: str
    """How many trials are of which code of the objective, in words; empty: all are of one."""
    versions: Mapping[str, str]
    """Of the packages that made this."""
    exported_with: Mapping[str, str]
    """Those that exported the model, and the `git_commit`, as far as its bundle is still there."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is known of a study. Trials are those of the budget, but for those of `work`."""

    name: str
    objective: str
    metric: str
    maximize: bool
    others: Mapping[str, str]
    """The metrics beside the one that leads, each with its direction; empty: there is one metric."""
    front: Sequence[int]
    """The numbers of the trials on the Pareto front, those first that lead."""
    made: str
    """When this was read: ISO 8601, UTC."""
    counts: Counts
    stopped: str
    """Why the search ended before its budget was spent, in words; empty: it did not."""
    rows: Sequence[Mapping[str, Any]]
    columns: Sequence[str]
    ranking: Sequence[int]
    """The numbers of the complete trials that break no constraint, the best first."""
    constraints: str
    """How many complete trials hold to the study's constraints, in words; empty: it has none."""
    best: Best | None
    best_when: str
    """In which epoch it had its value, or over which epochs; empty: there is none."""
    best_seconds: float | None
    points: Sequence[Point]
    curves: Mapping[str, Mapping[int, Sequence[float]]]
    """By metric: each trial's numbers, one an epoch (of a function: one a step)."""
    steps: Mapping[int, Sequence[int]]
    """The steps of those trials of a function that has counted its own."""
    main_curve: str
    """The name of the study's own metric among the curves."""
    distributions: Mapping[str, Mapping[str, Any]]
    """Of each searched param: `low`, `high` and `log` of its range, or `choices`, and `otherwise` of an `or`."""
    importances: Mapping[str, float]
    """By param, the highest first; they sum to 1. Empty where nothing can be said."""
    work: Work
    result: Mapping[str, Any]
    """Of the refit: `test` metrics by name, `bundle`, `number`, `parity`; empty: there was none."""
    confirmed: Mapping[str, Any]
    """What fresh seeds have shown (`Confirmed.as_dict`), its `params`, and `said`, in sentences; empty: nothing."""
    n_test_evaluations: int
    origin: Origin

    @property
    def direction(self) -> str:
        return "maximize" if self.maximize else "minimize"

    def sign(self, value: float) -> float:
        """Return `value` such that less is better."""
        return -value if self.maximize else value

    def ranked(self) -> list[Mapping[str, Any]]:
        """Return the rows of the complete trials that break no constraint, the best first."""
        rows = {row["number"]: row for row in self.rows}
        return [rows[number] for number in self.ranking]

    def as_data(self) -> dict[str, Any]:
        """Return everything as JSON has it."""
        whole: dict[str, Any] = finite(plain(asdict(self) | {"direction": self.direction}))
        return whole


def read(
    study: optuna.Study,
    trials: Sequence[FrozenTrial],
    leases: Mapping[str, float],
    *,
    budget: int,
    epochs: int | None = None,
) -> Facts:
    """Return the facts of a study; `trials` are all it has, but for adopted ones.

    `leases` are those of its workers (`hpo.search.budget.leases_in`). A trial has `epochs` epochs without pruning;
    None: as many as any has reported.
    """
    forget_masked()  # there may be more to mask by now
    identity = _mapping((attrs := study.user_attrs).get(schema.IDENTITY))
    metric, others = str(identity.get("metric", "value")), others_in(identity)
    main = f"valid_{metric}" if identity.get("params") else metric
    maximize, counted = maximizes(study), holders(trials)
    rows = [plain(row_of(trial, others)) for trial in counted]
    best = _best(counted, fixed_in(identity), others, maximize=maximize)
    result, stopped = plain(_mapping(attrs.get(schema.RESULT))), stopped_in(attrs.get(schema.STOPPED))
    return Facts(
        name=masked(study.study_name),
        objective=masked(str(identity.get("objective", ""))),
        metric=masked(metric),
        maximize=maximize,
        others=directions_by_name(others),
        front=[trial.number for trial in front_of(counted, [maximize, *others.values()])],
        made=datetime.now(UTC).isoformat(timespec="seconds"),
        counts=count(counted, budget_of(budget, counted, stopped)),
        stopped="" if stopped is None else stopped.text(),
        rows=rows,
        columns=[masked(name) for name in columns_of(rows)],
        ranking=[trial.number for trial in ranked(counted, maximize=maximize, others=others)],
        constraints=masked(feasible_text(counted, constraints_of(attrs))),
        best=best,
        best_when="" if best is None else where(str(identity.get("value", "best")), best.epoch),
        best_seconds=next((row["seconds"] for row in rows if best and row["number"] == best.number), None),
        points=[_point(trial) for trial in counted],
        curves=_curves(counted, main),
        steps={trial.number: steps for trial in counted if (steps := steps_in(trial)) is not None},
        main_curve=masked(main),
        distributions=distributions(counted),
        importances=importances(counted, maximize=maximize),
        work=_work(trials, counted, leases, epochs),
        result=result,
        confirmed=_confirmed(attrs.get(schema.CONFIRMED), metric, counted, fixed_in(identity), maximize=maximize),
        n_test_evaluations=len(_list(attrs.get(schema.TEST_EVALUATIONS))),
        origin=_origin(attrs, identity, result, counted),
    )


def _best(
    trials: Sequence[FrozenTrial], fixed: Mapping[str, Any], others: Mapping[str, bool], *, maximize: bool
) -> Best | None:
    best = best_of(trials, fixed, maximize=maximize, others=others)
    return best and replace(best, params=plain(best.params), metrics=plain(best.metrics))


def _work(
    trials: Sequence[FrozenTrial], counted: Sequence[FrozenTrial], leases: Mapping[str, float], epochs: int | None
) -> Work:
    most = max((len(trial.intermediate_values) for trial in counted), default=0)
    done = effort(counted, most if epochs is None else epochs)
    spans = _spans(trials, {trial.number for trial in counted}, leases)
    by_trial: dict[int, list[tuple[float, float]]] = {}
    for span in spans:
        by_trial.setdefault(span.number, []).append((span.start, span.end))
    return Work(
        spans=spans,
        effort=done.as_dict(),
        effort_text=done.text(),
        seconds_used=seconds_used(trials, leases),
        seconds_summed=sum(covered(each) for each in by_trial.values()),
    )


def _origin(
    attrs: Mapping[str, Any], identity: Mapping[str, Any], result: Mapping[str, Any], counted: Sequence[FrozenTrial]
) -> Origin:
    file = _study_file(attrs.get(schema.STUDY_FILE))
    return Origin(
        study_file=file,
        output=str(file.get("output", "mlruns")),
        fixed=plain(fixed_in(identity)),
        stacks=[masked(str(each)) for each in _list(attrs.get(schema.STACK_PATHS))],
        stack_choice=_stack_choice(attrs.get(schema.STACK)),
        codes=codes_text(attrs, counted),
        fingerprints={what: masked(str(attrs[key])) for what, key in _FINGERPRINTS if key in attrs},
        versions={name: versions()[name] or "unknown" for name in ("python", "hpo", "optuna")},
        exported_with=_exported_with(result),
    )


def _confirmed(
    stored: Any, metric: str, trials: Sequence[FrozenTrial], fixed: Mapping[str, Any], *, maximize: bool
) -> Mapping[str, Any]:
    found = confirmed_in(stored, maximize=maximize)
    of = None if found is None else [trial for trial in trials if trial.number == found.winner.number]
    winner = best_of(of, fixed, maximize=maximize) if of else None
    if found is None or winner is None:
        return {}
    said: dict[str, Any] = found.as_dict() | {"params": dict(winner.params), "said": sentences(found, metric)}
    return _mapping(plain(finite(said)))


def leases_of(storage: Any, name: str) -> dict[str, float]:
    """Return until when each worker's lease of study `name` holds, by its id."""
    return leases_in(storage.get_study_system_attrs(storage.get_study_id_from_name(name)))


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _list(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list) else []


def _exported_with(result: Mapping[str, Any]) -> dict[str, str]:
    try:
        about = _mapping(json.loads((Path(result["bundle"]) / "bundle.json").read_text(encoding="utf-8")))
    except (KeyError, TypeError, OSError, ValueError):
        return {}
    found = {**_mapping(about.get("versions")), "git commit": about.get("git_commit")}
    return {masked(str(name)): masked(str(value)) for name, value in found.items() if value}


def _study_file(stored: Any) -> Mapping[str, Any]:
    try:
        return _mapping(plain(json.loads(stored)))
    except (TypeError, ValueError):
        return {}


def _stack_choice(stored: Any) -> str:
    return masked(str(_mapping(_mapping(stored).get("choice")).get("why", "")))


def _point(trial: FrozenTrial) -> Point:
    last = trial.intermediate_values.get(trial.last_step) if trial.last_step is not None else None
    value = leading(trial) if trial.state == TrialState.COMPLETE else last
    return Point(
        number=trial.number,
        state=state_of(trial),
        value=finite(value),
        params=plain(params_of(trial)),
        feasible=is_feasible(trial),
    )


def _curves(trials: Sequence[FrozenTrial], main: str) -> dict[str, dict[int, list[float]]]:
    """Return the curves of all trials by metric, the study's own first."""
    found: dict[str, dict[int, list[float]]] = {main: {}}
    for trial in trials:
        try:
            curves = curves_in(trial, main)
        except ValueError:  # others wrote something else
            curves = {main: reported(trial)}
        for name, values in curves.items():
            if values:
                found.setdefault(masked(name), {})[trial.number] = values
    return {name: trials for name, trials in found.items() if trials}


def _spans(trials: Sequence[FrozenTrial], counted: set[int], leases: Mapping[str, float]) -> list[Span]:
    """Return when each trial was trained. One whose worker was killed was so until its lease expired."""
    found = []
    for trial in trials:
        until = held_until(trial, {} if trial.state.is_finished() else leases)
        spans = spans_of(trial)
        own = "INTERRUPTED" if trial.number not in counted else trial.state.name
        for i, (start, end) in enumerate(spans):
            last = i == len(spans) - 1 and own != "WAITING"
            found.append(
                Span(
                    number=trial.number,
                    worker=masked(worker_of(trial)),
                    start=start,
                    end=end if until is None else max(start, min(end, until)),
                    kind=own if last else "PAUSED",
                )
            )
    return sorted(found, key=lambda span: span.start)
