"""YAML text as plain values, with the line of each. `yaml` is imported here and nowhere else.

Beyond YAML 1.1 it reads `1e-5` as a number, and refuses what is too large to be a study (a text, or what its aliases
expand to) before it is made.
"""

import re
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

Path_ = tuple[str | int, ...]

_MOST_VALUES = 20_000
"""How many keys and values a file may hold, aliases counted as often as they are used."""
DEEPEST = 50
"""How far mappings and lists may be nested."""
_LARGEST = 1 << 63
"""Whole numbers are stored in 64 bits."""


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads `1e-5`, `off` and `1:30` as YAML 1.2 does (a number, words), and leaves dates as text.

    It makes plain values only: no dates, sets or bytes, whatever tag is written.
    """

    n_values = depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Refuse what is too large while it is read, not after."""
        self.n_values, self.depth = self.n_values + 1, self.depth + 1
        if self.n_values > _MOST_VALUES:
            raise TooLarge(_TOO_MANY)
        if self.depth > DEEPEST:
            raise TooLarge(TOO_DEEP)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class TooLarge(ValueError):
    """What is read is YAML, but too large or too deep to be a study."""


_TOO_MANY = f"holds more than {_MOST_VALUES:,} values, aliases counted as often as they are used; leave some out"
TOO_DEEP = f"mappings and lists are nested more than {DEEPEST} deep; put them into fewer"


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


class NotYaml(ValueError):
    """What is read is no YAML; `line` is where, if that is known."""

    def __init__(self, problem: str, line: int | None) -> None:
        super().__init__(problem)
        self.line = line


@dataclass
class Yaml:
    """The values of a text, and where in it they stand."""

    values: Any = None
    lines: dict[Path_, int] = field(default_factory=dict)
    twice: list[tuple[Path_, int]] = field(default_factory=list)
    """The keys that are written twice, each with the line of the first."""


def read_yaml(text: str) -> Yaml:
    """Return the values of `text`. Raises NotYaml, TooLarge."""
    read = Yaml()
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is not None:
                _require_small(node)
                _walk(node, (), read)
                read.values = loader.construct_document(node)
        finally:
            loader.dispose()
    except TooLarge:
        raise
    except Exception as error:  # a value that its tag does not fit: PyYAML lets through whatever its parsing raises
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or (str(error).splitlines() or [type(error).__name__])[0]
        raise NotYaml(problem, mark.line + 1 if mark else None) from error
    return read


def _require_small(root: yaml.Node) -> None:
    """Raise TooLarge where the values under `root` are too many, once its aliases are expanded, or too deep."""
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
        raise TooLarge(_TOO_MANY)
    if depth > DEEPEST:
        raise TooLarge(TOO_DEEP)


def _children(node: yaml.Node) -> list[tuple[str | int, yaml.Node]]:
    if isinstance(node, yaml.SequenceNode):
        return list(enumerate(node.value))
    if isinstance(node, yaml.MappingNode):
        return [(str(key.value), each) for key, value in node.value for each in (key, value)]
    return []


def _walk(node: yaml.Node, path: Path_, read: Yaml) -> None:
    """Note the lines of `node` and of all below it."""
    read.lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _walk(item, (*path, index), read)
    elif isinstance(node, yaml.MappingNode):
        seen: dict[Hashable, int] = {}
        for key, value in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            if name in seen:
                read.twice.append(((*path, name), seen[name]))
            seen[name] = line
            read.lines[(*path, name)] = line
            _walk(value, (*path, name), read)


def dotted(path: Sequence[str | int]) -> str:
    """Return ("params", "lr", 0) as `params.lr[0]`."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text
