"""Whether what a study file asks for can be had of its objective: halving, constraints, a metric, how it ends."""

from collections.abc import Mapping
from contextlib import suppress

from hpo.errors import Fault, Faulty, did_you_mean
from hpo.light import Metric
from hpo.search.samplers import CANNOT_HALVE
from hpo.study import loading as objectives
from hpo.study.constraints import OF_ANY_TRIAL
from hpo.study.objective import Function, Objective, resumes
from hpo.study.space import Space
from hpo.study.spec import StudySpec


def faults_with(spec: StudySpec, objective: Objective | Function) -> list[Fault]:
    """Return what the study file asks for, and its objective cannot give, whatever is searched."""
    return [*_halving_faults(spec, objective), *_end_faults(spec, objective), *_constraint_faults(spec, objective)]


def _halving_faults(spec: StudySpec, objective: Objective | Function) -> list[Fault]:
    """Return why `pruner: halving` cannot pause this study's trials, if so."""
    if spec.pruner.name != "halving":
        return []
    instead = "choose another pruner, such as median"
    why = None
    if isinstance(objective, Function):
        why = f"a function's trials cannot be paused: {instead}, which it asks itself by trial.should_prune()"
    elif objective.train is not None and not resumes(objective.train):
        why = f"the objective's own train cannot resume a paused trial: give it a parameter `resume`, or {instead}"
    elif spec.sampler.name in CANNOT_HALVE:
        why = f"{spec.sampler.name} learns from trials in the order in which they end: choose another sampler, as tpe"
    return [] if why is None else [Fault(path=("pruner",), message=f"halving pauses trials, and {why}")]


def _constraint_faults(spec: StudySpec, objective: Objective | Function) -> list[Fault]:
    """Return the constraints that nothing could be held to."""
    if isinstance(objective, Function):
        why = "a function sets its own: trial.set_constraint(name, value), where 0 or less holds; remove `constraints`"
        return [Fault(path=("constraints",), message=why)] if spec.constraints else []
    faults: list[Fault] = []
    own: list[str] = []
    with suppress(Faulty):  # said once, of `metric`
        own = [*_metrics(objective), "loss"]
    for name in spec.constraints if own else ():
        at = ("constraints", name)
        if name in own and name in OF_ANY_TRIAL:
            why = "the objective has a metric of that name, so it is not clear which is meant; rename the metric"
            faults.append(Fault(path=at, message=why))
        elif name not in (*own, *OF_ANY_TRIAL):
            why = f"there is nothing of that name to constrain{did_you_mean(name, [*own, *OF_ANY_TRIAL])}"
            faults.append(Fault(path=at, message=why))
    return faults


def _end_faults(spec: StudySpec, objective: Objective | Function) -> list[Fault]:
    """Return why a study cannot end as it is to: confirmed, with several seeds."""
    if spec.refit_seeds > 1 and spec.ensemble > 1:
        why = f"the test metrics of an ensemble's {spec.ensemble} networks are given as those of refit_seeds; drop one"
        return [Fault(path=("refit_seeds",), message=why)]
    if spec.confirm is None:
        return []
    if isinstance(objective, Function):
        why = "a function's seeds are its own, so it cannot be trained with fresh ones; remove `confirm`"
        return [Fault(path=("confirm",), message=why)]
    if "top" in spec.confirm.model_fields_set and spec.confirm.top > spec.trials:
        why = f"must be at most {spec.trials}, the number of trials, but got {spec.confirm.top}"
        return [Fault(path=("confirm", "top"), message=why)]
    return []


def stop_faults(spec: StudySpec, space: Space, objective: Objective | Function) -> list[Fault]:
    """Return why Optuna's terminator cannot be asked, if so: its model is of params that every trial has."""
    name = None if spec.stop is None else spec.stop.terminator
    if name in (None, "best_value_stagnation") or isinstance(objective, Function):
        return []
    if any(not dimension.searched.when for dimension in space.dimensions):
        return []
    why = "needs a param that is searched in every trial, and the space has none; choose best_value_stagnation"
    return [Fault(path=("stop", "terminator"), message=f"{name} {why}")]


def metric_of(objective: Objective, spec: StudySpec) -> tuple[str, bool]:
    """Return the study's metric and whether more of it is better. Raises Faulty."""
    metrics = _metrics(objective)
    known = [*metrics, "loss"]
    name = known[0] if spec.metric is None else spec.metric
    if name not in known:
        raise Faulty(("metric",), f"the objective has no metric {name!r}{did_you_mean(name, known)}")
    better = False if name == "loss" else metrics[name].higher_is_better
    if better is None and spec.direction is None:
        raise Faulty(
            ("metric",),
            f"{name} does not say in which direction it is better (higher_is_better); write a `direction`, or choose "
            f"one of {', '.join(known)}",
        )
    maximize = spec.direction == "maximize" if better is None else bool(better)
    if spec.direction not in (None, "maximize" if maximize else "minimize"):
        raise Faulty(("direction",), f"of {name} {'more' if maximize else 'less'} is better; remove `direction`")
    return name, maximize


def _metrics(objective: Objective) -> Mapping[str, Metric]:
    """Return the objective's metrics. Raises Faulty unless they are TorchMetrics objects by name."""
    at = ("objective",)
    try:
        metrics = objective.metrics()
    except Exception as error:  # the user's own code
        raise Faulty(at, f"metrics failed: {objectives.origin(error)}") from error
    if not isinstance(metrics, Mapping):
        rule = "metrics must return a mapping of names to TorchMetrics objects"
        came = "None" if metrics is None else f"a {type(metrics).__name__}"
        raise Faulty(at, f"{rule}, but returned {came}")
    if "loss" in metrics:
        raise Faulty(at, "metrics must not name one of them loss, which is the engine's own; give it another name")
    if wrong := [name for name, metric in metrics.items() if not isinstance(metric, Metric)]:
        came = f"{metrics[wrong[0]]!r:.100}"
        raise Faulty(at, f"the objective's metrics must be TorchMetrics objects, but {wrong[0]} is {came}")
    return metrics
