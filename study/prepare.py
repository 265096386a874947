"""From cached features to what runs train on: split, and standardised by train."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from study.arrays import PartArrays, TrainingArrays
from study.data import Dataset, Split
from study.features import Features
from study.streams import derive_seed


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
