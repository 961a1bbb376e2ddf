"""The exported model: written whole or not at all, and proved equal to the model that was measured.

A bundle is a folder:
    model.pt               {"model_state_dict", "model_hyperparameters", ...}; loads with weights_only=True
    model.torchscript.pt   raw inputs -> predictions, compiled, frozen, optimised; needs torch and nothing else
    bundle.json            params, metrics, inputs and output, class names, parity, versions, commit, data's fingerprint
"""

import errno
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import asdict, dataclass
from inspect import Parameter, Signature
from keyword import iskeyword
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hpo.errors import ExportError, InputError
from hpo.export.answers import Values, values_of
from hpo.export.columns import columns_of
from hpo.export.environment import git_commit, versions
from hpo.export.files import FILES, FORMAT, digests, finite
from hpo.study.data import DataInfo, Split, prediction

_jit: Any = torch.jit  # whose functions have no types
TOLERANCE = 1e-5
"""The largest difference between an exported model's predictions and the eager one's, of the largest of these where
that is above 1: float32 has 7 digits, whatever the unit."""
BATCH_SIZES = (1, 2, 7, 64, 1000)


@dataclass(frozen=True, kw_only=True)
class Model:
    """A trained model, and what a bundle says of it. `params` are all that it was built from."""

    preprocess: nn.Module
    network: nn.Module
    head: nn.Module
    params: Mapping[str, Any]
    info: DataInfo
    about: Mapping[str, Any]
    """study, objective, options, trial, epochs, seed, metrics, data_fingerprint: plain values."""

    def predictor(self) -> nn.Module:
        """Return raw inputs -> predictions, in evaluation mode, as a module of its own on the CPU."""
        parts = [part.cpu().eval() for part in deepcopy([self.preprocess, self.network, self.head])]
        names = ("preprocess", "network", "head")
        several = len(self.info.inputs) > 1 or self._gives_several(parts)
        module = _Named(list(self.info.inputs), *parts) if several else nn.Sequential()
        if isinstance(module, nn.Sequential):
            for name, part in zip(names, parts, strict=True):
                module.add_module(name, part)
        return module.cpu().eval().requires_grad_(False)

    def _gives_several(self, parts: Sequence[nn.Module]) -> bool:
        """Whether the network gives several outputs, the first of which is the prediction."""
        dtype = getattr(torch, next(iter(self.info.input_dtypes.values())))
        with torch.no_grad():
            x = torch.zeros(2, *next(iter(self.info.inputs.values())), dtype=dtype)
            return not isinstance(parts[1](parts[0](x)), Tensor)


class _Named(nn.Module):
    """preprocess, network and head for several inputs or outputs; traced: TorchScript cannot script `*inputs`.

    What is traced takes its inputs by their names too, as far as Python allows them.
    """

    def __init__(self, names: Sequence[str], preprocess: nn.Module, network: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.preprocess, self.network, self.head = preprocess, network, head

        def forward(*inputs: Tensor) -> Tensor:
            prepared = inputs if isinstance(preprocess, nn.Identity) else preprocess(*inputs)
            prepared = (prepared,) if isinstance(prepared, Tensor) else prepared
            predicted: Tensor = head(prediction(network(*prepared)))
            return predicted

        plain = [n if n.isidentifier() and not iskeyword(n) else f"input{place}" for place, n in enumerate(names)]
        parameters = [Parameter(name, Parameter.POSITIONAL_OR_KEYWORD) for name in plain]
        forward.__signature__ = Signature(parameters)  # type: ignore[attr-defined]  # the tracer reads names here
        self.forward = forward


def export(model: Model, held_out: Split, folder: Path) -> dict[str, Any]:
    """Write `model` to `folder`, in place of whatever bundle is there; return bundle.json's content.

    What was written is loaded again and compared with the eager module on `held_out` (its inputs only).
    Raises ExportError, and leaves `folder` as it was, where they differ by more than TOLERANCE, or cannot be written.
    """
    with _written(folder):
        place = folder.resolve()  # where a link leads
        place.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=place.parent))
    try:
        os.chmod(work, 0o755)  # mkdtemp makes it for its owner only
        eager = model.predictor()
        hyperparameters = dict(model.params) | {
            "input_shapes": {name: list(shape) for name, shape in model.info.inputs.items()},
            "n_classes": model.info.n_classes,
        }
        state = {"model_state_dict": eager.state_dict(), "model_hyperparameters": hyperparameters}
        with _written(folder):
            torch.save(state | json.loads(json.dumps(dict(model.about))), work / "model.pt")
        with _quiet_jit():
            how = _write_torchscript(eager, held_out, work / "model.torchscript.pt", folder)
            loaded = _jit.load(work / "model.torchscript.pt")
            state = torch.load(work / "model.pt", weights_only=True)
            restored = _reset(model.predictor())
            restored.load_state_dict(state["model_state_dict"])
            parity = {
                "model.torchscript.pt": parity_of(eager, loaded, held_out),
                "model.pt": parity_of(eager, restored, held_out),
            }
        _require_parity(parity)
        about = _describe(model, eager, held_out) | {"torchscript": how, "parity": parity, "files": digests(work)}
        with _written(folder):
            (work / "bundle.json").write_text(json.dumps(finite(about), indent=2, allow_nan=False) + "\n")
            _replace(work, place)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return about


