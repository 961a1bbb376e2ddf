"""The files that a model is exported as, each written and read by the library that it belongs to."""

import errno
import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hpo.errors import ExportError, InputError, did_you_mean
from hpo.export.files import in_memory
from hpo.export.model import Model, Named
from hpo.export.parity import TOLERANCE, called
from hpo.light import lightly
from hpo.log import silenced
from hpo.study.data import Split

_jit: Any = torch.jit  # whose functions have no types
Formats = Mapping[str, bool]
"""Formats by name, and whether it is an error where the model cannot be exported as that, or it is left out."""
FILE_OF = {
    "state_dict": "model.pt",
    "torchscript": "model.torchscript.pt",
    "pt2": "model.pt2",
    "onnx": "model.onnx",
    "safetensors": "model.safetensors",
}
"""The file of each format. The first two are in every bundle."""
ALWAYS: Formats = {"state_dict": True, "torchscript": True}
_COMPARED = 64
"""How many rows are compared before one form of TorchScript is preferred to another; parity is of more."""
_NOT_WRITTEN = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
_NEEDS = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "safetensors": ("safetensors",)}


def formats_of(text: str | None) -> Formats:
    """Return the formats that `--formats` names, those of every bundle first. Raises InputError.

    Where it was not given, pt2 is among them if the model can be exported as that.
    """
    if text is None:
        return {**ALWAYS, "pt2": False}
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in FILE_OF:
            known = did_you_mean(name, FILE_OF)
            raise InputError(f"--formats: must be of {', '.join(FILE_OF)}, but got {name!r}{known}")
        if lacking := [package for package in _NEEDS.get(name, ()) if find_spec(package) is None]:
            raise InputError(f"--formats {name}: needs {', '.join(lacking)}; pip install 'hpo[{name}]'")
    return {**ALWAYS, **dict.fromkeys(names, True)}


@dataclass(frozen=True, kw_only=True)
class Written:
    """A file that was written: how, and what it gives for raw inputs; None: it holds tensors, no model."""

    how: Mapping[str, Any]
    call: Callable[..., Tensor] | None = None


def write(kind: str, model: Model, eager: nn.Module, held_out: Split, folder: Path) -> Written:
    """Write `eager` as one format into `folder`, and read it back. Raises ExportError where it cannot be that."""
    path = folder / FILE_OF[kind]
    if kind == "state_dict":
        return _write_state(model, eager, path)
    if kind == "torchscript":
        with _quiet("torch.jit"):
            how = _write_torchscript(eager, held_out, path)
            return Written(how=how, call=_jit.load(path))
    if kind == "safetensors":
        from safetensors.torch import save

        path.write_bytes(save({name: tensor.clone().contiguous() for name, tensor in eager.state_dict().items()}))
        return Written(how={})
    example = tuple(x[:3].cpu() for x in held_out.inputs.values())
    if len(example[0]) < 2:  # a batch of one would be taken for a fixed size
        example = tuple(torch.cat([x, x]) for x in example)
    names = list(held_out.inputs)
    try:
        with _quiet(""):
            if kind == "pt2":
                return _write_pt2(eager, example, path)
            return _write_onnx(eager, example, names, path)
    except Exception as error:  # torch.export and the converter raise dozens of kinds
        if isinstance(error, OSError) and error.errno in _NOT_WRITTEN:
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise ExportError(f"the model cannot be exported as {kind}: {reason}") from error


def _write_state(model: Model, eager: nn.Module, path: Path) -> Written:
    hyperparameters = dict(model.params) | {
        "input_shapes": {name: list(shape) for name, shape in model.info.inputs.items()},
        "n_classes": model.info.n_classes,
    }
    state = {"model_state_dict": eager.state_dict(), "model_hyperparameters": hyperparameters}
    path.write_bytes(in_memory(torch.save, state | json.loads(json.dumps(dict(model.about)))))
    restored = _reset(model.predictor())
    restored.load_state_dict(torch.load(path, weights_only=True)["model_state_dict"])
    return Written(how={}, call=restored)


def _exported(eager: nn.Module, example: tuple[Tensor, ...]) -> torch.export.ExportedProgram:
    """Return what torch.export makes of `eager`, for any size of the first dimension of every input."""
    # of a network that branches on its numbers torch prints the graph so far; we say it in one line
    with lightly("torch"), silenced("torch.fx.experimental.symbolic_shapes"), redirect_stderr(StringIO()):
        program = torch.export.export(eager, example, dynamic_shapes=tuple({0: torch.export.Dim.AUTO} for _ in example))
    _require_any_size(program)
    return program


