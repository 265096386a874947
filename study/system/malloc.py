"""Control how much freed memory the C library keeps."""

import ctypes

#: Two mallopt parameters, numbered as in glibc's malloc.h, and their values in bytes: the most free
#: memory kept at the top of the heap, and the allocation size from which mmap is used. Older
#: versions of glibc accept no larger value for the second.
TRIM_THRESHOLD, KEPT = -1, 2**28
MMAP_THRESHOLD, LARGE = -3, 2**25


def keep_freed() -> None:
    """Keep up to 256 MB of freed memory in this process for reuse.

    A training step frees dozens of megabytes that the next step allocates again. glibc would return
    them to the system, which zeroes each page before handing it out: wide heads took 1.5 times as
    long. Has no effect with other C libraries.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(TRIM_THRESHOLD, KEPT)
        mallopt(MMAP_THRESHOLD, LARGE)


def give_back_freed() -> None:
    """Return memory that Python and PyTorch have freed to the system.

    glibc keeps small freed blocks for reuse: 0.3 GB after a backbone is exported for ONNX Runtime.
    Has no effect with other C libraries.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
