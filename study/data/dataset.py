"""Labelled images in memory."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Dataset:
    """Labelled images; pixels are in memory or in a memory-mapped file."""

    name: str
    """"cifar10", or the name of the user's folder."""
    classes: tuple[str, ...]
    """Class names, indexed by label."""
    pixels: np.ndarray
    """uint8 [N, side, side, 3], RGB; training images, then val images if given, then test."""
    labels: np.ndarray
    """int64 [N]."""
    training_count: int
    """Number of training images, which come first."""
    source: str
    """Where the images come from, for display."""
    source_key: str
    """"torchvision", "npm", "path" or "folder"; pinned when a study is resumed."""
    sha256: str
    """SHA-256 of the images and labels in order, independent of the source: for all of CIFAR-10, of
    its concatenated official binary files; for a sample, of the sample's records."""
    val_count: int = 0
    """Number of val images, which come next; 0: val is carved out of the training images."""
    files: tuple[str, ...] = ()
    """Each image's path inside the user's folder; empty if the images are not files."""
    unreadable: tuple[str, ...] = ()
    """Files that were skipped, each with the reason."""
    hashes: np.ndarray | None = None
    """Perceptual hashes, uint64 [N]; None if duplicates are not searched for."""

    @property
    def side(self) -> int:
        """Side length of the images, in pixels."""
        return int(self.pixels.shape[1])


def count_by_class(dataset: Dataset, rows: np.ndarray) -> list[int]:
    """Return the number of images of each class among these rows."""
    counts: list[int] = np.bincount(dataset.labels[rows], minlength=len(dataset.classes)).tolist()
    return counts
