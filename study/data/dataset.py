"""Labelled images in memory."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Dataset:
    """Labelled images; pixels in memory, or in a file that is mapped into it."""

    name: str
    """"cifar10", or the name of the user's folder."""
    classes: tuple[str, ...]
    """Their names; a label is an index into them."""
    pixels: np.ndarray
    """uint8 [N, side, side, 3], RGB; training images first, then those given as val, then test."""
    labels: np.ndarray
    """int64 [N]."""
    training_count: int
    """So many of the images, from the first on, are training images."""
    source: str
    """Where they come from, in words for people."""
    source_key: str
    """"torchvision", "npm", "path" or "folder": what is pinned when a study goes on."""
    sha256: str
    """Of the images and labels in order, the same whatever the source: for all of CIFAR-10 that of
    its official binary files one after the other, for a part that of the part's records."""
    val_count: int = 0
    """So many images after those are given as val; 0: val is carved out of the training images."""
    files: tuple[str, ...] = ()
    """For each image its path inside the user's folder; empty where images are no files."""
    unreadable: tuple[str, ...] = ()
    """Files that were left out, each with the reason."""
    hashes: np.ndarray | None = None
    """Perceptual hashes, uint64 [N]; None where images are not compared."""

    @property
    def side(self) -> int:
        """Of the images, in pixels."""
        return int(self.pixels.shape[1])


def count_by_class(dataset: Dataset, rows: np.ndarray) -> list[int]:
    """Images of each class among these rows."""
    counts: list[int] = np.bincount(dataset.labels[rows], minlength=len(dataset.classes)).tolist()
    return counts
