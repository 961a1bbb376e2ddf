"""A table to learn from: what its columns are, its tensors, its splits; or in one line why nothing can be learned.

Each column is numbers, dates or categories. What a model was trained on is said in plain values, a mapping for each
column, so that `encode` makes the same tensors of another table: {"name": "age", "kind": "number"}, or {"name": "city",
"kind": "category", "categories": ["Basel", "Bern"]}, or of "kind": "date" with the keys of `hpo.study.table_dates`.
Categories that are numbers in a text file have the key "written": they stay as they are there, and 007 is not 7.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import torch
from hpo.objectives.datasets import rows_of_splits
from hpo.objectives.table_columns import (
    FEW,
    FLOAT32,
    Column,
    Found,
    columns_of,
    plain_numbers,
    step_of_float32,
    without,
)
from hpo.objectives.table_files import MARKS, MERGED, read_table, words_for_missing
from pandas.api import types
from torch import Tensor

from hpo.errors import DataError, did_you_mean, listed
from hpo.study.blocks import split_by_rows
from hpo.study.data import Data
from hpo.study.table_amounts import amounts
from hpo.study.table_dates import dates_of, format_of, is_stored_as_date, numbers_of
from hpo.study.table_marks import PLAIN, Marks, are_codes, as_codes, with_point
from hpo.study.table_text import as_text

Task = Literal["regression", "binary", "multiclass"]

_PARTS = ("valid", "test")
FEWEST_ROWS, FEWEST_OF_A_CLASS = 20, 3
_MOST_ROUNDED = 0.1
"""Numbers of float32 may lie so much of a target's standard deviation apart: rounding to them costs 0.001 of R2."""


@dataclass(frozen=True)
class TableOptions:
    """`task` auto is told from the target: two values, and text, are classes; numbers that have fractions, or are many,
    are amounts; of other numbers the study must say what they are.

    `missing`: of values that are not there, numbers become the median of train, categories one of their own, and rows
    without a target are left out; or they are an error. `drop` names columns to leave out, `keep` those that look like
    identifiers and are none, `categorical` those whose numbers are names. `valid` and `test` are shares of all rows
    (of each class), drawn by `seed`.
    """

    file: Path
    target: str
    task: Literal["auto", "regression", "binary", "multiclass"] = "auto"
    missing: Literal["error", "impute"] = "impute"
    drop: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
    categorical: tuple[str, ...] = ()
    valid: float = 0.2
    test: float = 0.2
    seed: int = 0

    def __post_init__(self):
        if not (self.valid > 0 and self.test > 0 and self.valid + self.test < 0.9):
            raise ValueError("valid and test must be shares above 0 that leave a tenth of the rows to train on")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be from 0 to {2**32 - 1}, but is {self.seed}")


@dataclass(frozen=True, kw_only=True)
class Table:
    """A file as it is learned from. A regression's targets are (value - `mean`) / `std`, which are those of train."""

    data: Data
    task: Task
    columns: Sequence[Column]
    dropped: Mapping[str, str]
    n_without_target: int
    mean: float
    std: float

    @property
    def category_sizes(self) -> list[int]:
        """How many codes each categorical column has, that of unknown values among them."""
        return [len(column["categories"]) + 1 for column in self.columns if column["kind"] == "category"]


def table_of(options: TableOptions) -> Table:
    """Return the file that the options name as it is learned from. Raises DataError."""
    file, target, impute = options.file, options.target, options.missing == "impute"
    frame = read_table(file, options.categorical, target)
    _require_named(file, frame, options)
    whole, faults = frame, []
    frame, n_without_target = _with_target(file, frame, target, impute)
    every_marks: Mapping[str, Marks] = whole.attrs.get(MARKS, {})
    frame = frame.assign(**{n: _named(frame[n], every_marks.get(n, PLAIN)) for n in options.categorical})
    where, values = f"{file}: the target {target!r}", _stripped(frame[target])
    task, names, codes, values = _understood(where, values, every_marks.get(target, PLAIN), options.task, faults)
    rows = rows_of_splits(codes, test=options.test, valid=options.valid, seed=options.seed)
    if task == "regression" and (few := [n for n, part in zip(_PARTS, rows[1:], strict=True) if len(part) < 2]):
        shares = " and ".join(f"{name}: {getattr(options, name)}" for name in few)
        faults.append(f"{file}: {shares} of {len(frame)} rows is one row, and R2 needs two; give larger shares")
    frame = without(frame, {target, *options.drop})
    found = columns_of(frame, options.keep, options.categorical, rows[0])
    taken = [column["name"] for column in found.columns]
    gaps = _missing_in(frame[[*taken, *found.faults]])
    if gaps and not impute:
        faults.append(f"{file}: values are missing: {gaps}; fill them in, drop these columns, or set missing: impute")
    faults += _column_faults(file, found, options.drop)
    if not (taken or faults):
        why = f"left out: {found.reasons()}" if found.dropped else "it is the only one"
        faults.append(f"{file}: there is no column to predict {target!r} from; {why}")
    if faults:
        raise DataError("; ".join(faults))
    mean, std, targets = 0.0, 1.0, torch.from_numpy(codes)
    if task == "regression":
        numbers = values.astype("float64").to_numpy()
        mean, std = float(numbers[rows[0]].mean()), float(numbers[rows[0]].std()) or 1.0
        targets = torch.from_numpy((numbers - mean) / std)
    data = split_by_rows(
        encode(frame, found.columns, file),
        targets if task == "multiclass" else targets.float().unsqueeze(1),
        rows,
        feature_names=_feature_names(found.columns),
        class_names=names,
    )
    of_numbers = {c["name"] for c in found.columns if c["kind"] == "number"} | ({target} if not names else set())
    marks = {n: each for n, each in every_marks.items() if n in of_numbers and not types.is_bool_dtype(whole[n])}
    words = words_for_missing(file, target) if n_without_target else {}
    notices = _notices(found, gaps, len(whole), n_without_target, words, marks)
    return Table(
        data=replace(data, missing=impute, notices=(*whole.attrs.get(MERGED, ()), *notices)),
        task=task,
        columns=_with_marks(found.columns, every_marks),
        dropped=found.dropped,
        n_without_target=n_without_target,
        mean=mean,
        std=std,
    )


