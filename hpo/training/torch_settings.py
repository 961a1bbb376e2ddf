"""torch's process-wide settings: set and restored in one place, so that no study changes the process that it runs in.

with torch_settings(device, precision="tf32", deterministic=True, threads=1):
    ...
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor

from hpo.training.stack import Precision

_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"


@contextmanager
def torch_settings(
    device: torch.device,
    *,
    precision: Precision | None = None,
    deterministic: bool | None = None,
    threads: int | None = None,
) -> Iterator[None]:
    """Run a block under these settings; None leaves one as it is.

    At the block's end, also by an error, everything is as it was before: the number of threads, whatever the block set
    it to, what is set here, and the states of the random generators that code on `device` draws from.
    """
    states, n_threads = random_states(device), torch.get_num_threads()
    with ExitStack() as restoring:
        restoring.callback(set_random_states, states, device)
        restoring.callback(torch.set_num_threads, n_threads)
        if threads is not None:
            torch.set_num_threads(threads)
        if device.type == "cuda":
            restoring.callback(torch.cuda.set_device, torch.cuda.current_device())
            torch.cuda.set_device(device)  # streams, graphs and synchronizing take the current one
            if precision is not None:
                _set_tf32(precision == "tf32", restoring)
        if deterministic is not None:
            _set_deterministic(deterministic, restoring)
        yield


def _set_tf32(allowed: bool, restoring: ExitStack) -> None:
    """Have matrix products and convolutions both use TF32, or neither: torch's own default is convolutions only.

    It is said in both of torch's ways: where these differ, which code that knows only the newer one brings about, the
    older one raises when it is read, and torch's compiler reads it.
    """
    b: Any = torch.backends  # torch does not annotate all of it
    ours = [b.cuda.matmul, b.cudnn.conv, b.cudnn.rnn]
    for each in (*ours, b.mkldnn.matmul):  # the older way sets the last one too
        restoring.callback(setattr, each, "fp32_precision", each.fp32_precision)
    with suppress(RuntimeError):
        restoring.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
    with suppress(RuntimeError):
        restoring.callback(setattr, b.cudnn, "allow_tf32", b.cudnn.allow_tf32)
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    b.cudnn.allow_tf32 = allowed
    for each in ours:
        each.fp32_precision = "tf32" if allowed else "ieee"


def _set_deterministic(wanted: bool, restoring: ExitStack) -> None:
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    if before != (wanted, False):  # it imports torch's compiler, which takes a second
        restoring.callback(lambda: torch.use_deterministic_algorithms(before[0], warn_only=before[1]))
        torch.use_deterministic_algorithms(wanted)
    if wanted and _CUBLAS not in os.environ:
        os.environ[_CUBLAS] = ":4096:8"  # what CUDA's matrix products need for it
        restoring.callback(os.environ.pop, _CUBLAS, None)


def random_states(device: torch.device) -> dict[str, Tensor]:
    """Return the states of torch's generators that code on `device` draws from."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        states["mps"] = torch.mps.get_rng_state()
    return states


def has_drawn(since: Mapping[str, Tensor], device: torch.device) -> bool:
    """Whether code on `device` has drawn from torch's generators since `random_states` returned these."""
    return any(not torch.equal(state, since[name]) for name, state in random_states(device).items())


def set_random_states(states: Mapping[str, Tensor], device: torch.device) -> None:
    """Set the generators that code on `device` draws from to the states that `random_states` returned."""
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)
    elif "mps" in states and device.type == "mps":
        torch.mps.set_rng_state(states["mps"])
