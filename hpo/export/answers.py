"""A model's outputs as a table: class names and probabilities, scores, or numbers. pandas is imported for a table."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from hpo.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

Values = Literal["probabilities", "logits", "scores", "labels", "numbers"]
"""What a model's outputs are. Logits are of a loss that is known; of scores the largest says the class, no more; labels
have each a probability of its own."""


def values_of(outputs: np.ndarray, n_classes: int) -> Values:
    """Return what outputs (N, ...) are, as far as can be seen of them."""
    width = int(np.prod(outputs.shape[1:]))
    if n_classes < 2 or width not in ({1, 2} if n_classes == 2 else {n_classes}):
        return "numbers"
    shares = outputs.min() >= 0 and outputs.max() <= 1
    if shares and width > 1:
        shares = bool(np.allclose(outputs.reshape(len(outputs), -1).sum(1), 1, atol=1e-3))
    return "probabilities" if shares else "scores"


def require_top_k(about: Mapping[str, Any], top_k: int | None) -> None:
    """Raise InputError where there are not so many classes."""
    n = len(about["class_names"])
    if top_k is None:
        return
    if not isinstance(top_k, int) or isinstance(top_k, bool):
        raise InputError(f"--top-k {top_k!r}: must be a whole number")
    if about["output"].get("values") == "numbers" or n < 2:
        raise InputError(f"--top-k {top_k}: the model has no classes, it predicts numbers; leave --top-k away")
    if about["output"].get("values") == "labels":
        raise InputError(f"--top-k {top_k}: each label has a probability of its own; leave --top-k away")
    if not 1 <= top_k <= n:
        raise InputError(f"--top-k {top_k}: must be from 1 to the number of classes, {n}")


def answers(about: Mapping[str, Any], outputs: np.ndarray, top_k: int | None = None) -> "pd.DataFrame":
    """Return outputs (N, ...) as a table of N rows.

    Of classes: `class`, and `probability_<class>` of each; of two classes `class` and its `probability`; with `top_k`
    class_1, probability_1, class_2, ... from the likeliest on. Where they are no probabilities, `score` stands in
    place of `probability`. Of labels: `probability_<label>` of each. Of numbers: `prediction`, or prediction_1,
    prediction_2, ...
    """
    import pandas as pd

    names = about["class_names"]
    values: Values = about["output"].get("values") or values_of(outputs, len(names))
    flat = outputs.reshape(len(outputs), -1)
    if values == "numbers":
        width = flat.shape[1]
        return pd.DataFrame({"prediction" if width == 1 else f"prediction_{i + 1}": flat[:, i] for i in range(width)})
    if values == "labels":
        return pd.DataFrame({f"probability_{name}": flat[:, i] for i, name in enumerate(names)})
    word = "score" if values == "scores" else "probability"
    each = _of_each(flat, values)
    classes = np.array(names, dtype=object)
    if top_k is not None:
        order = np.argsort(-each, axis=1, kind="stable")[:, :top_k]
        best = np.take_along_axis(each, order, 1)
        parts = ((f"class_{i + 1}", classes[order[:, i]], f"{word}_{i + 1}", best[:, i]) for i in range(top_k))
        return pd.DataFrame({key: value for a, b, c, d in parts for key, value in ((a, b), (c, d))})
    chosen = each.argmax(1)
    if len(names) == 2:
        return pd.DataFrame({"class": classes[chosen], word: np.take_along_axis(each, chosen[:, None], 1)[:, 0]})
    columns = {f"{word}_{name}": each[:, i] for i, name in enumerate(names)}
    return pd.DataFrame({"class": classes[chosen], **columns})


def _of_each(flat: np.ndarray, values: Values) -> np.ndarray:
    """Return each class's probability or score, (N, classes): one output (N, 1) is that of the second class."""
    if values == "logits":
        pair = np.concatenate([np.zeros_like(flat), flat], 1) if flat.shape[1] == 1 else flat
        shifted = np.exp(pair - pair.max(1, keepdims=True))
        return np.asarray(shifted / shifted.sum(1, keepdims=True))
    if flat.shape[1] == 1:
        return np.concatenate([1 - flat if values == "probabilities" else -flat, flat], 1)
    return flat
