"""study.yaml as a frozen, typed `StudySpec`: parsed once, here, and nowhere else (`pydantic` stays in this module).

`read` gives a `Draft`: the spec, the document it came from (for lines in messages), and all the faults found so far.
What is at fault is left out of a draft's spec, so that the checks that come after (the objective, the space, the
sampler) still run and a user sees every fault at once; `Draft.spec` must not be run while `Draft.faults` is not empty.
"""

import builtins
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from hpo.errors import Fault, did_you_mean
from hpo.study.document import Document
from hpo.study.document import read as read_document


def _scalar(value: Any) -> Any:
    if value is not None and not isinstance(value, bool | int | float | str):
        raise ValueError("must be one value: a number, a text, true, false or null")
    return value


Scalar = Annotated[Any, AfterValidator(_scalar)]
SAMPLERS = ("tpe", "gp", "cmaes", "qmc", "random", "grid", "brute_force")
PRUNERS = ("median", "percentile", "successive_halving", "hyperband", "patient", "threshold", "wilcoxon", "none")


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError("must be a finite number")
    return value


Finite = Annotated[float, AfterValidator(_finite)]


class _Conditional(_Frozen):
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


_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def _seconds(value: Any) -> Any:
    """Return `2h`, `1h30m`, `90s` or a number of seconds as seconds."""
    if isinstance(value, str):
        parts = re.findall(r"(\d+(?:\.\d+)?)\s*([smhd])", value)
        if not parts or re.sub(r"(\d+(?:\.\d+)?)\s*([smhd])\s*", "", value):
            raise ValueError("must be a length of time such as 90s, 45m, 2h, 1h30m or 1d")
        return float(sum(float(number) * _UNITS[unit] for number, unit in parts))
    return value


class Plugin(BaseModel):
    """A sampler or a pruner: a name and the keys of Optuna's own class, checked against it in `hpo.search.search`."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True)
    name: str

    @property
    def keys(self) -> dict[str, Any]:
        """All that stands beside `name`."""
        return dict(self.model_extra or {})


def _named(value: Any) -> Any:
    """`sampler: tpe` is short for `sampler: {name: tpe}`."""
    return {"name": value} if isinstance(value, str) else {"name": "none"} if value is None else value


def _one_of(known: tuple[str, ...]) -> AfterValidator:
    """Return a validator that takes a plugin with one of the `known` names."""

    def check(plugin: Plugin) -> Plugin:
        if plugin.name not in known:
            raise ValueError(f"must be one of {', '.join(known)}, but got {plugin.name!r}{_near(plugin.name, known)}")
        return plugin

    return AfterValidator(check)


def _near(name: str, known: tuple[str, ...]) -> str:
    hint = did_you_mean(name, known)
    return hint if "did you mean" in hint else ""


def _off(value: Any) -> Any:
    return "off" if value is False or value is None else value


def _stack(value: Any) -> Any:
    if value != "auto" and not (type(value) is int and value >= 1):
        raise ValueError(f"must be auto, or a whole number of at least 1, but got {value!r}")
    return value


LONGEST_NAME = 128
"""Bytes of a study's name. A file's name may have 255, and `<name>.<process>.jsonl` has up to 100 beside it."""


def _cut(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."


_Time = Annotated[Finite, Field(gt=0), BeforeValidator(_seconds)]


class Loading(_Frozen):
    """How data gets to the device. What does not lie there streams through a `DataLoader`, with torch's own keys."""

    resident: Literal["auto"] | bool = "auto"
    """Whether data lies on the device as a whole; auto: where it fits."""
    num_workers: Annotated[int | None, Field(ge=0)] = None
    """None: up to 4 beside a GPU, else none."""
    prefetch_factor: Annotated[int | None, Field(ge=1)] = None
    persistent_workers: bool = True
    pin_memory: bool | None = None
    """None: beside a GPU."""
    non_blocking: bool = True


