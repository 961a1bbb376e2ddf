"""What was found of members that are paused, for when they return: they are not built and tried a second time.

A network takes 10 to 20 ms for that, and half of a study's trials may be resumed at once.
"""

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import replace

from hpo.stacks.candidate import Candidate
from hpo.training.memory import n_bytes
from hpo.training.stack import Member

_MOST_BYTES = 64 << 20
_COPIES = 4
"""How many copies of its weights a candidate holds, about: padded, as a probe, its gradients and buffers."""


class Returning:
    """The candidates of members that may return, the oldest forgotten where there are too many bytes of them."""

    def __init__(self, most: int = _MOST_BYTES) -> None:
        """`most`: how many bytes they may have together, on the device and beside it."""
        self._most, self._bytes = most, 0
        self._known: OrderedDict[Hashable, tuple[Candidate, int]] = OrderedDict()

    def keep(self, candidate: Candidate) -> None:
        """Keep that of a member that will be paused, without what it resumes from and has reported."""
        self.take(candidate.member)
        size = _COPIES * n_bytes(candidate.probe.module)
        member = replace(candidate.member, resume=None, history=[], rounds=[])
        self._known[_key(member)] = replace(candidate, member=member), size
        self._bytes += size
        while self._bytes > self._most:
            _, (_, size) = self._known.popitem(last=False)
            self._bytes -= size

    def take(self, member: Member) -> Candidate | None:
        """Return what was kept of a member with this number, seed and params, and forget it."""
        found, size = self._known.pop(_key(member), (None, 0))
        self._bytes -= size
        if found is None:
            return None
        member.n_parameters = found.member.n_parameters
        return replace(found, member=member)


def _key(member: Member) -> Hashable:
    return member.number, member.seed, repr(sorted(member.params.items()))
