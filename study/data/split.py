"""The split into train, val and test, and stratified sampling."""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from study.data.dataset import Dataset
from study.errors import UserError
from study.system.cache import sha256_of

#: Smallest sample that can be requested.
SMALLEST_SAMPLE = 200
#: Default fraction of each class's training images that becomes `val`.
VAL_FRACTION = 0.1


@dataclass(frozen=True)
class Split:
    """Disjoint, sorted int64 indices into a Dataset."""

    train: np.ndarray
    val: np.ndarray
    test: np.ndarray
    sha256: str
    """SHA-256 of the three lists of indices as JSON."""


def make_split(dataset: Dataset, val_fraction: float | None = None, seed: int = 0) -> Split:
    """Carve `val` out of the training images: a random, seeded fraction of each class.

    For CIFAR-10 this gives 45,000 / 5,000 / 10,000 images. If the dataset has its own val images,
    those are used.

    Args:
        dataset: The images.
        val_fraction: Fraction of each class; None: a tenth.
        seed: Seed of the choice.

    Raises:
        UserError: A label is out of range, a class has no image in one of the three parts, or
            `val_fraction` is given although the dataset has val images.
    """
    _check_labels(dataset)
    if dataset.val_count and val_fraction is not None:
        raise UserError(
            f"--val-fraction: {dataset.source} has a val/ folder, which is used as val; omit the"
            " option."
        )
    val_fraction = VAL_FRACTION if val_fraction is None else val_fraction
    training = dataset.labels[: dataset.training_count]
    test_start = dataset.training_count + dataset.val_count
    if dataset.val_count:
        val = np.arange(dataset.training_count, test_start)
    else:
        order = shuffled_by_class(training, len(dataset.classes), seed)
        val = np.sort(np.concatenate([rows[: round(val_fraction * len(rows))] for rows in order]))
    train = np.setdiff1d(np.arange(len(training)), val)
    test = np.arange(test_start, len(dataset.labels))
    for part, rows in (("train", train), ("val", val), ("test", test)):
        _check_no_class_is_empty(dataset, part, rows, val_fraction)
    indices = json.dumps([train.tolist(), val.tolist(), test.tolist()])
    return Split(train, val, test, sha256_of(indices.encode()))


def shuffled_by_class(labels: np.ndarray, classes: int, seed: int) -> list[np.ndarray]:
    """Return the rows of each class, shuffled by the seed."""
    # Python guarantees this sequence across versions; numpy does not for its generators.
    stream = random.Random(seed)
    order = np.argsort([stream.random() for _ in labels], kind="stable")
    return [order[labels[order] == label] for label in range(classes)]


def in_proportion(sizes: Sequence[int], count: int) -> list[int]:
    """Return how many to take from each group so that proportions are kept.

    The largest remainders are rounded up; each non-empty group contributes at least one if `count`
    allows it.

    Args:
        sizes: Sizes of the groups.
        count: Total to take, at most the sum of the sizes.
    """
    exact = np.array(sizes) * (count / max(1, sum(sizes)))
    taken = np.minimum(np.maximum(np.floor(exact), np.array(sizes) > 0), sizes).astype(int)
    while (missing := count - taken.sum()) != 0:
        change = 1 if missing > 0 else -1
        open_to_change = taken < sizes if missing > 0 else taken > 1
        if not open_to_change.any():
            break
        wanted = np.where(open_to_change, change * (exact - taken), -np.inf)
        taken[wanted.argmax()] += change
    counts: list[int] = taken.tolist()
    return counts


def _check_labels(dataset: Dataset) -> None:
    labels, classes = dataset.labels, dataset.classes
    wrong = np.flatnonzero((labels < 0) | (labels >= len(classes)))
    if len(wrong):
        raise UserError(
            f"{dataset.source}: image {wrong[0]} has label {labels[wrong[0]]}, but labels must"
            f" be 0 ({classes[0]}) to {len(classes) - 1} ({classes[-1]}); fix the labels."
        )


def _check_no_class_is_empty(
    dataset: Dataset, part: str, rows: np.ndarray, val_fraction: float
) -> None:
    empty = np.flatnonzero(np.bincount(dataset.labels[rows], minlength=len(dataset.classes)) == 0)
    if not len(empty):
        return
    name, of_class = dataset.classes[empty[0]], dataset.labels == empty[0]
    training = of_class[: dataset.training_count].sum()
    val = of_class[dataset.training_count :][: dataset.val_count].sum()
    test = of_class.sum() - training - val
    if dataset.val_count:
        have, need = f"{training} training, {val} val", "1 image in each"
    else:
        have, need = f"{training} training", f"{_fewest(val_fraction)} training images and 1 test"
        need += " image"
    raise UserError(
        f"{dataset.source}: class {name} has {have} and {test} test images, which leaves none for"
        f" {part}; provide at least {need}, or remove the class."
    )


def _fewest(val_fraction: float) -> int:
    """Return the fewest training images of a class that give both train and val at least one."""
    return next(n for n in range(2, 10**6) if 0 < round(val_fraction * n) < n)
