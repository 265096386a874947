"""Sources of an effect's uncertainty: the seeds, and the finite set of test images."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from analysis.frames import StudyFrames
from analysis.rundir.predictions import load_predictions
from analysis.stats.pairs import Pairs

RESAMPLES = 2_000


@dataclass(frozen=True)
class StandardErrors:
    """Standard errors of an effect on test accuracy, in points.

    Attributes:
        seeds: Over draws of seeds, with the test images fixed.
        images: Over draws of test images, with the seeds fixed; NaN without stored predictions.
        both: Over draws of both, by a crossed bootstrap of seeds × images (Owen 2007, "The
            pigeonhole bootstrap"); NaN without stored predictions.
    """

    seeds: float
    images: float
    both: float


def compute_standard_errors(frames: StudyFrames, pairs: Pairs) -> StandardErrors:
    """Compute the standard errors of an effect from its pairs and the stored predictions."""
    by_seed = 100 * pairs.by_seed
    seeds = float(by_seed.std() / math.sqrt(len(by_seed)))
    gains = _gains(frames, pairs)
    if gains is None:
        return StandardErrors(seeds, math.nan, math.nan)
    images = float(gains.mean(axis=0).std(ddof=1) / math.sqrt(gains.shape[1]))
    return StandardErrors(seeds, images, crossed_bootstrap(gains))


def crossed_bootstrap(gains: NDArray[np.floating], resamples: int = RESAMPLES) -> float:
    """Return the standard deviation of the mean over draws of rows and columns with replacement.

    Args:
        gains: [seeds, images], each image's contribution to the effect at each seed.
        resamples: Number of draws.
    """
    random = np.random.default_rng(0)
    rows, columns = gains.shape
    row_weights = random.multinomial(rows, np.full(rows, 1 / rows), size=resamples) / rows
    means = np.empty(resamples)
    for index, weights in enumerate(row_weights):
        drawn = random.multinomial(columns, np.full(columns, 1 / columns))
        means[index] = (weights @ gains) @ drawn / columns
    return float(means.std(ddof=1))


def _gains(frames: StudyFrames, pairs: Pairs) -> NDArray[np.float64] | None:
    """Return [seeds, images]: 100 if only the setting is right, -100 if only the baseline is.

    For balanced accuracy, images of rare classes weigh more.
    """
    runs = frames.confirm.set_index(["seed", "recipe", "setting"])["run_id"]
    balanced = frames.accuracy == "balanced_accuracy"
    rows = []
    for seed in pairs.by_recipe.index:
        gains = []
        for recipe in pairs.by_recipe.columns:
            right = []
            for setting in (pairs.setting, pairs.baseline):
                stored = load_predictions(frames.path, runs[seed, recipe, setting])
                if stored is None:
                    return None
                weights = class_weights(stored.labels) if balanced else 1.0
                right.append(weights * (stored.guesses == stored.labels))
            gains.append(100.0 * (right[0] - right[1]))
        rows.append(np.mean(gains, axis=0))
    return np.array(rows)


def class_weights(labels: NDArray[np.integer]) -> NDArray[np.float64]:
    """Return each image's weight in a class-balanced mean: [images], mean 1."""
    images = np.bincount(labels)
    return np.asarray(len(labels) / ((images > 0).sum() * images[labels]), np.float64)
