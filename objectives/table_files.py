"""A table from a file, read as it is meant; or refused in one line that says what is wrong, where, and what to do."""

import re
import warnings
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from pandas.api.types import is_integer_dtype, is_numeric_dtype, is_scalar
from pandas.errors import ParserWarning

from hpo.errors import DataError, listed
from hpo.study.table_groups import groups
from hpo.study.table_marks import (
    MISSING,
    PLAIN,
    Seen,
    are_codes,
    are_whole,
    marks_of,
    may_have_thousands,
    most_common,
    scan,
    with_point,
)
from hpo.study.table_text import OPEN, Dialect, as_text, beginning, dialect_of, windows, without_arrow
from hpo.training.memory import free_bytes

MARKS = "marks"
"""In a table's `attrs`: the marks of decimals and thousands of columns whose numbers have not just a point."""
MERGED = "merged"
"""In a table's `attrs`: what is to be said of fields that look like several rows, a line for each column."""
_CLASSES = 10_000
"""More different numbers with decimals are amounts."""
_ROWS = 1 << 16
"""So many rows are looked at together for what the numbers that were made of them do not show."""
_MEMORY = {"text": 4, "packed": 20}
"""Bytes of memory that a byte of a file takes to be trained on (3 were measured); packed is .parquet, or compressed."""


def read_table(file: Path, texts: Collection[str] = (), target: str | None = None) -> pd.DataFrame:
    """Return the table in a .csv, .tsv or .txt file (.gz, .bz2 or .xz too), or in a .parquet file. Raises DataError.

    Of text, separator (comma, semicolon, tab, |) and encoding (UTF-8, UTF-16, Windows-1252) are seen at its beginning,
    and the marks of decimals and thousands in all rows. The numbers of columns in `texts` stay as they are written, and
    so do those of others that are codes rather (007 beside 7), and of a `target` that may be classes.
    """
    if not file.is_file():
        raise DataError(f"{file}: {'is a folder; name a file in it' if file.exists() else 'there is no such file'}")
    _require_memory(file)
    try:
        frame = (
            _read_parquet(file) if _is_parquet(file) else _read_text(file, partial(_parse, texts=texts, target=target))
        )
    except DataError:
        raise
    except Exception as error:  # pandas, pyarrow, csv, zlib, lzma: each fails in a way of its own
        reason = (str(error).splitlines() or [""])[0][:200]
        raise DataError(f"{file}: cannot be read ({type(error).__name__}: {reason})") from error
    frame.columns = pd.Index([str(name).strip() for name in frame.columns])
    if twice := sorted(set(frame.columns[frame.columns.duplicated()])):
        raise DataError(f"{file}: has several columns of one name ({listed(map(repr, twice))}); give each its own")
    if frame.empty:
        raise DataError(f"{file}: has a header, but no rows")
    for name in frame.columns[(frame.dtypes == "object").to_numpy()]:
        if not all(map(is_scalar, frame[name].dropna().iloc[:1])):
            raise DataError(f"{file}: column {name!r} holds lists or structures; give plain values")
    return frame.reset_index(drop=True).copy()  # in one piece: a hundred thousand of them take minutes to look at


def _require_memory(file: Path) -> None:
    size = file.stat().st_size
    if size == 0:
        raise DataError(f"{file}: is empty")
    packed = _is_parquet(file) or file.suffix.lower() in OPEN
    needed, free = size * _MEMORY["packed" if packed else "text"], free_bytes(torch.device("cpu"))
    if needed > free:
        raise DataError(
            f"{file}: its {size / 1e9:.1f} GB need about {needed / 1e9:.1f} GB of memory, but {free / 1e9:.1f} GB are "
            "free; keep fewer of its rows or columns, or take a machine with more"
        )


def _is_parquet(file: Path) -> bool:
    return file.suffix.lower() == ".parquet"


