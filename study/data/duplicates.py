"""Near-duplicates between train, val and test: images that a model may have memorised.

Perceptual hashes find candidates quickly; pixels decide. Of CIFAR-10's test images, this finds 8
that duplicate a training image, all correctly; ciFAIR (Barz and Denzler 2020) found 3.3 % by eye:
precision is high, recall low. On datasets of uniform photographs such as Fashion-MNIST,
different objects may match (47 of 2,000 test images, against 12,000 others): inspect the pairs.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

from study.data.dataset import Dataset
from study.data.split import Split

#: Images are candidates if at most this many of the 64 bits of their perceptual hashes differ.
DISTANCE = 10
#: Images are duplicates if their pixels, scaled to GRID x GRID, correlate at least this much.
CORRELATION = 0.99
GRID = 16
#: Number of images compared with all of another part at once.
COMPARED_AT_ONCE = 256


@dataclass(frozen=True)
class Pair:
    """Two similar images in different parts, as rows of the dataset."""

    first: int
    """In test or val."""
    second: int
    """In train, or in val if `first` is in test."""


def perceptual_hash(pixels: np.ndarray) -> int:
    """Return 64 bits that barely change when an image is scaled, compressed or brightened.

    This is ImageHash's pHash: the lowest frequencies of the image's cosine transform, each compared
    with their median.

    Args:
        pixels: uint8 [height, width, 3], RGB.
    """
    import imagehash  # slow to import, and needed only for the user's own images

    bits = imagehash.phash(Image.fromarray(pixels)).hash
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def find_duplicates(dataset: Dataset, split: Split) -> list[Pair]:
    """Find test images that duplicate one in train or val, and val images that duplicate train.

    Returns:
        Each such image with its closest match; empty for a dataset without hashes.
    """
    if dataset.hashes is None:
        return []
    rest = np.concatenate([split.train, split.val])
    return [
        *_alike(dataset.pixels, dataset.hashes, split.test, rest),
        *_alike(dataset.pixels, dataset.hashes, split.val, split.train),
    ]


def _alike(
    pixels: np.ndarray, hashes: np.ndarray, part: np.ndarray, others: np.ndarray
) -> Iterator[Pair]:
    for start in range(0, len(part), COMPARED_AT_ONCE):
        rows = part[start : start + COMPARED_AT_ONCE]
        distance = np.bitwise_count(hashes[rows, None] ^ hashes[others])
        firsts, seconds = np.nonzero(distance <= DISTANCE)
        wanted = np.unique(np.concatenate([rows[firsts], others[seconds]]))
        small = _standardised(pixels, wanted)
        for number in np.unique(firsts):
            candidates = others[seconds[firsts == number]]
            alike = small[np.searchsorted(wanted, candidates)]
            correlation = alike @ small[np.searchsorted(wanted, rows[number])]
            if correlation.max() >= CORRELATION:
                yield Pair(int(rows[number]), int(candidates[correlation.argmax()]))


def _standardised(pixels: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return downscaled images with mean 0 and norm 1, so that dot products are correlations."""
    small = np.empty((len(rows), GRID * GRID * 3), np.float32)
    for place, row in enumerate(rows):
        image = Image.fromarray(pixels[row]).resize((GRID, GRID), Image.Resampling.BOX)
        small[place] = np.asarray(image).reshape(-1)
    small -= small.mean(axis=1, keepdims=True)
    # A single-colour image matches no other.
    small /= np.maximum(np.linalg.norm(small, axis=1, keepdims=True), 1e-6)
    return small
