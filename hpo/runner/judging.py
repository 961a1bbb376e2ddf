"""The best trial's weights looked at on the validation split, and what plain scikit-learn models reach there.

Of the test split nothing is read: it is for the refit alone. What cannot be had is said in one line, and is no error:
the rest of a report needs none of it.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hpo.errors import HpoError, masked, said
from hpo.runner.baselines import LOOKED_AT, fit_baselines, form_seen, is_table, taken, value_of
from hpo.runner.checkpoints import BEST, folder_of
from hpo.runner.opening import torch_set
from hpo.runner.prepare import Plan, guarded, prepare
from hpo.runner.table_models import Absent
from hpo.search import schema
from hpo.search.search import Search
from hpo.search.view import Best, StudyView
from hpo.study.data import Data, prediction
from hpo.study.loading import origin
from hpo.study.sealed import sealed, sealing
from hpo.training.batches import make_batches
from hpo.training.evaluation import measure, outputs_of

MOST_ROWS = 100_000
"""Above so many training rows baselines are fitted only if they are asked for."""
MOST_RESIDUALS = 2000
MOST_CLASSES = 100


def judge(
    path: Path, overrides: Mapping[str, str], search: Search, seen: StudyView, baselines: bool | None
) -> dict[str, Any]:
    """Return what the objective's data says of the best trial, as plain data.

    Keys: `absent` (why there is nothing), else `measured` (metrics by name), `n_valid`, `confusion` (`classes`, and
    `counts` by true class, then by predicted class) or `residuals` (`targets` and `predictions` of a sample of `n`
    values), `notes`, and `baselines` (`rows` of `name`, `value`, `seconds`; or `absent`).
    `baselines`: True whatever the size, False none, None up to MOST_ROWS rows.
    """
    try:
        best = seen.best()
        if best is None:
            raise Absent("no trial is complete")
        plan = _plan(path, overrides, search)
        with torch_set(plan):
            return _judge(plan, search, best, baselines)
    except Absent as reason:
        return {"absent": masked(str(reason))}
    except (HpoError, OSError) as error:
        return {"absent": said(error)}
    except (Exception, SystemExit) as error:  # the user's own code, and whatever is in a file of weights
        return {"absent": masked(origin(error).splitlines()[0])}


def _plan(path: Path, overrides: Mapping[str, str], search: Search) -> Plan:
    plan = prepare(path, {**overrides, "device": "auto"})  # where it was trained may be another machine
    if plan.function is not None:
        raise Absent("a plain function has no data that is known")
    if (plan.metric, plan.maximize) != (search.metric, search.maximize):
        raise Absent(f"the objective's metric is {plan.metric} by now, and not the study's {search.metric}")
    return plan


def _judge(plan: Plan, search: Search, best: Best, baselines: bool | None) -> dict[str, Any]:
    data = plan.load_data()
    assert data is not None
    if search.attrs.get(schema.DATA) not in (None, data.fingerprint()):
        raise Absent("the data is not what the study was run with")
    with sealing(plan.given):
        return _judged(plan, search, best, sealed(data), baselines)


def _judged(plan: Plan, search: Search, best: Best, data: Data, baselines: bool | None) -> dict[str, Any]:
    preprocess = guarded(plan, "preprocess", lambda: plan.objective.preprocess(data.train))
    judged: dict[str, Any] = {"n_valid": len(data.valid), "notes": []}
    if search.attrs.get(schema.CODE) not in (None, plan.source):
        judged["notes"].append("The code of the objective has changed since the study was run.")
    judged |= _part("weights", lambda: _weights(plan, search, best, data, preprocess))
    judged["baselines"] = _part("absent", lambda: _baselines(plan, best, data, preprocess, baselines))
    return judged


def _part(key: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what `make` gives; where it cannot be had, why, under `key`."""
    try:
        return make()
    except Absent as reason:
        return {key: masked(str(reason))}
    except HpoError as error:
        return {key: said(error)}
    except (Exception, SystemExit) as error:  # as above: the user's own code
        return {key: masked(origin(error).splitlines()[0])}


def _weights(plan: Plan, search: Search, best: Best, data: Data, preprocess: nn.Module) -> dict[str, Any]:
    """Measure the best trial's weights on the validation split."""
    if plan.objective.train is not None:
        raise Absent("the objective has its own train, of which no weights are kept")
    network = _network(plan, search, best, data).to(plan.device)
    task = plan.task(data.info, len(data.train))
    batches = make_batches(data.valid, preprocess, plan.device, plan.spec.loading)
    outputs = outputs_of(task, network, batches)
    with torch.no_grad():
        metrics = {name: metric.to(plan.device) for name, metric in plan.objective.metrics().items()}
        measured = measure(plan.objective, outputs, batches.targets, best.params, metrics)
        shown = _outputs_beside_targets(plan, data, prediction(outputs).cpu(), data.valid.targets)
    return {"measured": measured, **shown}


