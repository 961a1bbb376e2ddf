"""The columns of a bundle's inputs: a table's rows become the arrays that its model takes, by the columns' names.

A column is {"name": "age", "kind": "number", "input": "numeric"}, or {"name": "city", "kind": "category", "input":
"categorical", "categories": ["Basel", "Bern"]}, or of "kind": "date" with the keys of `hpo.study.table_dates`, whose
parts stand behind the numbers of its input. Category i has the code i + 1; what is missing or unknown has 0.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from pandas.api import types

from hpo.errors import InputError, did_you_mean, listed
from hpo.study.table_amounts import amounts
from hpo.study.table_dates import dates_of, numbers_of
from hpo.study.table_marks import MISSING, PLAIN, Marks, as_code, number_pattern, without_thousands
from hpo.study.table_text import as_text


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column of a table; `categories` and `date` None: it holds numbers."""

    name: str
    categories: tuple[str, ...] | None = None
    date: Mapping[str, Any] | None = None
    """How its dates are written, and which of their parts are numbers; see `hpo.study.table_dates`."""
    decimal: str | None = None
    """The mark of decimals, where its numbers may have a unit; see `hpo.study.table_amounts`."""
    marks: Marks = PLAIN
    """How its numbers were written where it was trained."""
    written: bool = False
    """Whether its categories are texts as they were written: 007 is not 7. Else 007 is 7, as in bundles without it."""

    @property
    def is_text(self) -> bool:
        """Whether it holds categories, dates, or numbers with a unit."""
        return any(x is not None for x in (self.categories, self.date, self.decimal))


@dataclass
class Notes:
    """What is to be said of a table beside its predictions."""

    ignored: list[str] = field(default_factory=list)
    unknown: dict[str, tuple[int, str]] = field(default_factory=dict)
    """By column: how many of its values are no category of the model, and the first of them."""
    undated: dict[str, tuple[int, str]] = field(default_factory=dict)
    """By column: how many of its values are no dates as training had them, and the first of them."""
    resized: tuple[int, str] = (0, "")
    by_place: int = 0
    """How many columns without names were taken in their order."""

    def texts(self) -> list[str]:
        """Return one line for each."""
        lines = [f"columns that the model does not take were ignored: {listed(self.ignored)}"] if self.ignored else []
        if self.by_place:
            lines.append(f"the bundle names no columns: the table's {self.by_place} were taken in their order")
        return lines + self.doubts()

    def doubts(self) -> list[str]:
        """Return one line for each of what may make answers worse."""
        lines = []
        for name, (n, first) in self.unknown.items():
            rows = "1 value was" if n == 1 else f"{n} values were"
            lines.append(f"column {name!r}: {rows} not seen in training, and taken as unknown (the first: {first})")
        for name, (n, first) in self.undated.items():
            rows = "1 value is no date" if n == 1 else f"{n} values are no dates"
            lines.append(f"column {name!r}: {rows} as training had them, and taken as missing (the first: {first})")
        if self.resized[0]:
            lines.append(f"{self.resized[0]} images were resized (the first: {self.resized[1]})")
        return lines


