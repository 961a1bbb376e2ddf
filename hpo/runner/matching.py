"""Whether what a study file asks for can be had of its objective: halving, constraints, a metric, how it ends."""

from collections.abc import Iterable, Mapping
from contextlib import suppress

from hpo.errors import Fault, Faulty, did_you_mean
from hpo.light import Metric
from hpo.search.samplers import CANNOT_HALVE, ONE_METRIC
from hpo.study import loading as objectives
from hpo.study.constraints import OF_ANY_TRIAL
from hpo.study.goals import direction_of
from hpo.study.objective import Function, Objective, resumes
from hpo.study.space import Space
from hpo.study.spec import StudySpec

_TWICE = "the objective has a metric of that name, so it is not clear which is meant; rename the metric"


def faults_with(spec: StudySpec, objective: Objective | Function) -> list[Fault]:
    """Return what the study file asks for, and its objective cannot give, whatever is searched."""
    faults = [*_halving_faults(spec, objective), *_end_faults(spec, objective), *_constraint_faults(spec, objective)]
    if spec.precision == "bf16" and (isinstance(objective, Function) or objective.train is not None):
        why = "is of hpo's own loop, and this objective trains by itself: have it choose (Lightning: `trainer`)"
        faults.append(Fault(path=("precision",), message=why))
    return [*faults, *_several_faults(spec)]


def _halving_faults(spec: StudySpec, objective: Objective | Function) -> list[Fault]:
    """Return why `pruner: halving` cannot pause this study's trials, if so."""
    if spec.pruner.name != "halving":
        return []
    instead = "choose another pruner, such as median"
    why = None
    if isinstance(objective, Function):
        why = f"a function's trials cannot be paused: {instead}, which it asks itself by trial.should_prune()"
    elif objective.train is not None and not resumes(objective.train):
        from hpo.study.lightning import LightningObjective

        if isinstance(objective, LightningObjective):
            why = f"Lightning's Trainer, which trains this one, does not resume them: {instead}"
        else:
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
            faults.append(Fault(path=at, message=_TWICE))
        elif name not in (*own, *OF_ANY_TRIAL):
            why = f"there is nothing of that name to constrain{did_you_mean(name, [*own, *OF_ANY_TRIAL])}"
            faults.append(Fault(path=at, message=why))
    return faults


def _end_faults(spec: StudySpec, objective: Objective | Function) -> list[Fault]:
    """Return why a study cannot end as it is to: confirmed, with several seeds."""
    if spec.refit_seeds > 1 and spec.ensemble > 1:
        why = f"the test metrics of an ensemble's {spec.ensemble} networks are given as those of refit_seeds; drop one"
        return [Fault(path=("refit_seeds",), message=why)]
    if spec.ensemble > 1 and (limited := of_one_network(spec.constraints)):
        why = f"{limited[0]} is held to of a trial's one network, and {spec.ensemble} are exported as one; drop one"
        return [Fault(path=("ensemble",), message=why)]
    if spec.confirm is None:
        return []
    if isinstance(objective, Function):
        why = "a function's seeds are its own, so it cannot be trained with fresh ones; remove `confirm`"
        return [Fault(path=("confirm",), message=why)]
    if "top" in spec.confirm.model_fields_set and spec.confirm.top > spec.trials:
        why = f"must be at most {spec.trials}, the number of trials, but got {spec.confirm.top}"
        return [Fault(path=("confirm", "top"), message=why)]
    return []


def of_one_network(names: Iterable[str]) -> list[str]:
    """Return which of a study's constraints or metrics are a size or a time that an ensemble has several times."""
    return [name for name in names if name in OF_ANY_TRIAL]


def stop_faults(spec: StudySpec, space: Space, objective: Objective | Function) -> list[Fault]:
    """Return why Optuna's terminator cannot be asked, if so: its model is of params that every trial has."""
    name = None if spec.stop is None else spec.stop.terminator
    if name in (None, "best_value_stagnation") or isinstance(objective, Function):
        return []
    if any(not dimension.searched.when for dimension in space.dimensions):
        return []
    why = "needs a param that is searched in every trial, and the space has none; choose best_value_stagnation"
    return [Fault(path=("stop", "terminator"), message=f"{name} {why}")]


