"""The study's params: the engine's and the objective's defaults, under what the study file says; their losses."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hpo.errors import Fault, collecting, did_you_mean
from hpo.study import loading as objectives
from hpo.study import losses
from hpo.study import space as spaces
from hpo.study.draft import Draft
from hpo.study.objective import Function, Objective
from hpo.study.ranges import Categorical, FloatRange, IntRange, Searched, parse_params
from hpo.study.space import FreeSpace, Space
from hpo.study.spec import StudySpec
from hpo.study.yaml_values import dotted
from hpo.training import optim


def space_of(objective: Objective | Function, draft: Draft, spec: StudySpec, folder: Path) -> tuple[Space, list[Fault]]:
    """Return the space of the objective's params as the file has them; a function's is free."""
    if isinstance(objective, Function):
        message = "a function suggests its own params; remove this"
        faults = [Fault(path=("params", name), message=message) for name in spec.params]
        return FreeSpace(fixed={}, dimensions=()), faults
    params, faults = _params(objective, draft, spec)
    faults += _name_losses(objective, params, folder)
    space, more = spaces.build(params, spec.start_with)
    if objective.train is None:
        faults += optim.faults_together(space.combinations(optim.TOGETHER))
    return space, faults + more


def _params(objective: Objective, draft: Draft, spec: StudySpec) -> tuple[dict[str, Any], list[Fault]]:
    """Return the study's params: the engine's and the objective's defaults, under what the file says.

    The objective's default space is used where the file names no range of its own.
    """
    engine, names = (optim.DEFAULTS, optim.NAMES) if objective.train is None else ({}, ())
    defaults, ranges, own_faults = _own_params(objective, [*engine, *names])
    if own_faults:
        return {**engine}, own_faults
    params = {**engine, **defaults}
    known = list(dict.fromkeys([*params, *names, *ranges]))
    faults = [
        Fault(
            path=("params", name),
            message=f"neither the engine nor the objective has this parameter{did_you_mean(name, known)}",
        )
        for name in spec.params
        if name not in known
    ]
    own = {name: value for name, value in spec.params.items() if name in known}
    if not draft.own_space:
        params |= {name: entry for name, entry in ranges.items() if _reachable(entry, {**params, **ranges, **own})}
    params |= own
    for fault in draft.faults:  # a parameter that is wrong in the file is not missing from the space
        if fault.path[:1] == ("params",) and len(fault.path) > 1 and fault.path[1] not in params:
            params[str(fault.path[1])] = None
    values = {name: _span(value) for name, value in params.items() if value is not None}
    return params, faults + (optim.faults(values) if objective.train is None else [])


def default_params(objective: Objective, spec: StudySpec, space: Space) -> dict[str, Any]:
    """Return the default configuration: the first of `start_with` over the objective's and the engine's defaults.

    What the study file fixes is fixed here too; a searched param of the engine that has no default is left to torch.
    Raises KeyError with the name of a param that has none.
    """
    known = {**optim.DEFAULTS, **objective.defaults, **(spec.start_with[0] if spec.start_with else {})}
    params = dict(space.fixed)
    for each in space.dimensions:
        if each.applies(params) and (each.name in known or each.name not in optim.NAMES):
            params[each.name] = known[each.name]
    return params


def _own_params(objective: Objective, engine: Sequence[str]) -> tuple[Mapping[str, Any], dict[str, Any], list[Fault]]:
    """Return the objective's defaults, its default space, and what is wrong with them."""
    at = ("objective",)
    given = {}
    for what in ("defaults", "space"):
        try:
            given[what] = getattr(objective, what)
        except Exception as error:  # the user's own code
            return {}, {}, [Fault(path=at, message=f"its {what} failed: {objectives.origin(error)}")]
        if not isinstance(given[what], Mapping):
            message = f"its {what} must be a mapping of names, but is a {type(given[what]).__name__}"
            return {}, {}, [Fault(path=at, message=message)]
    defaults, space = given["defaults"], given["space"]
    faults = []
    for name, value in defaults.items():
        if isinstance(value, Mapping) or not _is_plain(value):
            rule = "must be a number, a text, true, false or null (ranges belong into its space)"
            faults.append(Fault(path=at, message=f"its default {name} {rule}, but is a {type(value).__name__}"))
    ranges, more = parse_params({n: dict(v) if isinstance(v, Mapping) else v for n, v in space.items()}, ())
    faults += [Fault(path=at, message=f"its space: {dotted(fault.path)}: {fault.message}") for fault in more]
    for name, value in ranges.items():
        if not isinstance(value, Searched):
            rule = 'must be a range, {"type": "float", "low": ..., "high": ...}'
            faults.append(Fault(path=at, message=f"its space: {name} {rule}, but is {value!r:.60}"))
        hint = did_you_mean(name, [n for n in (*defaults, *engine) if n not in ranges])
        if name not in defaults and name not in engine and "did you mean" in hint:
            message = f"its space: neither its defaults nor the engine has {name!r}{hint} else add it to its defaults"
            faults.append(Fault(path=at, message=message))
    return defaults, ranges, faults


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def _name_losses(objective: Objective, params: Mapping[str, Any], folder: Path) -> list[Fault]:
    """Give the objective the losses that its params name by import path; return what is wrong with the losses' own."""
    faults: list[Fault] = []
    own: dict[str, Any] = {}
    if not isinstance(objective.defaults, Mapping):
        return faults  # which is said already
    for name in _span(params["loss"]) if "loss" in objective.defaults else []:
        at = ("params", "loss")
        if ":" in str(name):
            with collecting(faults):
                own[str(name)] = objectives.load_function(str(name), folder, at)
        elif name not in losses.BY_NAME:
            message = f"there is no loss {name!r}{did_you_mean(str(name), losses.BY_NAME)}; or name your own, file.py:f"
            faults.append(Fault(path=at, message=message))
    objective.own_losses = own
    return faults + losses.faults({name: _span(value) for name, value in params.items()})


def _reachable(entry: Any, params: Mapping[str, Any]) -> bool:
    """Whether the condition of a default range can be met at all: the file may have fixed what it depends on."""
    return all(
        name not in params or isinstance(params[name], Searched) or params[name] in values
        for name, values in entry.when.items()
    )


def _span(value: Any) -> list[Any]:
    """Return every value, or both ends and the one beside them, of one entry of the params."""
    if isinstance(value, Categorical):
        return list(value.choices)
    if isinstance(value, FloatRange | IntRange):
        return [value.low, value.high, *([] if value.otherwise is None else [value.otherwise])]
    return [value]
