"""From cached features to what runs train on: split, standardised, and laid out for sharing.

Ray shares numpy arrays between processes without a copy, but numpy has no bfloat16, so the arrays
hold its bits as uint16.
"""

import warnings
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from study.data import Dataset, Split
from study.features import Features
from study.streams import derive_seed
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


@dataclass(frozen=True)
class Standardisation:
    """Mean and standard deviation of each feature over train, fp32 [features]; part of the model.

    A feature that does not vary has standard deviation 1.
    """

    mean: Tensor
    std: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """[n, features] in any float type -> the same shape in bfloat16."""
        return ((features.float() - self.mean) / self.std).bfloat16()


@dataclass(frozen=True)
class Prepared:
    """The data of a study, ready to be trained on."""

    training: TrainingArrays
    test: PartArrays
    standardisation: Standardisation


def prepare(dataset: Dataset, split: Split, features: Features) -> Prepared:
    """Standardise the features by train, and cut them into the parts of the split."""
    standardisation = fit_standardisation(features.values[torch.from_numpy(split.train)])

    def part(rows: np.ndarray) -> PartArrays:
        values = standardisation(features.values[torch.from_numpy(rows)])
        return PartArrays(values.view(torch.uint16).numpy(), dataset.labels[rows])

    monitor = split.train[stratified_rows(dataset.labels[split.train], len(split.val))]
    training = TrainingArrays(
        part(split.train), part(monitor), part(split.val), len(dataset.classes)
    )
    return Prepared(training, part(split.test), standardisation)


def fit_standardisation(features: Tensor) -> Standardisation:
    """Mean and standard deviation of each feature: [n, features] in any float type."""
    values = features.float()
    std, mean = torch.std_mean(values, dim=0, correction=0)
    return Standardisation(mean, torch.where(std > 1e-6, std, 1.0))


def stratified_rows(labels: np.ndarray, count: int) -> np.ndarray:
    """`count` row numbers with the classes in proportion, the same at every call, sorted.

    Args:
        labels: int64 [n].
        count: Between the number of classes and n.
    """
    random = np.random.default_rng(derive_seed(0, "monitor"))
    shuffled = random.permutation(len(labels))
    # Rank each row within its class; the smallest relative ranks are a stratified part.
    rank = np.empty(len(labels))
    for label in np.unique(labels):
        rows = shuffled[labels[shuffled] == label]
        rank[rows] = (np.arange(len(rows)) + 0.5) / len(rows)
    return np.sort(np.argsort(rank, kind="stable")[:count])
