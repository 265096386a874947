"""Named tensors: the weights of a model, or of a part of it, as they go to files and come back."""

from collections.abc import Mapping

import torch
from torch import Tensor


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
