"""What a process does about Python's garbage."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Within this none is looked for: again and again among the many objects of an import, or of a study's trials.

    All of them stay, and it is a fifth to a quarter of the time that they take.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()
