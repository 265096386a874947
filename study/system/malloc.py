"""What the C library keeps of freed memory."""

import ctypes

#: glibc's numbers for two of its settings, from malloc.h, and what they are set to, in bytes: the
#: most that is kept free at the end of the heap, and how large a piece must be to be asked of the
#: system on its own. Older versions take no more than this for the second.
TRIM_THRESHOLD, KEPT = -1, 2**28
MMAP_THRESHOLD, LARGE = -3, 2**25


def keep_freed() -> None:
    """Keep what this process frees for what it needs next, up to 256 MB.

    A training step frees dozens of megabytes and needs as many in the next. glibc would give them
    back to the system, which clears each page again before it hands it out: wide heads took 1.5
    times as long. Other C libraries go on as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(TRIM_THRESHOLD, KEPT)
        mallopt(MMAP_THRESHOLD, LARGE)


def give_back_freed() -> None:
    """Give memory that Python and PyTorch have freed back to the system.

    glibc keeps what has been freed in small pieces for later: 0.3 GB after a backbone has been
    written down for ONNX Runtime. Other C libraries do without this.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
