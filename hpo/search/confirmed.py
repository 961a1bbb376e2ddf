"""What the storage holds of configurations that were trained again with fresh seeds, and what it says of them.

One stored value has all of it (`schema.CONFIRMED`): `configurations` by a digest of their params and of how they were
trained, each with the `number` and `value` of its trial and its `results` by run; and once the confirmation has ended
`top`, the digests of those it was between. Whoever can write the storage writes anything: what has not that shape is
left out.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hpo.search import schema
from hpo.search.budget import rank
from hpo.search.retrained import Configuration, Confirmed, Result
from hpo.search.search import Search
from hpo.search.view import NO_TRIAL, Best, StudyView
from hpo.study.spec_parts import Confirm


def top_of(search: Search, seen: StudyView, how: Confirm) -> dict[str, Best]:
    """Return the best distinct configurations of the search by their digest, the best first."""
    top: dict[str, Best] = {}
    others = tuple(search.others.values())
    for trial in sorted(seen.feasible, key=lambda trial: rank(trial, maximize=search.maximize, others=others)):
        if len(top) == how.top:
            break
        best = seen.best(trial.number)
        assert best is not None
        top.setdefault(digest(best.params, how), best)
    return top


def digest(params: Mapping[str, Any], how: Confirm) -> str:
    """Return what names the results of a configuration: those of other splits are others."""
    text = json.dumps([dict(params), how.resplit, how.folds], sort_keys=True, default=repr)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def results_in(stored: Any, key: str) -> dict[int, Result]:
    """Return the results of a configuration by their run, as far as the storage holds them."""
    of = _mapping(_mapping(_mapping(stored).get("configurations")).get(key)).get("results")
    return {int(run): found for run, each in _mapping(of).items() if run.isdigit() and (found := _result(each))}


def _result(stored: Any) -> Result | None:
    if not isinstance(stored, list) or len(stored) not in (2, 3) or type(stored[1]) is not int:
        return None
    if len(stored) == 3:
        return Result(fault=str(stored[2]), epoch=stored[1])
    value = stored[0]
    is_number = type(value) in (int, float) and math.isfinite(value)
    return Result(value=float(value), epoch=stored[1]) if is_number else None


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def note_results(search: Search, key: str, best: Best, results: Mapping[int, Result]) -> None:
    """Store new results of a configuration, by run, beside those that are there."""
    stored = _mapping(search.attrs.get(schema.CONFIRMED))
    known = {**results_in(stored, key), **results}
    whole = {
        "number": best.number,
        "value": None if best.number == NO_TRIAL else best.value,
        "results": {str(run): result.stored() for run, result in sorted(known.items())},
    }
    others = _mapping(stored.get("configurations"))
    search.remember(schema.CONFIRMED, {**stored, "configurations": {**others, key: whole}})


def note_end(
    search: Search, top: Mapping[str, Best], how: Confirm, overlap: float, default: Mapping[str, Best]
) -> None:
    """Store that a confirmation has all its results, between which configurations it was, and the `default` one."""
    stored = _mapping(search.attrs.get(schema.CONFIRMED))
    known = _mapping(stored.get("configurations"))
    now = {key: {**_mapping(known.get(key)), "number": best.number, "value": best.value} for key, best in top.items()}
    end = {"configurations": {**known, **now}, "top": list(top), "how": how.model_dump(), "overlap": overlap}
    end |= {"default": next(iter(default))} if default else {}
    if stored != end:
        search.remember(schema.CONFIRMED, end)


def confirmed_in(stored: Any, *, maximize: bool) -> Confirmed | None:
    """Return the confirmation that has ended last, as the storage holds it; None: there is none, or not of ours."""
    stored = _mapping(stored)
    try:
        how = Confirm.model_validate(stored["how"])
        found = []
        for key in stored["top"]:
            each, results = stored["configurations"][key], results_in(stored, key)
            runs = [results[run] for run in range(how.runs)]
            found.append(Configuration(number=int(each["number"]), value=float(each["value"]), results=runs))
        overlap = float(stored["overlap"])
    except (KeyError, TypeError, ValueError):
        return None
    if not any(each.values for each in found):
        return None
    default = _default_in(stored, how)
    sign = -1 if maximize else 1
    order = sorted(found, key=lambda each: (each.n_failed, sign * each.mean if each.values else math.inf))
    return Confirmed(configurations=order, how=how, overlap=overlap, maximize=maximize, default=default)


def _default_in(stored: Mapping[str, Any], how: Confirm) -> Configuration | None:
    """Return the default configuration's results; None: they are not there, or not of ours."""
    try:
        each, results = stored["configurations"][stored["default"]], results_in(stored, stored["default"])
        value = math.nan if each["value"] is None else float(each["value"])
        runs = [results[run] for run in range(how.runs)]
        return Configuration(number=int(each["number"]), value=value, results=runs)
    except (KeyError, TypeError, ValueError):
        return None