def _stripped(values: pd.Series) -> pd.Series:
    """Return a target whose texts have no blanks around them: `yes` and `yes ` are one class."""
    return values if types.is_numeric_dtype(values) or is_stored_as_date(values) else as_text(values)


def _with_marks(columns: Sequence[Column], marks: Mapping[str, Marks]) -> list[Column]:
    """Return the columns; those of numbers, also of such that are names, with their marks."""

    def has_marks(column: Column) -> bool:
        holds_numbers = column.get("written", False) or (column["kind"] == "number" and "decimal" not in column)
        return holds_numbers and column["name"] in marks

    return [{**c, "marks": list(marks[c["name"]])} if has_marks(c) else c for c in columns]


def _named(values: pd.Series, marks: Marks) -> pd.Series:
    """Return a column that is named as categorical: numbers in texts are names, as they are written."""
    return as_codes(values, marks) if types.is_string_dtype(values) else values


def _require_named(file: Path, frame: pd.DataFrame, options: TableOptions) -> None:
    """Raise DataError with every name in the options that is no column of the table, or is the target."""
    target = options.target
    given = {"drop": options.drop, "categorical": options.categorical, "keep": options.keep}
    faults = []
    for names, what in (([target], "the target"), *((names, f"in {key}") for key, names in given.items())):
        try:
            require(file, frame, names, what)
        except DataError as error:
            faults.append(str(error))
    if target in options.drop:
        faults.append(f"{file}: drop names the target {target!r}; remove it there, or name another target")
    if faults:
        raise DataError("; ".join(faults))


def _understood(
    where: str, values: pd.Series, marks: Marks, task: str, faults: list[str]
) -> tuple[Task, tuple[str, ...], np.ndarray, pd.Series]:
    """Return the task, the classes' names and each row's class (N,), 0 of amounts; and the target as it is learned.

    Numbers in text are amounts, or classes as they are written: 01 is not 1. What is wrong goes to `faults`.
    """
    none = np.zeros(len(values), dtype=np.int64)
    numbers = values if types.is_numeric_dtype(values) or is_stored_as_date(values) else with_point(values, marks)
    if types.is_numeric_dtype(numbers) and not types.is_numeric_dtype(values):
        texts = as_codes(values, marks)
        if task not in ("auto", "regression") or (task == "auto" and (are_codes(texts) or numbers.nunique() == 1)):
            numbers = texts
    else:
        texts = numbers = values
    try:
        found = _task(where, numbers, task)
        if found == "regression":
            return found, (), none, numbers
        return _task(where, texts, task), *_classes(where, texts, marks), texts
    except DataError as error:
        faults.append(str(error))
        return "regression", (), none, values


def _column_faults(file: Path, found: Found, drop: Sequence[str]) -> list[str]:
    """Return what is wrong with the columns, all of it, and the line of the study file that leaves them out."""
    if not found.faults:
        return []
    each = "; ".join(f"column {name!r} {why}" for name, why in found.faults.items())
    quoted = ", ".join(json.dumps(name, ensure_ascii=False) for name in (*drop, *found.faults))
    return [f"{file}: {each}; or leave {'it' if len(found.faults) == 1 else 'them'} out, drop: [{quoted}]"]