def _read_parquet(file: Path) -> pd.DataFrame:
    """Return a table with what pandas had stored as the names of its rows, which are columns like others."""
    frame = without_arrow(pd.read_parquet(file))
    named = [name for name in frame.index.names if name is not None]
    return frame.reset_index(level=named) if named else frame


def _read_text(file: Path, parse: Callable[[Path, Dialect], pd.DataFrame]) -> pd.DataFrame:
    with OPEN.get(file.suffix.lower(), open)(file, "rb") as stream:
        head, cut = beginning(stream)
    dialect = dialect_of(file, head, cut)
    try:
        return parse(file, dialect)
    except UnicodeDecodeError:
        if dialect.encoding != "utf-8-sig":
            raise
        return parse(file, windows(file, head, cut))


def _parse(file: Path, dialect: Dialect, texts: Collection[str], target: str | None) -> pd.DataFrame:
    with warnings.catch_warnings():
        warnings.simplefilter("error", ParserWarning)  # where pandas would cut rows that are too long
        frame, grouped = _read_fast(file, dialect)
        merged = _merged(frame, dialect.separator) if _n_line_ends(file) > len(frame) + 1 else ()
        seen = _seen(file, dialect, frame, grouped)
        others = most_common(seen.values(), dialect.separator)
        marks = {name: marks_of(each, others, dialect.separator) for name, each in seen.items()}
        numbers = [name for name, kind in frame.dtypes.items() if kind.kind in "iuf"]
        decimal, thousands = dialect.decimal, dialect.thousands
        right = {
            n: ((decimal, thousands), (decimal, thousands if n in grouped else ""), (decimal, " ")) for n in numbers
        }
        lossy = {n for n in numbers if seen[n].n_marked and marks[n] not in right[n]}
        names = {n for n in numbers if n in texts or (n == target and (seen[n].zeros or _may_be_classes(frame[n])))}
        zeros = {n for n in numbers if seen[n].zeros}
        again = [n for n in numbers if n in lossy | zeros or (n in names and frame[n].dtype.kind == "f")]
        if again:
            written = pd.read_csv(file, low_memory=False, dtype=str, usecols=again, **dialect.for_pandas())
            names |= {n for n in zeros - names - {target} if are_codes(written[n].str.strip())}
            frame = frame.assign(**{n: written[n] for n in again if n in lossy | names})
    names |= {n for n in frame if n not in numbers and (n in texts or (n == target and _may_be_classes(frame[n])))}
    made = {n: as_text(frame[n]) for n in names if is_integer_dtype(frame[n])}  # as they are written
    for name, each in marks.items():
        if not is_numeric_dtype(frame[name]) and name not in names and seen[name].n_marked and each is not None:
            pointed = with_point(frame[name], each)
            if each != others or is_numeric_dtype(pointed):
                made[name] = pointed
    frame = frame.assign(**made) if made else frame
    whole = {n for n in numbers if is_integer_dtype(frame[n]) and not (marks[n] or PLAIN)[1]}  # no mark is in them
    taken = {n for n in frame if n in names or is_numeric_dtype(frame[n])} - whole
    frame.attrs[MERGED] = merged
    frame.attrs[MARKS] = {n: each for n, each in marks.items() if n in taken and each not in (None, PLAIN)}
    return frame


def _n_line_ends(file: Path) -> int:
    """Return how often a text file has the one of the two characters that end lines which it has more often."""
    with OPEN.get(file.suffix.lower(), open)(file, "rb") as stream:
        counts = [(block.count(b"\n"), block.count(b"\r")) for block in iter(lambda: stream.read(1 << 20), b"")]
    return max(map(sum, zip(*counts, strict=True)), default=0)


