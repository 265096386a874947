"""The data of a study as Ray hands it to its workers: numpy arrays, shared without a copy.

numpy has no bfloat16, so the arrays hold its bits as uint16. Workers import this module and no
torchvision, which takes seconds.
"""

import warnings
from dataclasses import dataclass

import numpy as np
import torch

from study.training import Part, TrainingData


@dataclass(frozen=True)
class PartArrays:
    """A part of the data as numpy arrays."""

    bits: np.ndarray
    """uint16 [n, features]: the bits of standardised bfloat16 features."""
    labels: np.ndarray
    """int64 [n]."""

    def to(self, device: torch.device) -> Part:
        """As tensors; on the CPU without a copy."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            inputs = torch.from_numpy(self.bits).view(torch.bfloat16)
            return Part(inputs.to(device), torch.from_numpy(self.labels).to(device))


@dataclass(frozen=True)
class TrainingArrays:
    """What search trials see: everything but `test`."""

    train: PartArrays
    monitor: PartArrays
    val: PartArrays
    classes: int

    def to(self, device: torch.device) -> TrainingData:
        """As tensors; on the CPU without a copy."""
        return TrainingData(
            self.train.to(device), self.monitor.to(device), self.val.to(device), self.classes
        )
