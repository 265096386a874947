"""How far a model's confidence can be believed: the expected calibration error.

That of Guo et al. 2017, "On Calibration of Modern Neural Networks": how far accuracy and mean
confidence lie apart, mean over bins of equal width, weighted by their images.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from analysis.rundir.predictions import Predictions

BINS = 15


@dataclass(frozen=True)
class Bins:
    """Test images by the confidence of the answer: the highest probability among the classes.

    Attributes:
        images: [BINS], how many.
        confidence: [BINS], sum of their confidences.
        right: [BINS], how many of the answers are right.
    """

    images: NDArray[np.float64]
    confidence: NDArray[np.float64]
    right: NDArray[np.float64]

    def __add__(self, other: "Bins") -> "Bins":
        """The images of both."""
        return Bins(
            self.images + other.images,
            self.confidence + other.confidence,
            self.right + other.right,
        )

    @property
    def ece(self) -> float:
        """The expected calibration error, in points."""
        return float(100 * np.abs(self.right - self.confidence).sum() / self.images.sum())


def bin_predictions(predictions: Predictions) -> Bins:
    """Sort a run's test images into bins of confidence, each with its upper edge, as Guo et al."""
    confidence = predictions.probabilities.max(axis=1).astype(np.float64)
    number = np.clip(np.ceil(confidence * BINS).astype(np.int64) - 1, 0, BINS - 1)
    right = predictions.guesses == predictions.labels
    return Bins(
        images=np.bincount(number, minlength=BINS).astype(np.float64),
        confidence=np.bincount(number, confidence, minlength=BINS).astype(np.float64),
        right=np.bincount(number, right, minlength=BINS).astype(np.float64),
    )
