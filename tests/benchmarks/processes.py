"""What benchmarks need of the processes that they start: their memory, and a cache to find."""

import subprocess
from contextlib import suppress
from pathlib import Path

import psutil

from study.system.cache import cache_dir

#: Seconds between two looks at a process's memory, where nothing else is said.
LOOK_EVERY = 0.5


def cache_without_features(folder: Path) -> Path:
    """A cache directory that shares images and weights with the user's, and has nothing else.

    Args:
        folder: Where it is made.

    Returns:
        What XDG_CACHE_HOME is to be.
    """
    cache = folder / "cache" / "dropout-study"
    cache.mkdir(parents=True)
    for entry in cache_dir().iterdir():
        if entry.name != "features" and entry.suffix != ".lock":
            (cache / entry.name).symlink_to(entry)
    return cache.parent


def watch_memory(process: "subprocess.Popen[bytes]", look_every: float = LOOK_EVERY) -> int:
    """Wait for a process to end; the most bytes that it and its descendants held at once.

    Args:
        process: One that is running.
        look_every: In seconds.
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
    """Bytes of a process; of memory that it shares its part, where the system tells."""
    try:
        info = process.memory_full_info()
    except psutil.Error:  # it has just ended
        return 0
    return int(getattr(info, "pss", info.uss))
