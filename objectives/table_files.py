"""A table from a file, read as it is meant; or refused in one line that says what is wrong, where, and what to do."""

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import pandas as pd
import torch
from pandas.api.types import is_integer_dtype, is_numeric_dtype, is_scalar
from pandas.errors import ParserWarning

from hpo.errors import DataError
from hpo.study.table_text import (
    MISSING,
    OPEN,
    PLAIN,
    Dialect,
    beginning,
    dialect_of,
    listed,
    windows,
    without_arrow,
)
from hpo.training.memory import free_bytes

MARKS = "marks"
"""In a table's `attrs`: the marks of decimals and thousands of columns whose numbers have not just a point."""
_MEMORY = {"text": 4, "packed": 20}
"""Bytes of memory that a byte of a file takes to be trained on (3 were measured); packed is .parquet, or compressed."""


def read_table(file: Path) -> pd.DataFrame:
    """Return the table in a .csv, .tsv or .txt file (.gz, .bz2 or .xz too), or in a .parquet file. Raises DataError.

    Of text, separator (comma, semicolon, tab, |), encoding (UTF-8, UTF-16, Windows-1252), and the marks of decimals and
    thousands are told from its beginning.
    """
    if not file.is_file():
        raise DataError(f"{file}: {'is a folder; name a file in it' if file.exists() else 'there is no such file'}")
    _require_memory(file)
    try:
        frame = _read_parquet(file) if _is_parquet(file) else _read_text(file, _parse)
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


def _parse(file: Path, dialect: Dialect) -> pd.DataFrame:
    with warnings.catch_warnings():
        warnings.simplefilter("error", ParserWarning)  # where pandas would cut rows that are too long
        dtypes = {name: str for name in dialect.own}
        frame = dialect.numbers(pd.read_csv(file, low_memory=False, dtype=dtypes, **dialect.for_pandas()))
    numbers = frame.columns[[is_numeric_dtype(kind) for kind in frame.dtypes]]
    marks = {name: dialect.marks_of(name) for name in numbers}
    whole = {name for name in numbers if is_integer_dtype(frame[name]) and not marks[name][1]}  # no mark is in them
    frame.attrs[MARKS] = {name: each for name, each in marks.items() if each != PLAIN and name not in whole}
    return frame


def words_for_missing(file: Path, name: str) -> Mapping[str, int]:
    """Return which words stand where a column's values are read as missing, and how often; none: in Parquet."""
    if _is_parquet(file):
        return {}

    def as_written(file: Path, dialect: Dialect) -> pd.DataFrame:
        how = dialect.for_pandas() | {"na_values": None, "keep_default_na": False, "usecols": [name], "dtype": str}
        return pd.read_csv(file, low_memory=False, **how)

    words = _read_text(file, as_written)[name].str.strip().value_counts()
    return {str(word): int(n) for word, n in words.items() if word in MISSING and word}
