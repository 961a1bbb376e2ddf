"""Parts of the pages that are made from the code, so that they cannot drift from it.

A line `<!-- study keys: NAME -->` in a page becomes one entry for each field of the class NAME in `hpo.study.spec`: the
key, its type, its default, its docstring. A line `<!-- api: NAME, NAME -->` becomes autodoc's entries of these names of
`hpo`.
"""

import ast
import inspect
import itertools
import re
import textwrap
import types
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

import hpo
from hpo.study import spec

_DEFAULTS = {("StudySpec", "name"): "default: the file's name without its ending"}
CLASSES = ("StudySpec", "Loading", "Stop", "Confirm", "FloatRange", "IntRange", "Categorical")


def study_keys(name: str) -> str:
    """Return the Markdown of all keys of the class `name` in `hpo.study.spec`."""
    cls = getattr(spec, name)
    docs = {key: text for each in reversed(cls.__mro__) for key, text in _docstrings(each).items()}
    lines = []
    for field_name, field in cls.model_fields.items():
        key = field.alias or field_name
        about = docs.get(field_name, "")
        default = _DEFAULTS.get((name, key)) or _default(field)
        lines += [f"`{key}`", f": *{_kind(field)}; {default}.* {about}", ""]
    return "\n".join(lines)


def missing_docstrings(name: str) -> list[str]:
    """Return the keys of a class that have no docstring."""
    cls = getattr(spec, name)
    docs = {key for each in cls.__mro__ for key in _docstrings(each)}
    return [field for field in cls.model_fields if field not in docs]


def _docstrings(cls: type) -> dict[str, str]:
    """Return the docstring below each annotated field of a class, by the field's name."""
    if cls.__module__ != spec.__name__ and not cls.__module__.startswith("hpo."):
        return {}
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    body = tree.body[0].body  # type: ignore[attr-defined]
    found = {}
    for field, below in itertools.pairwise(body):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(below, ast.Expr)
            and isinstance(below.value, ast.Constant)
            and isinstance(below.value.value, str)
        ):
            found[field.target.id] = " ".join(below.value.value.split())
    return found


def _kind(field: Any) -> str:
    """Return a field's type as a user writes it, with its bounds."""
    validators = repr(field.metadata)
    if "_seconds" in validators or "_seconds" in repr(field.annotation):
        return "a length of time: seconds, or `90s`, `45m`, `2h`, `1h30m`, `1d`"
    bounds = [f"at least {m.ge}" for m in field.metadata if getattr(m, "ge", None) is not None]
    bounds += [f"above {m.gt}" for m in field.metadata if getattr(m, "gt", None) is not None]
    return ", ".join([_words(field.annotation), *bounds])


_WORDS = {
    int: "whole number",
    float: "number",
    bool: "true or false",
    str: "text",
    type(None): "nothing",
    Any: "one value",
}


def _words(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation in _WORDS:
        return _WORDS[annotation]
    if annotation is spec.Plugin:
        return "a name, or a mapping of `name` and Optuna's own keys"
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_words(each) for each in arguments if each is not type(None)))
    if hasattr(annotation, "__metadata__"):
        return _words(origin if origin is not None and not arguments else arguments[0])
    if origin is dict:
        return "a mapping"
    if origin is tuple:
        return "a list of mappings" if "dict" in repr(arguments) else "a list"
    if isinstance(annotation, type):
        return "a mapping, see below" if issubclass(annotation, BaseModel) else annotation.__name__
    return str(annotation)


def _default(field: Any) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined or value is None or value in ({}, ()):
        return "optional"
    if isinstance(value, spec.Plugin):
        return f"default `{value.name}`"
    if isinstance(value, BaseModel):
        return "optional"
    if isinstance(value, bool):
        value = str(value).lower()
    return f"default `{value:g}`" if isinstance(value, float) else f"default `{value}`"


def api(names: str) -> str:
    """Return autodoc's directives of the public names, and a note of those that this version has not."""
    lines = []
    for name in re.findall(r"\w+", names):
        found = getattr(hpo, name, None)
        if found is None:
            lines += [f"`hpo.{name}`", ": Not in this version.", ""]
            continue
        directive = (
            "autoexception"
            if isinstance(found, type) and issubclass(found, BaseException)
            else "autoclass"
            if isinstance(found, type)
            else "autofunction"
        )
        is_ours = directive == "autoclass" and not name.startswith(("MLP", "Standardize", "LogitAccuracy"))
        options = [":members:"] if is_ours else []
        lines += ["```{eval-rst}", f".. {directive}:: hpo.{name}", *(f"   {each}" for each in options), "```", ""]
    return "\n".join(lines)


def expanded(text: str) -> str:
    """Return a page's source with what is generated in its place."""
    text = re.sub(r"^<!-- study keys: (\w+) -->$", lambda m: study_keys(m[1]), text, flags=re.M)
    return re.sub(r"^<!-- api: ([\w, ]+) -->$", lambda m: api(m[1]), text, flags=re.M)


def _expand(app: Any, page: str, source: list[str]) -> None:
    source[0] = expanded(source[0])


def as_rst(lines: list[str]) -> list[str]:
    """Return a docstring, plain text with `names`, as reStructuredText: drawings as they are, names as code."""
    made: list[str] = []
    for block in "\n".join(lines).split("\n\n"):
        rows = block.splitlines()
        first = rows[0] if rows else ""
        is_example = first.lstrip().startswith(">>>")
        is_drawing = any(_indent(row) > _indent(first) for row in rows) and not first.lstrip().startswith(
            ("-", ":", "..")
        )
        if is_drawing and not is_example:
            made += ["::", "", *(f"    {row}" for row in rows), ""]
        elif is_example:
            made += [*rows, ""]
        else:
            made += [*(re.sub(r"(?<!`)`([^`]+)`(?!`)", r"``\1``", row) for row in rows), ""]
    return made


def _indent(row: str) -> int:
    return len(row) - len(row.lstrip())


def _rewrite(app: Any, what: str, name: str, found: Any, options: Any, lines: list[str]) -> None:
    lines[:] = as_rst(lines)


def setup(app: Any) -> dict[str, Any]:
    """Sphinx's entry point."""
    from pygments.lexers.special import TextLexer

    app.add_lexer("tree", TextLexer)
    app.connect("source-read", _expand)
    app.connect("autodoc-process-docstring", _rewrite)
    return {"parallel_read_safe": True}
