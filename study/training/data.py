"""The data a run trains on: as tensors, and as the numpy arrays that Ray shares without a copy.

With a frozen backbone, workers import this module without torchvision, which takes seconds.
"""

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from study.config import Augment

if TYPE_CHECKING:  # it imports torchvision, which takes seconds; a frozen study never needs it
    from study.models.network import Pretrained


@dataclass(frozen=True)
class Part:
    """Inputs and labels of one part of the data, on the training device."""

    inputs: Tensor
    """Standardised features, bfloat16 [n, features]; or images, uint8 [n, height, width, 3]."""
    labels: Tensor
    """int64 [n], 0 to classes - 1."""


@dataclass(frozen=True)
class TrainingData:
    """The data a run may use while it trains: everything but `test`."""

    train: Part
    monitor: Part
    """A fixed stratified subset of train, as large as val; its metrics show the fit by epoch."""
    val: Part
    classes: int
    pretrained: "Pretrained | None" = None
    """The backbone to train with the head; None if the inputs are features."""
    augment: Augment = "none"
    """Random augmentation of the training images."""

    @property
    def device(self) -> torch.device:
        """The training device."""
        return self.train.inputs.device


@dataclass(frozen=True)
class PartArrays:
    """A part of the data as numpy arrays."""

    inputs: np.ndarray
    """Standardised features, uint16 [n, features]: the bits of bfloat16, which numpy lacks; or
    images, uint8 [n, height, width, 3], RGB."""
    labels: np.ndarray
    """int64 [n]."""

    def to(self, device: torch.device) -> Part:
        """Convert to tensors on a device; on the CPU without a copy."""
        inputs = _tensor(self.inputs)
        if inputs.dtype == torch.uint16:
            inputs = inputs.view(torch.bfloat16)
        return Part(inputs.to(device), _tensor(self.labels).to(device))


@dataclass(frozen=True)
class TrainingArrays:
    """The data of search trials: everything but `test`."""

    train: PartArrays
    monitor: PartArrays
    val: PartArrays
    classes: int
    pretrained: "Pretrained | None" = None
    augment: Augment = "none"

    def to(self, device: torch.device) -> TrainingData:
        """Convert to tensors on a device; on the CPU without a copy."""
        return TrainingData(
            self.train.to(device),
            self.monitor.to(device),
            self.val.to(device),
            self.classes,
            self.pretrained and self.pretrained.to(device),
            self.augment,
        )


def _tensor(array: np.ndarray) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)
