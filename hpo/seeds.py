"""Seeds by purpose: every random stream of a study follows from the study's one seed.

Two purposes, or two trials, never share a stream, and a stream never depends on how often a study was restarted.
"""

from hashlib import blake2b


def derive(seed: int, purpose: str, index: int = 0) -> int:
    """Return a seed in [0, 2**31) for one `purpose` ("init", "order", "sampler") and one `index` (a trial, a round)."""
    digest = blake2b(f"{seed}/{purpose}/{index}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1
