"""What the columns of a raw table are: numbers, dates, categories; what nothing can be learned from, and what is wrong.

Nothing is raised here: all that is wrong is collected, so that it can be said at once.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from pandas.api import types

from hpo.errors import listed
from hpo.study.table_amounts import amounts, unit_of
from hpo.study.table_dates import ISO, described, format_of, is_stored_as_date, moments
from hpo.study.table_marks import EVERY, are_codes, number_pattern, to_numbers
from hpo.study.table_text import as_text

Column = Mapping[str, Any]

FEW = 20
"""So many different texts are categories, however few rows there are; so many whole numbers may be classes, or not."""
_MOST_BROKEN = 0.1
"""So large a share of a column of dates may be none; they count as missing."""
FLOAT32 = float(np.finfo(np.float32).max)
_FEWEST_STEPS = 100
"""Numbers that lie within so many steps of float32 are rounded so much that it is said."""
_KEEPABLE = re.compile("identifier|counts the rows|free text")
_IDENTIFIER = re.compile(r"(?:^|[\s_.-])(?:id|idx|index|uuid|guid|row|rownames?)$", re.IGNORECASE)
_OFFSET = re.compile(r"[T ]\d.*(?:[Zz]|[+-]\d\d(?::?\d\d)?)$")
"""What a date that is written with its time zone ends with."""
_CAMEL_IDENTIFIER = re.compile(r"[a-z]I[dD]$")


@dataclass
class Found:
    """What was found in a table's columns, each of which is in one of `columns`, `dropped` and `faults`."""

    columns: list[Column] = field(default_factory=list)
    dropped: dict[str, str] = field(default_factory=dict)
    """Why nothing can be learned from a column, by its name."""
    faults: dict[str, str] = field(default_factory=dict)
    """What must be changed in a column, by its name: what it holds, and what to do beside dropping it."""
    notices: list[str] = field(default_factory=list)
    """What is to be known of columns that are taken otherwise than as they stand there."""

    def reasons(self) -> str:
        """Return which columns are dropped, and why; and what keeps one of them nevertheless."""
        each = listed((f"{name!r}: {why}" for name, why in self.dropped.items()), 200)
        names = [name for name, why in self.dropped.items() if _KEEPABLE.search(why)]
        return (
            f"{each}; a column that is to stay: keep: [{json.dumps(names[0], ensure_ascii=False)}]" if names else each
        )


def columns_of(frame: pd.DataFrame, keep: Sequence[str], categorical: Sequence[str], rows: np.ndarray) -> Found:
    """Return what each column of a table is; the categories of texts, and the parts of dates, as they are in `rows`.

    The table's index says which rows of its file these are, from 0 on.
    Columns in `keep` are no identifiers, and those in `categorical` are categories, whatever they look like; their
    numbers are names as they stand there, where the table has them as texts.
    """
    found = Found()
    numbers = set(plain_numbers(frame)) - set(categorical)
    found.dropped |= _useless_numbers(frame[[n for n in frame.columns if n in numbers]], set(keep))
    plain = frame[[n for n in frame.columns if n in numbers and n not in found.dropped]]
    found.faults |= _infinite(plain)
    found.notices += _rounded(plain)
    for name in frame.columns:
        if name in found.dropped or name in found.faults:
            continue
        if name in numbers:
            found.columns.append({"name": name, "kind": "number"})
        elif name in categorical:
            _take_category(found, name, as_text(frame[name]), rows, written=_is_text(frame[name]))
        else:
            _look(found, name, frame[name], rows, kept=name in keep)
    return found


def plain_numbers(frame: pd.DataFrame) -> list[str]:
    """Return the columns that NumPy has as numbers: of these there may be very many, so they are looked at together."""
    return [name for name, kind in frame.dtypes.items() if isinstance(kind, np.dtype) and kind.kind in "iuf"]


def without(frame: pd.DataFrame, names: Iterable[str]) -> pd.DataFrame:
    """Return the other columns; `drop` would leave them in as many pieces, each as slow to look at as a whole table."""
    return frame.loc[:, ~frame.columns.isin(list(names))]


def _useless_numbers(plain: pd.DataFrame, keep: set[str]) -> dict[str, str]:
    """Return why nothing can be learned from columns of numbers: one value, or they count or name rows."""
    dropped = {}
    varied = (plain.min() < plain.max()).to_numpy(dtype=bool)
    empty = plain.isna().all().to_numpy(dtype=bool)
    for place in np.flatnonzero(~varied):
        dropped[plain.columns[place]] = "it has no values" if empty[place] else "it has one value only"
    values = plain.iloc[[0, -1]].to_numpy()
    counts = np.isin(values[0] - plain.index[0], (0, 1)) & (values[1] - plain.index[-1] == values[0] - plain.index[0])
    named = np.array([_names_rows(name) for name in plain.columns], dtype=bool)
    for place in np.flatnonzero(varied & (counts | named)):
        name = plain.columns[place]
        if name not in keep and (why := _identifies(plain[name], counted=bool(counts[place]))):
            dropped[name] = why
    return dropped


