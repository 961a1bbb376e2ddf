"""Which columns of a text file have marks between thousands, and which have them elsewhere: seen in its bytes.

pandas takes such marks away wherever they stand: it makes 15 of 1.5 and 31122020 of 31.12.2020. What it has read is
right in the columns in which each mark stands between thousands.
"""

from collections.abc import Iterator
from typing import IO

import numpy as np

_BLOCK, _LONGEST = 1 << 18, 1 << 24
"""So many bytes are looked at together, in the processor's cache; a line may be as long as that."""
_PAD = b"\n" * 5
"""What is looked at in front of a mark, and behind it, is never outside of the block."""
_SIGNS = b'\r\n" +-'


def groups(stream: IO[bytes], separator: str, thousands: str) -> tuple[set[int], set[int]] | None:
    """Return the places of the columns in which the mark stands between thousands, and of those where it also does not.

    None: that cannot be seen.
    """
    good: set[int] = set()
    bad: set[int] = set()
    header = True
    for block in _lines(stream):
        if block is None:
            return None
        for_all, some = _of_block(block, separator, thousands, skip=header)
        good, bad, header = good | for_all, bad | some, False
    return good, bad


def _lines(stream: IO[bytes]) -> Iterator[bytes | None]:
    """Yield a file in blocks of whole lines; None where it has very long ones, or other ends of lines."""
    left = b""
    while block := stream.read(max(_BLOCK, len(left))):
        left += block
        data = np.frombuffer(left, dtype=np.uint8)
        ends = np.flatnonzero((data == ord("\n")) & ~_quoted(data, left))
        if len(ends):
            lines, left = left[: ends[-1] + 1], left[ends[-1] + 1 :]
            yield lines if _are_lines(lines) else None
        elif len(left) > _LONGEST:
            yield None
    if left:
        yield left + b"\n" if _are_lines(left) else None


def _are_lines(text: bytes) -> bool:
    return text.count(b"\r") == text.count(b"\r\n")


def _quoted(data: np.ndarray, block: bytes) -> np.ndarray:
    """Return which bytes stand in quotes; where there are none, one value for all."""
    if b'"' not in block:
        return np.zeros(1, dtype=bool)
    quoted: np.ndarray = np.cumsum(data == ord('"'), dtype=np.uint8) % 2 == 1
    return quoted


def _of_block(block: bytes, separator: str, thousands: str, *, skip: bool) -> tuple[set[int], set[int]]:
    if skip:  # the columns' names
        data = np.frombuffer(block, dtype=np.uint8)
        ends = np.flatnonzero((data == ord("\n")) & ~_quoted(data, block))
        block = block[ends[np.searchsorted(ends, len(block) - len(block.lstrip()))] + 1 :]
    data = np.frombuffer(_PAD + block + _PAD, dtype=np.uint8)
    at = np.flatnonzero(data == ord(thousands))
    if not len(at):
        return set(), set()
    newline = data == ord("\n")
    is_end = (newline | (data == ord(separator))) & ~_quoted(data, block)
    ends = np.flatnonzero(is_end)
    first = np.flatnonzero(newline[ends]) + 1  # of each line, among the ends
    sizes = np.diff(np.concatenate([[0], first]))
    columns = np.arange(first[-1]) - np.repeat(first - sizes, sizes)
    column = np.take(columns, np.cumsum(is_end, dtype=np.int32)[at], mode="clip")  # quotes may not be closed
    digit = (data - ord("0")) < 10  # wraps around below "0"
    before = np.where(digit[at - 2], np.where(digit[at - 3], 3, 2), 1)  # so many digits stand in front of it
    start = at - before
    ahead = data[start - 1]
    good = digit[at - 1] & digit[at + 1] & digit[at + 2] & digit[at + 3] & ~digit[at + 4]
    begins = np.isin(ahead, np.frombuffer(_SIGNS + separator.encode(), dtype=np.uint8)) & (data[start] != ord("0"))
    good &= begins | ((ahead == ord(thousands)) & (before == 3))
    return set(np.unique(column).tolist()), set(np.unique(column[~good]).tolist())