def confirmation(search: Search, seen: StudyView) -> Confirmed | None:
    """Return the confirmation that the study file asks for, if it has all its results; None: not yet, or none asked.

    What was confirmed of a search that has had more trials since then, or with other keys, is none of that search.
    """
    how = search.spec.confirm
    stored = _mapping(search.attrs.get(schema.CONFIRMED))
    if how is None or not stored or stored.get("top") != list(top_of(search, seen, how)):
        return None
    found = confirmed_in(stored, maximize=search.maximize)
    return found if found is not None and found.how == how else None


def progress_text(search: Search, seen: StudyView) -> str:
    """Return how far a confirmation is that the search waits for; empty: none is asked for, or it has ended."""
    how = search.spec.confirm
    if how is None or seen.counts.unfinished or not seen.feasible or confirmation(search, seen) is not None:
        return ""
    top = top_of(search, seen, how)
    stored = search.attrs.get(schema.CONFIRMED)
    done = sum(run < how.runs for key in top for run in results_in(stored, key))
    return f"confirming: {done} of {len(top) * how.runs} trainings done"


def chosen(search: Search, seen: StudyView) -> Best | None:
    """Return the trial whose params the study ends with: the confirmed one, where it is confirmed, else the best.

    Of a confirmed one `epoch` is the median of its runs' best epochs. None: there is none, or none is confirmed yet.
    """
    if search.spec.confirm is None:
        return seen.best()
    found = confirmation(search, seen)
    if found is None:
        return None
    best = seen.best(found.winner.number)
    return None if best is None else replace(best, epoch=found.winner.epoch)


def sentences(found: Confirmed, metric: str) -> list[str]:
    """Return what a confirmation says of the value that is to be expected, for a person."""
    winner, how, n = found.winner, found.how, len(found.configurations)
    each = f"{how.seeds} fresh seed{'s' if how.seeds > 1 else ''}"
    if how.folds is not None:
        each += f", {how.folds} folds each"
    elif how.resplit:
        each += ", each with a validation split of its own"
    what = "configuration was" if n == 1 else f"{n} best configurations were"
    said = [f"After the search the {what} trained again ({each}): {mean_text(found, metric)}, trial {winner.number}."]
    if n > 1:
        chance = min(found.chances[0], 0.99)  # of so few seeds nothing more can be said
        more = "at least " if found.chances[0] > chance else ""
        said.append(f"The chance that it is really the best of them is {more}{chance:.0%} (bootstrap over seeds).")
    best, by = found.search_best, abs(found.optimism)
    mean = f"the mean of that configuration with fresh seeds is {best.mean:.4g}"
    if not best.values:
        said.append(f"The search's own best value, {best.value:.4g} of trial {best.number}, came from one that failed.")
    elif found.optimism > 0:
        said.append(
            f"The search's best value, {best.value:.4g} of trial {best.number}, was too good by {by:.2g}: {mean}."
        )
    else:
        said.append(f"The search's best value, {best.value:.4g} of trial {best.number}, was not too good: {mean}.")
    said += _of_default(found, metric)
    if not any(each.deviation for each in found.configurations) and len(winner.results) > 1:
        said.append(
            "No seed has changed any result, so these say nothing of what another seed would give: the objective draws "
            "nothing from its seed, or the metric is too coarse; `resplit` and `folds` vary the rows."
        )
    said += [
        f"Of trial {each.number}, {each.n_failed} of {len(each.results)} trainings failed."
        for each in found.configurations
        if each.n_failed
    ]
    return said


def _of_default(found: Confirmed, metric: str) -> list[str]:
    """Return what the search has gained over the default configuration."""
    default, gain = found.default, found.gain
    if default is None:
        return []
    if found.is_default:
        return ["It is the default configuration: the search gained nothing over that."]
    if gain is None:
        return [f"Of the default configuration, {default.n_failed} of {len(default.results)} trainings failed."]
    n = len(default.results)
    said = f"The default configuration comes to a mean {metric} of {default.mean:.4g} with the same seeds: the search "
    if not gain.is_clear or gain.interval is None:
        return [f"{said}gained nothing that {n} trainings could show."]
    what = f"gained {gain.by:.2g}" if gain.by > 0 else f"lost {-gain.by:.2g}"
    return [f"{said}{what} (95% interval {gain.ends_text})."]


def mean_text(found: Confirmed, metric: str) -> str:
    """Return the winner's mean, its standard deviation and interval, for a person."""
    deviation, interval = found.winner.deviation, found.interval
    text = f"{metric} {found.winner.mean:.4g}"
    if deviation is None or interval is None:
        return f"{text} on validation"
    return (
        f"{text} on validation, standard deviation {deviation:.2g}, 95% interval of the mean "
        f"{interval.low:.4g} to {interval.high:.4g}"
    )