def _network(plan: Plan, search: Search, best: Best, data: Data) -> nn.Module:
    file = folder_of(plan) / BEST
    if not file.is_file():
        raise Absent(
            f"there are no weights of the best trial in {file}; it was trained elsewhere, or they were removed"
        )
    try:
        content = torch.load(file, weights_only=True, map_location="cpu")
        if content["trial"] != best.number or content.get("study", search.making) != search.making:
            raise Absent(f"{file} holds the weights of another trial")
        network = plan.objective.build(dict(best.params), data.info)
        network.load_state_dict(content["model_state_dict"])
    except Absent:
        raise
    except Exception as error:  # torch.load raises a dozen kinds; the user's own code
        raise Absent(f"{file} does not fit the network: {said(error)}") from error
    return network


def _outputs_beside_targets(plan: Plan, data: Data, outputs: Tensor, targets: Tensor) -> dict[str, Any]:
    """Return the confusion of classes, or a sample of numbers predicted beside their targets; neither: {}."""
    classes = _classes(plan, outputs, targets)
    if classes is not None:
        return _confusion(data, classes, targets.reshape(-1).long())
    if outputs.shape != targets.shape or not targets.is_floating_point():
        return {}
    flat, wanted = outputs.reshape(-1), targets.reshape(-1)
    at = torch.linspace(0, len(flat) - 1, min(len(flat), MOST_RESIDUALS)).long()
    difference = flat - wanted
    residuals = {
        "n": len(flat),
        "targets": wanted[at].tolist(),
        "predictions": flat[at].tolist(),
        "mean": float(difference.mean()),
        "std": float(difference.std(correction=0)),
    }
    return {"residuals": residuals}


def _classes(plan: Plan, outputs: Tensor, targets: Tensor) -> Tensor | None:
    """Return the class (N,) that is predicted of each row; None: these are numbers, not classes."""
    if outputs.ndim == 2 and outputs.shape[1] > 1 and targets.numel() == len(outputs):
        return None if _is_fraction(targets) else outputs.argmax(1)
    binary = outputs.numel() == len(outputs) == targets.numel() and bool(((targets == 0) | (targets == 1)).all())
    if not binary or (plan.objective.info.n_classes not in (0, 2)):
        return None
    if plan.objective.info.n_classes == 0 and targets.is_floating_point():
        return None  # numbers that happen to be 0 and 1
    head = plan.objective.head()
    limit = 0.0 if isinstance(head, nn.Identity) else 0.5
    classes: Tensor = (head(outputs).reshape(-1) > limit).long()
    return classes


def _is_fraction(targets: Tensor) -> bool:
    return targets.is_floating_point() and bool((targets != targets.round()).any())


def _confusion(data: Data, predicted: Tensor, targets: Tensor) -> dict[str, Any]:
    n = max(len(data.class_names), int(predicted.max()) + 1, int(targets.max()) + 1)
    if n > MOST_CLASSES or int(targets.min()) < 0:
        return {}
    counts = torch.bincount(targets * n + predicted, minlength=n * n).reshape(n, n)
    names = [*data.class_names, *map(str, range(len(data.class_names), n))]
    return {"confusion": {"classes": [masked(str(name)) for name in names], "counts": counts.tolist()}}


def _baselines(plan: Plan, best: Best, data: Data, preprocess: nn.Module, wanted: bool | None) -> dict[str, Any]:
    """Fit models that cost little on the train split; measure the study's metric on validation."""
    if wanted is False:
        raise Absent("they were not asked for (--no-baselines)")
    if wanted is None and len(data.train) > MOST_ROWS:
        raise Absent(f"there are more than {MOST_ROWS:,} rows to train on; --baselines fits them all the same")
    if not is_table(data.train, preprocess):
        raise Absent("they need a table: numbers or categories, a row for each example")
    valid, targets = data.valid.through(preprocess), data.valid.targets
    task = plan.task(data.info, len(data.train))
    few = taken(valid, torch.arange(min(LOOKED_AT, len(valid))))
    form = form_seen(task, best.params, task.network(best.params), few, torch.device("cpu"))
    fitted, absent = fit_baselines(form, data.train, preprocess, plan.spec.seed, most=len(data.train))
    metric = None if plan.metric == "loss" else plan.objective.metrics()[plan.metric]
    rows = []
    for each in fitted:
        value = value_of(plan.objective, plan.metric, each.predict(valid), targets, best.params, metric)
        name = f"{each.name} ({each.note})" if each.note else each.name
        rows.append({"name": name, "value": value, "seconds": each.seconds})
    return {"rows": rows} | ({"notes": absent} if absent else {})