def _require_any_size(program: torch.export.ExportedProgram) -> None:
    """Raise RuntimeError for a program that takes the example's number of rows only: its first call would say less."""
    from torch.fx.experimental.symbolic_shapes import is_concrete_int  # torch.export has imported it

    names = program.graph_signature.user_inputs
    given = [node.meta["val"] for node in program.graph.nodes if node.op == "placeholder" and node.name in names]
    if fixed := [int(x.shape[0]) for x in given if is_concrete_int(x.shape[0])]:
        raise RuntimeError(
            f"torch.export makes of it a model of batches of {fixed[0]} rows only, since its forward turns the number "
            "of rows into a plain one: x.shape[0] can stay any, len(x) and int(x.shape[0]) cannot"
        )


def _write_pt2(eager: nn.Module, example: tuple[Tensor, ...], path: Path) -> Written:
    program = _exported(eager, example)
    path.write_bytes(in_memory(torch.export.save, program))
    return Written(how={"inputs": list(program.graph_signature.user_inputs)}, call=torch.export.load(path).module())


def _write_onnx(eager: nn.Module, example: tuple[Tensor, ...], names: list[str], path: Path) -> Written:
    import onnxruntime

    from hpo.export.onnx_file import write_onnx

    program = _exported(eager, example)
    write_onnx(program, example, names, path)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what goes wrong is raised; it would be printed, too
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def call(*inputs: Tensor) -> Tensor:
        given = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
        return torch.from_numpy(session.run(None, given)[0])

    return Written(how={"inputs": names, "outputs": ["prediction"]}, call=call)


def _write_torchscript(eager: nn.Module, held_out: Split, path: Path) -> dict[str, Any]:
    """Write `eager` as TorchScript; return how that was done: scripted or traced, optimised or (why) not."""
    example = tuple(x[:2].cpu() for x in held_out.inputs.values())
    how: dict[str, Any] = {"compiled": "script"}
    try:
        if isinstance(eager, Named):
            raise RuntimeError("several inputs")
        script = torch.jit.script(eager)
        script(*example)  # of what is compiled some only raises: a parametrized weight does
    except Exception as error:  # the compiler raises a dozen kinds of error for Python it does not take
        said = str(error).strip().splitlines() or [type(error).__name__]
        how = {"compiled": "trace", "not_scripted": said[-isinstance(error, torch.jit.Error)][:200]}
        script = _jit.trace(eager, example)
    return how | _write_fastest(script, eager, held_out, path)


def _write_fastest(script: Any, eager: nn.Module, held_out: Split, path: Path) -> dict[str, Any]:
    """Write `script` optimised as far as it then still is `eager`; return how far that was, and why no further.

    With convolutions optimize_for_inference makes a file that torch.jit.load refuses ("attribute 'value' is
    undefined"); the freezing that folds BatchNorm into the layer before it does so where that has another reader too.
    """
    inputs = [x[:_COMPARED].cpu() for x in held_out.inputs.values()]
    expected = called("the model", eager, inputs, ValueError)
    why = ""
    for numerics, optimized in ((True, True), (True, False), (False, True)):
        try:
            frozen = torch.jit.freeze(script, optimize_numerics=numerics)
            _save_script(torch.jit.optimize_for_inference(frozen) if optimized else frozen, path)
            with torch.no_grad():
                off = float((_jit.load(path)(*inputs) - expected).abs().max())
            if off <= TOLERANCE * max(1.0, float(expected.abs().max())):
                break
            reason = f"its predictions differ by {off:.3g}"
        except (RuntimeError, torch.jit.Error) as error:
            reason = str(error).strip().splitlines()[-1][:200]
        why = why or reason
    else:
        _save_script(torch.jit.freeze(script, optimize_numerics=False), path)
        optimized = False
    return {"optimized_for_inference": optimized} | ({"not_optimized": why} if why else {})


def _save_script(script: Any, path: Path) -> None:
    path.write_bytes(in_memory(_jit.save, script))


def _reset(module: nn.Module) -> nn.Module:
    """Return `module` with every number in it set to zero, so that it is what is loaded into it, or nothing."""
    for tensor in module.state_dict().values():
        tensor.zero_()
    return module


@contextmanager
def _quiet(about: str) -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=f".*{about}.*")  # of TorchScript: deprecated, and what C++ loads
        yield