def _notices(
    found: Found, gaps: str, n_rows: int, n_without_target: int, words: Mapping[str, int], marks: Mapping[str, Marks]
) -> tuple[str, ...]:
    """Return what a user should know of how a table is taken, a line for each."""
    lines = [*found.notices]
    if found.dropped:
        lines.insert(0, f"left out: {found.reasons()}")
    if n_without_target:
        said = (
            f": {listed(f'{n} say {word!r}' for word, n in words.items())}, which is read as missing" if words else ""
        )
        rename = "; if that is a class, give it another name in the table" if words else ""
        lines.insert(0, f"{n_without_target} of {n_rows} rows have no target and are left out{said}{rename}")
    for decimal, thousands in sorted(set(marks.values())):
        names = listed(repr(name) for name, each in marks.items() if each == (decimal, thousands))
        lines.append(
            f"numbers in {names} are read with {decimal!r} for decimals"
            + (f" and {thousands!r} for thousands" if thousands else "")
        )
    if gaps:
        lines.append(
            f"values are missing: {gaps}; numbers and parts of dates become the median of the training rows, "
            "categories one of their own (missing: error refuses them)"
        )
    return tuple(lines)


def _feature_names(columns: Sequence[Column]) -> tuple[str, ...]:
    """Return the names of all inputs in their order; those of dates are `day (year)`, `day (month)`, ..."""
    by_kind = {kind: [c for c in columns if c["kind"] == kind] for kind in ("number", "date", "category")}
    dates = [f"{c['name']} ({part})" for c in by_kind["date"] for part in c["parts"]]
    return (*(c["name"] for c in by_kind["number"]), *dates, *(c["name"] for c in by_kind["category"]))


def _with_target(file: Path, frame: pd.DataFrame, target: str, impute: bool) -> tuple[pd.DataFrame, int]:
    """Return the rows that have a target, and how many have none."""
    values = frame[target]
    known = (values if types.is_numeric_dtype(values) else as_text(values)).notna().to_numpy()
    n = int((~known).sum())
    if n and not impute:
        raise DataError(
            f"{file}: the target {target!r} is missing in {n} of {len(frame)} rows (the first: row "
            f"{known.argmin() + 1}); remove these rows, or set missing: impute, which leaves them out"
        )
    if len(frame) - n < FEWEST_ROWS:
        raise DataError(f"{file}: {len(frame) - n} rows have a target, but {FEWEST_ROWS} is the least to learn from")
    return (frame[known] if n else frame), n  # its index says which rows of the file these are


def _task(where: str, values: pd.Series, task: str) -> Task:
    """Return what kind of target it is; raise DataError where the study must say, or says what cannot be."""
    found = values.unique()
    number = types.is_numeric_dtype(values) and not types.is_bool_dtype(values)
    some = listed(map(repr, sorted(found[:10].tolist(), key=None if number else str)))
    some += ", ..." if len(found) > 10 else ""
    if len(found) == 1:
        raise DataError(f"{where} is {some} in every row: there is nothing to tell apart")
    if not number and task in ("auto", "regression") and (is_stored_as_date(values) or format_of(as_text(values))):
        raise DataError(
            f"{where} holds dates ({as_text(values).iloc[0]!r}); predict a number that you make of them, as the days "
            "since the first one"
        )
    if task == "regression":
        if not number:
            raise DataError(f"{where} must be numbers for task: regression, but it holds {some}")
        _require_fits_float32(where, values.astype("float64").to_numpy())
        return "regression"
    if task == "binary" and len(found) != 2:
        raise DataError(f"{where} must have two values for task: binary, but it has {len(found)}: {some}")
    if task != "auto":
        return task
    if len(found) == 2:
        return "binary"
    if not number:
        return "multiclass"
    whole = (values % 1 == 0).all()
    if whole and len(found) <= FEW:
        raise DataError(
            f"{where} has {len(found)} different whole numbers ({some}): set task: multiclass if they are classes, "
            "or task: regression if they are amounts"
        )
    return _task(where, values, "regression")


def _require_fits_float32(where: str, numbers: np.ndarray) -> None:
    """Raise DataError for amounts that a model's predictions, float32 in the target's own unit, cannot tell apart."""
    if not (np.abs(numbers) <= FLOAT32).all():
        raise DataError(f"{where} holds infinity, or more than 3e38; remove these rows, or give it in a larger unit")
    step, std = step_of_float32(np.abs(numbers).max()), numbers.std()
    if step > _MOST_ROUNDED * std:
        raise DataError(
            f"{where} varies by {std:.2g} around {numbers.mean():.6g}, but predictions are float32, which there has "
            f"steps of {step:.2g}; subtract {numbers.mean():.6g} from it, or give it in another unit"
        )


