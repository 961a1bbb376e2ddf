"""A YAML file as plain values, with the line each one stands on.

`read` gives a `Document`: the values, and `where(path)` for messages. It takes `${NAME}` and `${NAME:-default}` from
the environment, refuses a key written twice, and lets `--set a.b=1` replace or add a value. What it reads as YAML:
`hpo.study.yaml_values`.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from hpo.errors import Fault, InputError, conceal, without_passwords
from hpo.study.yaml_values import DEEPEST, TOO_DEEP, NotYaml, Path_, TooLarge, dotted, read_yaml

_SECRET_KEYS = ("options", "storage", "tracking")
"""The keys whose variables may hold secrets: their values are shown to nobody."""
_MOST_BYTES = 1_000_000
_VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")


@dataclass
class Document:
    """The values of one YAML file; `faults` are those found while reading it."""

    name: str
    values: dict[str, Any] = field(default_factory=dict)
    written: dict[str, Any] = field(default_factory=dict)
    """The values as they stand in the file, before any override."""
    faults: list[Fault] = field(default_factory=list)
    lines: dict[Path_, int] = field(default_factory=dict)
    overridden: set[Path_] = field(default_factory=set)
    variables: dict[Path_, str] = field(default_factory=dict)
    """The texts that took something from the environment, as they are written: `${NAME}`."""

    def where(self, path: Path_) -> str:
        """Return `file:line` of the value at `path`, of the nearest that holds it, or of the --set it came from."""
        path = tuple(path)
        for end in range(len(path), 0, -1):
            if path[:end] in self.overridden:
                return f"--set {dotted(path[:end])}"
            if path[:end] in self.lines:
                return f"{self.name}:{self.lines[path[:end]]}"
        return f"{self.name}:{self.lines.get((), 1)}" if self.lines else self.name

    def as_json(self, without: Sequence[str]) -> str:
        """Return the values as JSON, which is YAML too, but for the keys `without`.

        What came from the environment is `${NAME}` there, to be taken from the reader's own, except for numbers that
        are no option's; a password of an address is `***`.
        """

        def shown(path: Path_, value: Any) -> Any:
            if path in self.variables and (path[0] == "options" or isinstance(value, str)):
                return self.variables[path]
            return without_passwords(value) if isinstance(value, str) else value

        kept = {key: value for key, value in self.values.items() if key not in without}
        return json.dumps(_mapped(kept, (), shown))

    def options(self) -> dict[str, Any]:
        """Return the options as they may be stored and shown: what is not to be seen with a fingerprint, to compare."""

        def shown(path: Path_, value: Any) -> Any:
            text = self.variables.get(path, without_passwords(value) if isinstance(value, str) else value)
            return value if text == value else f"{text} #{_fingerprint(path, str(value))}"

        options = self.values.get("options") or {}
        return {key: _mapped(value, ("options", key), shown) for key, value in options.items()}

    def render(self, faults: Sequence[Fault]) -> list[str]:
        """Return `faults` as `file:line: path: message`, in the order of the file."""

        def order(fault: Fault) -> tuple[int, int]:
            known = [end for end in range(len(fault.path), -1, -1) if fault.path[:end] in self.lines]
            return self.lines[fault.path[: known[0]]] if known else 0, len(fault.path)

        texts = []
        for fault in sorted(faults, key=order):
            place = f"{self.where(fault.path)}: " + (f"{dotted(fault.path)}: " if fault.path else "")
            texts.append(place + fault.message)
        return list(dict.fromkeys(texts))


def _mapped(value: Any, path: Path_, leaf: Callable[[Path_, Any], Any]) -> Any:
    """Return `value` with `leaf` of everything in it that is no mapping and no list."""
    if isinstance(value, dict):
        return {key: _mapped(item, (*path, key), leaf) for key, item in value.items()}
    if isinstance(value, list):
        return [_mapped(item, (*path, index), leaf) for index, item in enumerate(value)]
    return leaf(path, value)


@cache
def _fingerprint(path: Path_, value: str) -> str:
    """Return 16 hex digits that tell one secret from another, and are slow to guess it from."""
    salt = f"hpo {dotted(path)}".encode()
    return hashlib.pbkdf2_hmac("sha256", value.encode(), salt, 100_000).hex()[:16]


def read(path: Path, overrides: Mapping[str, str] | None = None, environ: Mapping[str, str] = os.environ) -> Document:
    """Read the file at `path` and lay `overrides` (`{"params.batch_size": "64"}`, values as YAML) over it.

    Raises InputError where there is nothing to read: no such file, not YAML, not a mapping. Everything else that is
    wrong is in the document's `faults`, so that it is reported together with what the spec finds.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)  # no more, should it be a device that never ends
        if len(content) > _MOST_BYTES:
            raise InputError(
                f"{path}: is larger than {_MOST_BYTES // 1_000_000} MB; give the study file, which is YAML"
            )
        text = content.decode("utf-8")
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; a study file is YAML, see `hpo run --help`") from error
    except IsADirectoryError as error:
        raise InputError(f"{path}: is a folder; give the study file in it") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    document = Document(name=str(path))
    values = _load(text, document)
    if not isinstance(values, dict):
        came = "nothing" if values is None else type(values).__name__
        raise InputError(f"{path}: a study file is a mapping (`objective: breast_cancer`), but it holds {came}")
    return _finished(document, values, overrides, environ)


