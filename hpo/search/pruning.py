"""How a study's trials are pruned where its file leaves it open, settled once for all of its workers."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from hpo.search import schema
from hpo.search.halving import AUTO, Halving, HalvingPruner
from hpo.search.retrying import locked
from hpo.search.samplers import CANNOT_HALVE
from hpo.search.search import Search
from hpo.search.seen import LEARNING
from hpo.search.timed import TimedHalving


def settle_pruner(search: Search, at_once: int, stacked: bool) -> bool:
    """Settle how trials are pruned, and with `halving` have it pause them.

    So many trials are trained `at_once`, over all workers; `stacked`: a stack holds several. Return whether `halving`
    was chosen just now: the study file names no pruner, and they are stacked.
    """
    named = "pruner" in search.spec.model_fields_set
    pruner = search.study.pruner
    is_open = not named or (isinstance(pruner, HalvingPruner) and pruner.cohorts == AUTO)
    stored, chosen = search.attrs.get(schema.PRUNER), False
    if is_open and not _is_sound(stored):
        with locked(search.storage, search.spec.storage):
            stored = search.attrs.get(schema.PRUNER)
            if not _is_sound(stored):
                learns = search.spec.sampler.name in LEARNING
                name = search.spec.pruner.name if named else _default(search, stacked)
                stored = {"name": name, "cohorts": Halving.cohorts_for(search.spec.trials, at_once, learns)}
                search.remember(schema.PRUNER, stored)
                chosen = name == "halving" and not named
    name = search.spec.pruner.name if named or stored is None else stored["name"]
    if name == "halving":
        if not isinstance(pruner, HalvingPruner):
            search.study.pruner = pruner = HalvingPruner(search.spec.epochs)
        cohorts = 1 if stored is None else stored["cohorts"]
        rule = Halving if search.spec.limit is None else partial(TimedHalving, at_once=at_once)
        search.pause_by(rule(pruner, cohorts, maximize=search.maximize, value=search.spec.value))
    return chosen


def _is_sound(stored: Any) -> bool:
    """Whether what the storage holds is what is written here."""
    if not isinstance(stored, Mapping):
        return False
    cohorts = stored.get("cohorts")
    return stored.get("name") in ("halving", "median") and type(cohorts) is int and cohorts > 0


def _default(search: Search, stacked: bool) -> str:
    spec = search.spec
    is_new = search.view().n_claimed == 0  # what an older version began stays as it was
    rungs = HalvingPruner(spec.epochs).rungs
    suits = stacked and rungs and spec.sampler.name not in CANNOT_HALVE and not search.others
    return "halving" if suits and is_new else "median"
