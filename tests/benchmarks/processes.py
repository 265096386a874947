"""Helpers for processes that benchmarks start: memory use, and a cache without features."""

import subprocess
from contextlib import suppress
from pathlib import Path

import psutil

from study.system.cache import cache_dir

#: Default interval between samples of a process's memory, in seconds.
LOOK_EVERY = 0.5


def cache_without_features(folder: Path) -> Path:
    """Create a cache directory with the user's images and weights, but no features.

    Args:
        folder: Where to create it.

    Returns:
        The value for XDG_CACHE_HOME.
    """
    cache = folder / "cache" / "dropout-study"
    cache.mkdir(parents=True)
    for entry in cache_dir().iterdir():
        if entry.name != "features" and entry.suffix != ".lock":
            (cache / entry.name).symlink_to(entry)
    return cache.parent


def watch_memory(process: "subprocess.Popen[bytes]", look_every: float = LOOK_EVERY) -> int:
    """Wait for a process to end; return the peak memory of it and its descendants, in bytes.

    Args:
        process: A running process.
        look_every: Interval between samples, in seconds.
    """
    most = 0
    while process.poll() is None:
        with suppress(psutil.Error):
            root = psutil.Process(process.pid)
            most = max(most, sum(map(_memory_of, [root, *root.children(recursive=True)])))
        with suppress(subprocess.TimeoutExpired):
            process.wait(look_every)
    return most


def _memory_of(process: psutil.Process) -> int:
    """Return the bytes of a process, with its share of shared memory if known (PSS)."""
    try:
        info = process.memory_full_info()
    except psutil.Error:  # it has just ended
        return 0
    return int(getattr(info, "pss", info.uss))
