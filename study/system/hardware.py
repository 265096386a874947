"""Capabilities of this machine.

PyTorch takes seconds to import, so functions import it only when they need it.
"""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

#: Device files of GPU drivers: NVIDIA, Windows (under WSL), AMD. On Linux, PyTorch can use a GPU
#: only if one of them exists.
DRIVERS = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")


def has_native_bf16(device: "torch.device") -> bool:
    """Return whether the device multiplies bfloat16 matrices in hardware, so bf16 is faster."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    features = torch.cpu.get_capabilities()
    return any(features.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def cpu_count() -> int:
    """Return the number of cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def gpu_count() -> int:
    """Return the number of CUDA GPUs visible to this process."""
    if sys.platform == "linux" and not any(Path(driver).exists() for driver in DRIVERS):
        return 0
    import torch

    return torch.cuda.device_count()
