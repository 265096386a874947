"""Images of test or val that look like ones of another part: what a model may know by heart.

Perceptual hashes find candidates quickly, pixels decide. Among CIFAR-10's test images this finds 8
whose twin is in train, all of them real, of the 3.3 % that ciFAIR (Barz and Denzler 2020) counts by
eye: what it reports is sure, and not all there is. Where things are photographed alike, as in
Fashion-MNIST, different things may look the same to it (47 of 2,000 test images, against 12,000
others): look at the pairs.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

from study.data.dataset import Dataset
from study.data.split import Split

#: Perceptual hashes that differ in so many of their 64 bits at most make candidates.
DISTANCE = 10
#: Two images are taken to be one picture whose pixels, scaled to GRID x GRID, correlate so much.
CORRELATION = 0.99
GRID = 16
#: Images that are compared with all of another part at a time.
CHUNK = 256


@dataclass(frozen=True)
class Pair:
    """Two images of different parts that look alike; rows of the dataset."""

    first: int
    """In test, or else in val."""
    second: int
    """In val, or else in train."""


def find_duplicates(dataset: Dataset, split: Split) -> list[Pair]:
    """Images of test that look like one of train or val, and images of val like one of train.

    Returns:
        For each such image the one that is most like it; nothing for a dataset without hashes.
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
    for start in range(0, len(part), CHUNK):
        rows = part[start : start + CHUNK]
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
    """The images small, with mean 0 and length 1, so that their products are correlations."""
    small = np.empty((len(rows), GRID * GRID * 3), np.float32)
    for place, row in enumerate(rows):
        image = Image.fromarray(pixels[row]).resize((GRID, GRID), Image.Resampling.BOX)
        small[place] = np.asarray(image).reshape(-1)
    small -= small.mean(axis=1, keepdims=True)
    # An image of one colour is like no other.
    small /= np.maximum(np.linalg.norm(small, axis=1, keepdims=True), 1e-6)
    return small
