"""The data of a study as Ray hands it to its workers: numpy arrays, shared without a copy.

Workers of a study with a frozen backbone import this module and no torchvision, which takes
seconds.
"""

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from study.augment import Augment
from study.training import Part, TrainingData

if TYPE_CHECKING:
    from study.models.network import Pretrained


@dataclass(frozen=True)
class PartArrays:
    """A part of the data as numpy arrays."""

    inputs: np.ndarray
    """Features, uint16 [n, features]: the bits of standardised bfloat16 ones, since numpy has no
    such type; or images, uint8 [n, height, width, 3], RGB."""
    labels: np.ndarray
    """int64 [n]."""

    def to(self, device: torch.device) -> Part:
        """As tensors; on the CPU without a copy."""
        inputs = _tensor(self.inputs)
        if inputs.dtype == torch.uint16:
            inputs = inputs.view(torch.bfloat16)
        return Part(inputs.to(device), _tensor(self.labels).to(device))


@dataclass(frozen=True)
class TrainingArrays:
    """What search trials see: everything but `test`."""

    train: PartArrays
    monitor: PartArrays
    val: PartArrays
    classes: int
    pretrained: "Pretrained | None" = None
    augment: Augment = "none"

    def to(self, device: torch.device) -> TrainingData:
        """As tensors; on the CPU without a copy."""
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
