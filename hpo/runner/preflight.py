"""An objective tried before anything runs: a network for every corner of the space, one of them on a batch.

What would otherwise fail, or silently go wrong, in the middle of a study is said here: what cannot be built, a loss
that is not one number, a `build` that gives another network each time, code that changes torch's settings or seeds.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from hpo.errors import InputError
from hpo.export.ensemble import link_of
from hpo.runner.advice import advice
from hpo.runner.firststep import fixed_from, missing_param, module_from, settings_stay, try_measuring, try_step
from hpo.runner.prepare import Plan, guarded
from hpo.runner.preview import Preview
from hpo.runner.returned import apart_advice, few_rows, require_tensors, try_export, try_network
from hpo.study.data import Data, Split
from hpo.study.objective import Objective, Params
from hpo.study.sealed import sealed, sealing
from hpo.study.splits import require_rows
from hpo.training import optim
from hpo.training.faults import fault_of
from hpo.training.memory import Within, n_bytes
from hpo.training.outside import Outside

_LARGE = 1 << 28
"""Bytes of a network that is tried only once."""


def preflight(plan: Plan, data: Data) -> tuple[nn.Module | None, list[str]]:
    """Build a network and its optimizer for every corner of the space, and train the first on one batch.

    Return the first (None where the objective trains in its own way and has no `preview` of it), and what to warn of:
    corners that are infeasible, or that the machine has no memory for, whose trials will be ended; what `advice` says.
    Raises InputError.
    """
    with sealing(plan.given):
        return _tried(plan, sealed(data), data)


def _tried(plan: Plan, data: Data, whole: Data) -> tuple[nn.Module | None, list[str]]:
    """Do what `preflight` does; of `whole`, which has the test split too, only the extreme targets are looked at."""
    objective = plan.objective
    if plan.spec.ensemble > 1:
        link_of(module_from(plan, "head", objective.head), data.info.n_classes)
    if plan.spec.confirm is not None and plan.spec.confirm.folds is not None:
        require_rows(data, plan.spec.confirm.folds)
    if objective.train is not None and type(objective).preview is Objective.preview:
        return None, []
    preprocess = fixed_from(plan, "preprocess", lambda: objective.preprocess(data.train))
    rows = few_rows(plan, data, preprocess)
    batch = rows.batch
    if objective.train is not None:
        preview = Preview(plan, data, rows)
        first, infeasible = _each_corner(plan, preview)
        return first, [*infeasible, *preview.warnings]
    losses: dict[Any, Params] = {}
    for params in plan.space.corners():
        losses.setdefault(params.get("loss"), params)
    warnings: list[str] = []

    def attempt(params: Params, is_first: bool) -> nn.Module:
        if not is_first:
            return _built(plan, data, params)[0]
        module, optimizer = _built(plan, data, params, is_first=True)
        with settings_stay(plan, "a training step"):
            outputs = try_step(plan, module, optimizer, batch, params)
        warnings.extend(_untrained(plan, module))
        # while it is the network built last: a loss may read what its forward has left in it
        try_measuring(plan, whole, outputs, batch, [*losses.values()])
        warnings.extend(line for each in losses.values() for line in advice(plan, outputs, batch, each))
        if any(_is_own(each) for part in (module, preprocess) for each in part.modules()):
            try_network(plan, data, rows, module.eval(), measures=False)  # as measured: what it keeps has no graph then
            try:
                try_export(plan, data, rows, module, params)
            except InputError as error:  # it can be searched nevertheless, and its weights are in best.pt
                warnings.append(str(error))
        warnings.extend(apart_advice(plan, rows, module))
        if n_bytes(module) <= _LARGE:  # else twice as many would have to fit into memory, or it would take long
            warnings.extend(_left_behind(plan, data, params, batch))
        return module

    first, infeasible = _each_corner(plan, attempt)
    return first, [*infeasible, *dict.fromkeys(warnings)]


def _is_own(module: nn.Module) -> bool:
    """Whether a module's code is the user's: what comes with torch and hpo is known to be exported."""
    return type(module).__module__.partition(".")[0] not in ("torch", "torchvision", "hpo")


def _each_corner(plan: Plan, attempt: Callable[[Params, bool], nn.Module | None]) -> tuple[nn.Module | None, list[str]]:
    """Return what `attempt` makes of the first corner of the space (told so), once it has made something of each.

    And what to say of corners that would end their own trial only. Raises InputError.
    """
    made: list[nn.Module | None] = []
    infeasible: list[InputError] = []
    for params in plan.space.corners():
        try:
            each = attempt(params, not made)
        except InputError as error:
            if error.__cause__ is None or fault_of(error.__cause__, plan.spec.catch, "") is None:
                raise
            infeasible.append(error)
        else:
            made = made or [each]  # a network may be large: one is kept
            del each
    if not made:
        raise InputError(f"no extreme configuration of the space can be trained; {infeasible[0]}") from infeasible[0]
    if not infeasible:
        return made[0], []
    more = f" (and so for {len(infeasible) - 1} more corners of the space)" if len(infeasible) > 1 else ""
    return made[0], [f"{infeasible[0]}{more}: such trials will be ended, the others will be trained"]


def _built(plan: Plan, data: Data, params: Params, is_first: bool = False) -> tuple[nn.Module, Any]:
    """Build a network of `params` and its optimizer; the first is built several times, and must be the same."""
    searched = plan.space.searched(params).items()
    shown = ", ".join(f"{name}={value}" for name, value in searched) or "its fixed params"

    def build() -> nn.Module:
        with settings_stay(plan, "build"), Within():
            return module_from(plan, f"build with {shown}", lambda: plan.objective.build(dict(params), data.info))

    try:
        module = build()
        _refuse_lazy(plan, module)
        require_tensors(plan, module)
        if is_first:
            module = _require_same_network(plan, build)
    except InputError as error:
        raise InputError(f"{error}{missing_param(error, params)}") from error.__cause__
    made = f"optimizer {params['optimizer']} with {shown}"
    sparse = optim.gives_sparse(module)
    return module, guarded(plan, made, lambda: optim.make(params, module.parameters(), sparse=sparse))


def _left_behind(plan: Plan, data: Data, params: Params, batch: Split) -> list[str]:
    """Return what to say of what the objective holds after a trial that was not there after one just like it."""

    def trial() -> None:
        torch.manual_seed(1)
        try_step(plan, *_built(plan, data, params), batch, params)

    with torch.random.fork_rng(devices=()):
        trial()
        before = Outside(nn.Identity(), plan.objective)
        trial()
    kept, lost = before.changed()
    changed = [*lost, *(f"{holder}.{name}" for holder, held in kept.items() for name in held)]
    if not changed:
        return []
    names = ", ".join(each.replace("objective.", "self.", 1).removeprefix("class ") for each in changed)
    return [
        f"objective {plan.spec.objective}: its build or loss changes {names}, which the next trial finds as the last "
        "one left it: what a trial gives may depend on those before it; set it in `build`, before the network is made"
    ]


def _refuse_lazy(plan: Plan, module: nn.Module) -> None:
    """Raise InputError for a layer whose weights are made by the first batch (torch.nn.LazyLinear).

    Constraints, stacks and the optimizer need them before there is a batch, and each network its own from its seed.
    """
    lazy = next((f"{n} ({type(m).__name__})" for n, m in module.named_modules() if _is_lazy(m)), None)
    if lazy is not None:
        raise InputError(
            f"objective {plan.spec.objective}: build must return a network whose weights are there, but the first "
            f"batch makes those of {lazy}; give the layer its size (info.n_features, or from info.inputs), or call the "
            "network in build, once, with zeros of the inputs' shapes"
        )


def _is_lazy(module: nn.Module) -> bool:
    own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    return any(is_lazy(tensor) for tensor in own)


def _untrained(plan: Plan, module: nn.Module) -> list[str]:
    """Return what to say of weights that a step has given a gradient, and that the objective holds, not the network."""
    trained = {id(weight) for weight in module.parameters()}
    modules = {name: each for name, each in vars(plan.objective).items() if isinstance(each, nn.Module)}
    held = {f"self.{name}.{path}": w for name, each in modules.items() for path, w in each.named_parameters()}
    held |= {f"self.{name}": w for name, w in vars(plan.objective).items() if isinstance(w, nn.Parameter)}
    several = [name for name, weight in held.items() if weight.grad is not None and id(weight) not in trained]
    if not several:
        return []
    return [
        f"objective {plan.spec.objective}: no optimizer trains {', '.join(several[:5])}, which the loss depends on; "
        "make what is to be trained part of the network that build returns, and freeze the rest: requires_grad_(False)"
    ]


def _require_same_network(plan: Plan, build: Callable[[], nn.Module]) -> nn.Module:
    """Return the last network built. Raises InputError unless equal params and seeds give equal ones, others others."""
    layers, states = [], []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        module = build()
        layers.append([(n, _name(m), [*map(_shape, m.parameters())]) for n, m in module.named_modules()])
        states.append(torch.get_rng_state())
    one, two, _ = layers
    if one != two:
        differing = next((a[0] or b[0] for a, b in zip(one, two, strict=False) if a != b), "their number")
        raise InputError(
            f"objective {plan.spec.objective}: build gives another network each time for the same params and seed "
            f"(layers differ at {differing or 'the network itself'}); draw from torch's generator only, and let params "
            "decide the structure"
        )
    if torch.equal(states[0], states[2]):
        raise InputError(
            f"objective {plan.spec.objective}: build sets torch's seed itself, so all trials would begin with the same "
            "weights and their own seeds mean nothing; remove its torch.manual_seed"
        )
    return module


def _name(module: nn.Module) -> str:
    """Return what a layer's class is called: one that is written inside of `build` is another object each time."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _shape(tensor: torch.Tensor) -> torch.Size:
    return tensor.shape