def columns_of(about: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """Return the columns that bundle.json has, or that can be made of what it says; None: its inputs are no columns.

    Where nothing names them, their names are empty, and they are taken in their order.
    """
    if "columns" in about:
        columns: list[dict[str, Any]] | None = about["columns"]
        return columns
    widths = {entry["name"]: entry["shape"][1] for entry in about["inputs"] if len(entry["shape"]) == 2}
    if len(widths) != len(about["inputs"]):
        return None
    told = about.get("about_the_data", {}).get("columns")
    if isinstance(told, list) and set(widths) <= {"numeric", "categorical"}:
        places = {"number": "numeric", "date": "numeric", "category": "categorical"}
        made = [dict(column) | {"input": places[column["kind"]]} for column in told]
        made.sort(key=lambda column: list(places).index(column["kind"]))
        sizes = [(c["input"], len(c["parts"]) if c["kind"] == "date" else 1) for c in made]
        if [sum(n for name, n in sizes if name == each) for each in widths] == list(widths.values()):
            return made
    inputs = [name for name, width in widths.items() for _ in range(width)]
    names = list(about.get("feature_names", ()))
    names = names if len(names) == len(inputs) else [""] * len(inputs)
    return [{"name": n, "kind": "number", "input": i} for n, i in zip(names, inputs, strict=True)]


class Columns:
    """The columns of a bundle's inputs, and how a table's rows are taken to arrays. `missing`: NaN may be in them."""

    def __init__(self, about: Mapping[str, Any], columns: Sequence[Mapping[str, Any]]) -> None:
        self.missing = bool(about.get("missing", any(c["kind"] == "category" for c in columns)))
        dtypes = {entry["name"]: entry["dtype"] for entry in about["inputs"]}
        self._inputs: dict[str, list[Column]] = {name: [] for name in dtypes}
        self._dtypes = {name: np.dtype(dtype) for name, dtype in dtypes.items()}
        for column in columns:
            categories = tuple(column["categories"]) if column["kind"] == "category" else None
            date = column if column["kind"] == "date" else None
            decimal, thousands = column.get("marks", PLAIN)
            made = Column(
                name=column["name"],
                categories=categories,
                date=date,
                decimal=column.get("decimal"),
                marks=(decimal, thousands),
                written=bool(column.get("written", False)),
            )
            self._inputs[column["input"]].append(made)
        self._every = [column for each in self._inputs.values() for column in each]
        self._by_place = self.names == [""]

    @property
    def texts(self) -> list[str]:
        """The names of the columns that hold categories, dates, or numbers with a unit."""
        return [column.name for column in self._every if column.is_text]

    @property
    def marks(self) -> dict[str, Marks]:
        """How the numbers of the other columns were written where they were trained."""
        return {column.name: column.marks for column in self._every if not column.is_text}

    def without_words(self, frame: pd.DataFrame) -> pd.DataFrame:
        """Return a table of text without the words that say that a value is missing, but for those that are categories.

        Where a model was trained on a table that does not say it by words, `NA` may be a category.
        """
        made = {}
        for column in self._every:
            if column.is_text and column.name in frame:
                words = set(MISSING) - set(column.categories or ())
                text = frame[column.name]
                made[column.name] = text.mask(text.str.strip().isin(words))
        return frame.assign(**made) if made else frame

    @property
    def names(self) -> list[str]:
        """All names, each once."""
        return list(dict.fromkeys(column.name for column in self._every))

    def required(self, where: str, header: Iterable[str], keep: str | None, notes: Notes) -> list[str]:
        """Return which of the table's columns are taken. Raises InputError with all that are missing."""
        header = list(header)
        if keep is not None and keep not in header:
            raise InputError(f"{where}: there is no column {keep!r} (in --id){did_you_mean(keep, header)[:300]}")
        if self._by_place:
            found = [name for name in header if name != keep]
            if len(found) != len(self._every):
                raise InputError(
                    f"{where}: the bundle names no columns and takes {len(self._every)} in their order, but got "
                    f"{len(found)}: {listed(found)}"
                )
            notes.by_place = len(found)
            return found
        if missing := [name for name in self.names if name not in header]:
            near = did_you_mean(missing[0], header)[:300] if len(missing) == 1 else f"; it has {listed(header)}"
            what = "a column is" if len(missing) == 1 else f"{len(missing)} columns are"
            raise InputError(f"{where}: {what} missing that the model takes: {', '.join(map(repr, missing))}{near}")
        if twice := [name for name in self.names if header.count(name) > 1]:
            raise InputError(f"{where}: has several columns named {listed(map(repr, twice))}; give each its own name")
        known = {*self.names, keep}
        notes.ignored = [repr(name) for name in header if name not in known]
        return self.names

    def arrays(self, frame: pd.DataFrame, where: str, first: int, notes: Notes) -> dict[str, np.ndarray]:
        """Return a table's rows, the first of which is row `first`, as arrays (N, columns) by input.

        `frame` has the columns that are `required`. Raises InputError with row, column and value.
        """
        made, place = {}, 0
        if of_units := {c.name: amounts(frame[c.name], c.decimal) for c in self._every if c.decimal is not None}:
            frame = frame.assign(**of_units)
        for name, columns in self._inputs.items():
            names = list(frame.columns[place : place + len(columns)]) if self._by_place else [c.name for c in columns]
            place += len(columns)
            if columns and columns[0].categories is not None:
                made[name] = np.stack([self._codes(frame[c.name], c, where, first, notes) for c in columns], 1)
            else:
                plain = [n for n, column in zip(names, columns, strict=True) if column.date is None]
                numbers = self._numbers(frame, plain, self._dtypes[name], where, first)
                dates = [self._dates(frame[c.name], c, where, first, notes) for c in columns if c.date is not None]
                made[name] = np.concatenate([numbers, *dates], 1, dtype=numbers.dtype) if dates else numbers
        return made

    def _numbers(
        self, frame: pd.DataFrame, names: Sequence[str], dtype: np.dtype[Any], where: str, first: int
    ) -> np.ndarray:
        """Return these columns as numbers (N, columns)."""
        part = frame[list(names)]
        for name, kind in part.dtypes.items():
            if not (types.is_numeric_dtype(kind) or _may_be_text(kind)) or types.is_complex_dtype(kind):
                raise InputError(f"{where}: column {str(name)!r} must be numbers, but is {kind}")
        plain = all(isinstance(kind, np.dtype) and kind.kind in "iufb" for kind in part.dtypes)
        columns = part if plain else pd.DataFrame({i: _as_numbers(part.iloc[:, i]) for i in range(len(names))})
        numbers = columns.to_numpy(dtype=np.float64)
        with np.errstate(over="ignore", invalid="ignore"):
            cast = numbers.astype(dtype)
        if dtype.kind == "f":
            if np.isfinite(cast.sum(dtype=np.float64)):
                return cast
            wrong = ~np.isfinite(cast) & ~(np.isnan(cast) & part.isna().to_numpy() & self.missing)
        else:
            wrong = cast != numbers
        if wrong.any():
            row, column = (int(place) for place in np.argwhere(wrong)[0])
            came: Any = part.iloc[row, column]
            at = f"{where}: row {first + row}, column {names[column]!r}"
            if pd.isna(came):
                raise InputError(f"{at}: the value is missing, and the model takes none that are; fill it in")
            kind = "a finite number" if dtype.kind == "f" else f"a whole number ({dtype})"
            raise InputError(f"{at}: must be {kind}, but got {_shown(came)}")
        return cast

    def _dates(self, values: "pd.Series[Any]", column: Column, where: str, first: int, notes: Notes) -> np.ndarray:
        """Return the parts of a column's dates (N, parts), NaN where there is none."""
        assert column.date is not None
        dates = dates_of(values, column.date)
        gone = dates.isna().to_numpy()
        if gone.any() and not self.missing:
            at = f"{where}: row {first + int(gone.argmax())}, column {column.name!r}"
            raise InputError(f"{at}: there is no date as training had them, and the model takes none that are missing")
        if (wrong := gone & as_text(values).notna().to_numpy()).any():
            row = int(wrong.argmax())
            n, example = notes.undated.get(column.name, (0, f"{_shown(values.iloc[row])} in row {first + row}"))
            notes.undated[column.name] = n + int(wrong.sum()), example
        return numbers_of(dates, column.date)

    def _codes(self, values: "pd.Series[Any]", column: Column, where: str, first: int, notes: Notes) -> np.ndarray:
        """Return a column's categories as codes (N,)."""
        assert column.categories is not None
        text = as_text(values)
        index = pd.Index(column.categories, dtype="string")
        codes = index.get_indexer(pd.Index(text)).astype(np.int64) + 1
        gone = text.isna().to_numpy()
        if gone.any() and not self.missing:
            at = f"{where}: row {first + int(gone.argmax())}, column {column.name!r}"
            raise InputError(f"{at}: the value is missing, and the model takes none that are; fill it in")
        if (other := (codes == 0) & ~gone).any():
            category = _other_forms(column, given_numbers=_are_numbers(values))
            codes[other] = [category(t) for t in text[other]]
        if (unknown := (codes == 0) & ~gone).any():
            row = int(unknown.argmax())
            n, example = notes.unknown.get(column.name, (0, f"{_shown(text.iloc[row])} in row {first + row}"))
            notes.unknown[column.name] = n + int(unknown.sum()), example
        return codes


def _as_numbers(values: "pd.Series[Any]") -> np.ndarray:
    """Return values as numbers; NaN for those that are none. Texts that are all true or false are 1 or 0."""
    if not types.is_numeric_dtype(values):
        if (words := as_text(values).str.lower()).dropna().isin(("true", "false")).all():
            return words.map({"true": 1.0, "false": 0.0}).to_numpy(dtype=np.float64, na_value=np.nan)
        values = values.map(in_range) if values.dtype == object else values
        values = pd.to_numeric(values, errors="coerce")
    return values.astype("Float64").to_numpy(dtype=np.float64, na_value=np.nan)


def _other_forms(column: Column, *, given_numbers: bool) -> Callable[[str], int]:
    """Return what says which category, from 1 on, a text is that is none as it stands; 0: it is none."""
    assert column.categories is not None
    marks, places = column.marks, list(enumerate(column.categories, 1))
    if not column.written:  # 1.0 and 01 are the category 1, as pandas read the training table
        known = {_plain(c): place for place, c in reversed(places)}
        return lambda text: known.get(_plain(text)) or known.get(_plain(text, (",", ".")), 0)
    names = {as_code(c, marks): place for place, c in reversed(places)}
    numbers = {_plain(c, marks): place for place, c in places} if given_numbers else {}
    alone = Counter(_plain(c, marks) for c in column.categories)  # the number 7 is 007 where no other category is 7

    def category(text: str) -> int:
        if found := names.get(as_code(text, marks)) or names.get(as_code(text)):
            return found
        number = _plain(text)
        return numbers.get(number, 0) if alone[number] == 1 else 0

    return category


def _are_numbers(values: "pd.Series[Any]") -> bool:
    """Whether a column was given as numbers, not as texts."""
    kinds = values.cat.categories if isinstance(values.dtype, pd.CategoricalDtype) else values
    return pd.api.types.infer_dtype(kinds, skipna=True) in ("integer", "floating", "mixed-integer-float", "decimal")


def _may_be_text(kind: Any) -> bool:
    return types.is_object_dtype(kind) or types.is_string_dtype(kind) or isinstance(kind, pd.CategoricalDtype)


def in_range(value: Any) -> Any:
    """Return a value; text for a whole number that is larger than NumPy's floats can be."""
    try:
        return str(value) if isinstance(value, int) and math.isinf(float(value)) else value
    except OverflowError:
        return str(value)


def _plain(text: str, marks: Marks = (".", "")) -> str:
    """Return a number or a truth value as pandas writes what it has read as one; whole numbers without a point."""
    if number_pattern(*marks).fullmatch(text):
        text = without_thousands(text, marks[1]).replace(marks[0], ".")
    if text.lower() in ("true", "false"):
        return text.capitalize()
    try:
        if text.removeprefix("-").isdecimal():  # of large ones a float would be that of others too
            return str(int(text))
        number = float(text)
        return str(int(number)) if number.is_integer() else str(number)
    except (ValueError, OverflowError):
        return text


def _shown(value: Any) -> str:
    text = repr(value.item() if isinstance(value, np.generic) else value)
    return text if len(text) <= 60 else f"{text[:57]}..."
