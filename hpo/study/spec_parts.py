"""Parts of the study file: times, names of exceptions, and the keys that have keys of their own."""

import builtins
import re
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from hpo.study.checking import near
from hpo.study.ranges import Finite, Frozen

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def _seconds(value: Any) -> Any:
    """Return `2h`, `1h30m`, `90s` or a number of seconds as seconds."""
    if isinstance(value, str):
        parts = re.findall(r"(\d+(?:\.\d+)?)\s*([smhd])", value)
        if not parts or re.sub(r"(\d+(?:\.\d+)?)\s*([smhd])\s*", "", value):
            raise ValueError("must be a length of time such as 90s, 45m, 2h, 1h30m or 1d")
        return float(sum(float(number) * _UNITS[unit] for number, unit in parts))
    return value


Time = Annotated[Finite, Field(gt=0), BeforeValidator(_seconds)]


class Loading(Frozen):
    """How data gets to the device. What does not lie there streams through a `DataLoader`, with torch's own keys."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    resident: Literal["auto"] | bool = "auto"
    """Whether data lies on the device as a whole: `auto` (where it fits), `true` or `false`."""
    num_workers: Annotated[int | None, Field(ge=0)] = None
    """Processes that load batches. By default up to 4 beside a GPU, else none."""
    prefetch_factor: Annotated[int | None, Field(ge=1)] = None
    """Batches that each of these processes loads ahead. By default torch's own."""
    persistent_workers: bool = True
    """Whether these processes outlive an epoch."""
    pin_memory: bool | None = None
    """Whether batches are put into page-locked memory. By default beside a GPU."""
    non_blocking: bool = True
    """Whether the program goes on while a batch is copied from page-locked memory; the GPU waits for it."""


TERMINATORS: Mapping[str, int] = {"regret_bound": 30, "emmr": 30, "best_value_stagnation": 32}
"""Optuna's terminators by name, and how many complete trials each needs before it can end a search."""


def _terminator(value: Any) -> Any:
    """`terminator: true` is short for Optuna's default, `false` for none."""
    if value is None or isinstance(value, bool):
        return "regret_bound" if value else None
    if not isinstance(value, str) or value not in TERMINATORS:
        hint = near(value, tuple(TERMINATORS)) if isinstance(value, str) else ""
        raise ValueError(f"must be true or one of {', '.join(TERMINATORS)}, but got {value!r}{hint}")
    return value


class Stop(Frozen):
    """What ends a search before `trials`: the first of these that holds."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    no_gain: Annotated[int | None, Field(ge=1)] = None
    """N: none of the last N finished trials (complete, pruned or failed) was better than the best before them."""
    target: Finite | None = None
    """A complete trial's value has reached this number, in the study's direction."""
    terminator: Annotated[str | None, BeforeValidator(_terminator)] = None
    """One of Optuna's terminators: `regret_bound` (or `true`), `emmr`, `best_value_stagnation`."""

    @model_validator(mode="after")
    def _some_rule(self) -> "Stop":
        if not self.rules():
            raise ValueError(f"must name at least one of {', '.join(Stop.model_fields)}, but got none of them")
        return self

    def rules(self) -> dict[str, int | float | str]:
        """Return what is set, by key."""
        return {key: value for key in Stop.model_fields if (value := getattr(self, key)) is not None}


def stop_of(value: Any) -> Any:
    """`stop: false` is none at all."""
    if value is None or value is False:
        return None
    if not isinstance(value, Mapping | Stop):
        raise ValueError(f"must be false or a mapping of {', '.join(Stop.model_fields)}, but got {value!r}")
    return value


class Confirm(Frozen):
    """How the best configurations of a search are trained again, with fresh seeds, before one of them is chosen."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    top: Annotated[int, Field(ge=1)] = 5
    """How many of the best distinct configurations are trained again; at most as many as `trials`."""
    seeds: Annotated[int, Field(ge=1)] = 5
    """How many fresh seeds each of them is trained with."""
    resplit: bool = False
    """Whether each seed has a train and a validation split of its own, drawn from the rows of both."""
    folds: Annotated[int | None, Field(ge=2)] = None
    """K: cross-validation over train and validation in K folds, for each seed. By default none."""

    @model_validator(mode="after")
    def _one_way_to_split(self) -> "Confirm":
        if self.resplit and self.folds is not None:
            raise ValueError(f"resplit and folds exclude each other; drop one, but got both (folds: {self.folds})")
        if self.seeds == 1 and self.folds is None:
            raise ValueError("seeds must be at least 2, but got 1: one result says nothing of how much they differ")
        return self

    @property
    def runs(self) -> int:
        """How often each configuration is trained."""
        return self.seeds * (self.folds or 1)


def confirm_of(value: Any) -> Any:
    """`confirm: true` is short for all of its defaults, `false` for none at all."""
    if value is None or isinstance(value, bool):
        return {} if value else None
    if not isinstance(value, Mapping | Confirm):
        raise ValueError(f"must be true, false or a mapping of {', '.join(Confirm.model_fields)}, but got {value!r}")
    return value


def wrong_names(catch: Sequence[str]) -> Iterator[str]:
    """Yield why a name cannot be meant, for each such name."""
    for name in catch:
        known = getattr(builtins, name, None)
        if isinstance(known, type) and issubclass(known, BaseException):
            if not issubclass(known, Exception):
                yield f"must name an Exception, but {name} is how a process is stopped"
        elif known is not None or not re.fullmatch(r"[A-Za-z_][\w.]*", name):
            yield f"must name an exception, as Python shows it (ValueError, torch.linalg.LinAlgError), but got {name!r}"
        elif near := get_close_matches(name, [n for n in dir(builtins) if n.endswith(("Error", "Exception"))], 1, 0.85):
            yield f'there is no exception {name!r}; did you mean "{near[0]}"?'