def _names_rows(name: str) -> bool:
    """Whether a column is called as identifiers are: id, PassengerId, row_index, or nothing at all."""
    return bool(_IDENTIFIER.search(name) or _CAMEL_IDENTIFIER.search(name)) or name.startswith("Unnamed: ")


def _identifies(values: "pd.Series[Any]", *, counted: bool) -> str | None:
    """Return how whole numbers identify rows, if they do: they count them, or differ in each and are called so."""
    known = values.dropna()
    if counted and (values - values.index).nunique(dropna=False) == 1:
        unnamed = str(values.name).startswith("Unnamed: ")
        return "it has no name and counts the rows" if unnamed else "it counts the rows"
    if _names_rows(str(values.name)) and known.is_unique and bool((known % 1 == 0).all()):
        return "it is an identifier, another whole number in each row"
    return None


def _infinite(plain: pd.DataFrame) -> dict[str, str]:
    """Return which columns of numbers hold what float32 cannot."""
    faults = {}
    least, most = plain.min().to_numpy(dtype=np.float64), plain.max().to_numpy(dtype=np.float64)
    for place in np.flatnonzero((most > FLOAT32) | (least < -FLOAT32)):
        wrong = (plain.iloc[:, place].abs() > FLOAT32).to_numpy()
        faults[plain.columns[place]] = (
            f"holds infinity, or more than 3e38, in {wrong.sum()} of {len(wrong)} rows (the first: row "
            f"{plain.index[wrong.argmax()] + 1}); remove these rows"
        )
    return faults


def step_of_float32(numbers: Any) -> Any:
    """Return how far apart the numbers of float32 are there."""
    with np.errstate(over="ignore", invalid="ignore"):
        return np.spacing(np.asarray(numbers, dtype=np.float32)).astype(np.float64)


def _rounded(plain: pd.DataFrame) -> list[str]:
    """Return, a line for each, which columns of numbers lose most of what varies in them in float32."""
    notices = []
    least, most = plain.min().to_numpy(dtype=np.float64), plain.max().to_numpy(dtype=np.float64)
    steps = step_of_float32(np.maximum(np.abs(least), np.abs(most)))
    for place in np.flatnonzero(most - least < _FEWEST_STEPS * steps):
        values = plain.iloc[:, place].dropna()
        if values.astype(np.float32).nunique() < values.nunique():
            notices.append(
                f"column {plain.columns[place]!r} lies between {least[place]:.10g} and {most[place]:.10g}, where the "
                f"network's numbers (float32) have steps of {steps[place]:.2g}: smaller differences are lost; subtract "
                f"{least[place]:.10g} from it in the table"
            )
    return notices


def _look(found: Found, name: str, values: "pd.Series[Any]", rows: np.ndarray, *, kept: bool) -> None:
    """Note what a column is that NumPy does not have as numbers."""
    if types.is_numeric_dtype(values):  # truth values, and pandas' own numbers
        _take_numbers(found, name, values)
        return
    if is_stored_as_date(values):
        _take_dates(found, name, values, ISO, rows)
        return
    text = as_text(values)
    plain = _is_text(values)
    if not plain and not isinstance(values.dtype, pd.CategoricalDtype):
        first = text.dropna().iloc[:1].tolist()
        found.faults[name] = f"holds times ({first[0]!r}); give numbers in their place" if first else "has no values"
        return
    known = text.dropna()
    if known.empty:
        found.dropped[name] = "it has no values"
        return
    if (numbers := to_numbers(known).notna()).all() and plain:
        if are_codes(known):
            _look_at_codes(found, name, text, rows, kept=kept)
        else:
            _take_numbers(found, name, values)
    elif numbers.mean() > 0.5:
        row, value = known[~numbers].index[0] + 1, known[~numbers].iloc[0]
        found.faults[name] = (
            f"holds numbers, but also text in {int((~numbers).sum())} rows ({value!r} in row {row}); correct it, or "
            "add it to categorical"
        )
    elif (form := format_of(known)) is not None:
        _take_dates(found, name, values, form, rows)
    elif known.nunique() > FEW and (of := unit_of(known)) is not None:
        _take_amounts(found, name, text, *of)
    else:
        _look_at_text(found, name, text, rows, kept=kept)


def _is_text(values: "pd.Series[Any]") -> bool:
    return types.is_object_dtype(values) or types.is_string_dtype(values)


