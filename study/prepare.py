"""From images or cached features to what runs train on: split, and features standardised."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from study.arrays import PartArrays, TrainingArrays
from study.augment import Augment
from study.data.dataset import Dataset
from study.data.split import Split
from study.features import Features
from study.models.head import FEATURES
from study.models.network import Pretrained
from study.seeds import derive_seed

#: Rows of features that are in fp32 at a time: what a core's cache holds.
ROWS = 256


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


def prepare_features(
    dataset: Dataset, split: Split, features: Features
) -> tuple[Prepared, Standardisation]:
    """Standardise the features by train, and cut them into the parts of the split."""
    standardisation = fit_standardisation(features.values, torch.from_numpy(split.train))

    def part(rows: np.ndarray) -> PartArrays:
        values = torch.empty(len(rows), features.values.shape[1], dtype=torch.bfloat16)
        pieces = zip(torch.from_numpy(rows).split(ROWS), values.split(ROWS), strict=True)
        for chosen, piece in pieces:
            piece.copy_(standardisation(features.values.index_select(0, chosen)))
        return PartArrays(values.view(torch.uint16).numpy(), dataset.labels[rows])

    training = TrainingArrays(
        part(split.train),
        part(monitor_rows(dataset, split)),
        part(split.val),
        len(dataset.classes),
    )
    return Prepared(training, part(split.test)), standardisation


def prepare_images(
    dataset: Dataset, split: Split, pretrained: Pretrained, augment: Augment
) -> Prepared:
    """Cut the images into the parts of the split, for runs that train the backbone too."""

    def part(rows: np.ndarray) -> PartArrays:
        return PartArrays(dataset.pixels[rows], dataset.labels[rows])

    training = TrainingArrays(
        part(split.train),
        part(monitor_rows(dataset, split)),
        part(split.val),
        len(dataset.classes),
        pretrained,
        augment,
    )
    return Prepared(training, part(split.test))


def monitor_rows(dataset: Dataset, split: Split) -> np.ndarray:
    """A fixed stratified part of train, as large as val; indices into the dataset, sorted."""
    rows: np.ndarray = split.train[stratified_rows(dataset.labels[split.train], len(split.val))]
    return rows


def no_standardisation() -> Standardisation:
    """One that leaves features as they are."""
    return Standardisation(torch.zeros(FEATURES), torch.ones(FEATURES))


def fit_standardisation(features: Tensor, rows: Tensor) -> Standardisation:
    """Mean and standard deviation of each feature over some rows.

    Args:
        features: [n, features] in any float type.
        rows: int64 [1 or more].
    """
    # Differences from a row, and not the values: what does not vary then has a deviation of exactly
    # 0. `torch.std_mean` is ten times as slow.
    shift = features[rows[0]].float()
    total, squares = torch.zeros(2, len(shift), dtype=torch.float64)
    for chosen in rows.split(ROWS):
        differences = features.index_select(0, chosen).float().sub_(shift)
        total += differences.sum(dim=0)
        squares += differences.square_().sum(dim=0)
    mean = total / len(rows)
    std = (squares / len(rows) - mean.square()).clamp_(min=0).sqrt().float()
    return Standardisation((mean + shift).float(), torch.where(std > 1e-6, std, 1.0))


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
