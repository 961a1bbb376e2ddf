"""What is predicted from, read in chunks of rows: a table, arrays, images. Nothing in it is unpickled."""

import contextlib
import shutil
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import pandas as pd
from pandas.api import types

from hpo.errors import InputError, listed
from hpo.export.columns import Columns, Notes
from hpo.export.images import SUFFIXES, image_chunks
from hpo.export.texts import marks_in_parquet, read_as_in_a_file
from hpo.study.table_groups import groups
from hpo.study.table_marks import MISSING, PLAIN, Marks, Seen, as_read, marks_of, most_common, with_point
from hpo.study.table_text import OPEN, Dialect, beginning, dialect_of

ROWS = 1 << 16
"""So many rows of a table are read at a time."""
_BYTES = 1 << 26
"""Arrays and images: so many bytes."""
_MARK = "="
"""Stands before values that are to stay as they are written, so that pandas takes none for a number or as missing."""
_TEXT = (".csv", ".tsv", ".txt")


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Some rows, as arrays (N, ...) by the model's inputs. `share`: how much of the whole has been read, 0 to 1."""

    arrays: Mapping[str, np.ndarray]
    kept: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    """Columns that are copied to the answer."""
    share: float = 1.0

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))


def chunks(
    source: str, about: Mapping[str, Any], columns: Columns | None, keep: str | None, notes: Notes
) -> Iterator[Chunk]:
    """Yield the rows of `source`, a path or `-` for a CSV on stdin. Raises InputError."""
    if source == "-":
        return _stdin(_tabular("stdin", about, columns), keep, notes)
    path = Path(source)
    suffixes = [suffix.lower() for suffix in path.suffixes]
    last = suffixes[-1] if suffixes else ""
    if not path.exists():
        raise InputError(f"{path}: there is no such file")
    if path.is_file() and path.stat().st_size == 0:
        raise InputError(f"{path}: is empty")
    if path.is_dir() or last in SUFFIXES:
        _no_column(path, keep)
        return (
            Chunk(arrays=arrays, kept={"file": names}, share=share)
            for arrays, names, share in image_chunks(path, about, _BYTES, notes)
        )
    if last in (".npz", ".npy", ".pt"):
        _no_column(path, keep)
        return _arrays(path, about, columns)
    if last == ".parquet":
        return _parquet(path, _tabular(str(path), about, columns), keep, notes)
    if last in _TEXT or (last in OPEN and suffixes[-2:-1] and suffixes[-2] in _TEXT):
        return _text_file(path, _tabular(str(path), about, columns), keep, notes)
    raise InputError(
        f"{path}: must be .csv, .tsv or .txt (.gz, .bz2 or .xz too), .parquet, .npz, .npy, .pt, an image "
        f"({', '.join(SUFFIXES)}), a folder of images, or - for a CSV on stdin"
    )


def _no_column(path: Path, keep: str | None) -> None:
    if keep is not None:
        raise InputError(f"--id {keep}: {path} is no table and has no columns; leave --id away")


def _tabular(where: str, about: Mapping[str, Any], columns: Columns | None) -> Columns:
    if columns is None:
        shapes = ", ".join(f"{e['name']} {tuple(e['shape'][1:])} in {e['dtype']}" for e in about["inputs"])
        raise InputError(f"{where}: is a table, but the model takes {shapes}: give a .npz, a .pt, or images")
    return columns


def _stdin(columns: Columns, keep: str | None, notes: Notes) -> Iterator[Chunk]:
    with _kept(sys.stdin.buffer) as stream:
        yield from _text(stream, "stdin", columns, keep, notes, lambda: 0.0)


def _kept(stream: IO[bytes]) -> IO[bytes]:
    """Return a copy of a stream that can be read more than once, in memory or, where it is long, on disk."""
    copy = tempfile.SpooledTemporaryFile(_BYTES)  # noqa: SIM115  it is closed by who reads it
    shutil.copyfileobj(stream, copy)
    copy.seek(0)
    return cast(IO[bytes], copy)


