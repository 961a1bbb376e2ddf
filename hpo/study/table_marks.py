"""The marks of a table's numbers: which stand before decimals, which between thousands; numbers that are codes.

What a number means follows from its whole column, never from where in the file its row stands.
"""

import re
from collections.abc import Iterable, Sequence
from typing import IO, Any

import numpy as np
import pandas as pd

_ABBREVIATED = ("#N/A", "#N/A N/A", "#NA", "<NA>", "N/A", "NA", "n/a", "NULL", "null", "None")
_NO_NUMBER = ("NaN", "nan", "-NaN", "-nan", "1.#IND", "-1.#IND", "1.#QNAN", "-1.#QNAN")
MISSING = ("", *_ABBREVIATED, *_NO_NUMBER, "?")
"""Texts that are read as missing: those that pandas takes for that, and the question mark."""
Marks = tuple[str, str]
"""Of decimals and of thousands; empty: there is none. A blank stands for every kind of it."""
PLAIN: Marks = (".", "")
WITHOUT_BLANKS: tuple[Marks, ...] = (PLAIN, (",", ""), (",", "."), (".", ","))
_WITH_BLANKS: tuple[Marks, ...] = ((",", " "), (".", " "))
EVERY = (*WITHOUT_BLANKS, *_WITH_BLANKS)
_BLANK = "[ \u00a0\u2009\u202f]"
_MANY = 2
"""So many numbers with marks, and as many without, say that the marks are those of thousands."""
_BLOCK, _LONGEST = 1 << 18, 64
"""So many bytes are looked at together, in the processor's cache; a number with leading zeros is not longer."""


def number_pattern(decimal: str = ".", thousands: str = "") -> re.Pattern[str]:
    """Return what a number is that is written with these marks; thousands need none."""
    mark = _BLANK if thousands == " " else rf"\{thousands}"
    whole = rf"(?:[1-9]\d{{0,2}}(?:{mark}\d{{3}})+|\d+)" if thousands else r"\d+"
    return re.compile(rf"[+-]?(?:{whole}(?:\{decimal}\d*)?|\{decimal}\d+)(?:[eE][+-]?\d+)?")


_NUMBER = {marks: number_pattern(*marks) for marks in EVERY}
_OF_THOUSANDS = {
    marks: re.compile(rf"[+-]?[1-9]\d{{0,2}}(?:\{marks[1]}\d{{3}})+") for marks in ((".", ","), (",", "."))
}
_SAYS_NOTHING = re.compile(r"[+-]?\d+[.,]0*")
_CODE = re.compile(r"0\d+")


class Seen:
    """What was seen of a column's values: enough to say what its marks are, in whatever order they come."""

    def __init__(self) -> None:
        self.fits = dict.fromkeys(EVERY, True)
        """Whether all values with a mark are numbers with these marks."""
        self.grouped = dict.fromkeys(_OF_THOUSANDS, True)
        """Whether all of them are whole numbers with these marks of thousands."""
        self.n_marked = self.n_whole = 0
        self.says = self.long = self.zeros = False
        """Whether a value has decimals or a mark of thousands; is whole and from a thousand on; has leading zeros."""

    def add(self, values: "pd.Series[Any]") -> None:
        """See more of the column's values; only texts count."""
        for value, n in values.value_counts(sort=False).items():
            if not isinstance(value, str):
                continue
            text = value.strip()
            if "." in text or "," in text:
                if text not in MISSING:
                    self._add_marked(text, n)
            elif text.isdecimal():
                self.n_whole += n
                self.long |= len(text) > 3
                self.zeros |= _CODE.fullmatch(text) is not None
            elif any(self.fits[marks] for marks in _WITH_BLANKS) and text not in MISSING:
                self._add_other(text, n)

    def _add_other(self, text: str, n: int) -> None:
        if not _NUMBER[PLAIN].fullmatch(text):
            if _NUMBER[_WITH_BLANKS[0]].fullmatch(text):
                self._add_marked(text, n)
            else:  # blanks between digits are marks where nothing else is in the column
                self.fits |= dict.fromkeys(_WITH_BLANKS, False)

    def _add_marked(self, text: str, n: int) -> None:
        self.n_marked += n
        self.says = self.says or _SAYS_NOTHING.fullmatch(text) is None
        for marks, so_far in self.fits.items():
            if so_far and not _NUMBER[marks].fullmatch(text):
                self.fits[marks] = False
        for marks, so_far in self.grouped.items():
            if so_far and not _OF_THOUSANDS[marks].fullmatch(text):
                self.grouped[marks] = False

    def add_read(self, numbers: np.ndarray, decimal: str, thousands: str = "") -> None:
        """See a column that pandas has read as numbers with these marks, and that has both, or no thousands."""
        if not are_whole(numbers):
            self.n_marked, self.says = len(numbers), True
            self.fits = {marks: marks[0] == decimal and thousands in marks[1] for marks in EVERY}
            self.grouped = dict.fromkeys(_OF_THOUSANDS, False)

    def thousands(self) -> Marks | None:
        """Return the marks of whole numbers of which those from a thousand on have a mark, and no other; None: others.

        As decimals they would be a strange mixture: three digits behind the point, or no point at all.
        """
        if self.n_marked < _MANY or self.n_whole < _MANY or self.long:
            return None
        return next((marks for marks, all_are in self.grouped.items() if all_are), None)


