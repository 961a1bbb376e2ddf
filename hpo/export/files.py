"""What lies in a bundle's folder, and numbers as its JSON has them. Nothing here imports torch."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hpo.errors import InputError

FORMAT = 2
"""The version of bundle.json that is written; 1 had no checksums."""
_MUST = {"inputs", "output", "class_names", "feature_names"}
FILES = ("model.pt", "model.torchscript.pt", "bundle.json")


def finite(value: Any) -> Any:
    """Return plain values with None for every number that JSON has not: NaN and infinity."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_about(folder: Path) -> dict[str, Any]:
    """Return bundle.json's content. Raises InputError where it is none."""
    file = folder / "bundle.json"
    try:
        about = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: cannot be read ({(str(error).splitlines() or [''])[0][:200]})") from error
    if not isinstance(about, dict) or not isinstance(about.get("format"), int) or _MUST - set(about):
        raise InputError(f"{file}: is no description of an hpo bundle; `hpo export` makes one")
    if about["format"] > FORMAT:
        raise InputError(f"{file}: is of format {about['format']}, and this hpo reads up to {FORMAT}; upgrade hpo")
    return about