def goals_of(objective: Objective | Function, spec: StudySpec) -> dict[str, bool]:
    """Return the study's metrics, each with whether more of it is better; the one that leads is the first.

    Raises Faulty.
    """
    if isinstance(objective, Function):
        named = spec.metric or "value"
        known, each_epoch = dict.fromkeys((named,) if isinstance(named, str) else named), None
        wanted = list(known)
    else:
        metrics = _metrics(objective)
        each_epoch = [*metrics, "loss"]
        wanted = [each_epoch[0]] if spec.metric is None else _names(spec)
        known = {name: metric.higher_is_better for name, metric in metrics.items()} | {"loss": False}
        if len(wanted) > 1:
            known = dict.fromkeys(OF_ANY_TRIAL, False) | known
        for name in wanted:
            if len(wanted) > 1 and name in metrics and name in OF_ANY_TRIAL:
                raise Faulty(("metric",), f"{name}: {_TWICE}")
            if name not in known:
                raise Faulty(("metric",), _unknown(name, list(known)))
    directions = _directions(spec, wanted)
    goals = {name: _maximizes(name, known, directions[name], each_epoch is None) for name in wanted}
    leading = _leading(spec, wanted, each_epoch)
    return {leading: goals.pop(leading), **goals}


def _names(spec: StudySpec) -> list[str]:
    return [spec.metric] if isinstance(spec.metric, str) else list(spec.metric or ())


def _unknown(name: str, known: list[str]) -> str:
    why = f"the objective has no metric {name!r}{did_you_mean(name, known)}"
    if name in OF_ANY_TRIAL:
        why = f"{name} alone says nothing of what was learned: name a metric beside it, such as [{known[0]}, {name}]"
    return why


def _directions(spec: StudySpec, wanted: list[str]) -> dict[str, str | None]:
    """Return the `direction` of each metric, as far as the study file names one. Raises Faulty."""
    if spec.direction is None or (isinstance(spec.direction, str) and len(wanted) == 1):
        return dict.fromkeys(wanted, spec.direction)
    given = [spec.direction] if isinstance(spec.direction, str) else list(spec.direction)
    if len(given) != len(wanted):
        rule = f"must be a list with one for each of {', '.join(wanted)}" if len(wanted) > 1 else "must be one"
        raise Faulty(("direction",), f"{rule}, but got {', '.join(given)}")
    return dict(zip(wanted, given, strict=True))


def _maximizes(name: str, known: Mapping[str, bool | None], direction: str | None, is_function: bool) -> bool:
    """Return whether more of a metric is better. Raises Faulty."""
    better = known[name]
    if is_function:
        return direction == "maximize"
    if better is None and direction is None:
        raise Faulty(
            ("metric",),
            f"{name} does not say in which direction it is better (higher_is_better); write a `direction`, or choose "
            f"one of {', '.join(other for other in known if other not in OF_ANY_TRIAL)}",
        )
    maximize = direction == "maximize" if better is None else bool(better)
    if direction not in (None, direction_of(maximize)):
        raise Faulty(("direction",), f"of {name} {'more' if maximize else 'less'} is better; remove `direction`")
    return maximize


def _leading(spec: StudySpec, wanted: list[str], each_epoch: list[str] | None) -> str:
    """Return the metric that leads. Raises Faulty.

    `each_epoch` are those that are measured each epoch; None: they are a function's, which may report any.
    """
    if spec.prune_on is not None and len(wanted) == 1:
        raise Faulty(("prune_on",), f"is for studies of several metrics: trials are pruned on {wanted[0]}; remove it")
    if spec.prune_on is not None and spec.prune_on not in wanted:
        raise Faulty(("prune_on",), f"must be one of `metric`, {', '.join(wanted)}, but got {spec.prune_on!r}")
    if spec.prune_on is not None and each_epoch is not None and spec.prune_on not in each_epoch:
        raise Faulty(("prune_on",), f"must be measured each epoch, but {spec.prune_on} is known once: of a network")
    leading = [name for name in wanted if each_epoch is None or name in each_epoch]
    if not leading:
        rule = f"one must be measured each epoch, {' or '.join(each_epoch or [])}, to choose the best epoch by"
        raise Faulty(("metric",), f"{rule}, but got {', '.join(wanted)}")
    return spec.prune_on or leading[0]


def _several_faults(spec: StudySpec) -> list[Fault]:
    """Return what a study of several metrics cannot have."""
    if not isinstance(spec.metric, tuple):
        return []
    faults = []
    if spec.sampler.name in ONE_METRIC:
        why = f"{spec.sampler.name} searches for one metric: choose another sampler for several, such as tpe or nsgaii"
        faults.append(Fault(path=("sampler",), message=why))
    if spec.prune_on is None and "pruner" in spec.model_fields_set and spec.pruner.name != "none":
        why = f"{spec.pruner.name} ends trials by one metric, and the study has several: name it, such as"
        faults.append(Fault(path=("pruner",), message=f"{why} `prune_on: {spec.metric[0]}`, or leave the pruner out"))
    if spec.stop is not None and spec.stop.terminator is not None:
        why = "Optuna's terminators know one metric; choose `no_gain` (trials that add nothing to the Pareto front)"
        faults.append(Fault(path=("stop", "terminator"), message=why))
    return faults


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