def _merged(frame: pd.DataFrame, separator: str) -> tuple[str, ...]:
    """Return a line for each column with fields that hold as many separators as the rows between their line breaks."""
    lines, between = [], frame.shape[1] - 1
    for name in (name for name, kind in frame.dtypes.items() if kind.kind == "O"):
        texts = frame[name].astype("string")
        some = texts[texts.str.contains(r"[\r\n]", na=False)].str.strip()
        breaks, marks = some.str.count(r"\r\n?|\n"), some.str.count(re.escape(separator))
        some = some[(breaks > 0) & (marks > 0) & (marks >= between * breaks)]
        if len(some):
            lines.append(
                f"column {name!r} holds line breaks and {separator!r} in {len(some)} rows (the first: row "
                f"{some.index[0] + 1}, {some.iloc[0][:40]!r}), as if several rows were one: see whether a quote is not "
                "closed there; a quote inside of a text is written twice, in a text in quotes"
            )
    return tuple(lines)


def _may_be_classes(values: "pd.Series") -> bool:
    """Whether a target may be classes whose names numbers would not say: 1.10 is 1.1."""
    return not is_integer_dtype(values) and values.nunique() <= _CLASSES


def _read_fast(file: Path, dialect: Dialect) -> tuple[pd.DataFrame, set[str]]:
    """Return the table as pandas reads it, and the columns whose marks of thousands it has taken away, rightly."""
    how, found, names = dialect.for_pandas(), None, dialect.names()
    if dialect.thousands and dialect.encoding != "utf-16":
        with OPEN.get(file.suffix.lower(), open)(file, "rb") as stream:
            found = groups(stream, dialect.separator, dialect.thousands)
    good, bad = ({n for i, n in enumerate(names) if i in places} for places in found or (set(), set()))
    if found is not None:
        how |= {"thousands": dialect.thousands, "dtype": {name: str for name in bad}}
    return pd.read_csv(file, low_memory=False, **how), good - bad


def _seen(file: Path, dialect: Dialect, frame: pd.DataFrame, grouped: Collection[str]) -> Mapping[str, Seen]:
    """Return what the values of each column look like, as far as that says what its numbers mean."""
    seen = {name: Seen() for name in frame}
    kinds = {name: kind.kind for name, kind in frame.dtypes.items()}
    zeros = round_ = False
    if any(kind in "iuf" for kind in kinds.values()):
        zeros, round_ = _scanned(file, dialect)
    doubtful = []
    for name, kind in kinds.items():
        if kind not in "iufb":
            seen[name].add(frame[name])
            continue
        numbers = frame[name].to_numpy()
        doubt = (zeros and kind != "b") or name in grouped
        if (doubt and are_whole(numbers)) or (kind == "f" and may_have_thousands(numbers, round_)):
            doubtful.append(name)
        else:
            seen[name].add_read(numbers, dialect.decimal, dialect.thousands if name in grouped else "")
    if doubtful:
        for some in pd.read_csv(file, dtype=str, usecols=doubtful, chunksize=_ROWS, **dialect.for_pandas()):
            for name in doubtful:
                seen[name].add(some[name])
    return seen


def _scanned(file: Path, dialect: Dialect) -> tuple[bool, bool]:
    """Return whether there may be numbers with leading zeros, and some with three zeros behind the mark."""
    if dialect.encoding == "utf-16":
        return True, True
    with OPEN.get(file.suffix.lower(), open)(file, "rb") as stream:
        return scan(stream, dialect.separator, dialect.decimal)


def words_for_missing(file: Path, name: str) -> Mapping[str, int]:
    """Return which words stand where a column's values are read as missing, and how often; none: in Parquet."""
    if _is_parquet(file):
        return {}

    def as_written(file: Path, dialect: Dialect) -> pd.DataFrame:
        how = dialect.for_pandas() | {"na_values": None, "keep_default_na": False, "usecols": [name], "dtype": str}
        return pd.read_csv(file, low_memory=False, **how)

    words = _read_text(file, as_written)[name].str.strip().value_counts()
    return {str(word): int(n) for word, n in words.items() if word in MISSING and word}
