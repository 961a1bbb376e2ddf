"""What lies in a bundle's folder, and numbers as its JSON has them. Nothing here imports torch."""

import math
from collections.abc import Mapping
from typing import Any

FILES = ("model.pt", "model.torchscript.pt", "bundle.json")


def finite(value: Any) -> Any:
    """Return plain values with None for every number that JSON has not: NaN and infinity."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
