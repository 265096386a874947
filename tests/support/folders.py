"""Folders of real image files: CIFAR-10 from this repository, Fashion-MNIST from Debian."""

import gzip
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from study.data.dataset import Dataset

#: Where Debian's package dataset-fashion-mnist installs it.
FASHION = Path("/usr/share/datasets/fashion-mnist")
FASHION_CLASSES = (
    "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot",
)  # fmt: skip


def write_cifar10(
    dataset: Dataset, folder: Path, place: Callable[[int, str], str], rows: range | None = None
) -> None:
    """Write images of a dataset as PNG files.

    Args:
        dataset: The images.
        folder: Where to write.
        place: Maps row and class name to a subfolder.
        rows: Rows to write; default: all.
    """
    for row in range(len(dataset.labels)) if rows is None else rows:
        to = folder / place(row, dataset.classes[dataset.labels[row]]) / f"{row:03d}.png"
        to.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(dataset.pixels[row]).save(to)


def write_fashion(folder: Path, training: int, test: int) -> None:
    """Write the first images of Fashion-MNIST as grey PNG files, under train/ and test/."""
    for part, name, count in (("train", "train", training), ("test", "t10k", test)):
        images = _read(f"{name}-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28)
        labels = _read(f"{name}-labels-idx1-ubyte.gz", 8)
        for row in range(count):
            to = folder / part / FASHION_CLASSES[labels[row]] / f"{row:05d}.png"
            to.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images[row]).save(to)


def _read(name: str, header: int) -> np.ndarray:
    return np.frombuffer(gzip.decompress((FASHION / name).read_bytes()), np.uint8, offset=header)
