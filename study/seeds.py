"""Named random streams: each use of randomness in a run draws from its own stream.

Turning dropout on therefore changes only the dropout masks: the initial weights and the data order
stay the same, which makes two runs a matched pair.
"""

import hashlib

import torch


def derive_seed(seed: int, *names: str | int) -> int:
    """Return a seed determined by the arguments alone.

    Args:
        seed: The seed to derive from, 0 or more.
        names: The purpose of the new seed, for example `"trial", "dropout", 7`.

    Returns:
        An integer in 0 to 2^31 - 1, the same on every machine.
    """
    text = "/".join(map(str, (seed, *names)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1


def generator(seed: int, *names: str | int) -> torch.Generator:
    """Return a CPU generator for the named stream."""
    return torch.Generator().manual_seed(derive_seed(seed, *names))
