"""A table from a file, read as it is meant; or refused in one line that says what is wrong, where, and what to do."""

import bz2
import csv
import gzip
import lzma
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from io import StringIO
from pathlib import Path
from typing import IO

import numpy as np
import pandas as pd
import torch
from pandas.api.types import is_scalar
from pandas.errors import ParserWarning

from hpo.errors import DataError
from hpo.training.memory import free_bytes

_OPEN = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_SAMPLE, _MOST = 1 << 18, 1 << 24
"""So many bytes of a file say how it is written; where they do not hold `_LINES` lines, more, up to `_MOST`."""
_LINES = 8
_FIELDS = 1 << 17
"""So many fields say how numbers are written."""
csv.field_size_limit(_MOST)  # a line that is read with the wrong separator is one field
_MISSING = ("?",)
"""Read as missing, beside what pandas takes for that: nothing, NA, N/A, NaN, null, None, ..."""
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
        frame = pd.read_parquet(file) if file.suffix == ".parquet" else _read_text(file)
    except DataError:
        raise
    except Exception as error:  # pandas, pyarrow, csv, zlib, lzma: each fails in a way of its own
        reason = (str(error).splitlines() or [""])[0][:200]
        raise DataError(f"{file}: cannot be read ({type(error).__name__}: {reason})") from error
    frame.columns = pd.Index([str(name).strip() for name in frame.columns])
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
    packed = file.suffix == ".parquet" or file.suffix in _OPEN
    needed, free = size * _MEMORY["packed" if packed else "text"], free_bytes(torch.device("cpu"))
    if needed > free:
        raise DataError(
            f"{file}: its {size / 1e9:.1f} GB need about {needed / 1e9:.1f} GB of memory, but {free / 1e9:.1f} GB are "
            "free; keep fewer of its rows or columns, or take a machine with more"
        )


def _read_text(file: Path) -> pd.DataFrame:
    with _OPEN.get(file.suffix, open)(file, "rb") as stream:
        head, cut = _beginning(stream)
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return _parse(file, head, cut, "utf-16", "strict")
    if odd := re.search(rb"[\x00-\x08\x0e-\x1f]", head):
        raise DataError(
            f"{file}: is no text (byte {odd.start()} is {odd[0][0]}); give a .csv or a .parquet file, and save a "
            "workbook as CSV"
        )
    try:
        return _parse(file, head, cut, "utf-8-sig", "strict")
    except UnicodeDecodeError:
        return _parse(file, head, cut, "cp1252", "replace")


def _beginning(stream: IO[bytes]) -> tuple[bytes, bool]:
    """Return a file's beginning, with some whole rows in it, and whether there is more of it."""
    head = stream.read(_SAMPLE)
    while _n_lines(head) < _LINES and len(head) < _MOST and (more := stream.read(len(head))):
        head += more
    return head, bool(stream.read(1))


def _n_lines(text: bytes) -> int:
    """Return how many lines end in `text`, those inside of quotes not counted."""
    characters = np.frombuffer(text, dtype=np.uint8)
    in_quotes = np.cumsum(characters == ord('"')) % 2 == 1
    return int((((characters == ord("\n")) | (characters == ord("\r"))) & ~in_quotes).sum())


def _parse(file: Path, head: bytes, cut: bool, encoding: str, errors: str) -> pd.DataFrame:
    text = head.decode(encoding, "ignore" if cut else errors)
    separator = max(",;\t|", key=lambda mark: _n_columns(text, mark, cut))
    rows = list(_rows(text, separator, cut))
    if not rows:
        raise DataError(f"{file}: is empty")
    header, *rows = [[value.strip() for value in row] for row in rows]
    number = _number()
    if all(number.fullmatch(name) for name in header):
        raise DataError(
            f"{file}: its first line holds numbers, no names; write a line with the columns' names above it"
        )
    if twice := [name for name, n in Counter(header).items() if n > 1 and name]:
        raise DataError(
            f"{file}: its header names {listed(map(repr, twice))} more than once; give each column its own name"
        )
    if long := next((row for row in rows if len(row) > len(header)), None):
        raise DataError(
            f"{file}: a row has {len(long)} fields, but its header has {len(header)} (separated by {separator!r}): "
            f"{separator.join(long)[:60]!r}; put text that holds {separator!r} into quotes"
        )
    decimal, thousands = _marks(rows, separator)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ParserWarning)  # where pandas would cut rows that are too long
        return pd.read_csv(
            file,
            sep=separator,
            decimal=decimal,
            thousands=thousands or None,
            encoding=encoding,
            encoding_errors=errors,
            index_col=False,
            skipinitialspace=True,
            na_values=list(_MISSING),
            low_memory=False,
        )


def _rows(text: str, separator: str, cut: bool) -> Iterator[list[str]]:
    """Yield the rows that hold something; of several not the last, which is half a row, where the text was `cut`."""
    rows = filter(None, csv.reader(StringIO(text, newline=""), delimiter=separator, skipinitialspace=True))
    before = next(rows, None)
    if before is None:
        return
    whole = not cut
    for row in rows:
        yield before
        before, cut = row, not whole
    if whole or not cut:
        yield before


def _n_columns(text: str, separator: str, cut: bool) -> int:
    """Return how many columns there are if `separator` is between them; 0 where most rows have another number."""
    sizes = [len(row) for row in _rows(text, separator, cut)]
    return sizes[0] if sizes and sizes.count(sizes[0]) >= 0.9 * len(sizes) else 0


def _marks(rows: Sequence[Sequence[str]], separator: str) -> tuple[str, str]:
    """Return the marks of decimals and of thousands with which most fields are numbers; of equals, the first here."""
    known = [(".", ""), (",", ""), (",", "."), (".", ",")]
    if separator == ",":  # numbers that hold a comma are in quotes, and it is the mark of thousands
        known = [(".", ""), (".", ","), (",", ""), (",", ".")]

    values = [value for row in rows for value in row]
    some = values[:: 1 + len(values) // _FIELDS]

    def n_numbers(marks: tuple[str, str]) -> int:
        number = _number(*marks)
        return sum(number.fullmatch(value) is not None for value in some)

    return max(known, key=n_numbers)


def _number(decimal: str = ".", thousands: str = "") -> re.Pattern[str]:
    whole = rf"(?:[1-9]\d{{0,2}}(?:\{thousands}\d{{3}})+|\d+)" if thousands else r"\d+"
    return re.compile(rf"[+-]?(?:{whole}(?:\{decimal}\d*)?|\{decimal}\d+)(?:[eE][+-]?\d+)?")


def listed(texts: Iterable[str]) -> str:
    """Return the texts, long ones cut, with commas between, and how many more there are than ten."""
    every = [text if len(text) <= 50 else f"{text[:47]}..." for text in texts]
    more = f" and {len(every) - 10} more" if len(every) > 10 else ""
    return ", ".join(every[:10]) + more
