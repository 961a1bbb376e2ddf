"""Where a report is written: whole, or not at all."""

import re
from contextlib import suppress
from pathlib import Path

from hpo.errors import InputError
from hpo.processes import this_process


def default_path(output: str | Path, name: str) -> Path:
    """Return where the page of study `name` goes; a name that others stored leads nowhere else."""
    safe = re.sub(r"[^\w .+-]", "_", name)[:200].lstrip(".") or "study"
    return Path(output) / "reports" / safe / "report.html"


def encoded(text: str) -> bytes:
    """Return `text` in UTF-8, with `?` for what is no character at all."""
    return text.encode("utf-8", "replace")


def write(path: Path, text: str) -> None:
    """Write a report. Raises InputError where that cannot be."""
    unfinished = path.parent / f".{path.name}.{this_process()}.part"
    try:
        if path.is_dir():
            raise IsADirectoryError(21, "it is a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_bytes(encoded(text))
        unfinished.replace(path)
    except OSError as error:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
        raise InputError(
            f"the report {path} cannot be written ({error.strerror}); give another place by --out"
        ) from None
