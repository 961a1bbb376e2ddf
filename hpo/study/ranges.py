"""What an entry of `params` is: one plain value, or a range or choice to be searched. Optuna's: `hpo.study.space`."""

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from hpo.errors import Fault
from hpo.study.checking import faults_of


def _scalar(value: Any) -> Any:
    if value is not None and not isinstance(value, bool | int | float | str):
        raise ValueError("must be one value: a number, a text, true, false or null")
    return value


Scalar = Annotated[Any, AfterValidator(_scalar)]


class Frozen(BaseModel):
    """A part of the study file: frozen, strict, with no key that is not known."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError("must be a finite number")
    return value


Finite = Annotated[float, AfterValidator(_finite)]


class _Conditional(Frozen):
    when: dict[str, Any] = Field(default_factory=dict)
    """Ask for this parameter only where each of the named ones has one of these values (a tuple for each)."""

    @field_validator("when")
    @classmethod
    def _not_empty(cls, when: dict[str, Any]) -> dict[str, Any]:
        """Return `when` with a tuple of values for each name."""
        lists = {name: tuple(values) if isinstance(values, list) else (values,) for name, values in when.items()}
        for name, values in lists.items():
            if not values:
                raise ValueError(f"must name at least one value of {name}, but got []")
            for value in values:
                _scalar(value)
        return lists


class _Range(_Conditional):
    @model_validator(mode="after")
    def _bounds(self) -> "_Range":
        low, high, step = self.low, self.high, self.step  # type: ignore[attr-defined]
        if low >= high:
            raise ValueError(f"low < high must hold, but got low={low} and high={high}")
        if self.log and low <= 0:  # type: ignore[attr-defined]
            hint = "; for exactly 0 or a log range write `or: 0`" if low == 0 else ""
            raise ValueError(f"low > 0 must hold with log: true, but got low={low}{hint}")
        if step is not None and self.log:  # type: ignore[attr-defined]
            raise ValueError("step and log: true exclude each other; drop one")
        if step is not None and not 0 < step <= (high - low) * (1 + 1e-9):  # 0.5 - 0.4 is less than 0.1
            raise ValueError(f"0 < step <= high - low must hold, but got step={step}")
        return self


class FloatRange(_Range):
    """`{type: float, low:, high:, log:, step:, or:, when:}`."""

    type: Literal["float"]
    low: Finite
    high: Finite
    log: bool = False
    step: Finite | None = None
    otherwise: Annotated[Finite | None, Field(alias="or")] = None
    """`or`: exactly this value, or one from the range."""


class IntRange(_Range):
    """`{type: int, low:, high:, log:, step:, or:, when:}`."""

    type: Literal["int"]
    low: int
    high: int
    log: bool = False
    step: int | None = None
    otherwise: Annotated[int | None, Field(alias="or")] = None


class Categorical(_Conditional):
    """`{type: categorical, choices: [...], when:}`."""

    type: Literal["categorical"]
    choices: tuple[Scalar, ...] = Field(strict=False)

    @field_validator("choices")
    @classmethod
    def _distinct(cls, choices: tuple[Any, ...]) -> tuple[Any, ...]:
        if not choices:
            raise ValueError("must name at least one choice, but got []")
        if len(set(choices)) < len(choices):  # `true` and 1 too: Optuna stores the first of two equal choices
            raise ValueError(f"must name each choice once, but got {list(choices)}")
        return choices


Searched = FloatRange | IntRange | Categorical
_SEARCHED = TypeAdapter(Annotated[Searched, Field(discriminator="type")])
_SCALAR = TypeAdapter(Scalar)


def parse_param(value: Any) -> Any:
    """Return one entry of `params`: a `Searched` for a mapping, else the fixed value itself.

    Raises pydantic's ValidationError.
    """
    return _SEARCHED.validate_python(value) if isinstance(value, dict) else _SCALAR.validate_python(value)


def parse_params(params: Mapping[str, Any], at: tuple[str | int, ...]) -> tuple[dict[str, Any], list[Fault]]:
    """Return what `parse_param` makes of each entry, and the faults of those that are none."""
    good: dict[str, Any] = {}
    faults: list[Fault] = []
    for name, value in params.items():
        try:
            good[name] = parse_param(value)
        except ValidationError as error:
            faults += faults_of(error, (*at, name), value, _keys_of(value))
    return good, faults


def _keys_of(value: Any) -> list[str]:
    """Return the keys that a range of that type has."""
    models: dict[Any, type[Frozen]] = {"float": FloatRange, "int": IntRange, "categorical": Categorical}
    model = models.get(value.get("type")) if isinstance(value, dict) else None
    return [field.alias or name for name, field in model.model_fields.items()] if model else []
