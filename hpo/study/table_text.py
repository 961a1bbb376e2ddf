"""How a text table is written: separator, encoding, marks of numbers, from its beginning; values as text."""

import bz2
import csv
import gzip
import lzma
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import StringIO
from itertools import zip_longest
from typing import IO, Any

import numpy as np
import pandas as pd
from pandas.api import types

from hpo.errors import DataError

OPEN: Mapping[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
"""How a file is opened, by its suffix, where that is not `open`."""
_SAMPLE, _MOST = 1 << 18, 1 << 24
"""So many bytes of a file say how it is written; where they do not hold `_LINES` lines, more, up to `_MOST`."""
_LINES = 8
_FIELDS = 1 << 17
"""So many fields say how numbers are written."""
csv.field_size_limit(_MOST)  # a line that is read with the wrong separator is one field
_MANY = 2
"""So many numbers with marks, and as many without, say that the marks are those of thousands."""
_ABBREVIATED = ("#N/A", "#N/A N/A", "#NA", "<NA>", "N/A", "NA", "n/a", "NULL", "null", "None")
_NO_NUMBER = ("NaN", "nan", "-NaN", "-nan", "1.#IND", "-1.#IND", "1.#QNAN", "-1.#QNAN")
MISSING = ("", *_ABBREVIATED, *_NO_NUMBER, "?")
"""Texts that are read as missing: those that pandas takes for that, and the question mark."""
Marks = tuple[str, str]
"""Of decimals and of thousands; empty: there is none."""
PLAIN: Marks = (".", "")


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """How a table is written, and its `header`."""

    header: Sequence[str]
    separator: str
    decimal: str
    thousands: str
    encoding: str
    errors: str
    """What is done with bytes that are none of the encoding: strict or replace."""
    own: Mapping[str, Marks | None] = field(default_factory=dict)
    """The columns whose numbers have other marks than these; None: what has marks there is no number (31.12.2020)."""

    def marks_of(self, name: str) -> Marks:
        """Return the marks of a column's numbers."""
        return self.own.get(name) or (self.decimal, self.thousands)

    def names(self) -> list[str]:
        """Return the columns' names as pandas has them: those without one are numbered."""
        return [name or f"Unnamed: {i}" for i, name in enumerate(self.header)]

    def numbers(self, frame: pd.DataFrame) -> pd.DataFrame:
        """Return a table that pandas has read with the numbers of the columns in `own`, which are text there."""
        made = {n: with_point(frame[n], marks) for n, marks in self.own.items() if marks is not None and n in frame}
        return frame.assign(**made) if made else frame

    def for_pandas(self) -> dict[str, Any]:
        """Return the arguments of `pandas.read_csv`; the columns in `own` are to be read as text."""
        return {
            "header": 0,
            "names": self.names(),
            "sep": self.separator,
            "decimal": self.decimal,
            "thousands": self.thousands or None,
            "encoding": self.encoding,
            "encoding_errors": self.errors,
            "index_col": False,
            "skipinitialspace": True,
            "na_values": list(MISSING),
        }


def dialect_of(where: object, head: bytes, cut: bool, trained: Mapping[str, Marks] | None = None) -> Dialect:
    """Return how the table is written that begins with `head`, and has more where it is `cut`.

    `where` says in messages which table it is; `trained` are the marks that the columns' numbers had in another table,
    which they have here too, wherever that can be. Raises DataError.
    """
    trained = trained or {}
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return _dialect(where, head, cut, "utf-16", "strict", trained)
    if odd := re.search(rb"[\x00-\x08\x0e-\x1f]", head):
        raise DataError(
            f"{where}: is no text (byte {odd.start()} is {odd[0][0]}); give a .csv or a .parquet file, and save a "
            "workbook as CSV"
        )
    try:
        return _dialect(where, head, cut, "utf-8-sig", "strict", trained)
    except UnicodeDecodeError:
        return windows(where, head, cut, trained)


def windows(where: object, head: bytes, cut: bool, trained: Mapping[str, Marks] | None = None) -> Dialect:
    """Return how the table is written, whose encoding is that of Windows. Raises DataError."""
    return _dialect(where, head, cut, "cp1252", "replace", trained or {})


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


def _dialect(
    where: object, head: bytes, cut: bool, encoding: str, errors: str, trained: Mapping[str, Marks]
) -> Dialect:
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
    if long := next((row for row in rows if len(row) > len(header)), None):
        raise DataError(
            f"{where}: a row has {len(long)} fields, but its header has {len(header)} (separated by {separator!r}): "
            f"{separator.join(long)[:60]!r}; put text that holds {separator!r} into quotes"
        )
    decimal, thousands = marks = _marks(rows, separator)
    own: dict[str, Marks | None] = {}
    for name, *values in zip_longest(header, *rows, fillvalue=""):
        found = _marks_of(values, marks, trained.get(name), separator)
        if found != marks:
            own[name] = found
    return Dialect(
        own=own,
        header=header,
        separator=separator,
        decimal=decimal,
        thousands=thousands,
        encoding=encoding,
        errors=errors,
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


def _every_marks(separator: str) -> list[Marks]:
    """Return all marks; those that mean more come later."""
    if separator == ",":  # numbers that hold a comma are in quotes, and it is the mark of thousands
        return [PLAIN, (".", ","), (",", ""), (",", ".")]
    return [PLAIN, (",", ""), (",", "."), (".", ",")]


def _marks(rows: Sequence[Sequence[str]], separator: str) -> Marks:
    """Return the marks of decimals and of thousands with which most fields are numbers; of equals, the first."""
    known = _every_marks(separator)
    values = [value for row in rows for value in row]
    some = [value for value in values[:: 1 + len(values) // _FIELDS] if "." in value or "," in value]

    def n_numbers(marks: Marks) -> int:
        number = number_pattern(*marks)
        return sum(number.fullmatch(value) is not None for value in some)

    if n_numbers(known[0]) == len(some):
        return known[0]
    return max(known, key=n_numbers)


def _marks_of(values: Sequence[str], marks: Marks, trained: Marks | None, separator: str) -> Marks | None:
    """Return the marks of a column's numbers: as it was `trained`, or as the others of its table, wherever that can be.

    None: where it holds marks, it holds other than numbers.
    """
    some = values[:: 1 + len(values) // _FIELDS]
    marked = [value for value in some if ("." in value or "," in value) and value not in MISSING]
    if not marked:
        return marks

    def fit(marks: Marks) -> bool:
        number = number_pattern(*marks)
        return all(number.fullmatch(value) for value in marked)

    if trained is not None and fit(trained):
        return trained
    of_thousands = _thousands(some, marked)
    if of_thousands is not None and (separator != "," or of_thousands == (".", ",")):
        return of_thousands
    return next((each for each in (marks, *_every_marks(separator)) if fit(each)), None)


def _thousands(values: Sequence[str], marked: Sequence[str]) -> Marks | None:
    """Return the marks of whole numbers of which those from a thousand on have a mark, and no other; None: of others.

    As decimals they would be a strange mixture: three digits behind the point, or no point at all.
    """
    plain = [value for value in values if value.isdecimal()]
    if len(marked) < _MANY or len(plain) < _MANY or any(len(value) > 3 for value in plain):
        return None
    for decimal, thousands in ((".", ","), (",", ".")):
        of_thousands = re.compile(rf"[+-]?[1-9]\d{{0,2}}(?:\{thousands}\d{{3}})+")
        if all(of_thousands.fullmatch(value) for value in marked):
            return decimal, thousands
    return None


def as_read(texts: Sequence[str], marks: Marks) -> "pd.Series[Any]":
    """Return a column as it is read whose values are written so: what is missing is None, numbers are as in Python."""
    stripped = [text.strip() for text in texts]
    return with_point(pd.Series([None if text in MISSING else text for text in stripped], dtype=object), marks)


def with_point(values: "pd.Series[Any]", marks: Marks) -> "pd.Series[Any]":
    """Return texts of which those that are numbers with these marks have a point for decimals, and no other mark.

    Where that makes numbers of all of them, the column is one of numbers.
    """
    text = values.astype("string").str.strip()
    number = text.str.fullmatch(number_pattern(*marks).pattern, na=False).astype(bool)
    decimal, thousands = marks
    plain = text.str.replace(thousands, "", regex=False) if thousands else text
    made = text.mask(number, plain.str.replace(decimal, ".", regex=False)).astype(object)
    made = made.where(made.notna(), None)
    numbers = pd.to_numeric(made, errors="coerce")
    return numbers if numbers.notna().sum() == made.notna().sum() else made


def number_pattern(decimal: str = ".", thousands: str = "") -> re.Pattern[str]:
    """Return what a number is that is written with these marks; thousands need none."""
    whole = rf"(?:[1-9]\d{{0,2}}(?:\{thousands}\d{{3}})+|\d+)" if thousands else r"\d+"
    return re.compile(rf"[+-]?(?:{whole}(?:\{decimal}\d*)?|\{decimal}\d+)(?:[eE][+-]?\d+)?")


def listed(texts: Iterable[str], longest: int = 50) -> str:
    """Return the texts, cut where they are longer than `longest`, with commas between, and how many more than ten."""
    every = [text if len(text) <= longest else f"{text[: longest - 3]}..." for text in texts]
    more = f" and {len(every) - 10} more" if len(every) > 10 else ""
    return ", ".join(every[:10]) + more


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
