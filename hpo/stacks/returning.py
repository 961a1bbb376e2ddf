"""What was found of members that are paused, for when they return: they are not built and tried a second time.

A network takes 10 to 20 ms for that, and half of a study's trials may be resumed at once.
"""

from collections.abc import Hashable
from dataclasses import replace

from hpo.stacks.candidate import Candidate
from hpo.training.memory import Bounded, n_bytes
from hpo.training.stack import Member

_MOST_BYTES = 64 << 20
_COPIES = 4
"""How many copies of its weights a candidate holds, about: padded, as a probe, its gradients and buffers."""


class Returning:
    """The candidates of members that may return, the oldest forgotten where there are too many bytes of them."""

    def __init__(self, most: int = _MOST_BYTES) -> None:
        """`most`: how many bytes they may have together, on the device and beside it."""
        self._known = Bounded[Hashable, Candidate](most)

    def keep(self, candidate: Candidate) -> None:
        """Keep that of a member that will be paused, without what it resumes from and has reported."""
        member = replace(candidate.member, resume=None, history=[], rounds=[])
        self._known.keep(_key(member), replace(candidate, member=member), _COPIES * n_bytes(candidate.probe.module))

    def take(self, member: Member) -> Candidate | None:
        """Return what was kept of a member with this number, seed and params, and forget it."""
        found = self._known.take(_key(member))
        if found is None:
            return None
        member.n_parameters = found.member.n_parameters
        return replace(found, member=member)


def _key(member: Member) -> Hashable:
    return member.number, member.seed, repr(sorted(member.params.items()))
