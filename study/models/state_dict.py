"""Named tensors: the weights of a model or of a part of it, in memory and in files."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from study.errors import storage_error

StateDict = dict[str, Tensor]


def strip_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names start with a prefix, without it; "head." gives the head's."""
    return {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }


def copy_to_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors to the CPU, contiguous as in files; later training steps leave them alone."""
    layout = torch.contiguous_format
    return {k: value.detach().cpu().clone(memory_format=layout) for k, value in tensors.items()}


def save_safetensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file under a temporary name, then rename it.

    Raises:
        StorageError: The file cannot be written.
    """
    partial = path.with_name(f".{path.name}.part")
    try:
        # Without parents: a run directory that has vanished must not be recreated.
        path.parent.mkdir(exist_ok=True)
        save_file(dict(tensors), partial, metadata)
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        raise storage_error(error, path) or error from error


def is_readable(path: Path) -> bool:
    """Return whether a safetensors file exists and is complete according to its header."""
    try:
        with safe_open(path, "pt"):
            return True
    except (OSError, SafetensorError):
        return False
