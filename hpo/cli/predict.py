"""`hpo predict`: a bundle's predictions for a file, as CSV or JSON lines. Of the package it needs `export` alone."""

import csv
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from hpo.errors import HpoError, InputError, SpecError, did_you_mean
from hpo.export.files import allowed

if TYPE_CHECKING:
    import pandas as pd

FORMATS = ("csv", "jsonl")
_FORMAT_OF = {".jsonl": "jsonl", ".ndjson": "jsonl"}
_OTHER_FORMATS = (
    ".bz2",
    ".feather",
    ".gz",
    ".json",
    ".npy",
    ".npz",
    ".parquet",
    ".tsv",
    ".xls",
    ".xlsx",
    ".xz",
    ".zip",
)


def predict(
    bundle: Path, source: str, format_: str | None, out: Path | None, top_k: int | None, keep: str | None
) -> None:
    """`hpo predict`."""
    out = None if out == Path("-") else out
    form = _format(format_, out)
    folder = _folder(bundle)
    from hpo.export.columns import Notes
    from hpo.export.loading import load_bundle
    from hpo.export.predicting import predictions

    model, notes = load_bundle(folder), Notes()
    made = predictions(model.model, model.about, source, top_k=top_k, keep=keep, notes=notes)
    try:
        with _opened(out) as stream, _progress(source) as show:
            write = _csv_writer(stream) if form == "csv" else _json_writer(stream)
            for frame, share in made:
                write(frame)
                show(share)
    except BrokenPipeError:
        raise
    except OSError as error:
        where = "stdout" if out is None else f"--out {out}"
        raise HpoError(f"{where}: cannot be written ({error.strerror or error}); make room, or name another") from error
    for text in notes.texts():
        print(f"hpo: {text}", file=sys.stderr)


def _format(asked: str | None, out: Path | None) -> str:
    """Return what is written: what `--format` asks for, else what the ending of `out` says. Raises InputError."""
    if asked is not None:
        if asked not in FORMATS:
            raise InputError(f"--format: must be csv or jsonl, but got {asked!r}{did_you_mean(asked, FORMATS)}")
        return asked
    ending = "" if out is None else out.suffix.lower()
    if ending in _OTHER_FORMATS:
        raise InputError(
            f"--out {out}: predictions are csv or jsonl, not {ending}; name a .csv or .jsonl, or give --format"
        )
    return _FORMAT_OF.get(ending, "csv")


def _folder(bundle: Path) -> Path:
    """Return the bundle's folder; of a study file, that of its study. Raises InputError."""
    if bundle.suffix not in (".yaml", ".yml") or not bundle.is_file():
        return bundle
    from hpo.study.draft import read

    draft = read(bundle, {})
    if draft.faults or draft.spec is None:
        raise SpecError(draft.document.render(draft.faults))
    folder = Path(draft.spec.output) / "bundles" / draft.spec.name
    if not folder.is_dir():
        raise InputError(f"{folder}: study {draft.spec.name!r} has no bundle there; `hpo run {bundle}` makes it")
    return folder


@contextmanager
def _opened(out: Path | None) -> Iterator[IO[str]]:
    """Give what predictions are written to: stdout, or a file that is in its place when it is whole."""
    if out is None:
        yield sys.stdout
        sys.stdout.flush()
        return
    if out.exists() and not out.is_file():  # a pipe, /dev/null: written as it is
        if out.is_dir():
            raise InputError(f"--out {out}: is a folder; name a file in it")
        with out.open("w", encoding="utf-8", newline="") as stream:
            yield stream
        return
    try:
        handle, name = tempfile.mkstemp(prefix=".predictions-", dir=out.parent)
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written ({error.strerror}); name another file") from error
    try:
        with open(handle, "w", encoding="utf-8", newline="") as stream:
            yield stream
        os.chmod(name, allowed(0o666))  # mkstemp makes it for its owner only
        os.replace(name, out)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(name)


@contextmanager
def _progress(source: str) -> Iterator[Callable[[float], None]]:
    """Give a function that shows which share of `source` is done, 0 to 1, on a terminal."""
    if not sys.stderr.isatty() or source == "-":
        yield lambda share: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(Path(source).name, total=1.0)
        yield lambda share: progress.update(task, completed=share)


def _csv_writer(stream: IO[str]) -> "Callable[[pd.DataFrame], None]":
    writer = csv.writer(stream, lineterminator="\n")
    wrote = False

    def write(frame: "pd.DataFrame") -> None:
        nonlocal wrote
        if not wrote:
            writer.writerow(frame.columns)
            wrote = True
        writer.writerows(zip(*(_texts(frame[name], "") for name in frame), strict=True))

    return write


def _json_writer(stream: IO[str]) -> "Callable[[pd.DataFrame], None]":
    def write(frame: "pd.DataFrame") -> None:
        keys = [json.dumps(name) for name in frame]
        columns = [_json_texts(frame[name]) for name in frame]
        for row in zip(*columns, strict=True):
            stream.write("{" + ", ".join(f"{k}: {v}" for k, v in zip(keys, row, strict=True)) + "}\n")

    return write


def _texts(values: "pd.Series[Any]", gone: str) -> list[str]:
    """Return numbers of 7 digits, as many as float32 has, and what is not there as `gone`; the rest as it is."""
    found = values.tolist()
    if values.dtype.kind == "f":
        return [f"{value:.7g}" for value in found]
    return [gone if value is None or value != value else value for value in found]


def _json_texts(values: "pd.Series[Any]") -> list[str]:
    if values.dtype.kind == "f":
        return [f"{value:.7g}" if math.isfinite(value) else "null" for value in values.tolist()]
    return [json.dumps(None if value != value else value, default=str) for value in values.tolist()]
