"""A study file read as a `Draft`: the spec, the document it came from (for lines in messages), and all faults so far.

What is at fault is left out of a draft's spec, so that the checks that come after (the objective, the space, the
sampler) still run and a user sees every fault at once; `Draft.spec` must not be run while `Draft.faults` is not empty.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from hpo.errors import Fault
from hpo.study.checking import faults_of
from hpo.study.document import Document
from hpo.study.document import read as read_document
from hpo.study.ranges import parse_params
from hpo.study.spec import KEYS, StudySpec
from hpo.study.spec_parts import Confirm, Loading, Stop
from hpo.study.value import too_long

_PARTS: Mapping[str | int, Sequence[str]] = {
    "loading": tuple(Loading.model_fields),
    "stop": tuple(Stop.model_fields),
    "confirm": tuple(Confirm.model_fields),
}
"""The keys of what has keys of its own."""


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
    draft = draft_of(read_document(path, overrides), path.stem)
    if "name" not in draft.document.values:
        draft.faults[:] = [_of_the_file(fault) if fault.path == ("name",) else fault for fault in draft.faults]
    return draft


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
    spec, more = _spec(values, good)
    faults += more
    unset = {fault.path for fault in faults if _is_unset(fault)}  # what an unset variable left is no fault of its own
    faults = [fault for fault in faults if fault.path not in unset or _is_unset(fault)]
    if spec is not None and len(spec.start_with) > spec.trials:
        message = f"names {len(spec.start_with)} configurations, but trials is {spec.trials}; raise trials"
        faults.append(Fault(path=("start_with",), message=message))
    has_epochs = spec is not None and all(fault.path[:1] != ("epochs",) for fault in faults)
    if spec is not None and has_epochs and (why := too_long(spec.value, spec.epochs)) is not None:
        faults.append(Fault(path=("value",), message=why))
    return Draft(spec=spec, document=document, faults=faults, own_space=own_space)


def _spec(values: Mapping[str, Any], params: Mapping[str, Any]) -> tuple[StudySpec | None, list[Fault]]:
    """Return the spec of what in `values` has no fault, if there is at least an objective, and the faults."""
    left = dict(values)
    faults: list[Fault] = []
    while True:
        try:
            return StudySpec.model_validate(left | {"params": dict(params)}), faults
        except ValidationError as error:
            new = list(faults_of(error, (), left, KEYS, _PARTS))
        faults += new
        if any(fault.path == ("objective",) for fault in new):
            return None, faults
        for fault in new:
            left.pop(str(fault.path[0]), None)
        left.setdefault("name", "unnamed")


def _of_the_file(fault: Fault) -> Fault:
    """Return what is wrong with a name that nobody has written, with where it comes from."""
    why = "this is the file's name, since it has no `name`: write `name: ...` into it, or rename the file"
    return replace(fault, message=f"{fault.message}; {why}")


def _is_unset(fault: Fault) -> bool:
    return "environment variable" in fault.message


def _names_range(params: Any) -> bool:
    return isinstance(params, dict) and any(isinstance(value, dict) for value in params.values())
