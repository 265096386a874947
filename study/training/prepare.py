"""Training data from images or cached features: split, and features standardised."""

from dataclasses import dataclass

import numpy as np
import torch

from study.config import Augment
from study.data.dataset import Dataset
from study.data.split import Split
from study.features.extract import Features
from study.features.standardise import ROWS, Standardisation, fit_standardisation
from study.models.network import Pretrained
from study.seeds import derive_seed
from study.training.data import PartArrays, TrainingArrays


@dataclass(frozen=True)
class Prepared:
    """The data of a study, ready for training."""

    training: TrainingArrays
    test: PartArrays


def prepare_features(
    dataset: Dataset, split: Split, features: Features
) -> tuple[Prepared, Standardisation]:
    """Standardise the features by train and split them."""
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
    """Split the images, for runs that train the backbone too."""

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
    """Return a fixed stratified subset of train, as large as val: sorted dataset indices."""
    rows: np.ndarray = split.train[stratified_rows(dataset.labels[split.train], len(split.val))]
    return rows


def stratified_rows(labels: np.ndarray, count: int) -> np.ndarray:
    """Return `count` sorted row numbers with the classes in proportion, the same at every call.

    Args:
        labels: int64 [n].
        count: Between the number of classes and n.
    """
    random = np.random.default_rng(derive_seed(0, "monitor"))
    shuffled = random.permutation(len(labels))
    # Rank each row within its class; the smallest relative ranks are a stratified subset.
    rank = np.empty(len(labels))
    for label in np.unique(labels):
        rows = shuffled[labels[shuffled] == label]
        rank[rows] = (np.arange(len(rows)) + 0.5) / len(rows)
    return np.sort(np.argsort(rank, kind="stable")[:count])
