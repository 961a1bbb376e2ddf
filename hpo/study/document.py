"""A YAML file as plain values, with the line each one stands on.

`read` gives a `Document`: the values, and `line(path)` for messages. Beyond YAML 1.1 it reads `1e-5` as a number,
takes `${NAME}` and `${NAME:-default}` from the environment, refuses a key written twice, and lets `--set a.b=1`
replace or add a value. What is too large to be a study (a file, or what its aliases expand to) is refused before it is
made. `yaml` is imported here and nowhere else.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from hpo.errors import Fault, InputError, conceal, without_passwords

Path_ = tuple[str | int, ...]

_SECRET_KEYS = ("options", "storage", "tracking")
"""The keys whose variables may hold secrets: their values are shown to nobody."""
_MOST_BYTES = 1_000_000
_MOST_VALUES = 20_000
"""How many keys and values a file may hold, aliases counted as often as they are used."""
_DEEPEST = 50
"""How far mappings and lists may be nested."""
_LARGEST = 1 << 63
"""Whole numbers are stored in 64 bits."""
_VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads `1e-5`, `off` and `1:30` as YAML 1.2 does (a number, words), and leaves dates as text.

    It makes plain values only: no dates, sets or bytes, whatever tag is written.
    """

    n_values = depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Refuse what is too large while it is read, not after."""
        self.n_values, self.depth = self.n_values + 1, self.depth + 1
        if self.n_values > _MOST_VALUES:
            raise _TooLarge(_TOO_MANY)
        if self.depth > _DEEPEST:
            raise _TooLarge(_TOO_DEEP)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _TooLarge(ValueError):
    """What is read is YAML, but too large or too deep to be a study."""


_TOO_MANY = f"holds more than {_MOST_VALUES:,} values, aliases counted as often as they are used; leave some out"
_TOO_DEEP = f"mappings and lists are nested more than {_DEEPEST} deep; put them into fewer"


def _whole(loader: _Loader, node: Any) -> int:
    try:
        value = loader.construct_yaml_int(node)
    except ValueError:  # Python itself refuses to read thousands of digits
        value = None
    if value is None or not -_LARGEST <= value < _LARGEST:
        text = str(node.value)
        came = text if len(text) <= 40 else f"{text[:20]}... of {len(text):,} digits"
        mark = node.start_mark
        raise yaml.constructor.ConstructorError(None, None, f"{came} is no whole number of at most 64 bits", mark)
    return value


_Loader.yaml_constructors = {
    tag: construct
    for tag, construct in yaml.SafeLoader.yaml_constructors.items()
    if tag is None or not tag.endswith((":timestamp", ":binary", ":set", ":omap", ":pairs"))
}
_Loader.add_constructor("tag:yaml.org,2002:int", _whole)
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":timestamp", ":float", ":bool", ":int"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(\d[\d_]*\.[\d_]*([eE][-+]?\d+)?|\.\d[\d_]*([eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+|\.(inf|Inf|INF))$"
        r"|^\.(nan|NaN|NAN)$"
    ),
    list("-+0123456789."),
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"^[-+]?(0|[1-9][\d_]*|0x[\da-fA-F_]+|0o?[0-7_]+)$"), list("-+0123456789")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)


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

        return _mapped(self.values.get("options") or {}, ("options",), shown)

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


def dotted(path: Sequence[str | int]) -> str:
    """Return ("params", "lr", 0) as `params.lr[0]`."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


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
        return _values(text, document)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        at = f"{document.name}:{mark.line + 1}" if mark else document.name
        raise InputError(f"{at}: not YAML: {_problem(error)}") from error
    except _TooLarge as error:
        raise InputError(f"{document.name}: {error}") from error
    except Exception as error:  # a value that its tag does not fit: PyYAML lets through whatever its parsing raises
        raise InputError(f"{document.name}: not YAML: {_problem(error)}") from error


def _values(text: str, document: Document | None = None) -> Any:
    """Return the values of `text`, noting lines and double keys in `document`, if there is one.

    Raises YAMLError, _TooLarge, or whatever PyYAML fails with where a tag's value is no such value.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _require_small(node)
        if document is not None:
            _walk(node, (), document)
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _problem(error: Exception) -> str:
    return getattr(error, "problem", None) or (str(error).splitlines() or [type(error).__name__])[0]


def _require_small(root: yaml.Node) -> None:
    """Raise _TooLarge where the values under `root` are too many, once its aliases are expanded, or too deep."""
    known: dict[int, tuple[int, int]] = {}  # how many values are under a node, and how deep
    above: set[int] = set()

    def measure(node: yaml.Node, path: Path_) -> tuple[int, int]:
        if id(node) in above:
            raise ValueError(f"{dotted(path)} holds itself")
        if id(node) not in known:
            above.add(id(node))
            below = [measure(child, (*path, name)) for name, child in _children(node)]
            above.remove(id(node))
            known[id(node)] = 1 + sum(n for n, _ in below), 1 + max((deep for _, deep in below), default=0)
        return known[id(node)]

    n_values, depth = measure(root, ())
    if n_values > _MOST_VALUES:
        raise _TooLarge(_TOO_MANY)
    if depth > _DEEPEST:
        raise _TooLarge(_TOO_DEEP)


def _children(node: yaml.Node) -> list[tuple[str | int, yaml.Node]]:
    if isinstance(node, yaml.SequenceNode):
        return list(enumerate(node.value))
    if isinstance(node, yaml.MappingNode):
        return [(str(key.value), each) for key, value in node.value for each in (key, value)]
    return []


def _walk(node: yaml.Node, path: Path_, document: Document) -> None:
    document.lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _walk(item, (*path, index), document)
    elif isinstance(node, yaml.MappingNode):
        seen: dict[Hashable, int] = {}
        for key, value in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            if name in seen:
                document.faults.append(
                    Fault(path=(*path, name), message=f"is written twice, first in line {seen[name]}")
                )
            seen[name] = line
            document.lines[(*path, name)] = line
            _walk(value, (*path, name), document)


def _override(document: Document, key: str, text: str) -> None:
    path = tuple(key.split("."))
    if len(path) > _DEEPEST:
        raise InputError(f"--set {key[:40]}...: {_TOO_DEEP}")
    target = document.values
    for part in path[:-1]:
        held = {} if target.get(part) is None else target[part]
        if not isinstance(held, dict):
            raise InputError(f"--set {key}={text}: {part} is no mapping, so nothing can be set in it")
        target[part] = dict(held)  # a copy: where the file has it as `*name` elsewhere, it stays as it is there
        target = target[part]
    try:
        target[path[-1]] = _values(text)
    except Exception as error:  # see `_load`
        came = text if len(text) <= 80 else f"{text[:77]}..."
        why = str(error) if isinstance(error, _TooLarge) else f"the value is not YAML: {_problem(error)}"
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
        value = _values(text)
    except Exception:  # no YAML, so a text; see `_load`
        return None
    return value if isinstance(value, int | float) else None
