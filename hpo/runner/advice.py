"""What can be run, but hardly as it was meant: a loss of logits given probabilities, a rule that never holds."""

import sys
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from hpo.runner.prepare import Plan
from hpo.runner.progress import shown
from hpo.search.starts import starts_in
from hpo.search.stop import budget
from hpo.search.view import StudyView
from hpo.study.data import Split, prediction
from hpo.study.objective import Function, Params, SeenParams
from hpo.study.probabilities import TAKES_LOGITS, LogitsSeen, link_of, takes_probabilities
from hpo.study.spec_parts import TERMINATORS
from hpo.training.faults import exception_at, names_of

_OF_PARAM = {"cross_entropy": "cross_entropy", "bce": "binary_cross_entropy_with_logits"}
_HEAD = {"cross_entropy": "nn.Softmax(dim=-1)", "binary_cross_entropy_with_logits": "nn.Sigmoid()"}
_LAST = {"SoftmaxBackward0": "a softmax", "SigmoidBackward0": "a sigmoid"}
_RESHAPES = (
    "View",
    "Reshape",
    "Squeeze",
    "Unsqueeze",
    "Select",
    "Slice",
    "T",
    "Transpose",
    "Permute",
    "Alias",
    "Clone",
)


def advice(plan: Plan, outputs: Any, batch: Split, params: Params) -> list[str]:
    """Return what to say of a network's `outputs` of `batch`, with their graph, and of the loss that they are given."""
    return _incomparable(plan, outputs, batch, params) + _logits_advice(plan, outputs, batch, params)


def _incomparable(plan: Plan, outputs: Any, batch: Split, params: Params) -> list[str]:
    """Return what to say of a study that compares its trials by their losses, which differ in what they compute."""
    if "loss" not in (plan.metric, *plan.measured):
        return []
    seen = SeenParams(params)
    with torch.no_grad():
        plan.objective.loss(outputs, batch.targets, seen)
    names = [name for name in plan.space.searched(params) if name in seen.read]
    if not names:
        return []
    key = "constraints" if plan.metric != "loss" and "loss" in plan.spec.constraints else "metric"
    several = ", ".join(name for name in plan.objective.metrics() if name != "loss")
    return [
        f"{key}: loss: objective {plan.spec.objective} computes it by {', '.join(names)}, which the study searches: "
        "losses of trials that differ there do not compare, and the smallest may be of the worse network; take another "
        f"metric{f' ({several})' if several else ''}, or fix {', '.join(names)}"
    ]


def _logits_advice(plan: Plan, outputs: Any, batch: Split, params: Params) -> list[str]:
    """Return what to say of logits and probabilities: of a loss of those given these, of a head that lacks."""
    loss = _logits_loss(plan, outputs, batch, params)
    if loss is None:
        return head_advice(plan, outputs) if not link_of(plan.objective, outputs, batch.targets, params) else []
    where, head = f"objective {plan.spec.objective}", _HEAD[loss]
    if last := _last(prediction(outputs)):
        return [
            f"{where}: its network ends in {last}, but its loss, {loss}, takes logits and applies one itself: it "
            f"trains slowly, and not to what was meant; take it out of `build`, and have `head` return {head}"
        ]
    if isinstance(plan.objective.head(), nn.Identity):
        return [
            f"{where}: its loss, {loss}, takes logits, and it has no `head`, so that the exported model gives logits; "
            f"for probabilities have `head` return {head}"
        ]
    return []


def head_advice(plan: Plan, outputs: Any) -> list[str]:
    """Return what to say of a network's `outputs` where nothing shows whether they are logits."""
    assert not isinstance(plan.objective, Function)
    if not isinstance(plan.objective.head(), nn.Identity):
        return []
    names = [name for name, metric in plan.objective.metrics().items() if takes_probabilities(metric)]
    predictions = prediction(outputs)
    if not names or not predictions.is_floating_point() or ((predictions >= 0) & (predictions <= 1)).all():
        return []
    return [
        f"objective {plan.spec.objective}: its network gives numbers beyond 0 and 1, and it has no `head`; "
        f"TorchMetrics ({', '.join(names)}) takes them for logits, but for probabilities wherever all happen to "
        "lie between 0 and 1; have `head` return nn.Sigmoid() (two classes, labels) or nn.Softmax(dim=1)"
    ]


def file_advice(plan: Plan) -> list[str]:
    """Return what to say of what the study file asks for in vain."""
    return _unasked(plan) + _never(plan) + _unknown(plan)


