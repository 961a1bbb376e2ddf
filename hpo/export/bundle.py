"""The exported model: written whole or not at all, and proved equal to the model that was measured.

A bundle is a folder:
    model.pt               {"model_state_dict", "model_hyperparameters", ...}; loads with weights_only=True
    model.torchscript.pt   raw inputs -> predictions, compiled, frozen, optimised; needs torch and nothing else
    model.pt2, model.onnx, model.safetensors    where they were asked for; see `hpo.export.formats`
    bundle.json            params, metrics, inputs and output, class names, parity, checksums, versions, commit, ...
    MODEL.md               the same facts in words
"""

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torch import nn

from hpo.errors import ExportError, InputError
from hpo.export.card import card
from hpo.export.describing import describe
from hpo.export.files import FILES, MORE_FILES, allowed, digests, finite
from hpo.export.formats import ALWAYS, FILE_OF, Formats, write
from hpo.export.model import Model
from hpo.export.parity import NOTHING, TOLERANCE, fresh_parity, parity_of, require_parity
from hpo.log import log
from hpo.processes import is_gone, this_process
from hpo.study.data import Split


def export(
    model: Model, held_out: Split, folder: Path, formats: Formats = ALWAYS, fresh: bool = False
) -> dict[str, Any]:
    """Write `model` to `folder`, in place of whatever bundle is there; return bundle.json's content.

    What was written is loaded again and compared with the eager module on `held_out` (its inputs only); with `fresh` in
    a process of its own too, which cannot import hpo. A format that nobody asked for is left out where anything is
    wrong with it, which is logged. Raises ExportError, and leaves `folder` as it was, where one of the others differs
    by more than TOLERANCE, or cannot be written.
    """
    with _written(folder):
        place = folder.resolve()  # where a link leads
        place.parent.mkdir(parents=True, exist_ok=True)
        _remove_left(place.parent)
        work = Path(tempfile.mkdtemp(prefix=f"{_UNFINISHED}{this_process()}~", dir=place.parent))
    try:
        os.chmod(work, allowed(0o777))  # mkdtemp makes it for its owner only
        eager = model.predictor()
        how, parity = _write_all(model, eager, held_out, work, folder, formats)
        if fresh:
            parity = _compare_fresh(eager, held_out, work, formats, how, parity)
        about = describe(model, eager, held_out) | how | {"parity": parity}
        for each in about["notes"]:
            log.warning(f"{model.about.get('study', 'the model')}: {each}")
        with _written(folder):
            (work / "MODEL.md").write_text(card(about), encoding="utf-8")
            about |= {"files": digests(work)}
            (work / "bundle.json").write_text(json.dumps(finite(about), indent=2, allow_nan=False) + "\n")
            _replace(work, place)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return about


def _remove_left(parent: Path) -> None:
    """Remove what exports have left that were killed on this machine."""
    for left in parent.glob(f"{_UNFINISHED}*~*"):
        if is_gone(left.name.removeprefix(_UNFINISHED).rpartition("~")[0]):
            shutil.rmtree(left, ignore_errors=True)


