"""What the confirmation runs predicted, image by image."""

import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from analysis.errors import RunDirError
from analysis.frames import StudyFrames
from analysis.rundir import RunDir


@dataclass(frozen=True)
class Predictions:
    """A confirmation run's answers on the test images, at its selected epoch.

    Attributes:
        logits: [images, classes], float32.
        labels: [images], class numbers from 0.
    """

    logits: NDArray[np.float32]
    labels: NDArray[np.int64]

    @property
    def guesses(self) -> NDArray[np.int64]:
        """The class with the highest logit: [images]."""
        return np.asarray(self.logits.argmax(axis=1), np.int64)

    @property
    def probabilities(self) -> NDArray[np.float32]:
        """Softmax of the logits: [images, classes]."""
        raised = np.exp(self.logits - self.logits.max(axis=1, keepdims=True))
        return np.asarray(raised / raised.sum(axis=1, keepdims=True), np.float32)


def load_predictions(frames: StudyFrames, run_id: str) -> Predictions | None:
    """A confirmation run's predictions; None where its file is not there or cannot be read."""
    file = RunDir(frames.path).predictions(run_id)
    try:
        return read_predictions(file) if file.is_file() else None
    except RunDirError:
        return None


def read_predictions(file: Path) -> Predictions:
    """Read a file of predictions.

    Raises:
        RunDirError: It cannot be read.
    """
    try:
        with np.load(file) as stored:
            return Predictions(stored["test_logits"].astype(np.float32), stored["test_labels"])
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise RunDirError(f"{file} cannot be read: {error}") from error
