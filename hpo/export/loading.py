"""A bundle read back: one module from raw inputs to predictions. It needs torch alone."""

import warnings
from pathlib import Path

import torch

from hpo.errors import InputError

MODEL = "model.torchscript.pt"


def load_bundle(path: str | Path) -> torch.nn.Module:
    """Return the model of a bundle, in evaluation mode on the CPU: raw inputs (B, ...) -> predictions (B, ...).

    `path` is the bundle's folder (`study.bundle`; by default `mlruns/bundles/<name>`), or the TorchScript file in it.
    Several inputs are given by name or in their order, which bundle.json has.

    Raises InputError where there is no bundle, or its file cannot be read.

    >>> study = hpo.run({"objective": "iris", "trials": 1, "epochs": 2, "tracking": "off"}, quiet=True)
    >>> model = hpo.load_bundle(study.bundle)
    >>> model(torch.tensor([[5.1, 3.5, 1.4, 0.2]])).shape
    torch.Size([1, 3])
    """
    file = Path(path)
    file = file / MODEL if file.is_dir() else file
    if not file.is_file():
        raise InputError(f"{path}: no bundle is there (no {MODEL}); `hpo export` makes one")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*torch.jit.*")  # deprecated, and what the bundle is
            model: torch.nn.Module = torch.jit.load(file, map_location="cpu")  # type: ignore[no-untyped-call]
            return model.eval()
    except RuntimeError as error:
        reason = (str(error).splitlines() or [""])[0]
        raise InputError(f"{file}: cannot be read as a TorchScript model: {reason}") from error