def require_place(folder: Path) -> None:
    """Raise InputError where `--out folder` is no place for a bundle: it would replace anything else, or cannot be."""
    try:
        place = folder.resolve()
        if place.is_symlink():  # from Python 3.13 on, links that lead to each other are not an error
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        if place.exists() and not place.is_dir():
            raise InputError(f"--out {folder}: is a file; give a folder")
        foreign = sorted({file.name for file in place.iterdir()} - set(FILES)) if place.exists() else []
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
    return (getattr(error, "strerror", None) or str(error)).splitlines()[0][:200]


@contextmanager
def _written(folder: Path) -> Iterator[None]:
    """Within this, what cannot be written is an ExportError."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch: a full disk is a RuntimeError
        raise ExportError(f"{folder} cannot be written ({_why(error)}); nothing was exported") from error


def parity_of(eager: nn.Module, other: nn.Module, held_out: Split) -> dict[str, Any]:
    """Return the largest difference between the two modules' predictions on `held_out`, for several batch sizes."""
    largest, scale, rows = 0.0, 1.0, min(len(held_out), 2 * max(BATCH_SIZES))
    for batch_size in BATCH_SIZES:
        for start in range(0, min(rows, 4 * batch_size), batch_size):
            inputs = [x[start : start + batch_size].cpu() for x in held_out.inputs.values()]
            with torch.no_grad():
                one, two = eager(*inputs), other(*inputs)
            difference = torch.where(one == two, 0.0, (one - two).abs()).max()  # -inf equals -inf
            scale = max(scale, float(one.nan_to_num(posinf=0.0, neginf=0.0).abs().max()))
            # max() of Python would drop a NaN, and a NaN is no parity
            largest = max(largest, float(difference)) if torch.isfinite(difference) else float("inf")
    return {
        "max_difference": largest,
        "largest_prediction": scale,
        "tolerance": TOLERANCE * scale,
        "batch_sizes": list(BATCH_SIZES),
        "rows": rows,
    }


def _require_parity(parity: Mapping[str, Mapping[str, Any]]) -> None:
    for file, result in parity.items():
        if not result["max_difference"] <= result["tolerance"]:
            raise ExportError(
                f"{file} is not the model that was measured: its predictions differ by up to "
                f"{result['max_difference']:.3g} (allowed: {result['tolerance']:.3g}); nothing was exported"
            )


def _write_torchscript(eager: nn.Module, held_out: Split, path: Path, folder: Path) -> dict[str, Any]:
    """Write `eager` as TorchScript; return how that was done: scripted or traced, optimised or (why) not."""
    example = tuple(x[:2].cpu() for x in held_out.inputs.values())
    how: dict[str, Any] = {"compiled": "script"}
    try:
        if isinstance(eager, _Named):
            raise RuntimeError("several inputs")
        script = torch.jit.script(eager)
    except Exception as error:  # the compiler raises a dozen kinds of error for Python it does not take
        how = {"compiled": "trace", "not_scripted": str(error).strip().splitlines()[0][:200]}
        script = _jit.trace(eager, example)
    frozen = torch.jit.freeze(script)
    try:
        torch.jit.optimize_for_inference(frozen).save(str(path))
        _jit.load(path)(*example)
        how["optimized_for_inference"] = True
    except RuntimeError as error:
        # With convolutions it makes a file that torch.jit.load refuses ("attribute 'value' is undefined")
        with _written(folder):
            torch.jit.freeze(script).save(str(path))
        how |= {"optimized_for_inference": False, "not_optimized": str(error).strip().splitlines()[-1][:200]}
    return how


def _reset(module: nn.Module) -> nn.Module:
    """Return `module` with every number in it set to zero, so that it is what is loaded into it, or nothing."""
    for tensor in module.state_dict().values():
        tensor.zero_()
    return module


def _describe(model: Model, eager: nn.Module, held_out: Split) -> dict[str, Any]:
    with torch.no_grad():
        output = eager(*(x[:1000].cpu() for x in held_out.inputs.values()))
    info = asdict(model.info)
    about = {
        "format": FORMAT,
        **model.about,
        "params": dict(model.params),
        "inputs": [
            {"name": name, "shape": [None, *shape], "dtype": info["input_dtypes"][name]}
            for name, shape in info["inputs"].items()
        ],
        "output": {
            "name": "prediction",
            "shape": [None, *output.shape[1:]],
            "dtype": str(output.dtype).removeprefix("torch."),
            "values": _values(model, output),
        },
        "feature_names": info["feature_names"],
        "class_names": info["class_names"],
        "missing": info["missing"],
        "n_parameters": sum(p.numel() for p in model.network.parameters()),
        "versions": versions(),
        "git_commit": git_commit(),
    }
    return about | {"columns": columns_of(about)}


def _values(model: Model, output: Tensor) -> Values:
    """Return what the outputs are: what head and loss say counts for more than what a few rows look like."""
    seen = values_of(output.float().numpy(), model.info.n_classes)
    if seen == "numbers":
        return seen
    if isinstance(model.head, nn.Sigmoid | nn.Softmax):
        return "probabilities"
    if isinstance(model.head, nn.Identity) and model.params.get("loss") in ("bce", "cross_entropy", "nll"):
        return "logits"
    return seen


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


@contextmanager
def _quiet_jit() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.jit.*")  # deprecated, and still what C++ loads
        yield