class StudySpec(_Frozen):
    """All of a study, as study.yaml says it. Defaults are those of the README's table."""

    name: Annotated[str, BeforeValidator(lambda v: str(v) if type(v) in (int, float) else v)]
    """Optuna's study and MLflow's experiment; the folder of the bundle."""
    objective: str
    """One of hpo's own (`hpo objectives`), or `module[:Name]`, or `path/to/file.py[:Name]`."""
    options: dict[str, Any] = Field(default_factory=dict)
    """The objective's own options; `hpo.study.objective` validates them against its `Options`."""
    metric: str | None = None
    """One of the objective's metrics; None: the objective's own first choice."""
    direction: Literal["minimize", "maximize"] | None = None
    """Whether less of the metric is better, or more; None: as the metric says, of a function's value less."""
    value: Literal["best", "last"] = "best"
    """A trial's value is its best epoch's, or its last one's."""
    epochs: int = Field(default=20, ge=1)
    patience: int | None = Field(default=None, ge=1)
    """A trial ends when its metric has not improved for so many epochs; None: it has all its epochs."""
    trials: int = Field(default=50, ge=1)
    """Exactly so many, over all workers and all restarts."""
    timeout: _Time | None = None
    """Seconds, for the whole study."""
    seed: int = Field(default=42, ge=0)
    sampler: Annotated[Plugin, BeforeValidator(_named), _one_of(SAMPLERS)] = Plugin(name="tpe")
    pruner: Annotated[Plugin, BeforeValidator(_named), _one_of(PRUNERS)] = Plugin(name="median")
    params: dict[str, Any] = Field(default_factory=dict)
    """Fixed values and `Searched` ranges by name."""
    start_with: tuple[dict[str, Scalar], ...] = Field(default=(), strict=False)
    """Configurations that are tried first."""
    storage: str = "sqlite:///mlruns/optuna.db"
    tracking: Annotated[str, BeforeValidator(_off)] = "sqlite:///mlruns/mlflow.db"
    device: str = "auto"
    precision: Literal["float32", "tf32", "bf16"] = "float32"
    """How networks compute: as they are; with TF32 in matrix products (CUDA); under autocast to bfloat16."""
    deterministic: bool = False
    """Whether torch uses deterministic algorithms only, and refuses those that are not."""
    loading: Loading = Loading()
    checkpoint_every: _Time = 60.0
    """Seconds, at the least, between two checkpoints of a trial; they are made at the end of epochs."""
    grace: _Time = 60.0
    """Seconds without a sign of life after which a worker counts as dead and its trials are taken up by others."""
    retries: int = Field(default=2, ge=0)
    """How often a trial whose worker died is begun again: it may be the trial that kills it."""
    outage: _Time = 600.0
    """Seconds for which the storage may be away before a worker stops."""
    catch: tuple[str, ...] = Field(default=(), strict=False)
    """Exceptions by name that fail the trial whose code raises them, not the study (`Study.optimize(catch=)`)."""
    stack: Annotated[Literal["auto"] | int, BeforeValidator(_stack)] = "auto"
    """How many trials are trained at once on the device, as one stack, where their structure allows; auto: measured."""

    @field_validator("catch")
    @classmethod
    def _exceptions(cls, catch: tuple[str, ...]) -> tuple[str, ...]:
        for why in _wrong_names(catch):
            raise ValueError(why)
        return catch

    @field_validator("name")
    @classmethod
    def _file_name(cls, name: str) -> str:
        if not re.fullmatch(r"[\w][\w .+=-]*", name):
            raise ValueError(f"must be letters, digits, `_`, `-`, `.` (it names a folder), but got {_cut(name)!r}")
        if (size := len(name.encode())) > LONGEST_NAME:
            raise ValueError(
                f"must be at most {LONGEST_NAME} bytes long, since it names files, but got {size} bytes: {_cut(name)!r}"
            )
        return name


KEYS = tuple(StudySpec.model_fields)


@dataclass(kw_only=True)
class Draft:
    """A spec with the document it came from and the faults found so far."""

    spec: StudySpec | None
    """None where not even the objective's name is known."""
    document: Document
    faults: list[Fault]
    own_space: bool
    """Whether the file names a range, so that its `params` are the whole space; else the objective's is used."""


def read(path: Path, overrides: Mapping[str, str] | None = None) -> Draft:
    """Read study.yaml at `path`, with `--set` overrides; see `hpo.study.document.read` for what it raises."""
    return draft_of(read_document(path, overrides), path.stem)