def _write_all(
    model: Model, eager: nn.Module, held_out: Split, work: Path, folder: Path, formats: Formats
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Write every format; return how each was written, and how far its predictions are from the eager ones."""
    how: dict[str, Any] = {}
    parity: dict[str, Any] = {}
    for kind in formats:
        file, compared = FILE_OF[kind], {}
        try:
            with _written(folder):
                written = write(kind, model, eager, held_out, work)
            if written.call is not None:
                compared = {file: parity_of(eager, written.call, held_out, file)}
                require_parity(compared)
        except ExportError as error:
            if kind in ALWAYS:
                raise
            if formats[kind]:
                raise ExportError(f"{str(error).removesuffix(NOTHING)}; leave {kind} out of --formats") from error
            _leave_out(kind, error, work, how)
            continue
        parity |= compared
        if written.how:
            how[kind] = dict(written.how)
    return how, parity


def _leave_out(kind: str, error: ExportError, work: Path, how: dict[str, Any]) -> None:
    """Export without a format that nobody asked for by name, and say why."""
    why = str(error).removesuffix(NOTHING)
    log.warning(f"the bundle has no {FILE_OF[kind]}, which nothing else needs: {why}")
    (work / FILE_OF[kind]).unlink(missing_ok=True)
    how[kind] = {"not_exported": why}


def _compare_fresh(
    eager: nn.Module, held_out: Split, work: Path, formats: Formats, how: dict[str, Any], parity: Mapping[str, Any]
) -> dict[str, Any]:
    """Return `parity` with what a process of its own finds of every file. Raises ExportError."""
    kinds = [kind for kind in formats if (work / FILE_OF[kind]).is_file()]
    try:
        files = [FILE_OF[kind] for kind in kinds]
        together = dict(parity)
        for name, found in fresh_parity(eager, work, files, held_out).items():
            scale = {"largest_prediction": 1.0, "tolerance": TOLERANCE} | together.get(name, {})
            together[name] = scale | {"fresh_process": found}
            together[name]["max_difference"] = max(found["max_difference"], scale.get("max_difference", 0.0))
        require_parity(together)
    except ExportError as error:
        left_out = [kind for kind in kinds if not formats[kind]]
        if not left_out:
            raise
        asked = {kind: True for kind in kinds if formats[kind]}
        kept = {file: each for file, each in parity.items() if file in {FILE_OF[kind] for kind in asked}}
        together = _compare_fresh(eager, held_out, work, asked, how, kept)  # where these are right, the others are not
        for kind in left_out:
            _leave_out(kind, error, work, how)
    return together


def require_place(folder: Path) -> None:
    """Raise InputError where `--out folder` is no place for a bundle: it would replace anything else, or cannot be."""
    try:
        place = folder.resolve()
        if place.is_symlink():  # from Python 3.13 on, links that lead to each other are not an error
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        if place.exists() and not place.is_dir():
            raise InputError(f"--out {folder}: is a file; give a folder")
        foreign = sorted({file.name for file in place.iterdir()} - {*FILES, *MORE_FILES}) if place.exists() else []
        if foreign:
            raise InputError(
                f"--out {folder}: is to be replaced by the bundle, but holds {foreign[0]}; give another folder"
            )
        if place in (here := Path.cwd(), *here.parents) or os.path.ismount(place):
            raise InputError(f"--out {folder}: is to be replaced by the bundle, but is in use; give a folder in it")
        _try_to_write(place.parent)
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: links that lead to each other
        if getattr(error, "errno", None) in _FULL:
            raise ExportError(f"--out {folder}: {_why(error)}; make room, or give another folder") from error
        raise InputError(f"--out {folder}: cannot be written ({_why(error)}); give another folder") from error


def require_writable(folder: Path) -> None:
    """Raise InputError where no bundle could be put into a study's own `folder`: before it trains, not after that.

    A disk that is full now may have room by then.
    """
    try:
        _try_to_write(folder)
    except OSError as error:
        if error.errno not in _FULL:
            why = f"output: {folder} cannot be written ({_why(error)}), where the best model is to be exported"
            raise InputError(f"{why}; give another `output`, no trial is lost") from error


def _try_to_write(parent: Path) -> None:
    """Make a file in `parent`, and the folders that lead there, and remove them again."""
    missing = [each for each in (parent, *parent.parents) if not each.exists()]
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(prefix=_UNFINISHED, dir=parent) as file:
            file.write(b"0")
    finally:
        for each in missing:
            with suppress(OSError):
                each.rmdir()


_UNFINISHED = ".bundle-"
_FULL = (errno.ENOSPC, errno.EDQUOT)


def _why(error: Exception) -> str:
    lines = (getattr(error, "strerror", None) or str(error)).strip().splitlines()
    return (lines or [type(error).__name__])[0][:200]


@contextmanager
def _written(folder: Path) -> Iterator[None]:
    """Within this, what cannot be written is an ExportError, and so is what TorchScript cannot hold."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch: a full disk is a RuntimeError
        if isinstance(error, OSError) or any(word in str(error) for word in _TORCH_CANNOT_WRITE):
            raise ExportError(f"{folder} cannot be written ({_why(error)}){NOTHING}") from error
        raise ExportError(f"the model cannot be exported ({_why(error)}){NOTHING}") from error


_TORCH_CANNOT_WRITE = ("PytorchStreamWriter", "inline_container", "unexpected pos", "iostream")


def _replace(work: Path, folder: Path) -> None:
    """Put `work` in `folder`'s place; what was there is away only for the moment between two renames."""
    old = work.with_name(f"{work.name}-old")
    if folder.exists():
        folder.rename(old)
    try:
        work.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)