def most_common(columns: Iterable[Seen], separator: str) -> Marks:
    """Return the marks with which the most columns are numbers; of equals, the first."""
    votes = [each.fits for each in columns if each.says and any(each.fits.values())]
    return max(_by_separator(separator), key=lambda marks: sum(fits[marks] for fits in votes))


def _by_separator(separator: str) -> Sequence[Marks]:
    """Return all marks; those that mean more come later."""
    if separator == ",":  # numbers that hold a comma are in quotes, and it is the mark of thousands
        return [PLAIN, (".", ","), (",", ""), (",", "."), (".", " "), (",", " ")]
    return EVERY


def marks_of(column: Seen, others: Marks, separator: str, trained: Marks | None = None) -> Marks | None:
    """Return the marks of a column's numbers: as it was `trained`, or as the others of its table, wherever that can be.

    None: where it holds marks, it holds other than numbers.
    """
    if not column.n_marked:
        return others if trained is None else trained
    if trained is not None and column.fits[trained]:
        return trained
    of_thousands = column.thousands()
    if of_thousands is not None and (separator != "," or of_thousands == (".", ",")):
        return of_thousands
    return next((each for each in (others, *_by_separator(separator)) if column.fits[each]), None)


def are_whole(numbers: np.ndarray) -> bool:
    """Whether none of the numbers has decimals; missing ones are not looked at."""
    if numbers.dtype.kind != "f":
        return True
    return not any(((np.rint(some) != some) & ~np.isnan(some)).any() for some in (numbers[:1000], numbers))


def may_have_thousands(numbers: np.ndarray, some_are_round: bool) -> bool:
    """Whether numbers that pandas has read with a mark of decimals may have it between thousands: 1.5 was 1.500.

    `some_are_round`: the file holds the mark with three zeros behind it, which are not seen in the numbers.
    """
    with np.errstate(invalid="ignore"):
        for some in (numbers[:1000], numbers):  # of most columns few values are enough
            rest = np.abs(some[(some % 1 != 0) & ~np.isnan(some)])
            milli = rest * 1000
            if len(rest) and not (rest.min() > 1 and rest.max() < 1000 and (abs(milli - np.rint(milli)) < 1e-6).all()):
                return False
    return len(rest) > 0 or (some_are_round and bool((np.abs(numbers) < 1000).any()))


def scan(stream: IO[bytes], separator: str, decimal: str) -> tuple[bool, bool]:
    """Return whether a field of a file is a number with leading zeros, and whether the mark has three zeros behind it.

    Both are lost in the numbers that pandas makes; few files have them, and only these are looked at more closely.
    """
    zeros = thousands = False
    before, wanted = b"\n", f"{decimal}000".encode()
    while block := stream.read(_BLOCK):
        whole = before + block
        zeros = zeros or _holds_leading_zeros(whole, separator)
        thousands = thousands or wanted in whole
        before = whole[-_LONGEST:]
    return zeros or _holds_leading_zeros(before + b"\n", separator), thousands


