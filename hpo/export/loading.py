"""A bundle read back: one module from raw inputs to predictions, and from tables to tables."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hpo.errors import InputError
from hpo.export.files import read_about, verify

if TYPE_CHECKING:
    import pandas as pd

MODEL = "model.torchscript.pt"


class Bundle(torch.nn.Module):
    """The model of a bundle: raw inputs (B, ...) -> predictions (B, ...)."""

    def __init__(self, model: torch.nn.Module, about: Mapping[str, Any] | None, path: Path) -> None:
        super().__init__()
        self.model = model
        self._about, self._path = about, path

    @property
    def about(self) -> Mapping[str, Any]:
        """What bundle.json says. Raises InputError where there is none beside the model."""
        if self._about is None:
            raise InputError(f"{self._path}: there is no bundle.json beside it, which says what the model takes")
        return self._about

    def forward(self, *inputs: torch.Tensor, **named: torch.Tensor) -> Any:
        """Return the model's predictions; several inputs are given by name or in their order."""
        return self.model(*inputs, **named)

    def predict(self, data: Any, *, top_k: int | None = None) -> "pd.DataFrame":
        """Return predictions of a table, or of arrays, as `hpo predict` prints them: a row for each of `data`'s.

        `data` is a DataFrame, whose columns are taken by their names, an array or tensor (N, ...), or several by
        input; of a DataFrame the answer has the index. Raises InputError with row, column and value.
        """
        from hpo.export.predicting import predict

        return predict(self.model, self.about, data, top_k)


def load_bundle(path: str | Path) -> Bundle:
    """Return the model of a bundle, in evaluation mode on the CPU: raw inputs (B, ...) -> predictions (B, ...).

    `path` is the bundle's folder (`study.bundle`; by default `mlruns/bundles/<name>`), or the TorchScript file in it.
    Several inputs are given by name or in their order, which bundle.json has. Its `predict` takes a table, and returns
    one: class names and probabilities, or numbers.

    Raises InputError where there is no bundle, its file cannot be read, or is not what bundle.json has the SHA-256 of.
    Nothing is unpickled.

    >>> study = hpo.run({"objective": "iris", "trials": 1, "epochs": 2, "tracking": "off"}, quiet=True)
    >>> model = hpo.load_bundle(study.bundle)
    >>> model(torch.tensor([[5.1, 3.5, 1.4, 0.2]])).shape
    torch.Size([1, 3])
    >>> model.predict(torch.tensor([[5.1, 3.5, 1.4, 0.2]])).columns.tolist()
    ['class', 'score_setosa', 'score_versicolor', 'score_virginica']
    """
    file = Path(path)
    file = file / MODEL if file.is_dir() else file
    if not file.is_file():
        raise InputError(f"{path}: no bundle is there (no {MODEL}); `hpo export` makes one")
    about = None
    if file != Path(path) or (file.parent / "bundle.json").is_file():
        about = read_about(file.parent)
        verify(file.parent, about, MODEL)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*torch.jit.*")  # deprecated, and what the bundle is
            model: torch.nn.Module = torch.jit.load(file, map_location="cpu")  # type: ignore[no-untyped-call]
            return Bundle(model, about, file).eval()
    except RuntimeError as error:
        reason = (str(error).splitlines() or [""])[0]
        raise InputError(f"{file}: cannot be read as a TorchScript model: {reason}") from error
