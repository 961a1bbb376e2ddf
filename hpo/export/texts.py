"""Numbers that are texts in a DataFrame or in Parquet: they are read as those of a text file are."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import pandas as pd

from hpo.export.columns import Columns, in_range
from hpo.study.table_marks import MISSING, PLAIN, Marks, Seen, marks_of, most_common, with_point


def marks_in(frames: Iterable[pd.DataFrame], columns: Columns) -> dict[str, Marks | None]:
    """Return the marks of texts in columns of numbers, as all rows say them: those of training, wherever they fit.

    None: they are no numbers, or are others in a table with commas between its columns than in one without: 1,234.
    """
    others, trained = set(columns.texts), columns.marks
    seen: dict[str, Seen] = {}
    for frame in frames:
        for name, kind in zip(frame.columns, frame.dtypes, strict=True):
            if name in others or kind.kind != "O":
                continue
            texts = frame[name].map(lambda value: isinstance(value, str)).astype(bool)
            if texts.any():
                seen.setdefault(name, Seen()).add(frame[name][texts].astype(object))

    def found(separator: str) -> dict[str, Marks | None]:
        most = most_common(seen.values(), separator)
        return {name: marks_of(seen[name], most, separator, trained.get(name, PLAIN)) for name in seen}

    with_commas = found(",")
    return {name: marks if _alike(marks, with_commas[name]) else None for name, marks in found(";").items()}


def _alike(one: Marks | None, other: Marks | None) -> bool:
    """Whether texts that fit both are the same numbers: with blanks between thousands none of them has decimals."""
    return one == other or (one is not None and other is not None and one[1] == other[1] == " ")


def read_as_in_a_file(frame: pd.DataFrame, marks: Mapping[str, Marks | None]) -> pd.DataFrame:
    """Return a table whose texts in columns of numbers are numbers, and missing where a file would say so."""
    made: dict[str, Any] = {}
    for name, each in marks.items():
        values = frame[name].astype(object).map(in_range)
        known = values.map(lambda value: None if isinstance(value, str) and value.strip() in MISSING else value)
        made[name] = known if each is None else with_point(known, each)
    return frame.assign(**made) if made else frame


def marks_in_parquet(file: Any, stored: Mapping[str, str], columns: Columns) -> dict[str, Marks | None]:
    """Return `marks_in` of a pyarrow.parquet.ParquetFile, whose columns are `stored` under these names."""
    kinds = {field.name: str(field.type) for field in file.schema_arrow}
    texts = {old: new for new, old in stored.items() if "string" in kinds.get(old, "")}

    def frames() -> Iterator[pd.DataFrame]:
        for batch in file.iter_batches(columns=list(texts)):
            yield batch.to_pandas(ignore_metadata=True).rename(columns=texts)

    return marks_in(frames() if {*texts.values()} - {*columns.texts} else (), columns)