def _holds_leading_zeros(block: bytes, separator: str) -> bool:
    data = np.frombuffer(block, dtype=np.uint8)
    ends = np.frombuffer(b'\r\n" ' + separator.encode(), dtype=np.uint8)
    at = np.flatnonzero((data[1:-1] == ord("0")) & ((data[2:] - ord("0")) < 10)) + 1  # wraps around below "0"
    at = at[np.isin(data[at - 1], ends)] + 2
    while len(at := at[at < len(data)]):
        following = data[at]
        if np.isin(following, ends).any():
            return True
        at = at[(following - ord("0")) < 10] + 1
    return False


def are_codes(texts: "pd.Series[Any]") -> bool:
    """Whether whole numbers are names rather: all have leading zeros, or without these several would be one."""
    known = texts.dropna().drop_duplicates()
    if not known.str.fullmatch(r"\d+").all():
        return False
    zeros = known.str.fullmatch(_CODE.pattern)
    return bool(zeros.any() and (zeros.all() or known.str.lstrip("0").nunique() < len(known)))


def as_code(text: str, marks: Marks = PLAIN) -> str:
    """Return a name that is a number with a point for decimals, a whole one without it: 7.0 is 7, but 07 is 07."""
    decimal, _ = marks
    if not number_pattern(decimal).fullmatch(text):  # marks of thousands are part of a name
        return text
    return re.sub(r"(?<=\d)\.0*$", "", text.replace(decimal, "."))


def as_codes(values: "pd.Series[Any]", marks: Marks) -> "pd.Series[Any]":
    """Return names that are numbers as they are written; where all are whole ones, without a point."""
    text = values.astype("string").str.strip()
    made = {each: as_code(each, marks) for each in text.dropna().unique()}
    return text.map(made).astype("string") if all(re.fullmatch(r"[+-]?\d+", each) for each in made.values()) else text


def as_read(texts: Sequence[str], marks: Marks) -> "pd.Series[Any]":
    """Return a column as it is read whose values are written so: what is missing is None, numbers are as in Python."""
    stripped = [text.strip() for text in texts]
    return with_point(pd.Series([None if text in MISSING else text for text in stripped], dtype=object), marks)


def with_point(values: "pd.Series[Any]", marks: Marks) -> "pd.Series[Any]":
    """Return texts of which those that are numbers with these marks have a point for decimals, and no other mark.

    Where that makes numbers of all of them, the column is one of numbers.
    """
    number = number_pattern(*marks)

    def pointed(value: Any) -> Any:
        if not isinstance(value, str):
            return None if pd.isna(value) else value
        text = value.strip()
        return _pointed(text, marks) if number.fullmatch(text) else text or None

    codes, known = pd.factorize(values.astype(object))
    made = np.array([*map(pointed, known), None], dtype=object)[codes]
    plain = pd.Series(made, index=values.index, name=values.name, dtype=object)
    numbers = to_numbers(plain)
    return numbers if numbers.notna().sum() == plain.notna().sum() else plain


def to_numbers(values: "pd.Series[Any]") -> "pd.Series[Any]":
    """Return values as numbers, NaN for those that are none; 1e400 is infinity, which pandas takes for none."""
    numbers = pd.to_numeric(values, errors="coerce")
    lost = numbers.isna() & values.notna()
    if not 0 < lost.mean() <= 0.5:  # most are words
        return numbers
    huge = [float(x) if isinstance(x, str) and _NUMBER[PLAIN].fullmatch(x) else np.nan for x in values[lost]]
    made = numbers.to_numpy(dtype=np.float64, na_value=np.nan, copy=True)
    made[lost.to_numpy()] = np.where(np.isinf(huge), huge, np.nan)
    return pd.Series(made, index=values.index, name=values.name) if np.isinf(huge).any() else numbers


def without_thousands(number: str, mark: str) -> str:
    """Return a number without its marks of thousands."""
    return re.sub(_BLANK, "", number) if mark == " " else number.replace(mark, "") if mark else number


def _pointed(number: str, marks: Marks) -> str:
    decimal, thousands = marks
    return without_thousands(number, thousands).replace(decimal, ".")
