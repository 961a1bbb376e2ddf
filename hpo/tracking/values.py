"""Names, texts and numbers as MLflow and its databases take them."""

import hashlib
import math
import re
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from hpo.errors import masked

MAX_PARAM, MAX_TAG, MAX_NAME = 6000, 5000, 250
RUN_NAME = "mlflow.runName"
"""MLflow's tag for the name of a run."""
NOTE = "mlflow.note.content"
"""MLflow's tag for the description of a run, in Markdown."""


def legal_name(name: str) -> str:
    """Return `name` as MLflow takes it. What had to be changed ends in a digest of it, so that two names stay two."""
    legal = re.sub(r"[^/\w.\- :]", "_", name)
    legal = "/".join(part for part in legal.split("/") if part not in ("", ".", ".."))  # as paths are shortened
    if legal == name and 0 < len(name) <= MAX_NAME:
        return name
    digest = hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()[:8]
    return f"{legal[: MAX_NAME - 9]}_{digest}"


def plain(text: str, most: int) -> str:
    """Return `text` as every database takes it."""
    return text[:most].replace("\0", "\\0").encode(errors="backslashreplace").decode()[:most]


def same(one: float | None, two: float) -> bool:
    """Whether MLflow would keep both values as the same."""
    return one is not None and stored(one) == stored(two)


def stored(value: float) -> tuple[float, bool]:
    """Return a metric's value as MLflow's tables, without NaN and infinity, have it, and whether it is NaN."""
    most = sys.float_info.max
    return (0.0, True) if math.isnan(value) else (max(-most, min(most, value)), False)


_LINK = re.compile(r"\(hpo:trial/(\d+)\)")


def linked(text: str, page: Callable[[int], str | None]) -> str:
    """Return a description, whose links to trials are `[trial 7](hpo:trial/7)`, with links to the `page` of each.

    One without a page loses its link.
    """

    def target(match: re.Match[str]) -> str:
        where = page(int(match[1]))
        return "" if where is None else f"({where})"

    return _LINK.sub(target, text)


def digest_of(folder: Path) -> str:
    """Return a SHA-256 over the names, sizes and contents of the files in `folder`."""
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{file.relative_to(folder)}\0{file.stat().st_size}\0".encode(errors="surrogateescape"))
        with file.open("rb") as content:
            for block in iter(lambda: content.read(1 << 20), b""):
                digest.update(block)
    return digest.hexdigest()


def end_tags(trial: int | None, state: str, error: str | None = None) -> dict[str, str]:
    """Return what a run is tagged with at its end; a trial's name says how it ended, unless it is complete."""
    tags = {"hpo.state": state}
    if error:
        tags["hpo.error"] = masked(error[: 2 * MAX_TAG])[:MAX_TAG]
    if trial is not None and state != "COMPLETE":
        tags[RUN_NAME] = run_name(trial, {"FAIL": "failed"}.get(state, state.lower()))
    return tags


def run_name(trial: int, state: str = "") -> str:
    """Return the name of a trial's run: `trial 7`, `trial 7 (pruned)`."""
    return f"trial {trial} ({state})" if state else f"trial {trial}"


def texts_of(params: Mapping[str, Any]) -> dict[str, str]:
    """Return params as MLflow takes them."""
    return {str(key): str(value)[:MAX_PARAM] for key, value in params.items()}


def rows_of(metrics: Mapping[str, float] | None, step: int = 0) -> list[list[Any]]:
    """Return metrics as an item has them: key, value, time and step."""
    return [[key, float(value), now_ms(), int(step)] for key, value in (metrics or {}).items()]


def now_ms() -> int:
    """Return the milliseconds since 1970."""
    return int(time.time() * 1000)


def sqlite_path(uri: str) -> Path | None:
    """Return the file of an SQLite address, as SQLAlchemy reads it; None for any other."""
    scheme = _SQLITE.match(uri)
    return None if scheme is None else Path(unquote(uri[scheme.end() :]))


def sqlite_address(path: Path) -> str:
    """Return the address of a file, which may have a `%` or a `?` in its path.

    MLflow makes the folder of a `sqlite:///` address as it stands, codes and all, but not where a driver is named.
    """
    codes = str(path).replace("%", "%25").replace("?", "%3F")
    return f"sqlite:///{path}" if codes == str(path) else f"sqlite+pysqlite:///{codes}"


_SQLITE = re.compile(r"sqlite(\+pysqlite)?:///")
