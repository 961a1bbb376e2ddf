"""What a tracker is told, as items of plain values that can be kept in a file and sent later, twice without harm.

An item has `do` (its kind), `trial` (Optuna's number; None: the study), `time` (in ms), and what its kind needs.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from hpo.tracking.base import PAUSED, STATUS
from hpo.tracking.values import now_ms

Item = dict[str, Any]
MERGED = {"start", "metrics", "end"}
"""Kinds of items that write to one run, of which several may become one (`merged`)."""


class Answer(NamedTuple):
    """What has become of an item that was to be sent."""

    sent: bool = True
    why: str = ""
    refused: bool = False
    """Not sent, and it never will be; else it may be later."""
    tries: int | None = None
    """How often it has been answered so that it is unclear which; to be kept with the item as `tries`."""
    runs: Sequence[tuple[int | None, str]] = ()
    """(trial, id of its run) for each run that was found or made for it; None: the study's."""


FILES = ("texts", "folder", "model")
"""Kinds of items that go to a store of their own, which may be away while the rest works; their order is free."""


def is_item(value: Any) -> bool:
    """Whether `value`, read from a file that anything may have happened to, is an item that can be sent."""
    if not isinstance(value, dict) or not isinstance(value.get("do"), str) or value["do"] not in _KINDS:
        return False
    if "trial" not in value or not (value["trial"] is None or _is_count(value["trial"])):
        return False
    return _is_count(value.get("time")) and _KINDS[value["do"]](value)


def as_left(item: Item) -> Iterator[Item]:
    """Give `item` as what a process left that is gone: it neither opens the study's run nor ends it again."""
    texts = item.pop("texts", None) if item["do"] == "start" else None  # as older versions had them
    item.pop("status", None) if item["do"] == "start" else None
    yield item | {"left": True}
    if texts:
        yield {"do": "texts", "trial": item["trial"], "time": item["time"], "texts": texts, "left": True}


def is_new(item: Item, lease: float) -> bool:
    """Whether an item begins a run that is not there yet: nothing was answered to it, and no other process left it.

    After `lease` seconds a peer may have taken its process for dead, and have made a run to end the trial in.
    """
    is_fresh = now_ms() - item["time"] < 1000 * lease
    return bool(item.get("is_new")) and is_fresh and not item.keys() & {"again", "tries", "left"}


def merged(item: Item, more: Item) -> Item | None:
    """Return one item that says of a run what both say, `more` after `item`; None: they are sent one by one.

    A trial's run may be begun, written to and ended by one item. The study's begins again and again, and what was
    refused is sent by itself: only metrics are sent together there.
    """
    kinds = {item["do"], more["do"]}
    if not kinds <= MERGED or item["do"] == "end" or not (set(item) | set(more)) <= _PLAIN:
        return None
    if item["trial"] is None and kinds != {"metrics"}:
        return None
    params = item.get("params", {}), more.get("params", {})
    if params[0].keys() & params[1].keys():  # MLflow takes a param once, and is to say so of the second
        return None
    both = item | {"do": more["do"] if more["do"] == "end" else item["do"]}
    if params[0] or params[1]:
        both["params"] = params[0] | params[1]
    if rows := [*item.get("rows", []), *more.get("rows", [])]:
        both["rows"] = rows
    if "tags" in more:
        both["tags"] = item.get("tags", {}) | more["tags"]
    if "status" in more:
        both["status"] = more["status"]
    if more["do"] == "end":
        both["ended"] = more.get("ended", more["time"])
    return both if len(rows) <= MOST_ROWS else None


def halves(item: Item) -> list[Item]:
    """Return two items that say what `item` says, or nothing where it says one thing only."""
    several = [key for key in ("rows", "params", "tags", "texts", "ends") if item.get(key)]
    if len(several) > 1:
        return [item | {key: {} for key in several[1:]}, item | {several[0]: {}}]
    if not several or len(item[several[0]]) < 2:
        return []
    key, things = several[0], item[several[0]]
    parts = list(things.items()) if isinstance(things, dict) else list(things)
    cut = (parts[: len(parts) // 2], parts[len(parts) // 2 :])
    return [item | {key: dict(part) if isinstance(things, dict) else part} for part in cut]


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _are_texts(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(x, str) for pair in value.items() for x in pair)


def _is_row(row: Any) -> bool:
    if not isinstance(row, list | tuple) or len(row) != 4:
        return False
    key, value, when, step = row
    is_number = isinstance(value, float) or (type(value) is int and abs(value) < 2**63)
    return isinstance(key, str) and is_number and _is_count(when) and type(step) is int and abs(step) < 2**63


def _is_end(end: Any) -> bool:
    return (
        isinstance(end, list | tuple)
        and len(end) == 2
        and isinstance(end[0], str)
        and end[0] in STATUS
        and isinstance(end[1], str | None)
    )


def _is_file_name(name: Any) -> bool:
    """Whether `name` is that of one file, as an objective's may be: with blanks and signs, but in no other folder."""
    return isinstance(name, str) and name not in ("", ".", "..") and len(name) <= 255 and not set(name) & set("/\\\0")


_PLAIN = {"do", "trial", "time", "ended", "params", "rows", "tags", "status", "left", "is_new"}
"""What an item has that nothing was answered to yet."""
MOST_ROWS = 900
"""MLflow takes at most 1,000 metrics in a call."""


def _is_of_a_run(item: Item) -> bool:
    return (
        all(_are_texts(item.get(key, {})) for key in ("params", "tags"))
        and isinstance(item.get("rows", []), list | dict)
        and all(map(_is_row, item.get("rows", [])))
        and _is_count(item.get("ended", 0))
    )


_KINDS: Mapping[str, Callable[[Item], bool]] = {
    "start": lambda item: (
        _is_of_a_run(item)
        and _are_texts(item.get("texts", {}))
        and all(map(_is_file_name, item.get("texts", {})))
        and item.get("status") in (None, "RUNNING", PAUSED)
    ),
    "texts": lambda item: _are_texts(item.get("texts")) and all(map(_is_file_name, item["texts"])),
    "metrics": lambda item: isinstance(item.get("rows"), list) and _is_of_a_run(item),
    "end": lambda item: item.get("status") in STATUS.values() and "tags" in item and _is_of_a_run(item),
    "folder": lambda item: isinstance(item.get("folder"), str) and _is_file_name(item.get("name")),
    "model": lambda item: (
        all(isinstance(item.get(key), str) for key in ("folder", "metric", "direction", "data", "torch"))
        and _is_count(item.get("of"))
        and isinstance(item.get("test"), dict)
        and all(isinstance(name, str) and isinstance(x, float | int) for name, x in item["test"].items())
    ),
    "data": lambda item: _are_texts(item.get("data")) and item["data"].keys() >= {"name", "digest", "source"},
    "best": lambda item: item["trial"] is not None,
    "reconcile": lambda item: (
        isinstance(item.get("ends"), dict)
        and all(isinstance(trial, str) and _is_end(end) for trial, end in item["ends"].items())
    ),
}
