"""Predictions of a bundle's model for a table, arrays or images: one way for `hpo predict` and `load_bundle().predict`.

Nothing of the objective is imported: what a table's columns are, and what the outputs mean, is in bundle.json.
"""

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from hpo.errors import InputError
from hpo.export.answers import answers, require_top_k
from hpo.export.columns import Columns, Notes, columns_of
from hpo.export.reading import as_arrays, chunks
from hpo.export.texts import marks_in, read_as_in_a_file
from hpo.log import log
from hpo.study.table_text import without_arrow

_BATCH = 8192
"""So many rows go through the model at a time."""


def predict(model: nn.Module, about: Mapping[str, Any], data: Any, top_k: int | None) -> pd.DataFrame:
    """Return predictions for a DataFrame or arrays; see `Bundle.predict`."""
    require_top_k(about, top_k)
    columns, notes = _columns(about), Notes()
    if isinstance(data, pd.DataFrame):
        if columns is None:
            raise InputError("the table: the model takes no columns; give arrays")
        if data.empty:
            raise InputError("the table: has no rows")
        named = data.set_axis([str(name).strip() for name in data.columns], axis=1)  # as a file's header is read
        taken = columns.required("the table", named.columns, None, notes)
        frame = without_arrow(named[taken])
        frame = read_as_in_a_file(frame, marks_in([frame], columns))
        arrays = columns.arrays(frame, "the table", 1, notes)
    else:
        arrays = as_arrays(data, about, columns, "the data")
    made = answers(about, outputs_of(model, arrays), top_k)
    doubts = notes.doubts()
    for text in notes.texts():
        log.log(logging.WARNING if text in doubts else logging.INFO, text)
    return made.set_index(data.index) if isinstance(data, pd.DataFrame) else made


def predictions(
    model: nn.Module,
    about: Mapping[str, Any],
    source: str,
    *,
    top_k: int | None,
    keep: str | None,
    notes: Notes,
) -> Iterator[tuple[pd.DataFrame, float]]:
    """Yield the predictions for `source`, a path or `-`, chunk after chunk, and the share of it that was read.

    `keep` is a column that is copied. What is to be said of the source is in `notes` at the end. Raises InputError.
    """
    require_top_k(about, top_k)
    for chunk in chunks(source, about, _columns(about), keep, notes):
        made = answers(about, outputs_of(model, chunk.arrays), top_k)
        for place, (name, values) in enumerate(chunk.kept.items()):
            if name in made:
                raise InputError(f"--id {name}: the predictions have a column of that name; rename it in {source}")
            made.insert(place, name, pd.Series(values, dtype=object))
        yield made, chunk.share


def _columns(about: Mapping[str, Any]) -> Columns | None:
    columns = columns_of(about)
    return None if columns is None else Columns(about, columns)


def outputs_of(model: nn.Module, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return the model's outputs (N, ...) for arrays (N, ...) in their order."""
    tensors = [torch.from_numpy(np.ascontiguousarray(array)) for array in arrays.values()]
    parts = []
    with torch.inference_mode():
        for start in range(0, len(tensors[0]), _BATCH):
            parts.append(model(*(x[start : start + _BATCH] for x in tensors)).float().numpy())
    return np.concatenate(parts)
