"""Numbers of a table that are written with a currency or a percent sign: $1,200.50, 1'200.50 CHF, 45%.

A column of them is a column of numbers that has the key `decimal`, the mark of decimals: all else between digits is a
mark of thousands.
"""

import re
from typing import Any

import pandas as pd
from pandas.api import types

from hpo.study.table_marks import number_pattern
from hpo.study.table_text import as_text

_UNIT = r"[$€£¥₹₩₽₺%]|USD|EUR|GBP|CHF|JPY|CNY|INR|CAD|AUD"
_AMOUNT = re.compile(rf"^([+-]?)\s*({_UNIT})?\s*([+-]?)(\d[\d.,'\u2019\s]*|[.,]\d+)({_UNIT})?$")
_BLANKS = re.compile(r"['\u2019\s]")


def _parts(text: "pd.Series[Any]") -> pd.DataFrame:
    """Return sign, unit, sign, digits and unit of each text, NaN where it is no amount."""
    return text.astype(object).str.extract(_AMOUNT)


def unit_of(text: "pd.Series[Any]") -> tuple[str, str] | None:
    """Return the one unit that most of a column's texts have, and the mark of decimals; None: these are no amounts."""
    parts = _parts(text)
    units = pd.concat([parts[1], parts[4]]).dropna()
    if units.nunique() != 1 or len(units) <= len(text) / 2:
        return None
    unit = str(units.iloc[0])
    digits = [_BLANKS.sub("", number) for number in parts[3].dropna()]
    fits = {mark: sum(number_pattern(mark, "").fullmatch(x) is not None for x in digits) for mark in ".,"}
    grouped = {
        mark: sum(number_pattern(mark, other).fullmatch(x) is not None for x in digits)
        for mark, other in ((".", ","), (",", "."))
    }
    if grouped["."] != grouped[","]:
        return unit, max(".,", key=grouped.__getitem__)
    # 1.200 and 1,200 could be either: of money these are thousands, for it never has three decimals
    return unit, (min if unit != "%" else max)(".,", key=fits.__getitem__)


def amounts(values: "pd.Series[Any]", decimal: str) -> "pd.Series[Any]":
    """Return a column's amounts without unit and thousands, with a decimal point; what is none stays as it is."""
    if types.is_numeric_dtype(values):
        return values
    text, thousands = as_text(values).astype(object), "," if decimal == "." else "."
    parts = _parts(text)
    digits = parts[3].str.replace(_BLANKS, "", regex=True)
    good = digits.str.fullmatch(number_pattern(decimal, thousands), na=False).astype(bool)
    plain = digits.str.replace(thousands, "", regex=False).str.replace(decimal, ".", regex=False)
    return text.where(~good, parts[0] + parts[2] + plain)
