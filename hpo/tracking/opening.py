"""The tracker that a study's `tracking:` names."""

import math
from collections.abc import Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from hpo.errors import InputError
from hpo.tracking.base import NullTracker, Tracker, check_address
from hpo.tracking.mlflow import MlflowTracker


def open_tracker(
    uri: str,
    study: str,
    outbox: Path,
    *,
    making: str = "",
    adopts: bool = True,
    tags: Mapping[str, str] | None = None,
    lease: float = math.inf,
) -> Tracker:
    """Return the tracker that `tracking:` names. Raises InputError for an address that can never work.

    `making` tells the study from others of its name (`Search.making`); where it `adopts`, runs that are of no making,
    as older versions made them, are taken for its own. Each run that this process makes gets `tags`. A trial that it
    begins is not ended by a peer within `lease` seconds.
    """
    check_address(uri)
    if uri == "off":
        return NullTracker()
    if not _has_mlflow():
        raise InputError(f"tracking {uri}: MLflow is not installed; pip install mlflow, or set tracking: off")
    return MlflowTracker(uri, study, outbox, making=making, adopts=adopts, tags=tags, lease=lease)


def _has_mlflow() -> bool:
    with suppress(ImportError):  # of what finds modules in place of Python's own
        return find_spec("mlflow") is not None
    return False