def of_values(
    name: str, values: Any, overrides: Mapping[str, str] | None = None, environ: Mapping[str, str] = os.environ
) -> Document:
    """Return a document of `values` that were written in Python; `name` stands for the file in messages.

    Tuples are lists, paths texts, NumPy's numbers Python's. Raises InputError for what no study file can hold.
    """
    if not isinstance(values, Mapping):
        raise InputError(f"{name}: must be a mapping with study.yaml's keys, but is a {type(values).__name__}")
    return _finished(Document(name=name), _plain(values, (), name), overrides, environ)


def _plain(value: Any, path: Path_, name: str) -> Any:
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise InputError(
                    f"{name}: {dotted(path) or 'the study'}: its keys must be texts, but one is {key!r:.80}"
                )
        return {key: _plain(item, (*path, key), name) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, (*path, index), name) for index, item in enumerate(value)]
    if isinstance(value, Path):
        return str(value)
    if type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0:
        return value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise InputError(
        f"{name}: {dotted(path)}: no study file can hold a {type(value).__name__}, but it is {value!r:.80}"
    )


def _finished(
    document: Document, values: dict[str, Any], overrides: Mapping[str, str] | None, environ: Mapping[str, str]
) -> Document:
    """Return `document` with `values`, what is laid over them, and the environment's variables in their places."""
    document.values, document.written = values, deepcopy(values)
    for key, value in (overrides or {}).items():
        _override(document, key, value)
    document.values = _expand(document.values, (), document, environ)
    return document


def _load(text: str, document: Document) -> Any:
    """Return the values of `text`, noting lines and double keys in `document`."""
    try:
        read = read_yaml(text)
    except NotYaml as error:
        at = document.name if error.line is None else f"{document.name}:{error.line}"
        raise InputError(f"{at}: not YAML: {error}") from error
    except TooLarge as error:
        raise InputError(f"{document.name}: {error}") from error
    document.lines = read.lines
    document.faults += [
        Fault(path=path, message=f"is written twice, first in line {line}") for path, line in read.twice
    ]
    return read.values


def _override(document: Document, key: str, text: str) -> None:
    path = tuple(key.split("."))
    if len(path) > DEEPEST:
        raise InputError(f"--set {key[:40]}...: {TOO_DEEP}")
    target = document.values
    for part in path[:-1]:
        held = {} if target.get(part) is None else target[part]
        if not isinstance(held, dict):
            raise InputError(f"--set {key}={text}: {part} is no mapping, so nothing can be set in it")
        target[part] = dict(held)  # a copy: where the file has it as `*name` elsewhere, it stays as it is there
        target = target[part]
    try:
        target[path[-1]] = read_yaml(text).values
    except (NotYaml, TooLarge) as error:
        came = text if len(text) <= 80 else f"{text[:77]}..."
        why = str(error) if isinstance(error, TooLarge) else f"the value is not YAML: {error}"
        raise InputError(f"--set {key}={came}: {why}") from error
    document.overridden.add(path)
    inside = [other for other in document.lines if other[: len(path)] == path and other != path]
    for other in inside:  # what stood there is gone: a fault in the new value is not the file's
        del document.lines[other]


def _expand(value: Any, path: Path_, document: Document, environ: Mapping[str, str]) -> Any:
    """Return `value` with the `${NAME}` in its strings taken from `environ`; a string that was one is read as YAML."""
    if isinstance(value, dict):
        return {str(key): _expand(item, (*path, str(key)), document, environ) for key, item in value.items()}
    if isinstance(value, list):
        return [_expand(item, (*path, index), document, environ) for index, item in enumerate(value)]
    if not isinstance(value, str) or not _VARIABLE.search(value):
        return value
    document.variables[path] = value

    def substitute(match: re.Match[str]) -> str:
        name, default = match.groups()
        if name not in environ and default is None:
            message = f"the environment variable {name} is not set; set it, or write ${{{name}:-default}}"
            document.faults.append(Fault(path=path, message=message))
        if environ.get(name) and path[0] in _SECRET_KEYS:
            conceal(environ[name], f"${{{name}}}")
        return environ.get(name) or default or ""  # as in a shell, an empty variable takes the default too

    expanded = _VARIABLE.sub(substitute, value)
    if path[0] == "options":  # it may be a secret of digits: the option's type says what it is
        return expanded
    if _VARIABLE.fullmatch(value) and (number := _scalar(expanded)) is not None:
        return number
    return expanded


def _scalar(text: str) -> int | float | bool | None:
    """Return the number or boolean that `text` is in YAML, so that `trials: ${N}` is one; None for any other text."""
    try:
        value = read_yaml(text).values
    except (NotYaml, TooLarge):  # so it is a text
        return None
    return value if isinstance(value, int | float) else None
