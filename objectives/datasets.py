"""The loaders: real data as `hpo.study.data.Data`, from `HPO_DATA_HOME` where it is there, else downloaded into it."""

import csv
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.model_selection import train_test_split

from hpo.errors import DataError, did_you_mean
from hpo.study.blocks import split_by_rows, tabular_splits  # noqa: F401 (version 0.1 had the second here)
from hpo.study.data import Data, Split, data_home
from hpo.study.pictures import upright


def rows_of_splits(
    classes: np.ndarray, *, test: float, valid: float, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return which rows train, validate and test; `test` and `valid` are shares of all, and of the rows of each class.

    `classes` (N,) are any values; equal ones where there are no classes. A class of three rows is in every split.
    """
    random = np.random.RandomState(seed)  # unlike a Generator's, its stream never changes
    splits: tuple[list[np.ndarray], ...] = ([], [], [])
    for label in np.unique(classes):
        rows = random.permutation(np.flatnonzero(classes == label))
        n_test, n_valid = (max(1, round(share * len(rows))) for share in (test, valid))
        parts = np.split(rows, [len(rows) - n_valid - n_test, len(rows) - n_test])
        for split, part in zip(splits, parts, strict=True):
            split.append(part)
    train_rows, valid_rows, test_rows = (random.permutation(np.concatenate(split)) for split in splits)
    return train_rows, valid_rows, test_rows


def sklearn_cached(name: str, file: str, fetch: Callable[..., Any]) -> Any:
    """Return what scikit-learn's `fetch` gives from `<data home>/sklearn`, downloading it where `file` is not there."""
    folder = data_home() / "sklearn"
    return _from(
        name, folder, folder / file, lambda download: fetch(data_home=str(folder), download_if_missing=download)
    )


def torchvision_splits(dataset: Callable[..., Any], class_names: tuple[str, ...]) -> Data:
    """Return MNIST, or what has its shape, from `<data home>/torchvision`: 55,000, 5,000 and 10,000 images.

    The input is `pixels`, (N, 28, 28) in uint8; `random_split` with seed 42 says which 5,000 validate.
    """
    images, classes = _torchvision_arrays(dataset, train=True)
    test_images, test_classes = _torchvision_arrays(dataset, train=False)
    rows = torch.randperm(len(images), generator=torch.Generator().manual_seed(42))  # as random_split draws them
    train, valid = rows[:55_000], rows[55_000:]
    return Data(
        train=Split(inputs={"pixels": images[train]}, targets=classes[train]),
        valid=Split(inputs={"pixels": images[valid]}, targets=classes[valid]),
        test=Split(inputs={"pixels": test_images}, targets=test_classes),
        class_names=class_names,
    )


def _torchvision_arrays(dataset: Callable[..., Any], *, train: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the images (N, H, W), uint8, and classes (N,) of a torchvision data set."""
    name, folder = dataset.__name__, data_home() / "torchvision"
    made = _from(
        name, folder, folder / name / "raw", lambda download: dataset(str(folder), train=train, download=download)
    )
    return made.data, made.targets


def images_of_csv(
    file: Path,
    images: Path | None,
    *,
    columns: tuple[str | None, str | None],
    label_transform: Mapping[str, str],
    size: int,
) -> Data:
    """Return the images that a CSV names, resized, with its labels as classes: 64% train, 16% validation, 20% test.

    Each class has its share of each split. The input is `pixels`, (N, 3, size, size) in uint8. `columns` are those of
    the file names and of the labels, else the first two. A file is looked for in `images`, else beside the CSV and in
    the folder `images` there. Raises DataError with file and line.
    """
    rows = _named_images(file, [images] if images else [file.parent, file.parent / "images"], columns)
    if unknown := label_transform.keys() - {label for _, _, label in rows}:
        name = min(unknown)
        raise DataError(f"{file}: no row has the label {name!r}{did_you_mean(name, {label for *_, label in rows})}")
    labels = [label_transform.get(label, label) for _, _, label in rows]
    counts = Counter(labels)
    class_names = tuple(sorted(counts))
    if len(class_names) < 2:
        raise DataError(f"{file}: all {len(rows)} rows have the label {labels[0]!r}; two classes or more are needed")
    classes = np.array([class_names.index(label) for label in labels])
    try:
        rest, test = train_test_split(np.arange(len(rows)), test_size=0.2, random_state=0, stratify=classes)
        train, valid = train_test_split(rest, test_size=0.2, random_state=0, stratify=classes[rest])
    except ValueError as error:
        rarest, n = counts.most_common()[-1]
        raise DataError(
            f"{file}: {len(rows)} images are too few for {len(class_names)} classes in three splits "
            f"({rarest!r} has {n}); add images, or merge classes with label_transform"
        ) from error
    pixels = torch.empty(len(rows), 3, size, size, dtype=torch.uint8)
    for place, (line, path, _) in enumerate(rows):
        pixels[place] = _image(path, size, f"{file}:{line}")
    return split_by_rows({"pixels": pixels}, torch.from_numpy(classes), (train, valid, test), class_names=class_names)


def _named_images(
    file: Path, folders: Sequence[Path], columns: tuple[str | None, str | None]
) -> list[tuple[int, Path, str]]:
    """Return the line, the image's path and the label of each row of a CSV. Raises DataError."""
    try:
        with file.open(newline="", encoding="utf-8-sig") as text:
            reader = csv.reader(text, skipinitialspace=True)
            header = [cell.strip() for cell in next(reader, [])]
            lines = [(reader.line_num, [cell.strip() for cell in row]) for row in reader if any(row)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        cause = getattr(error, "strerror", None) or error
        raise DataError(f"{file}: it cannot be read as a CSV in UTF-8 ({cause})") from error
    if len(header) < 2:
        raise DataError(f"{file}:1: two columns are needed, file name and label, but its first line is {header}")
    if unknown := [name for name in columns if name is not None and name not in header]:
        raise DataError(f"{file}:1: there is no column {unknown[0]!r}{did_you_mean(unknown[0], header)}")
    if not lines:
        raise DataError(f"{file}: it has no rows below its header")
    if any((folder / header[0]).is_file() for folder in folders):
        raise DataError(f"{file}:1: {header[0]!r} is an image, so a header is missing; write `file,label` above it")
    places = [place if name is None else header.index(name) for place, name in enumerate(columns)]
    found: dict[Path, tuple[int, Path, str]] = {}
    for line, row in lines:
        name, label = (row[place] if place < len(row) else "" for place in places)
        if not name or not label:
            raise DataError(f"{file}:{line}: the row has no {'label' if name else 'file name'}")
        path = next((folder / name for folder in folders if (folder / name).is_file()), None)
        if path is None:
            raise DataError(
                f"{file}:{line}: there is no image {' nor '.join(str(folder / name) for folder in folders)}"
            )
        if path in found:  # it could be in train and in test
            raise DataError(f"{file}:{line}: {name} stands in line {found[path][0]} already; name each image once")
        found[path] = line, path, label
    return list(found.values())


def _image(path: Path, size: int, where: str) -> torch.Tensor:
    """Return an image as it is meant to be looked at, (3, size, size) in uint8. Raises DataError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow, on metadata
            with Image.open(path) as image:
                small = upright(image, "RGB").resize((size, size), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(small)).permute(2, 0, 1)
    except Exception as error:  # Pillow's decoders: each fails in a way of its own
        cause = f"{type(error).__name__}: {error}".splitlines()[0]
        raise DataError(f"{where}: {path} is no image that can be read ({cause})") from error


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