def _classes(where: str, values: pd.Series, marks: Marks) -> tuple[tuple[str, ...], np.ndarray]:
    """Return the classes' names and each row's class (N,), numbers in their order.

    Raises DataError for a class of too few rows.
    """
    codes, found = pd.factorize(values if types.is_numeric_dtype(values) else as_text(values), sort=True)
    names = tuple(as_text(pd.Series(found)))
    numbers = with_point(pd.Series(names), marks)
    if types.is_numeric_dtype(numbers) and not types.is_numeric_dtype(values):
        order = np.argsort(numbers.to_numpy(), kind="stable")
        names, codes = tuple(names[place] for place in order), np.argsort(order)[codes]
    if len(names) > len(values) / FEWEST_OF_A_CLASS:
        raise DataError(
            f"{where} has {len(names)} different values in {len(values)} rows ({listed(map(repr, names[:3]))}, ...): "
            "these are no classes; amounts must be plain numbers"
        )
    few = [f"{name!r}: {n}" for name, n in zip(names, np.bincount(codes), strict=True) if n < FEWEST_OF_A_CLASS]
    if few:
        raise DataError(
            f"{where} has {len(names)} classes, and {len(few)} of them less than {FEWEST_OF_A_CLASS} rows "
            f"({listed(few)}), too few to train, validate and test on; remove these rows, or give them another class"
        )
    return names, codes.astype(np.int64)


def require(where: object, frame: pd.DataFrame, names: Iterable[str], what: str) -> None:
    """Raise DataError where the table has no column of one of these names; `what` says whence they are."""
    for name in names:
        if name not in frame:
            near = did_you_mean(name, map(str, frame.columns))
            raise DataError(f"{where}: there is no column {name!r} ({what}){near[:300]}")


def _missing_in(frame: pd.DataFrame) -> str:
    """Return how many values are missing in which columns; nothing where all are there."""
    counts = frame.isna().sum()
    return listed(f"{n} in {name!r}" for name, n in counts[counts > 0].items())


def encode(frame: pd.DataFrame, columns: Sequence[Column], where: object = "the table") -> dict[str, Tensor]:
    """Return a table's `columns` as tensors: `numeric` (N, F) in float32 and `categorical` (N, C) in int64, if any.

    Numbers come first, then the parts of dates; what is missing among them is NaN. Category i has the code i + 1;
    missing and unknown ones have 0. Raises DataError.
    """
    require(where, frame, [column["name"] for column in columns], "it is one of the model's")
    if of_units := {c["name"]: amounts(frame[c["name"]], c["decimal"]) for c in columns if "decimal" in c}:
        frame = frame.assign(**of_units)
    numbers = _matrix(where, frame, [c["name"] for c in columns if c["kind"] == "number"])
    if dates := [c for c in columns if c["kind"] == "date"]:
        parts = [numbers_of(dates_of(frame[c["name"]], c), c).astype(np.float32) for c in dates]
        numbers = np.concatenate([numbers, *parts], 1)
    codes = [
        pd.Index(c["categories"], dtype="string").get_indexer(as_text(frame[c["name"]])).astype(np.int64) + 1
        for c in columns
        if c["kind"] == "category"
    ]
    tensors = {"numeric": torch.from_numpy(numbers)} if numbers.shape[1] else {}
    return tensors | ({"categorical": torch.from_numpy(np.stack(codes, 1))} if codes else {})


def _matrix(where: object, frame: pd.DataFrame, names: Sequence[str]) -> np.ndarray:
    """Return these columns as (N, F) in float32. Raises DataError."""
    plain = set(plain_numbers(frame))
    together = [i for i, name in enumerate(names) if name in plain]
    numbers = np.empty((len(frame), len(names)), dtype=np.float32)
    with np.errstate(over="ignore"):
        numbers[:, together] = frame[[names[i] for i in together]].to_numpy(dtype=np.float64)
    infinite = np.flatnonzero(np.isinf(numbers[:, together]).any(0))
    alone = sorted({*range(len(names))} - {*together} | {together[i] for i in infinite[:1]})
    for i in alone:
        numbers[:, i] = _numbers(where, frame[names[i]])
    return numbers


def _numbers(where: object, values: pd.Series) -> np.ndarray:
    numbers = pd.to_numeric(values, errors="coerce").astype("float64").to_numpy()
    if (wrong := np.isnan(numbers) & values.notna().to_numpy()).any():
        row = int(wrong.argmax())
        raise DataError(
            f"{where}: column {values.name!r} must be numbers, but got {values.iloc[row]!r} in row {row + 1}"
        )
    with np.errstate(over="ignore"):
        numbers = numbers.astype(np.float32)
    if (infinite := np.isinf(numbers)).any():
        n, row = int(infinite.sum()), int(infinite.argmax()) + 1
        raise DataError(
            f"{where}: column {values.name!r} holds infinity, or more than 3e38, in {n} of {len(numbers)} rows (the "
            f"first: row {row}); remove these rows"
        )
    return numbers