def _unknown(plan: Plan) -> list[str]:
    """Return what to say of names in `catch` that no exception has; one that is imported later is not known yet."""
    names = {name for each in _subclasses(Exception) for name in names_of(each)}
    lines = []
    for name in plan.spec.catch:
        module = name.rpartition(".")[0]
        may_come = module and module not in sys.modules and _can_be_found(module.partition(".")[0])
        if name not in names and not may_come and exception_at(name) is None:
            lines.append(
                f"catch: no exception {name} is there before the first trial; it catches what has that name only"
            )
    return lines


def _subclasses(of: type[Exception]) -> set[type[Exception]]:
    """Return the exceptions that there are in this process."""
    found, left = {of}, [of]
    while left:
        new = set(type.__subclasses__(left.pop())) - found
        found |= new
        left += new
    return found


def _can_be_found(package: str) -> bool:
    return package in sys.modules or find_spec(package) is not None


def _unasked(plan: Plan) -> list[str]:
    """Return what to say of params of `start_with` that are not asked for beside the others of their entry."""
    if "start_with" not in plan.document.values:  # the objective's own defaults name params of every kind
        return []
    lines = []
    for index, entry in enumerate(plan.spec.start_with):
        known = {**plan.space.fixed, **entry}
        for dimension in plan.space.dimensions:
            others = {name: known[name] for name in dimension.searched.when if name in known}
            if (name := dimension.name) in entry and not dimension.meets(others):
                lines.append(
                    f"start_with[{index}].{name}: is without effect, since {name} is asked for only "
                    f"{dimension.condition()}, and this entry has {shown(others)}"
                )
    return lines


def _never(plan: Plan) -> list[str]:
    """Return what to say of rules of `stop` that can never hold in this study."""
    stop, trials = plan.spec.stop, plan.spec.trials
    if stop is None:
        return []
    lines = []
    if stop.no_gain is not None and stop.no_gain >= trials:
        lines.append(f"stop.no_gain: {stop.no_gain} never holds in a study of {trials} trials; lower it")
    if stop.terminator is not None and (least := TERMINATORS[stop.terminator]) >= trials:
        why = f"{stop.terminator} needs {least} complete trials"
        lines.append(f"stop.terminator: {why}, so it never ends a study of {trials}; raise `trials`")
    bound = None if stop.target is None or plan.function is not None else _bound(plan)
    if stop.target is not None and bound is not None and (bound - stop.target) * (1 if plan.maximize else -1) < 0:
        most = "at most" if plan.maximize else "at least"
        lines.append(f"stop.target: {stop.target:g} is never reached: {plan.metric} is {most} {bound:g}")
    return lines


def start_advice(plan: Plan, seen: StudyView) -> list[str]:
    """Return what to say of entries of `start_with` that are new in a resumed study, and that it has no trial for."""
    spec = plan.spec
    starts = starts_in(seen.everything, seen.trials, [plan.space.queued(each) for each in spec.start_with])
    n_kept = sum(not starts.gives_way(trial) for trial in seen.trials)
    left = starts.untried[max(0, budget(spec.trials, seen.trials, seen.stopped) - n_kept) :]
    if not left:
        return []
    named = "start_with" in plan.document.values
    names = ", ".join(f"start_with[{index}]" for index in left) if named else "the objective's present defaults"
    if seen.stopped is not None:
        return [f"the search was stopped, so no trial is left to try {names}; change or remove `stop` to search on"]
    more = f"raise `trials` to {max(spec.trials, n_kept) + len(left)}"
    return [f"of the {spec.trials} trials none is left to try {names}, which no trial has had; {more}"]


def _bound(plan: Plan) -> float | None:
    """Return the best value that the study's metric can have, as far as TorchMetrics says so."""
    metric = plan.objective.metrics().get(plan.metric)
    bound = getattr(metric, "plot_upper_bound" if plan.maximize else "plot_lower_bound", None)
    return float(bound) if isinstance(bound, int | float) else None


def _logits_loss(plan: Plan, outputs: Any, batch: Split, params: Params) -> str | None:
    """Return the name of torch's function that the loss gives logits to, if it does."""
    with torch.no_grad(), LogitsSeen() as seen:
        plan.objective.loss(outputs, batch.targets, params)
    is_named = type(plan.objective).loss.__module__ == "hpo.study.objective"
    return next(
        (TAKES_LOGITS[func] for func, _ in seen.calls if func in TAKES_LOGITS),
        _OF_PARAM.get(params.get("loss", "")) if is_named else None,
    )


def _last(outputs: Tensor) -> str | None:
    """Return the last operation that `outputs` come from, if it makes probabilities; reshaping does not count."""
    node = outputs.grad_fn
    while node is not None and node.name().startswith(_RESHAPES) and node.next_functions:
        node = node.next_functions[0][0]
    return None if node is None else _LAST.get(node.name())
