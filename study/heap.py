"""What the C library keeps of freed memory."""

import ctypes


def give_back_freed() -> None:
    """Give memory that Python and PyTorch have freed back to the system.

    glibc keeps what has been freed in small pieces for later: 0.3 GB after a backbone has been
    written down for ONNX Runtime. Other C libraries do without this.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
