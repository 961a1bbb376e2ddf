"""What lies in a bundle's folder, and numbers as its JSON has them. Nothing here imports torch."""

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

from hpo.errors import InputError

FORMAT = 2
"""The version of bundle.json that is written; 1 had no checksums."""
_MUST = {"inputs", "output", "class_names", "feature_names"}
_KINDS: Mapping[str, tuple[type, ...]] = {
    "inputs": (list,),
    "output": (dict,),
    "class_names": (list,),
    "columns": (list, type(None)),
}
FILES = ("model.pt", "model.torchscript.pt", "bundle.json")
"""What every bundle has; and what it may have."""
MORE_FILES = ("model.pt2", "model.onnx", "model.safetensors", "MODEL.md")


def allowed(mode: int) -> int:
    """Return those of the permissions `mode` that a file or folder of this process gets, as if it was made plainly."""
    umask = os.umask(0)
    os.umask(umask)
    return mode & ~umask


def finite(value: Any) -> Any:
    """Return plain values with None for every number that JSON has not: NaN and infinity."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_about(folder: Path) -> dict[str, Any]:
    """Return bundle.json's content. Raises InputError where it is none."""
    file = folder / "bundle.json"
    try:
        about = json.loads(file.read_text())
    except FileNotFoundError as error:
        raise InputError(f"{folder}: is no bundle, there is no bundle.json; `hpo export` makes one") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: cannot be read ({(str(error).splitlines() or [''])[0][:200]})") from error
    if not isinstance(about, dict) or not isinstance(about.get("format"), int) or _MUST - set(about):
        raise InputError(f"{file}: is no description of an hpo bundle; `hpo export` makes one")
    for key, kinds in _KINDS.items():
        if key in about and not isinstance(about[key], kinds):
            raise InputError(f"{file}: is damaged, {key} is a {type(about[key]).__name__}; `hpo export` makes it again")
    if not about["inputs"] or not all(map(_describes, about["inputs"])):
        raise InputError(f"{file}: is damaged, it does not describe the inputs; `hpo export` makes it again")
    if about["format"] > FORMAT:
        raise InputError(f"{file}: is of format {about['format']}, and this hpo reads up to {FORMAT}; upgrade hpo")
    return about


def digests(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the SHA-256 and the bytes of every file in a folder, by name."""
    return {file.name: _digest(file) for file in sorted(folder.iterdir())}


def verify(folder: Path, about: Mapping[str, Any], needed: str, *, by_size: bool = False) -> None:
    """Raise InputError unless the bundle's files are those that were written; `needed` must be among them.

    With `by_size` they are not read. Bundles of format 1 have no checksums, and are taken as they are.
    """
    if about["format"] < 2:
        return
    files = about.get("files")
    if not isinstance(files, dict) or needed not in files or not all(map(_is_digest, files.values())):
        raise InputError(f"{folder}: its bundle.json has no checksum of {needed}; export it again")
    for name, written in files.items():
        file = folder / Path(name).name
        if not file.is_file():
            raise InputError(f"{file}: is missing, which bundle.json names; the bundle is not whole, export it again")
        if (size := file.stat().st_size) != written["bytes"]:
            raise InputError(
                f"{file}: has {size} bytes, but {written['bytes']} were written: it is cut off, or another file; "
                "export it again"
            )
        if not by_size and _digest(file) != written:
            raise InputError(
                f"{file}: is not what was exported (its SHA-256 is not that of bundle.json), so it was not loaded; "
                "export it again"
            )


def _is_digest(written: Any) -> bool:
    return isinstance(written, dict) and {"bytes", "sha256"} <= set(written)


def _describes(entry: Any) -> bool:
    return isinstance(entry, dict) and {"name", "shape", "dtype"} <= set(entry)


def _digest(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        return {"sha256": hashlib.file_digest(stream, "sha256").hexdigest(), "bytes": file.stat().st_size}


def in_memory(save: Callable[[Any, Any], Any], what: Any) -> memoryview:
    """Return what `save` writes of `what`, to be written by Python.

    On a full disk Python raises an OSError that says so. Of torch's own writers that of TorchScript and pt2 ends the
    process, by an error in a C++ destructor, and that of tensors raises what does not say why.
    """
    file = BytesIO()
    save(what, file)
    return file.getbuffer()
