"""The loaders: real data as `hpo.data.Data`, from `HPO_DATA_HOME` where it is there, else downloaded into it."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.model_selection import train_test_split

from hpo.data import Data, Split, data_home
from hpo.errors import DataError


def tabular_splits(
    features: np.ndarray,
    targets: torch.Tensor,
    *,
    test: float,
    valid: float,
    random_state: int,
    feature_names: tuple[str, ...],
    class_names: tuple[str, ...] = (),
    stratify: bool = False,
) -> Data:
    """Return `features` (N, F) as float32 in three splits: `test` of all rows, then `valid` of those that are left.

    The test rows are the documented ones; `stratify` keeps the classes' shares equal in train and validation.
    """
    labels = targets.numpy().ravel() if stratify else None
    rest, test_rows = train_test_split(np.arange(len(features)), test_size=test, random_state=random_state)
    train_rows, valid_rows = train_test_split(
        rest, test_size=valid, random_state=random_state, stratify=None if labels is None else labels[rest]
    )
    inputs = torch.from_numpy(np.ascontiguousarray(features, dtype=np.float32))
    train, valid_split, test_split = (
        Split(inputs={"features": inputs[rows]}, targets=targets[rows]) for rows in (train_rows, valid_rows, test_rows)
    )
    return Data(train=train, valid=valid_split, test=test_split, feature_names=feature_names, class_names=class_names)


def sklearn_cached(name: str, file: str, fetch: Callable[..., Any]) -> Any:
    """Return what scikit-learn's `fetch` gives from `<data home>/sklearn`, downloading it where `file` is not there."""
    folder = data_home() / "sklearn"
    return _from(
        name, folder, folder / file, lambda download: fetch(data_home=str(folder), download_if_missing=download)
    )


def torchvision_arrays(name: str, dataset: Callable[..., Any], *, train: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the images (N, H, W), uint8, and classes (N,) of a torchvision data set in `<data home>/torchvision`."""
    folder = data_home() / "torchvision"
    made = _from(
        name, folder, folder / name / "raw", lambda download: dataset(str(folder), train=train, download=download)
    )
    return made.data, made.targets


def _from(name: str, folder: Path, file: Path, load: Callable[[bool], Any]) -> Any:
    """Call `load(download)`: with download only where `file` is not there; say in one line why it failed."""
    bring = f"bring it there by hand, or point HPO_DATA_HOME at the folder that holds {folder.name}/"
    download = not file.exists()
    try:
        if download:
            folder.mkdir(parents=True, exist_ok=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # retries and numpy's deprecations inside the libraries' own readers
            return load(download)
    except Exception as error:  # urllib, sockets, zlib, pickle, struct, torchvision: each fails in a way of its own
        cause = f"{type(error).__name__}: {error}".splitlines()[0]
        if download:
            raise DataError(f"{name}: not in {file}, and it could not be downloaded ({cause}); {bring}") from error
        raise DataError(
            f"{name}: {file} cannot be read ({cause}): a file in it is corrupted or incomplete; "
            f"delete it to have it downloaded again, or {bring}"
        ) from error