def _look_at_codes(found: Found, name: str, text: "pd.Series[Any]", rows: np.ndarray, *, kept: bool) -> None:
    n = len(found.columns)
    _look_at_text(found, name, text, rows, kept=kept)
    if len(found.columns) > n:
        example = text[text.str.fullmatch(r"0\d+", na=False)].iloc[0]
        found.notices.append(
            f"column {name!r} holds whole numbers with leading zeros ({example!r}), taken as names, each a category; "
            "if they are amounts, write them without these zeros in the table"
        )


def _look_at_text(found: Found, name: str, text: "pd.Series[Any]", rows: np.ndarray, *, kept: bool) -> None:
    known = text.dropna()
    n = known.nunique()
    if n == 1 and len(known) == len(text):
        found.dropped[name] = "it has one value only"
    elif n > max(FEW, len(known) / 2) and not kept:
        what = "it is an identifier" if n == len(known) and not known.str.contains(r"\s").any() else "it is free text"
        found.dropped[name] = f"{what}, {n} different texts in {len(known)} rows ({known.iloc[0][:40]!r}, ...)"
    else:
        _take_category(found, name, text, rows, written=True)


def _take_numbers(found: Found, name: str, values: "pd.Series[Any]") -> None:
    numbers = to_numbers(as_text(values).astype(object)) if values.dtype == object else values
    made = numbers.astype("Float64").to_numpy(dtype=np.float64, na_value=np.nan)
    plain = pd.DataFrame({name: made}, index=values.index)
    if useless := _useless_numbers(plain, {name}):
        found.dropped |= useless
    elif faults := _infinite(plain):
        found.faults |= faults
    else:
        found.columns.append({"name": name, "kind": "number"})


def _take_amounts(found: Found, name: str, text: "pd.Series[Any]", unit: str, decimal: str) -> None:
    """Note a column of numbers with a unit, all of which must be such."""
    plain = amounts(text, decimal)
    wrong = (pd.to_numeric(plain, errors="coerce").isna() & text.notna()).to_numpy()
    if wrong.any():
        row = int(wrong.argmax())
        found.faults[name] = (
            f"holds numbers with {unit!r}, but also other text in {wrong.sum()} rows ({text.iloc[row][:40]!r} in row "
            f"{text.index[row] + 1}); correct it, or add it to categorical"
        )
        return
    n = len(found.columns)
    _take_numbers(found, name, plain)
    if len(found.columns) > n:
        found.columns[-1] = {**found.columns[-1], "decimal": decimal}
        first = int(text.notna().to_numpy().argmax())
        found.notices.append(
            f"column {name!r} holds numbers with {unit!r}: {text.iloc[first]!r} is {plain.iloc[first]}"
        )


def _take_category(found: Found, name: str, text: "pd.Series[Any]", rows: np.ndarray, *, written: bool) -> None:
    """Note a column of categories; those that are numbers in texts are what is `written`: 007 is not 7."""
    if text.nunique(dropna=False) < 2:
        found.dropped[name] = "it has no values" if text.isna().all() else "it has one value only"
        return
    categories = sorted(text.iloc[rows].dropna().unique())
    are_numbers = written and any(number_pattern(*marks).fullmatch(each) for each in categories for marks in EVERY)
    as_written = {"written": True} if are_numbers else {}
    found.columns.append({"name": name, "kind": "category", "categories": categories, **as_written})


def _take_dates(found: Found, name: str, values: "pd.Series[Any]", form: str, rows: np.ndarray) -> None:
    """Note a column of dates; few that are none are missing, and where they are many nothing is guessed."""
    dates = moments(values, form)
    text = as_text(values)
    broken = (dates.isna() & text.notna()).to_numpy()
    how = "2020-01-31" if form == ISO else form
    if broken.any():
        row = int(broken.argmax())
        first = f"{text.iloc[row][:40]!r} in row {text.index[row] + 1}"
        which = f"{int(broken.sum())} of {len(broken)} rows (the first: {first})"
        if broken.sum() > _MOST_BROKEN * text.notna().sum():
            found.faults[name] = f"holds dates, written as {how}, but not in {which}; write all alike"
            return
        found.notices.append(f"column {name!r}: no date as {how} in {which}: these count as missing")
    about = described(dates.iloc[rows], form)
    if not about["parts"]:
        found.dropped[name] = "it has one date only"
        return
    found.columns.append({"name": name, "kind": "date", **about})
    zone = ", in UTC" if form == ISO and text.str.contains(_OFFSET, na=False).any() else ""
    found.notices.append(f"column {name!r} holds dates ({how}{zone}), taken as {listed(about['parts'])}")
