"""Images as the pixels that a model takes: upright, of its size and channels."""

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hpo.errors import InputError
from hpo.export.columns import Notes
from hpo.study.pictures import upright

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")


def image_chunks(
    path: Path, about: Mapping[str, Any], most: int, notes: Notes
) -> Iterator[tuple[dict[str, np.ndarray], list[str], float]]:
    """Yield pixels by the input's name, the files' names, and the share of files that were read.

    `path` is an image, or a folder whose images are taken in the order of their names; `most` bytes of pixels are in
    memory at a time. Raises InputError.
    """
    name, shape = _pixels(path, about)
    files = _files(path)
    rows = max(1, min(1024, most // int(np.prod(shape))))
    for start in range(0, len(files), rows):
        some = files[start : start + rows]
        pixels = np.stack([_image(file, shape, notes) for file in some])
        names = [str(file.relative_to(path)) if path.is_dir() else file.name for file in some]
        yield {name: pixels}, names, (start + len(some)) / len(files)


def _pixels(path: Path, about: Mapping[str, Any]) -> tuple[str, tuple[int, ...]]:
    """Return the name and shape of the input that takes images. Raises InputError where there is none."""
    entries = about["inputs"]
    shape = tuple(entries[0]["shape"][1:])
    is_image = len(shape) == 2 or (len(shape) == 3 and shape[0] in (1, 3))
    if len(entries) != 1 or not is_image or entries[0]["dtype"] != "uint8":
        shapes = ", ".join(f"{e['name']} {tuple(e['shape'][1:])} in {e['dtype']}" for e in entries)
        what = "is a folder" if path.is_dir() else "is an image"
        raise InputError(f"{path}: {what}, but the model takes {shapes}, no pixels from 0 to 255")
    return entries[0]["name"], shape


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
    if not files:
        raise InputError(f"{path}: there are no images in this folder ({', '.join(SUFFIXES)})")
    return files


def _image(file: Path, shape: tuple[int, ...], notes: Notes) -> np.ndarray:
    """Return an image as it is meant to be looked at, of that shape in uint8. Raises InputError."""
    from PIL import Image

    height, width = shape[-2:]
    colours = len(shape) == 3 and shape[0] == 3
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow, on metadata
            with Image.open(file) as image:
                shown = upright(image, "RGB" if colours else "L")
        if shown.size != (width, height):
            n, first = notes.resized
            size = f"{file.name} from {shown.width} x {shown.height} to {width} x {height}"
            notes.resized = n + 1, first or size
            shown = shown.resize((width, height), Image.Resampling.BILINEAR)
        pixels = np.array(shown)
    except Exception as error:  # Pillow's decoders: each fails in a way of its own
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        raise InputError(f"{file}: is no image that can be read ({reason})") from error
    return pixels.transpose(2, 0, 1) if colours else pixels.reshape(shape)