def _text_file(path: Path, columns: Columns, keep: str | None, notes: Notes) -> Iterator[Chunk]:
    size = path.stat().st_size
    with path.open("rb") if path.is_file() else _kept(path.open("rb")) as raw:
        opened = OPEN.get(path.suffix.lower())
        with raw if opened is None else opened(raw, "rb") as stream:
            yield from _text(stream, str(path), columns, keep, notes, lambda: raw.tell() / max(size, 1))


def _marks(
    stream: IO[bytes], dialect: Dialect, numbers: Sequence[str], trained: Mapping[str, Marks]
) -> tuple[Marks, dict[str, Marks | None]]:
    """Return the marks of most columns of numbers, and those of the others, as all rows say them.

    They are as they were `trained` wherever a whole column can be that. None: what has marks there is no number.
    """
    every = Counter(trained.values()).most_common() or [((dialect.decimal, ""), 0)]
    decimal = every[0][0][0]
    thousands = next((mark for (of_decimals, mark), _ in every if of_decimals == decimal and mark in {".", ","}), "")
    good, bad = _grouped(stream, dialect, thousands)
    fits = {(decimal, ""), (decimal, " "), (decimal, thousands)}  # what pandas reads as a number has no blanks
    known = {n for n in numbers if n not in bad and trained.get(n) in ({(decimal, thousands)} if n in good else fits)}
    common = decimal, thousands
    how = dialect.for_pandas() | {"usecols": list(numbers), "chunksize": ROWS} | _for_pandas(common)
    as_text = {name: str for name in numbers if name not in known}
    for frame in _readable(stream, how | {"dtype": as_text}) if known else ():
        known -= {name for name in known if not types.is_numeric_dtype(frame[name])}
    others = [name for name in numbers if name not in known]
    if not others:
        return common, {}
    seen = {name: Seen() for name in numbers}
    for frame in _readable(stream, how | {"dtype": str}):
        for name in numbers:
            seen[name].add(frame[name])
    most = most_common(seen.values(), dialect.separator)
    return common, {name: marks_of(seen[name], most, dialect.separator, trained.get(name)) for name in others}


def _grouped(stream: IO[bytes], dialect: Dialect, thousands: str) -> tuple[set[str], set[str]]:
    """Return the columns in which the mark stands between thousands, and those in which it does also elsewhere."""
    if not thousands:
        return set(), set()
    names, found = dialect.names(), None
    if dialect.encoding != "utf-16":
        stream.seek(0)
        with contextlib.suppress(Exception):  # zlib, lzma: the same comes again
            found = groups(stream, dialect.separator, thousands)
    good, bad = found or ({*range(len(names))}, {*range(len(names))})
    return {names[i] for i in good if i < len(names)}, {names[i] for i in bad if i < len(names)}


def _for_pandas(marks: Marks) -> dict[str, Any]:
    return {"decimal": marks[0], "thousands": marks[1] or None}


def _readable(stream: IO[bytes], how: Mapping[str, Any]) -> Iterator[pd.DataFrame]:
    """Yield a table's rows in pieces, as far as they can be read: what is wrong is said where they are predicted."""
    stream.seek(0)
    try:
        with pd.read_csv(stream, low_memory=False, **how) as reader:
            yield from reader
    except Exception:  # pandas, zlib, lzma: the same comes again
        return


