"""Which candidates would share a stack, before a step is traced for them, and what keeps them apart."""

from collections import Counter, deque
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from hpo.stacks.candidate import Candidate

_ABSENT = "absent"
_LAST = 64
_KEPT_APART = ("another optimizer", "another batch_size", "params of the engine that others lack", "another structure")
"""What members of one stack have in common (`Candidate.signature`), in its order."""


class Signature(NamedTuple):
    """What members of a stack have in common. It need not have a hash: params may be lists."""

    network: Any
    """`Candidate.signature`."""
    reads: tuple[tuple[str, tuple[type, Any]], ...]
    """The params that the loss reads, with their types: False, 0 and 0.0 are equal, and a loss may do something else
    with each. Of those that it takes as tensors no value."""

    @property
    def has_numbers(self) -> bool:
        """Whether the loss takes no tensors in place of its numbers, in which all members are the same then."""
        return any(kind is float and value is not None for _, (kind, value) in self.reads)


def signature_of(candidate: Candidate, numbers: Collection[str]) -> Signature:
    """Return the signature of `candidate` in a stack whose loss takes the params `numbers` as tensors."""
    params = candidate.member.params
    read = {name: params.get(name, _ABSENT) for name in {*candidate.reads, *numbers}}
    kinds = {name: (type(x), None if name in numbers and type(x) is float else x) for name, x in read.items()}
    return Signature(candidate.signature, tuple(sorted(kinds.items(), key=lambda item: item[0])))


class Sharing:
    """Knows of which candidates the loss takes no tensors, and what the last candidates were."""

    def __init__(self) -> None:
        self._last: deque[Signature] = deque(maxlen=_LAST)
        self._as_numbers: deque[Signature] = deque(maxlen=_LAST)

    def note(self, candidate: Candidate) -> None:
        self._last.append(signature_of(candidate, ()))

    def note_numbers(self, candidate: Candidate) -> None:
        """Take note that the loss of candidates like this one takes no tensors in place of its numbers."""
        self._as_numbers.append(_with_tensors(candidate))

    def takes_numbers(self, candidate: Candidate) -> bool:
        """Whether that is known of candidates like this one."""
        return _with_tensors(candidate) in self._as_numbers

    def signature(self, candidate: Candidate) -> Signature:
        """Return what `candidate` has in common with those that may share a stack with it, by what is known now."""
        return signature_of(candidate, ()) if self.takes_numbers(candidate) else _with_tensors(candidate)

    def share(self, signature: Signature) -> float:
        """Return of trials with the same network what share has this signature too, which numbers may be a part of."""
        if not signature.has_numbers:
            return 1.0
        like = [each for each in self._last if each.network == signature.network]
        return 1.0 if len(like) < 2 else max(0.0, (like.count(signature) - 1) / (len(like) - 1))

    def why_apart(self, candidate: Candidate) -> str:
        """Return what keeps the last candidates from sharing a stack with this one; empty: nothing does."""
        own, takes_numbers = signature_of(candidate, ()), self.takes_numbers(candidate)
        like = [dict(each.reads) for each in self._last if each.network == own.network]
        differs: Counter[str] = Counter()
        for name, (kind, value) in own.reads:
            if kind is not float or takes_numbers:
                differs[name] = sum(other.get(name) != (kind, value) for other in like)
        if differs.total():
            (name, _), *_ = differs.most_common(1)
            return _of_param(name, type(candidate.member.params.get(name)))
        others = [each.network for each in self._last if each.network != own.network]
        for text, one, other in zip(_KEPT_APART, own.network, others[-1], strict=False) if others else ():
            if one != other:
                return f"of the others some have {text}, and share no stack with them"
        return ""


def why_not_all(signature: Signature, group: Sequence[Candidate]) -> str | None:
    """Return why not all of a `group` with one network share the stack with this `signature`, that of the first."""
    sharing = Sharing()
    for each in group:
        sharing.note(each)
    if signature.has_numbers:
        sharing.note_numbers(group[0])
    return sharing.why_apart(group[0]) or None


def _with_tensors(candidate: Candidate) -> Signature:
    params = candidate.member.params
    return signature_of(candidate, [name for name in candidate.reads if type(params.get(name)) is float])


def _of_param(name: str, kind: type) -> str:
    if kind is float:
        alike = f"the loss reads the param {name!r} as a number, so only trials with the same value share a stack"
        return f"{alike}; a loss that takes it as a tensor too, as hpo's own do, sets no such limit"
    return f"the loss reads the param {name!r}, so only trials with the same value share a stack"
