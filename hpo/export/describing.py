"""What bundle.json says of a model: what goes in and comes out, how fast it is, what it was made with."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import torch
from torch import Tensor, nn

from hpo.export.answers import Values, values_of
from hpo.export.apart import apart, note
from hpo.export.environment import git_commit, versions
from hpo.export.files import FORMAT
from hpo.export.model import Model
from hpo.study.data import Split

PROTOCOL = {
    "of_the_trial": "the validation rows, in the search; the best of many trials, so rather too good",
    "test_mean_of_seeds": "the test rows, the mean over networks that were trained alike from other seeds",
    "test_std_of_seeds": "the test rows, the standard deviation over these networks",
    "test": "the test rows, which no trial saw, after training on train + validation from scratch",
}
"""What each group of `metrics` was measured on."""
_MOST_NUMBERS = 1000
_TOGETHER = 64


def describe(model: Model, eager: nn.Module, held_out: Split) -> dict[str, Any]:
    """Return what bundle.json says of a model beside its files and their parity."""
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
            "values": _values(model, output, held_out.targets),
        },
        "feature_names": info["feature_names"],
        "class_names": info["class_names"],
        "missing": info["missing"],
        "notes": _notes(eager, held_out),
        "n_parameters": sum(p.numel() for p in model.network.parameters()),
        "versions": versions(),
        "git_commit": git_commit(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "protocol": PROTOCOL,
        "latency_ms": latency(eager, held_out),
    }
    from hpo.export.columns import columns_of  # pandas, before it is needed: half a second of every start

    columns = columns_of(about)
    return about | {"columns": columns, "example": example(held_out, columns)}


def _notes(eager: nn.Module, held_out: Split) -> list[str]:
    """Return what who uses the model should know of its predictions."""
    try:
        found = apart(eager, [x[:_TOGETHER].cpu() for x in held_out.inputs.values()])
    except ValueError:  # of a row alone it gives another shape, which is said before the first trial
        return []
    return [note(found)] if found else []


def _values(model: Model, output: Tensor, targets: Tensor) -> Values:
    """Return what the outputs are: what head and loss say counts for more than what a few rows look like."""
    seen = values_of(output.float().numpy(), model.info.n_classes)
    if seen == "numbers":
        return seen
    is_logits = isinstance(model.head, nn.Identity) and model.link != ""
    if _are_labels(targets, output) and not isinstance(model.head, nn.Softmax):
        of_each = isinstance(model.head, nn.Sigmoid) or bool(((output >= 0) & (output <= 1)).all())
        return "labels" if of_each and not is_logits else "numbers"
    if isinstance(model.head, nn.Sigmoid | nn.Softmax):
        return "probabilities"
    if is_logits:
        return "logits"
    if seen == "scores" and output[0].numel() == 1 and not isinstance(model.head, nn.Identity):
        return "numbers"  # from which number on it is the second class, is not known
    return seen


def _are_labels(targets: Tensor, output: Tensor) -> bool:
    """Whether a row may have several of the classes, or none: not only one each, as one-hot targets have."""
    if targets.ndim < 2 or not targets[0].numel() == output[0].numel() > 1:
        return False
    each = targets.reshape(len(targets), -1).float().sum(1)
    return not torch.allclose(each, torch.ones_like(each), atol=1e-3)


def example(held_out: Split, columns: Sequence[Mapping[str, Any]] | None) -> dict[str, Any] | None:
    """Return the first held-out row: by column as a table has it, or by input; None: it has very many numbers."""
    first = {name: x[0].cpu() for name, x in held_out.inputs.items()}
    if sum(x.numel() for x in first.values()) > _MOST_NUMBERS:
        return None
    if not columns or not columns[0]["name"]:
        return {name: x.tolist() for name, x in first.items()}
    left = {name: [float(f"{v:.7g}") if x.is_floating_point() else v for v in x.tolist()] for name, x in first.items()}
    row: dict[str, Any] = {}
    for column in columns:
        if column["kind"] == "date":
            from hpo.study.table_dates import written

            row[column["name"]] = written([left[column["input"]].pop(0) for _ in column["parts"]], column)
            continue
        value = left[column["input"]].pop(0)
        if column["kind"] == "category":
            value = column["categories"][value - 1] if 0 < value <= len(column["categories"]) else None
        row[column["name"]] = value
    return row


def latency(
    eager: nn.Module, rows: Split, sizes: Sequence[int] = (1, 256), device: torch.device = torch.device("cpu")
) -> dict[str, float]:
    """Return the milliseconds that the eager module takes on `device` for so many rows: the median of a few calls."""
    found = {}
    for size in sizes:
        inputs = [x[torch.arange(size) % len(rows)].to(device) for x in rows.inputs.values()]
        times: list[float] = []
        with torch.inference_mode():
            _call(eager, inputs, device)
            while len(times) < 9 and sum(times) < 0.1:
                start = time.perf_counter()
                _call(eager, inputs, device)
                times.append(time.perf_counter() - start)
        found[str(size)] = round(1000 * sorted(times)[len(times) // 2], 4)
    return found


def _call(eager: nn.Module, inputs: Sequence[Tensor], device: torch.device) -> None:
    """Call the module and wait until the device has done it: a GPU returns at once."""
    eager(*inputs)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
