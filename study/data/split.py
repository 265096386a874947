"""Which images serve for what: train, val and test, and stratified parts of them."""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from study.data.dataset import Dataset
from study.errors import UserError
from study.system.cache import sha256_of

#: The fewest images of which a part can be asked for.
SMALLEST_PART = 200
#: Of each class of the training images, what becomes `val` unless the user says otherwise.
VAL_FRACTION = 0.1


@dataclass(frozen=True)
class Split:
    """Which images serve for what: disjoint int64 indices into a Dataset, sorted."""

    train: np.ndarray
    val: np.ndarray
    test: np.ndarray
    sha256: str
    """Of the three lists of indices, written as JSON."""


def make_split(dataset: Dataset, val_fraction: float | None = None, seed: int = 0) -> Split:
    """Carve `val` out of the training images: a part of each class, at random but for the seed.

    CIFAR-10 gives 45,000 / 5,000 / 10,000 images. Where images are given as val, those are it.

    Args:
        dataset: The images.
        val_fraction: What part of each class; None: a tenth.
        seed: Of the choice.

    Raises:
        UserError: A label stands for no class, a class has no image in one of the three, or a
            fraction is given where val is.
    """
    _check_labels(dataset)
    if dataset.val_count and val_fraction is not None:
        raise UserError(
            f"--val-fraction: {dataset.source} has a val/ folder, which serves as val; leave the"
            " option out."
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
    """For each class its row numbers, in an order that the seed alone decides."""
    # Python promises this sequence for ever; numpy may change that of its generators.
    stream = random.Random(seed)
    order = np.argsort([stream.random() for _ in labels], kind="stable")
    return [order[labels[order] == label] for label in range(classes)]


def in_proportion(sizes: Sequence[int], count: int) -> list[int]:
    """How many to take of each of several groups so that their proportions stay.

    The largest remainders are rounded up; a group that is not empty gives one at least, where
    `count` allows it.

    Args:
        sizes: Of the groups.
        count: To take in all, at most their sum.
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
            f"{dataset.source}: image {wrong[0]} has label {labels[wrong[0]]}, but labels go from"
            f" 0 ({classes[0]}) to {len(classes) - 1} ({classes[-1]}); mend the labels."
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
        have, need = f"{training} training, {val} val", "1 image or more in each"
    else:
        have, need = f"{training} training", f"{_fewest(val_fraction)} training images and 1 test"
        need += " image or more"
    raise UserError(
        f"{dataset.source}: class {name} has {have} and {test} test images, which leaves none for"
        f" {part}; give it {need}, or leave it out."
    )


def _fewest(val_fraction: float) -> int:
    """Training images of a class from which both train and val get one."""
    return next(n for n in range(2, 10**6) if 0 < round(val_fraction * n) < n)
