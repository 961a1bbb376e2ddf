"""The items of `gpu.py --part check`, in the order in which they are worth their time."""

from gpu_device import CHILDREN, FEED, FIRST, STUDIES
from gpu_items import Item
from gpu_steps import COMINGS, DROPOUT, EPOCHS, EQUAL, EQUAL_COMPILED, PATHS, PATHS_COMPILED, WAITING

from hpo.stacks import recording

_MOST = 4
"""How many of the compiled paths come early: those whose step is compiled in most studies."""
ITEMS: list[Item] = [
    *FIRST,
    *WAITING[:1],
    *PATHS,
    *EQUAL,
    *EPOCHS,
    *COMINGS,
    *DROPOUT[:1],
    *FEED,
    *PATHS_COMPILED[:_MOST],
    *CHILDREN,
    *STUDIES,
    *WAITING[1:],
    *EQUAL_COMPILED,
    *DROPOUT[1:],
    *PATHS_COMPILED[_MOST:],
]


def spoilt() -> bool:
    """Whether this process cannot record steps any more, since a capture has failed in it."""
    return bool(recording._given_up)