def _text(
    stream: IO[bytes], where: str, columns: Columns, keep: str | None, notes: Notes, share: Callable[[], float]
) -> Iterator[Chunk]:
    """Yield the rows of a table in text; its separator is seen at its beginning, its numbers' marks in all rows."""
    first = 1
    try:
        head, cut = beginning(stream)
        if not head.strip():
            raise InputError(f"{where}: is empty")
        dialect = dialect_of(where, head, cut)
        header = dialect.names()
        taken = columns.required(where, header, keep, notes)
        numbers = [name for name in taken if name not in columns.texts]
        common, marks = _marks(stream, dialect, numbers, columns.marks)
        texts = {*columns.texts, *marks} - {keep}
        words = {name: list(MISSING) for name in header if name not in columns.texts}
        stream.seek(0)
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)  # where pandas would cut rows that are too long
            reader = pd.read_csv(
                stream,
                chunksize=ROWS,
                low_memory=False,
                dtype={name: str for name in texts},
                converters=None if keep is None else {keep: _MARK.__add__},
                **dialect.for_pandas() | _for_pandas(common) | {"keep_default_na": False, "na_values": words},
            )
            for frame in reader:
                if len(frame):
                    kept = {}
                    if keep is not None:
                        kept[keep] = [text.removeprefix(_MARK) for text in frame[keep]]
                        of_keep = marks.get(keep, common) or PLAIN
                        frame[keep] = as_read(kept[keep], of_keep) if keep in numbers else kept[keep]
                    made = {n: with_point(frame[n], each) for n, each in marks.items() if each is not None}
                    frame = columns.without_words(frame.assign(**made))
                    yield Chunk(arrays=columns.arrays(frame[taken], where, first, notes), kept=kept, share=share())
                first += len(frame)
    except InputError:
        raise
    except Exception as error:  # pandas, csv, zlib, lzma: each fails in a way of its own
        what = "; save it as UTF-8" if isinstance(error, UnicodeDecodeError) else ""
        raise InputError(f"{where}: cannot be read behind row {first - 1} ({_why(error)}){what}") from error
    if first == 1:
        raise InputError(f"{where}: has a header, but no rows")


def _parquet(path: Path, columns: Columns, keep: str | None, notes: Notes) -> Iterator[Chunk]:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise InputError(f"{path}: Parquet is read by pyarrow, which is not installed: pip install pyarrow") from error
    first = 1
    try:
        with parquet.ParquetFile(path) as file:
            counted, stored = _counted_index(file.schema_arrow), file.schema_arrow.names
            header = [name.strip() for name in (*counted, *stored)]
            taken = columns.required(str(path), header, keep, notes)
            wanted = list(dict.fromkeys([*taken, *([] if keep is None else [keep])]))
            names = [(*counted, *stored)[header.index(name)] for name in wanted]
            total, stored_as = file.metadata.num_rows, dict(zip(wanted, names, strict=True))
            marks = marks_in_parquet(file, {name: stored_as[name] for name in taken}, columns)
            for batch in file.iter_batches(batch_size=ROWS, columns=[name for name in names if name not in counted]):
                frame = batch.to_pandas(ignore_metadata=True)  # it may ask for columns that are Arrow's
                frame.index = pd.RangeIndex(first - 1, first - 1 + batch.num_rows)
                for name, (start, step) in counted.items():
                    frame[name] = start + step * frame.index
                frame = frame[names]
                frame.columns = pd.Index(wanted)
                if len(frame):
                    kept = {} if keep is None else {keep: frame[keep].tolist()}
                    read = read_as_in_a_file(frame[taken], marks)
                    arrays = columns.arrays(read, str(path), first, notes)
                    first += len(frame)
                    yield Chunk(arrays=arrays, kept=kept, share=(first - 1) / total)
    except InputError:
        raise
    except Exception as error:  # pyarrow: many kinds
        raise InputError(f"{path}: cannot be read behind row {first - 1} ({_why(error)})") from error
    if first == 1:
        raise InputError(f"{path}: has no rows")


def _counted_index(schema: Any) -> dict[str, tuple[int, int]]:
    """Return the start and step of an index that pandas has only described, by name: training has it as a column."""
    described = (schema.pandas_metadata or {}).get("index_columns", [])
    ranges = [each for each in described if isinstance(each, dict) and each.get("kind") == "range" and each.get("name")]
    return {str(each["name"]): (int(each["start"]), int(each["step"])) for each in ranges}


