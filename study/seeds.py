"""Named random streams: each use of randomness in a run draws from a stream of its own.

Switching dropout on then changes nothing but the dropout masks: the initial weights and the order
of the data stay the same, which is what makes two runs a matched pair.
"""

import hashlib

import torch


def derive_seed(seed: int, *names: str | int) -> int:
    """A seed that depends on all its arguments and on nothing else.

    Args:
        seed: The seed to derive from, 0 or more.
        names: What the new seed is for, for example `"trial", "dropout", 7`.

    Returns:
        An integer in 0 to 2^31 - 1, the same on every machine.
    """
    text = "/".join(map(str, (seed, *names)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1


def generator(seed: int, *names: str | int) -> torch.Generator:
    """A CPU generator for the stream that the names stand for."""
    return torch.Generator().manual_seed(derive_seed(seed, *names))
