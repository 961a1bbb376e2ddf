"""pydantic's errors as ours: the path as the file has it, the rule, what came, a hint."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from hpo.errors import Fault, did_you_mean


def validate(cls: type, values: Mapping[str, Any], at: tuple[str | int, ...]) -> tuple[Any, list[Fault]]:
    """Return an instance of the dataclass `cls` made of `values`, checked by its annotations, and the faults found."""
    known = [field.name for field in fields(cls)]
    faults = [
        Fault(path=(*at, name), message=f"unknown option{did_you_mean(name, known)}")
        for name in values
        if name not in known
    ]
    try:
        adapter: TypeAdapter[Any] = TypeAdapter(cls, config=None)
        return adapter.validate_python({k: v for k, v in values.items() if k in known}, strict=False), faults
    except ValidationError as error:
        return None, faults + list(faults_of(error, at, dict(values), known))


def defaults_of(cls: type) -> dict[str, Any]:
    """Return the defaults of the dataclass `cls`, by name, as plain values; fields that must be given have none."""
    made = {
        field.name: field.default_factory() if field.default_factory is not MISSING else field.default
        for field in fields(cls)
    }
    plain: dict[str, Any] = json.loads(json.dumps({k: v for k, v in made.items() if v is not MISSING}, default=str))
    return plain


def faults_of(
    error: ValidationError,
    at: tuple[str | int, ...],
    values: Any,
    known: Sequence[str],
    parts: Mapping[str | int, Sequence[str]] | None = None,
) -> Iterator[Fault]:
    """Translate the errors of `values`, which stand `at` that place and may have the `known` keys.

    `parts` are the known keys of those that have keys of their own.
    """
    for item in error.errors(include_url=False):
        path: list[str | int] = []
        here = values
        for part in item["loc"]:
            inside = (isinstance(here, dict) and part in here) or (
                isinstance(here, list | tuple) and isinstance(part, int) and part < len(here)
            )
            if inside:
                here = here[part]
                path.append(part)
            elif part == item["loc"][-1] and item["type"] == "missing":
                path.append(part)
        whole = here is values and isinstance(here, dict)
        of = known if len(item["loc"]) < 2 or parts is None else parts.get(item["loc"][0], known)
        yield Fault(path=(*at, *path), message=_message(item, here, whole, of))


def _message(item: ErrorDetails, here: Any, whole: bool, known: Sequence[str]) -> str:
    kind, context = item["type"], item.get("ctx", {})
    if kind == "extra_forbidden":
        return f"unknown key{did_you_mean(item['loc'][-1], known)}"
    if kind == "missing":
        return "is missing"
    if kind == "union_tag_not_found":
        return "type is missing; write type: float, int or categorical"
    if kind == "union_tag_invalid":
        tag = context["tag"]
        return f"type must be float, int or categorical, but got {tag!r}{near(tag, ('float', 'int', 'categorical'))}"
    if kind == "value_error":
        text = str(context["error"])
        return text if "got" in text or whole else f"{text}, but got {here!r}"
    if kind in ("tuple_type", "list_type") and isinstance(here, str | int | float):
        return f"must be a list, but got {here!r}; write [{here}]"
    if kind == "string_type" and isinstance(here, int | float) and not isinstance(here, bool):
        return f'must be a text, but got the number {here!r}; write "{here}", with the quotes'
    rule = (
        item["msg"].replace("Input should be", "must be").replace("a valid ", "a ").replace("a integer", "an integer")
    )
    rule = re.sub(r", (got a|unable to) .*", "", rule)
    return f"{rule}, but got {here!r}"


def near(name: str, known: Sequence[str]) -> str:
    """Return ` (did you mean "x"?)` where one of `known` is near, else nothing."""
    hint = did_you_mean(name, known)
    return hint if "did you mean" in hint else ""
