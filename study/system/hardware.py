"""What the machine can do.

PyTorch is imported where it is asked for, since it takes seconds.
"""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

#: Of these Linux has at least one where PyTorch can have a GPU: NVIDIA's driver, that of Windows
#: around it, and AMD's.
DRIVERS = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")


def has_native_bf16(device: "torch.device") -> bool:
    """Whether the device multiplies bfloat16 matrices in hardware, so that bf16 is the faster."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    features = torch.cpu.get_capabilities()
    return any(features.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def cpu_count() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def gpu_count() -> int:
    """CUDA GPUs that this process sees."""
    if sys.platform == "linux" and not any(Path(driver).exists() for driver in DRIVERS):
        return 0
    import torch

    return torch.cuda.device_count()