def _arrays(path: Path, about: Mapping[str, Any], columns: Columns | None) -> Iterator[Chunk]:
    arrays = as_arrays(_loaded(path), about, columns, str(path))
    n = len(next(iter(arrays.values())))
    per_row = sum(array.nbytes for array in arrays.values()) // n
    rows = max(1, min(ROWS, _BYTES // max(1, per_row)))
    for start in range(0, n, rows):
        part = {name: array[start : start + rows] for name, array in arrays.items()}
        yield Chunk(arrays=part, share=min(1.0, (start + rows) / n))


def _loaded(path: Path) -> Any:
    """Return what a .npz, .npy or .pt holds. Raises InputError."""
    try:
        if path.suffix.lower() == ".pt":
            import torch

            return torch.load(path, map_location="cpu", weights_only=True)
        loaded = np.load(path, allow_pickle=False)
        return loaded if isinstance(loaded, np.ndarray) else dict(loaded)
    except Exception as error:  # zip, numpy, torch, pickle: each fails in a way of its own
        raise InputError(
            f"{path}: holds no plain arrays or tensors that can be read ({_why(error)}); nothing in it was run"
        ) from error


def _why(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


def as_arrays(value: Any, about: Mapping[str, Any], columns: Columns | None, where: str) -> dict[str, np.ndarray]:
    """Return one array, several in the inputs' order, or a mapping of names, as arrays (N, ...). Raises InputError."""
    names = [entry["name"] for entry in about["inputs"]]
    if isinstance(value, Mapping):
        if len(names) == 1 and len(value) == 1:
            value = dict(zip(names, value.values(), strict=True))
        if missing := [name for name in names if name not in value]:
            raise InputError(f"{where}: holds no {listed(map(repr, missing))}, only {listed(map(repr, value))}")
        given = [value[name] for name in names]
    elif isinstance(value, list | tuple) and len(names) > 1:
        given = list(value)
        if len(given) != len(names):
            raise InputError(f"{where}: the model takes {len(names)} inputs ({', '.join(names)}), but got {len(given)}")
    else:
        given = [value]
        if len(names) > 1:
            raise InputError(f"{where}: the model takes {len(names)} inputs, give each by its name: {', '.join(names)}")
    missing_ok = bool(about.get("missing", columns.missing if columns else False))
    made = {
        entry["name"]: _checked(each, entry, missing_ok, where)
        for entry, each in zip(about["inputs"], given, strict=True)
    }
    sizes = {name: len(array) for name, array in made.items()}
    if len(set(sizes.values())) > 1:
        raise InputError(f"{where}: the inputs have different numbers of rows: {sizes}")
    return made


def _checked(value: Any, entry: Mapping[str, Any], missing: bool, where: str) -> np.ndarray:
    """Return one input as its array (N, ...), of its shape and type. Raises InputError."""
    name, shape, dtype = entry["name"], tuple(entry["shape"][1:]), np.dtype(entry["dtype"])
    try:
        array = np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{where}: {name} is no array of numbers ({error})") from error
    if array.dtype.kind not in "iufb":
        raise InputError(f"{where}: {name} must be numbers, but is {array.dtype}")
    if array.ndim == 0 or array.shape[1:] != shape:
        raise InputError(f"{where}: {name} must be (N, {', '.join(map(str, shape))}), but is {array.shape}")
    if not len(array):
        raise InputError(f"{where}: {name} has no rows")
    with np.errstate(over="ignore", invalid="ignore"):
        cast = array.astype(dtype, copy=False)
    wrong = np.zeros(len(array), dtype=bool)
    if dtype.kind == "f":
        wrong = ~(np.isfinite(cast) | (np.isnan(array) & missing)).reshape(len(array), -1).all(1)
    elif cast is not array:
        wrong = (cast != array).reshape(len(array), -1).any(1)
    if wrong.any():
        what = "NaN or infinity" if dtype.kind == "f" else f"what {dtype} cannot hold"
        raise InputError(f"{where}: {name} holds {what} in row {int(wrong.argmax()) + 1}")
    return cast
