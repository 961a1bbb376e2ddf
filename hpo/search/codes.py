"""What code the trials of a study were trained with: an objective may be changed while its study is resumed."""

import math
import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from optuna.trial import FrozenTrial

from hpo.errors import masked
from hpo.search import schema

_SINCE, _CODE = "since", "code"


def codes_in(attrs: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the codes of a study's objective one after the other, from its `user_attrs`; see `schema.CODES`.

    An earlier version stored the present one only, which then counts as that from the start.
    """
    stored = attrs.get(schema.CODES)
    codes = [each for each in stored if _is_code(each)] if isinstance(stored, list) else []
    present = attrs.get(schema.CODE)
    return codes or ([] if present is None else [{_SINCE: 0.0, _CODE: str(present)}])


def _is_code(stored: Any) -> bool:
    return (
        isinstance(stored, Mapping) and type(stored.get(_SINCE)) in (int, float) and isinstance(stored.get(_CODE), str)
    )


def with_code(attrs: Mapping[str, Any], code: str, same: Collection[str] = ()) -> list[dict[str, Any]]:
    """Return these with the code that is trained from now on; `same` are other fingerprints of it."""
    codes = codes_in(attrs)
    if codes and codes[-1][_CODE] in (code, *same):
        return [*codes[:-1], {**codes[-1], _CODE: code}]
    return [*codes, {_SINCE: time.time(), _CODE: code}]


def code_of(attrs: Mapping[str, Any], trial: FrozenTrial) -> str | None:
    """Return the fingerprint of the code that a trial was trained with, by when it was started; None: not known."""
    codes = codes_in(attrs)
    at = math.inf if trial.datetime_start is None else trial.datetime_start.timestamp()
    found = next((each for each in reversed(codes) if each[_SINCE] <= at), codes[0] if codes else None)
    return None if found is None else str(found[_CODE])


def codes_text(attrs: Mapping[str, Any], trials: Sequence[FrozenTrial]) -> str:
    """Return that `trials` are of several codes, and how many are of which; nothing where they are of one."""
    if len(codes_in(attrs)) < 2:
        return ""
    n_of = Counter(code_of(attrs, trial) for trial in trials if trial.datetime_start is not None)
    if len(n_of) < 2:
        return ""
    each = ", ".join(f"{n} of {masked(str(code))}" for code, n in n_of.items())
    return f"trials of {len(n_of)} codes of the objective, which may not be comparable: {each}"
