"""How much memory is left on a device: a machine that runs out does not raise, it ends the process."""

from contextlib import suppress
from pathlib import Path

import psutil
import torch
from torch import nn

_CGROUPS = (  # a container's limit and use, as cgroups v2 and v1 have them
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)
_TO_LOOK_AT = 0.05
"""How much of the free memory networks may take that are built to be compared."""


def free_bytes(device: torch.device) -> int:
    """Return how many bytes may still be taken on `device`: of the GPU, or of the machine and its container."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = psutil.virtual_memory().available
    for limit, used in _CGROUPS:
        with suppress(OSError, ValueError):  # there is none, or it says "max"
            free = min(free, int(Path(limit).read_text()) - int(Path(used).read_text()))
    return max(0, free)


def networks_at_once(network: nn.Module) -> int:
    """Return how many networks as large as this one may be held only to be looked at, on the CPU: at least two."""
    size = sum(tensor.numel() * tensor.element_size() for tensor in network.parameters())
    return max(2, int(_TO_LOOK_AT * free_bytes(torch.device("cpu")) / max(1, size)))
