"""What was exported is the model that was measured: compared here, and in a process that cannot import hpo."""

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hpo.errors import ExportError
from hpo.export.files import in_memory
from hpo.study.data import Split

TOLERANCE = 1e-5
"""The largest difference between an exported model's predictions and the eager one's, of the largest of these where
that is above 1: float32 has 7 digits, whatever the unit."""
NOTHING = "; nothing was exported"
BATCH_SIZES = (1, 2, 7, 64, 257, 1000)


def parity_of(
    eager: Callable[..., Tensor], other: Callable[..., Tensor], held_out: Split, name: str = "what was exported"
) -> dict[str, Any]:
    """Return the largest difference between the two modules' predictions on `held_out`, for several batch sizes.

    Raises ExportError for a network that takes no batch of some size: BatchNorm without statistics no row alone; and
    where the other, called `name`, takes none, or gives predictions of another shape.
    """
    largest, scale, rows = 0.0, 1.0, min(len(held_out), 2 * max(BATCH_SIZES))
    for batch_size in BATCH_SIZES:
        for start in range(0, min(rows, 4 * batch_size), batch_size):
            inputs = [x[start : start + batch_size].cpu() for x in held_out.inputs.values()]
            one = called("the model", eager, inputs, ValueError)
            two = called(name, other, inputs, Exception)  # ONNX Runtime and torch.export's guards have their own
            if one.shape != two.shape:
                shapes = f"{tuple(two.shape)}, the model that was measured {tuple(one.shape)}"
                raise ExportError(f"{name} gives for a batch of {len(inputs[0])} predictions of shape {shapes}")
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


def called(name: str, module: Callable[..., Tensor], inputs: Sequence[Tensor], errors: type[Exception]) -> Tensor:
    """Return the predictions of `inputs`; of one of these `errors` make an ExportError."""
    try:
        with torch.no_grad():
            return module(*inputs)
    except errors as error:
        why = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise ExportError(f"{name} gives no predictions for a batch of {len(inputs[0])} ({why})") from error


def require_parity(parity: Mapping[str, Mapping[str, Any]]) -> None:
    for file, result in parity.items():
        if not result["max_difference"] <= result["tolerance"]:
            raise ExportError(
                f"{file} is not the model that was measured: its predictions differ by up to "
                f"{result['max_difference']:.3g} (allowed: {result['tolerance']:.3g}){NOTHING}"
            )


_FRESH_SIZES = (1, 2, 257)
_FRESH = """
import json, sys, warnings
sys.modules["hpo"] = sys.modules["objectives"] = None  # importing them raises
warnings.simplefilter("ignore")
import torch
folder, given, *files = sys.argv[1:]
torch.set_num_threads(1)
cases = torch.load(given, weights_only=True)
def loaded(file):
    if file.endswith(".onnx"):
        import onnxruntime
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        names = [each.name for each in session.get_inputs()]
        return lambda *x: torch.from_numpy(session.run(None, dict(zip(names, (t.numpy() for t in x))))[0])
    if file.endswith(".torchscript.pt"):
        return torch.jit.load(file)
    return torch.export.load(file).module()
state = torch.load(folder + "/model.pt", weights_only=True)["model_state_dict"]
largest = {}
for name in files:
    if name == "model.pt":
        continue
    if name.endswith(".safetensors"):
        from safetensors.torch import load_file
        other = load_file(folder + "/" + name)
        same = state.keys() == other.keys() and all(torch.equal(tensor, other[key]) for key, tensor in state.items())
        largest[name] = 0.0 if same else float("inf")
        continue
    call, largest[name] = loaded(folder + "/" + name), 0.0
    for inputs, expected in cases:
        with torch.no_grad():
            got = call(*inputs)
        if got.shape != expected.shape or got.dtype != expected.dtype:
            largest[name] = float("inf")
            continue
        off = torch.where(got == expected, 0.0, (got - expected).abs()).max()
        largest[name] = max(largest[name], float(off)) if torch.isfinite(off) else float("inf")
print(json.dumps(largest))
"""


def fresh_parity(eager: Callable[..., Tensor], folder: Path, files: list[str], held_out: Split) -> dict[str, Any]:
    """Return, by file, the largest difference that a process finds that cannot import hpo or an objective.

    Batches of 1, 2 and 257 rows of `held_out`; a file that holds tensors alone is compared with model.pt.
    Raises ExportError where a file cannot be loaded there.
    """
    cases = []
    for size in _FRESH_SIZES:
        rows = torch.arange(size) % len(held_out)
        inputs = [x[rows].cpu() for x in held_out.inputs.values()]
        with torch.no_grad():
            cases.append((inputs, eager(*inputs)))
    given = folder / "cases.pt"  # there, since the disk that it is on is the one that must have room
    try:
        given.write_bytes(in_memory(torch.save, cases))
        command = [sys.executable, "-I", "-c", _FRESH, str(folder.absolute()), str(given.absolute()), *files]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    finally:
        given.unlink(missing_ok=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["it was killed"])[-1][:300]
        raise ExportError(f"what was exported cannot be loaded in a fresh process ({reason}){NOTHING}")
    found: dict[str, float] = json.loads(done.stdout)
    return {
        name: {"max_difference": value, "batch_sizes": list(_FRESH_SIZES), "rows": min(len(held_out), 257)}
        for name, value in found.items()
    }
