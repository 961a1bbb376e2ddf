"""Dates of a table: how a column of them is written, and what of each date a network is given.

A column is said in plain values, so that another table's dates become the same numbers: {"format": "%d.%m.%Y", "first":
"2020-01-01T00:00:00", "parts": ["year", "month", "weekday", "days"], "any_year": true}. Without `any_year`, as in
bundles of earlier versions, texts before 1677 and after 2262 are no dates.
"""

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from pandas.api import types

from hpo.study.table_text import as_text

ISO = "ISO8601"
"""The format of dates that are written as 2020-01-31, with a time of day or not; of those that are stored as dates."""
_DAYS = ("%Y/%m/%d", "%m/%d/%Y", "%d/%m/%Y", "%d.%m.%Y", "%d-%m-%Y", "%m-%d-%Y", "%m/%d/%y", "%d/%m/%y", "%d.%m.%y")
_NAMED = ("%d %B %Y", "%d %b %Y", "%B %d, %Y", "%b %d, %Y", "%d-%b-%Y", "%d-%b-%y", "%d%b%Y", "%B %Y", "%b %Y")
_TIMES = ("", " %H:%M", " %H:%M:%S", " %I:%M %p", " %I:%M:%S %p")
FORMATS = (ISO, *(day + time for day, time in itertools.product((*_DAYS, *_NAMED), _TIMES)))
_SHAPE = (
    r"(\d{4}[-/]\d{1,2}|\d{1,4}([-/.])\d{1,2}\2\d{1,4}|\d{1,2}[ -]?[A-Za-z]{3,9}[ -]?\d{2,4}|"
    r"[A-Za-z]{3,9} (\d{1,2}, )?\d{4})([ T]\d.*)?"
)
_SAMPLE = 300
"""So many different texts say how dates are written."""
PARTS = ("year", "month", "weekday", "hour", "days")
"""What a date is to a network: `weekday` is 0 on Mondays, `days` are those since the first date, with a fraction."""
_DAY = pd.Timedelta(days=1)
_YEAR = re.compile(r"(?<!\d)\d{4}(?!\d)")
_NANO = 1700, 2100
"""Years whose moments nanoseconds reach, 400 of them: in the next 400 all dates are the same days of the week."""


def is_stored_as_date(values: "pd.Series[Any]") -> bool:
    """Whether a column's type says that it holds moments."""
    return types.is_datetime64_any_dtype(values) or isinstance(values.dtype, pd.PeriodDtype)


def looks_like_dates(text: "pd.Series[Any]") -> bool:
    """Whether most of a column's texts have the shape of dates; they need not be any."""
    some = _some(text)
    return len(some) > 0 and bool(some.str.fullmatch(_SHAPE).mean() > 0.5)


def format_of(text: "pd.Series[Any]") -> str | None:
    """Return the format in which most of a column's texts are dates; None: there is none.

    Where two fit as well (3/4/2020), the month comes first, as in `FORMATS`.
    """
    if not looks_like_dates(text):
        return None
    some = _some(text)
    shares = {form: float(moments(some, form).notna().mean()) for form in FORMATS}
    best = max(FORMATS, key=lambda form: shares[form])
    return best if shares[best] > 0.5 else None


