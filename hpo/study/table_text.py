"""How a text table is written: separator, encoding and header, from its beginning; values as text."""

import bz2
import csv
import gzip
import lzma
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from typing import IO, Any

import numpy as np
import pandas as pd
from pandas.api import types

from hpo.errors import DataError, listed
from hpo.study.table_marks import MISSING, WITHOUT_BLANKS, Marks, number_pattern

OPEN: Mapping[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
"""How a file is opened, by its suffix, where that is not `open`."""
_SAMPLE, _MOST = 1 << 18, 1 << 24
"""So many bytes of a file say how it is written; where they do not hold `_LINES` lines, more, up to `_MOST`."""
_LINES = 8
csv.field_size_limit(_MOST)  # a line that is read with the wrong separator is one field


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """How a table is written, and its `header`."""

    header: Sequence[str]
    separator: str
    decimal: str
    thousands: str
    """What most numbers of its beginning have before decimals and between thousands: pandas is fast with these."""
    encoding: str
    errors: str
    """What is done with bytes that are none of the encoding: strict or replace."""

    def names(self) -> list[str]:
        """Return the columns' names as pandas has them: those without one are numbered."""
        return [name or f"Unnamed: {i}" for i, name in enumerate(self.header)]

    def for_pandas(self) -> dict[str, Any]:
        """Return the arguments of `pandas.read_csv`, with which a number has no marks of thousands."""
        return {
            "header": 0,
            "names": self.names(),
            "sep": self.separator,
            "decimal": self.decimal,
            "encoding": self.encoding,
            "encoding_errors": self.errors,
            "index_col": False,
            "skipinitialspace": True,
            "na_values": list(MISSING),
        }


def dialect_of(where: object, head: bytes, cut: bool) -> Dialect:
    """Return how the table is written that begins with `head`, and has more where it is `cut`.

    `where` says in messages which table it is. Raises DataError.
    """
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return _dialect(where, head, cut, "utf-16", "strict")
    if odd := re.search(rb"[\x00-\x08\x0e-\x1f]", head):
        raise DataError(
            f"{where}: is no text (byte {odd.start()} is {odd[0][0]}); give a .csv or a .parquet file, and save a "
            "workbook as CSV"
        )
    try:
        return _dialect(where, head, cut, "utf-8-sig", "strict")
    except UnicodeDecodeError:
        return windows(where, head, cut)


def windows(where: object, head: bytes, cut: bool) -> Dialect:
    """Return how the table is written, whose encoding is that of Windows. Raises DataError."""
    return _dialect(where, head, cut, "cp1252", "replace")


def beginning(stream: IO[bytes]) -> tuple[bytes, bool]:
    """Return a file's beginning, with some whole rows in it, and whether there is more of it."""
    head = stream.read(_SAMPLE)
    while _n_lines(head) < _LINES and len(head) < _MOST and (more := stream.read(len(head))):
        head += more
    next_byte = stream.read(1)
    return head + next_byte, bool(next_byte)


def _n_lines(text: bytes) -> int:
    """Return how many lines end in `text`, those inside of quotes not counted."""
    characters = np.frombuffer(text, dtype=np.uint8)
    in_quotes = np.cumsum(characters == ord('"')) % 2 == 1
    return int((((characters == ord("\n")) | (characters == ord("\r"))) & ~in_quotes).sum())


def _dialect(where: object, head: bytes, cut: bool, encoding: str, errors: str) -> Dialect:
    text = head.decode(encoding, "ignore" if cut else errors)
    if mark := re.match(r"\s*(sep=.)\s*[\r\n]", text, re.IGNORECASE):
        raise DataError(f"{where}: its first line is Excel's {mark[1]!r}, no names; remove that line")
    columns = {mark: _n_columns(text, mark, cut) for mark in ",;\t|"}
    if max(columns.values()) == 1:  # rows that have more fields than the header: that is to be said, not "one column"
        first = text.lstrip().partition("\n")[0]
        columns = {mark: first.count(mark) for mark in columns}
    separator = max(columns, key=columns.__getitem__)
    rows = list(_rows(text, separator, cut))
    if not rows:
        raise DataError(f"{where}: is empty")
    header, *rows = [[value.strip() for value in row] for row in rows]
    number = number_pattern()
    if all(number.fullmatch(name) for name in header):
        raise DataError(
            f"{where}: its first line holds numbers, no names; write a line with the columns' names above it"
        )
    if twice := [name for name, n in Counter(header).items() if n > 1 and name]:
        raise DataError(
            f"{where}: its header names {listed(map(repr, twice))} more than once; give each column its own name"
        )
    if both := {f"Unnamed: {i}": i for i, name in enumerate(header) if not name and f"Unnamed: {i}" in header}:
        name, place = next(iter(both.items()))
        raise DataError(
            f"{where}: its column {place + 1} has no name and is called {name!r}, as column {header.index(name) + 1} "
            "is; give each its own name"
        )
    if long := next((row for row in rows if len(row) > len(header)), None):
        raise DataError(
            f"{where}: a row has {len(long)} fields, but its header has {len(header)} (separated by {separator!r}): "
            f"{separator.join(long)[:60]!r}; put text that holds {separator!r} into quotes"
        )
    decimal, thousands = _marks(rows)
    return Dialect(
        header=header, separator=separator, decimal=decimal, thousands=thousands, encoding=encoding, errors=errors
    )


def _marks(rows: Sequence[Sequence[str]]) -> Marks:
    """Return the marks with which the most fields are numbers."""
    some = [value for row in rows for value in row if "." in value or "," in value]
    patterns = {marks: number_pattern(*marks) for marks in WITHOUT_BLANKS}
    return max(WITHOUT_BLANKS, key=lambda marks: sum(patterns[marks].fullmatch(value) is not None for value in some))


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


def without_arrow(frame: pd.DataFrame) -> pd.DataFrame:
    """Return a table whose columns are NumPy's or pandas' own: Arrow's have not all of their operations."""
    arrow = [place for place, kind in enumerate(frame.dtypes) if isinstance(kind, pd.ArrowDtype)]
    if not arrow:
        return frame
    import pyarrow

    columns = [frame.iloc[:, place] for place in range(frame.shape[1])]
    for place in arrow:
        plain = pyarrow.array(columns[place]).to_pandas()
        columns[place] = plain.set_axis(frame.index).rename(columns[place].name)
    return pd.concat(columns, axis=1)


def as_text(values: pd.Series) -> pd.Series:
    """Return values as text without blanks around it, whole numbers without a point; missing ones stay missing."""
    if types.is_float_dtype(values) and (values.dropna() % 1 == 0).all():
        values = values.astype("Int64")
    text = values.astype("string").str.strip()
    return text.mask(text == "")
