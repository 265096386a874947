"""Named tensors: the weights of a model, or of a part of it, as they go to files and come back."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from study.errors import storage_error

StateDict = dict[str, Tensor]


def part_of(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with a prefix, without it; "head." gives the head's."""
    return {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }


def on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU, which later steps leave alone; in the layout that files have."""
    layout = torch.contiguous_format
    return {k: value.detach().cpu().clone(memory_format=layout) for k, value in tensors.items()}


def save_whole(
    path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file under another name, then give it its own.

    Raises:
        StorageError: It cannot be written.
    """
    partial = path.with_name(f".{path.name}.part")
    try:
        # Not its parents: where a run directory has vanished, none is to take its place.
        path.parent.mkdir(exist_ok=True)
        save_file(dict(tensors), partial, metadata)
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        raise storage_error(error, path) or error from error


def is_readable(path: Path) -> bool:
    """Whether a safetensors file is there, and whole by what its header says."""
    try:
        with safe_open(path, "pt"):
            return True
    except (OSError, SafetensorError):
        return False
