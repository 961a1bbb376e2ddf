"""Which process of which machine: names that tell workers apart, and whether one of this machine is still there."""

import os
import socket
from contextlib import suppress
from functools import cache
from pathlib import Path

import psutil


def this_process() -> str:
    """Return what names this process among all that may work on a study: `host-boot-namespace-id`."""
    return f"{_place()}-{os.getpid()}"


def is_gone(process: str) -> bool:
    """Whether a process named so was one of this machine and is no more; of another machine's that is not known."""
    place, _, pid = process.rpartition("-")
    return place == _place() and pid.isdigit() and not _alive(int(pid))


@cache
def _place() -> str:
    """Return what tells this machine (and container) from others that may have processes of the same number."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()[:8]
        return f"{socket.gethostname()}-{boot}-{os.readlink('/proc/self/ns/pid').strip('pid:[]')}"
    return socket.gethostname()


def _alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:  # another user's: it is there
        return True