def draft_of(document: Document, name: str) -> Draft:
    """Return the spec of a study's values, with all that is wrong with them; `name` is its name if it has none."""
    values = dict(document.values)
    faults = list(document.faults)
    own_space = any(_names_range(each.get("params")) for each in (document.values, document.written))
    values.setdefault("name", name)
    params = values.pop("params", None)
    if params is not None and not isinstance(params, dict):
        faults.append(Fault(path=("params",), message=f"must be a mapping of names, but got {params!r}"))
    good, more = parse_params(params if isinstance(params, dict) else {}, ("params",))
    faults += more
    spec = None
    while spec is None:
        try:
            spec = StudySpec.model_validate(values | {"params": good})
        except ValidationError as error:
            new = list(_faults(error, (), values))
            faults += new
            if any(fault.path == ("objective",) for fault in new):
                break
            for fault in new:
                values.pop(fault.path[0], None)
            values.setdefault("name", "unnamed")
    known = {fault.path for fault in faults if "environment variable" in fault.message}
    faults = [fault for fault in faults if fault.path not in known or "environment variable" in fault.message]
    if spec is not None and spec.start_with and len(spec.start_with) > spec.trials:
        message = f"names {len(spec.start_with)} configurations, but trials is {spec.trials}; raise trials"
        faults.append(Fault(path=("start_with",), message=message))
    return Draft(spec=spec, document=document, faults=faults, own_space=own_space)


def parse_params(params: Mapping[str, Any], at: tuple[str | int, ...]) -> tuple[dict[str, Any], list[Fault]]:
    """Return what `parse_param` makes of each entry, and the faults of those that are none."""
    good: dict[str, Any] = {}
    faults: list[Fault] = []
    for name, value in params.items():
        try:
            good[name] = parse_param(value)
        except ValidationError as error:
            faults += _faults(error, (*at, name), value)
    return good, faults


def _names_range(params: Any) -> bool:
    return isinstance(params, dict) and any(isinstance(value, dict) for value in params.values())


def validate(cls: type, values: Mapping[str, Any], at: tuple[str | int, ...]) -> tuple[Any, list[Fault]]:
    """Return an instance of the dataclass `cls` made of `values`, checked by its annotations, and the faults found."""
    known = [field.name for field in fields(cls)]
    faults = [
        Fault(path=(*at, name), message=f"unknown option{did_you_mean(name, known)}")
        for name in values
        if name not in known
    ]
    try:
        adapter = TypeAdapter(cls, config=None)
        return adapter.validate_python({k: v for k, v in values.items() if k in known}, strict=False), faults
    except ValidationError as error:
        return None, faults + list(_faults(error, at, dict(values)))


def _faults(error: ValidationError, at: tuple[str | int, ...], values: Any) -> Iterator[Fault]:
    """Translate pydantic's errors into ours: the path as the file has it, the rule, what came, a hint."""
    for item in error.errors(include_url=False):
        path, here = [], values
        for part in item["loc"]:
            inside = (isinstance(here, dict) and part in here) or (
                isinstance(here, list | tuple) and isinstance(part, int) and part < len(here)
            )
            if inside:
                here = here[part]  # type: ignore[index]
                path.append(part)
            elif part == item["loc"][-1] and item["type"] == "missing":
                path.append(part)
        yield Fault(path=(*at, *path), message=_message(item, here, values))


def _message(item: Any, here: Any, values: Any) -> str:
    kind, context = item["type"], item.get("ctx", {})
    if kind == "extra_forbidden":
        return f"unknown key{did_you_mean(item['loc'][-1], _known_keys(item, values))}"
    if kind == "missing":
        return "is missing"
    if kind == "union_tag_not_found":
        return "type is missing; write type: float, int or categorical"
    if kind == "union_tag_invalid":
        tag = context["tag"]
        return f"type must be float, int or categorical, but got {tag!r}{_near(tag, ('float', 'int', 'categorical'))}"
    if kind == "value_error":
        text = str(context["error"])
        whole = here is values and isinstance(here, dict)
        return text if "got" in text or whole else f"{text}, but got {here!r}"
    rule = (
        item["msg"].replace("Input should be", "must be").replace("a valid ", "a ").replace("a integer", "an integer")
    )
    rule = re.sub(r", (got a|unable to) .*", "", rule)
    return f"{rule}, but got {here!r}"


def _known_keys(item: Any, values: Any) -> list[str]:
    models = {"float": FloatRange, "int": IntRange, "categorical": Categorical}
    model = models.get(str(item["loc"][0])) if isinstance(values, dict) and "objective" not in values else None
    if model is None:
        return list(KEYS)
    return [field.alias or name for name, field in model.model_fields.items()]


def _wrong_names(catch: Sequence[str]) -> Iterator[str]:
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
