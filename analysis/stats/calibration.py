"""The expected calibration error (ECE): how well a model's confidence matches its accuracy.

Guo et al. 2017, "On Calibration of Modern Neural Networks": the gap between accuracy and mean
confidence, averaged over bins of equal width that are weighted by their number of images.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from analysis.rundir.predictions import Predictions

BINS = 15


@dataclass(frozen=True)
class Bins:
    """Test images binned by confidence, the highest class probability of a prediction.

    Attributes:
        images: [BINS], number of images.
        confidence: [BINS], sum of their confidences.
        right: [BINS], number of correct predictions.
    """

    images: NDArray[np.float64]
    confidence: NDArray[np.float64]
    right: NDArray[np.float64]

    def __add__(self, other: "Bins") -> "Bins":
        """Pool the images of both."""
        return Bins(
            self.images + other.images,
            self.confidence + other.confidence,
            self.right + other.right,
        )

    @property
    def ece(self) -> float:
        """Expected calibration error, in points."""
        return float(100 * np.abs(self.right - self.confidence).sum() / self.images.sum())


def bin_predictions(predictions: Predictions) -> Bins:
    """Bin a run's test images by confidence; bins include their upper edge, as in Guo et al."""
    confidence = predictions.probabilities.max(axis=1).astype(np.float64)
    number = np.clip(np.ceil(confidence * BINS).astype(np.int64) - 1, 0, BINS - 1)
    right = predictions.guesses == predictions.labels
    return Bins(
        images=np.bincount(number, minlength=BINS).astype(np.float64),
        confidence=np.bincount(number, confidence, minlength=BINS).astype(np.float64),
        right=np.bincount(number, right, minlength=BINS).astype(np.float64),
    )
