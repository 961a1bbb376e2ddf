"""A table to learn from: what its columns are, its tensors, its splits; or in one line why nothing can be learned.

Each column is numbers or categories. What a model was trained on is said in plain values, a mapping for each column, so
that `encode` makes the same tensors of another table: {"name": "age", "kind": "number"}, or {"name": "city", "kind":
"category", "categories": ["Basel", "Bern"]}.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from hpo.objectives.datasets import rows_of_splits
from hpo.objectives.table_files import read_table
from pandas.api import types
from torch import Tensor

from hpo.errors import DataError, did_you_mean
from hpo.study.blocks import split_by_rows
from hpo.study.data import Data
from hpo.study.table_text import as_text, listed

Column = Mapping[str, Any]
Task = Literal["regression", "binary", "multiclass"]

FEWEST_ROWS, FEWEST_OF_A_CLASS = 20, 3
FEW = 20
"""So many different texts are categories, however few rows there are; so many whole numbers may be classes, or not."""
_DATE = r"\d{1,4}([-/.])\d{1,2}\1\d{1,4}([ T].*)?"


@dataclass(frozen=True)
class TableOptions:
    """`task` auto is told from the target: two values, and text, are classes; numbers that have fractions, or are many,
    are amounts; of other numbers the study must say what they are.

    `missing`: values that are not there are an error; or numbers become the median of train, categories one of their
    own, and rows without a target are left out. `drop` names columns to leave out, `categorical` those whose numbers
    are names. `valid` and `test` are shares of all rows (of each class), drawn by `seed`.
    """

    file: Path
    target: str
    task: Literal["auto", "regression", "binary", "multiclass"] = "auto"
    missing: Literal["error", "impute"] = "error"
    drop: tuple[str, ...] = ()
    categorical: tuple[str, ...] = ()
    valid: float = 0.2
    test: float = 0.2
    seed: int = 0

    def __post_init__(self):
        if not (self.valid > 0 and self.test > 0 and self.valid + self.test < 0.9):
            raise ValueError("valid and test must be shares above 0 that leave a tenth of the rows to train on")


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
    frame = read_table(file)
    require(file, frame, [target], "the target")
    require(file, frame, options.drop, "in drop")
    require(file, frame, options.categorical, "in categorical")
    frame, n_without_target = _with_target(file, frame, target, impute)
    values = frame[target]
    where = f"{file}: the target {target!r}"
    task = _task(where, values, options.task)
    frame, dropped = _without_constants(_without(frame, {target, *options.drop}))
    if frame.columns.empty:
        reasons = listed(f"{name!r} was dropped, {why}" for name, why in dropped.items())
        raise DataError(f"{file}: there is no column to predict {target!r} from; {reasons or 'it is the only one'}")
    if (gaps := _missing_in(frame)) and not impute:
        raise DataError(f"{file}: values are missing: {gaps}; fill them in, drop these columns, or set missing: impute")
    names, codes = (), np.zeros(len(values), dtype=np.int64)
    if task != "regression":
        names, codes = _classes(where, values)
    rows = rows_of_splits(codes, test=options.test, valid=options.valid, seed=options.seed)
    mean, std, targets = 0.0, 1.0, torch.from_numpy(codes)
    if task == "regression":
        numbers = values.astype("float64").to_numpy()
        mean, std = float(numbers[rows[0]].mean()), float(numbers[rows[0]].std()) or 1.0
        targets = torch.from_numpy((numbers - mean) / std)
    columns = columns_of(file, frame, options.categorical, rows[0])
    data = split_by_rows(
        encode(frame, columns, file),
        targets if task == "multiclass" else targets.float().unsqueeze(1),
        rows,
        feature_names=tuple(c["name"] for kind in ("number", "category") for c in columns if c["kind"] == kind),
        class_names=names,
    )
    return Table(
        data=replace(data, missing=impute),
        task=task,
        columns=columns,
        dropped=dropped,
        n_without_target=n_without_target,
        mean=mean,
        std=std,
    )


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
    return (frame[known].reset_index(drop=True) if n else frame), n


def _task(where: str, values: pd.Series, task: str) -> Task:
    """Return what kind of target it is; raise DataError where the study must say, or says what cannot be."""
    found = values.unique()
    number = types.is_numeric_dtype(values) and not types.is_bool_dtype(values)
    some = listed(map(repr, sorted(found[:10].tolist(), key=None if number else str)))
    some += ", ..." if len(found) > 10 else ""
    if len(found) == 1:
        raise DataError(f"{where} is {some} in every row: there is nothing to tell apart")
    if task == "regression":
        if not number:
            raise DataError(f"{where} must be numbers for task: regression, but it holds {some}")
        if not np.isfinite(values.astype("float64")).all():
            raise DataError(f"{where} holds infinity; remove these rows")
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


def _classes(where: str, values: pd.Series) -> tuple[tuple[str, ...], np.ndarray]:
    """Return the classes' names and each row's class (N,). Raises DataError for a class of too few rows."""
    codes, found = pd.factorize(values if types.is_numeric_dtype(values) else as_text(values), sort=True)
    names = tuple(as_text(pd.Series(found)))
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


def _plain_numbers(frame: pd.DataFrame) -> list[str]:
    """Return the columns that NumPy has as numbers: of these there may be very many, so they are looked at together."""
    return [name for name, kind in frame.dtypes.items() if isinstance(kind, np.dtype) and kind.kind in "iuf"]


def _without_constants(frame: pd.DataFrame) -> tuple[pd.DataFrame, dict[str, str]]:
    """Return the table without the columns that say nothing, and why each of these was dropped."""
    plain = frame[_plain_numbers(frame)]
    varied = set(plain.columns[(plain.min() < plain.max()).to_numpy(dtype=bool)])
    dropped = {}
    for name in (n for n in frame.columns if n not in varied or n.startswith("Unnamed: ")):
        values = frame[name]
        number = types.is_numeric_dtype(values)
        if values.nunique(dropna=number) < 2:
            dropped[name] = "it has one value only"
        elif number and name.startswith("Unnamed: ") and (values.diff().dropna() == 1).all():
            dropped[name] = "it has no name and counts the rows"
    return _without(frame, dropped), dropped


def _without(frame: pd.DataFrame, names: Iterable[str]) -> pd.DataFrame:
    """Return the other columns; `drop` would leave them in as many pieces, each as slow to look at as a whole table."""
    return frame.loc[:, ~frame.columns.isin(list(names))]


def columns_of(where: object, frame: pd.DataFrame, categorical: Sequence[str], rows: np.ndarray) -> list[Column]:
    """Return what each column is: of those in `categorical` and of texts the categories, as they are in `rows`.

    Raises DataError for dates, for text that is different in almost every row, and for what is no plain value.
    """
    columns: list[Column] = []
    names = set(categorical)
    numbers = set(_plain_numbers(frame)) - names
    for name in frame.columns:
        if name not in numbers and (name in names or _is_category(f"{where}: column {name!r}", frame[name])):
            found = sorted(as_text(frame[name].iloc[rows]).dropna().unique())
            columns.append({"name": name, "kind": "category", "categories": found})
        else:
            columns.append({"name": name, "kind": "number"})
    return columns


def _is_category(where: str, values: pd.Series) -> bool:
    if types.is_numeric_dtype(values) or isinstance(values.dtype, pd.CategoricalDtype):
        return not types.is_numeric_dtype(values)
    text = as_text(values).dropna()
    plain = types.is_object_dtype(values) or types.is_string_dtype(values)
    if not plain or text.str.fullmatch(_DATE).mean() > 0.9:
        raise DataError(
            f"{where} holds dates or times ({text.iloc[0]!r}); give numbers in their place (year, month, ...), "
            "or add it to drop"
        )
    numbers = pd.to_numeric(text, errors="coerce").notna()
    if numbers.mean() > 0.5 and not numbers.all():
        row, value = text[~numbers].index[0] + 1, text[~numbers].iloc[0]
        raise DataError(
            f"{where} holds numbers, but also text ({value!r} in row {row}); mend it, or add it to categorical or drop"
        )
    if (n := text.nunique()) > max(FEW, len(text) / 2):
        raise DataError(
            f"{where} has {n} different texts in {len(text)} rows ({text.iloc[0][:40]!r}, ...); add it to drop, "
            "or, if they are categories, to categorical"
        )
    return not numbers.all()


def encode(frame: pd.DataFrame, columns: Sequence[Column], where: object = "the table") -> dict[str, Tensor]:
    """Return a table's `columns` as tensors: `numeric` (N, F) in float32 and `categorical` (N, C) in int64, if any.

    A missing number is NaN. Category i has the code i + 1; missing and unknown ones have 0. Raises DataError.
    """
    require(where, frame, [column["name"] for column in columns], "it is one of the model's")
    numbers = _matrix(where, frame, [c["name"] for c in columns if c["kind"] == "number"])
    codes = [
        pd.Index(c["categories"], dtype="string").get_indexer(as_text(frame[c["name"]])).astype(np.int64) + 1
        for c in columns
        if c["kind"] == "category"
    ]
    tensors = {"numeric": torch.from_numpy(numbers)} if numbers.shape[1] else {}
    return tensors | ({"categorical": torch.from_numpy(np.stack(codes, 1))} if codes else {})


def _matrix(where: object, frame: pd.DataFrame, names: Sequence[str]) -> np.ndarray:
    """Return these columns as (N, F) in float32. Raises DataError."""
    plain = set(_plain_numbers(frame))
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