def _some(text: "pd.Series[Any]") -> "pd.Series[Any]":
    different = text.dropna().drop_duplicates()
    return different.iloc[:: max(1, len(different) // _SAMPLE)]


def moments(values: "pd.Series[Any]", form: str, *, any_year: bool = True) -> "pd.Series[Any]":
    """Return a column's dates without a time zone (in UTC where they have one); NaT for what is none in that format.

    `any_year`: dates are those of the years 1 to 9999, however the column is stored; else texts are none where
    nanoseconds do not reach.
    """
    if isinstance(values.dtype, pd.PeriodDtype):
        values = _starts(values)
    if values.dtype == object and pd.api.types.infer_dtype(values, skipna=True) in ("date", "datetime"):
        dates = pd.to_datetime(values, errors="coerce", utc=True)  # Python's own, however dates are written
        values = _with_other_years(dates, as_text(values), ISO) if any_year else dates
    elif not types.is_datetime64_any_dtype(values):
        text = as_text(values).astype(object)
        dates = pd.to_datetime(text, format=form, errors="coerce", utc=True)
        values = _with_other_years(dates, text, form) if any_year else dates
    values = values.dt.tz_convert(None) if values.dt.tz is not None else values
    if any_year and values.dt.unit != "ns":
        values = values.where(values.dt.year.between(1, 9999)).dt.as_unit("us")
    return values


def _starts(periods: "pd.Series[Any]") -> "pd.Series[Any]":
    try:
        starts: pd.Series[Any] = periods.dt.to_timestamp()
        return starts
    except pd.errors.OutOfBoundsDatetime:
        seconds = pd.PeriodIndex(periods).asfreq("s", how="START").asi8
        return pd.Series(seconds.view("datetime64[s]"), index=periods.index, name=periods.name)


def _with_other_years(dates: "pd.Series[Any]", text: "pd.Series[Any]", form: str) -> "pd.Series[Any]":
    """Return the dates with those that nanoseconds do not reach: read with a year that they do, and moved."""
    index, dates, text = dates.index, dates.reset_index(drop=True), text.reset_index(drop=True)
    lost = text[dates.isna() & text.notna()]
    years = pd.to_numeric(lost.astype(object).str.extract(f"({_YEAR.pattern})")[0])
    years = years[years.between(1, 9999) & ~years.between(*_NANO)].astype(int)
    if years.empty:
        return dates.set_axis(index)
    near = (years - _NANO[0]) % 400 + _NANO[0]
    moved = [_YEAR.sub(str(year), text, count=1) for year, text in zip(near, lost[years.index], strict=True)]
    read = pd.to_datetime(pd.Series(moved, index=years.index, dtype=object), format=form, errors="coerce", utc=True)
    days = ((years - near) // 400 * 146_097).to_numpy().astype("timedelta64[D]").astype("timedelta64[us]")
    read = read.dt.as_unit("us") + days
    read = read[read.dt.year.between(1, 9999)]
    made = dates.dt.as_unit("us").copy() if len(read) else dates
    made[read.index] = read
    return made.set_axis(index)


def described(dates: "pd.Series[Any]", form: str) -> dict[str, Any]:
    """Return what is to be known of a column of dates: its format, the first date, and the parts that vary in it."""
    known = dates.dropna()
    first = known.min() if len(known) else pd.Timestamp(0)
    numbers = _every(known, first)
    varied = [name for i, name in enumerate(PARTS) if len(known) and np.ptp(numbers[:, i]) > 0]
    return {"format": form, "first": first.isoformat(), "parts": varied, "any_year": True}


def dates_of(values: "pd.Series[Any]", column: Mapping[str, Any]) -> "pd.Series[Any]":
    """Return the dates of another table's column, NaT where there is none; see `described`."""
    return moments(values, column["format"], any_year=bool(column.get("any_year", False)))


def numbers_of(dates: "pd.Series[Any]", column: Mapping[str, Any]) -> np.ndarray:
    """Return the parts of dates (N, parts) as numbers in float64, NaN where there is no date; see `described`."""
    first, wanted = pd.Timestamp(column["first"]), [PARTS.index(name) for name in column["parts"]]
    return _every(dates, first, any_year=bool(column.get("any_year", False)))[:, wanted]


def _every(dates: "pd.Series[Any]", first: pd.Timestamp, *, any_year: bool = True) -> np.ndarray:
    day = _DAY
    if any_year and (dates.dt.unit != "ns" or not _NANO[0] <= first.year <= _NANO[1]):  # nanoseconds would overflow
        dates, first, day = dates.dt.as_unit("us"), first.as_unit("us"), day.as_unit("us")
    at = dates.dt
    days = (dates - first) / day
    every = [at.year, at.month, at.day_of_week, at.hour + at.minute / 60, days]
    return np.stack([part.to_numpy(dtype=np.float64, na_value=np.nan) for part in every], 1)


def written(numbers: Sequence[float], column: Mapping[str, Any]) -> str | None:
    """Return the date whose `numbers_of` are given, as the column writes dates; None where it is missing."""
    days, form = numbers[column["parts"].index("days")], column["format"]
    if np.isnan(days):
        return None
    since = pd.Timedelta(np.timedelta64(round(days * 86_400e6), "us"))
    moment = (pd.Timestamp(column["first"]).as_unit("us") + since).round("s")
    return moment.isoformat().removesuffix("T00:00:00") if form == ISO else moment.strftime(form)
