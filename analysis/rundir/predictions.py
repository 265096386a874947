"""Per-image predictions of the confirmation runs."""

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from analysis.rundir import RunDir
from analysis.rundir.errors import RunDirError

#: Largest unpacked size in bytes; 100,000 images with 1,000 classes need a fifth of it.
LARGEST = 1 << 30


@dataclass(frozen=True)
class Predictions:
    """A confirmation run's predictions on the images of val or test, at its selected epoch.

    Attributes:
        logits: [images, classes], float32.
        labels: [images], class numbers from 0.
    """

    logits: NDArray[np.float32]
    labels: NDArray[np.int64]

    @property
    def guesses(self) -> NDArray[np.int64]:
        """Class with the highest logit: [images]."""
        return np.asarray(self.logits.argmax(axis=1), np.int64)

    @property
    def probabilities(self) -> NDArray[np.float32]:
        """Softmax of the logits: [images, classes]."""
        raised = np.exp(self.logits - self.logits.max(axis=1, keepdims=True))
        return np.asarray(raised / raised.sum(axis=1, keepdims=True), np.float32)


def load_predictions(run_dir: Path, run_id: str) -> Predictions | None:
    """Load a confirmation run's predictions; None if its file is missing or unreadable."""
    file = RunDir(run_dir).predictions(run_id)
    try:
        return read_predictions(file) if file.is_file() else None
    except RunDirError:
        return None


def read_predictions(file: Path, part: Literal["val", "test"] = "test") -> Predictions:
    """Read a file of predictions.

    Args:
        file: A .npz file in confirm/.
        part: The split the images belong to.

    Raises:
        RunDirError: The file is unreadable, or does not contain predictions.
    """
    try:
        # If the file is not an archive, numpy's error would explain how to load it as a pickle.
        with zipfile.ZipFile(file) as archive:
            size = sum(member.file_size for member in archive.infolist())
        if size > LARGEST:
            raise ValueError(f"it unpacks to {size:,} bytes; the limit is {LARGEST:,}")
        # allow_pickle stays off, so that no array can execute code.
        with np.load(file) as stored:
            return _predictions(stored[f"{part}_logits"], stored[f"{part}_labels"], part)
    # A damaged archive or array can raise almost anything.
    except Exception as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise RunDirError(f"{file} cannot be read: {reason}") from error


def _predictions(logits: NDArray[Any], labels: NDArray[Any], part: str) -> Predictions:
    """Check that logits and labels match, and convert them.

    Raises:
        ValueError: Their shapes, types or class numbers do not match.
    """
    if logits.ndim != 2 or logits.dtype.kind != "f" or not logits.size:
        raise ValueError(
            f"{part}_logits is {logits.dtype} {[*logits.shape]}, not float [images, classes]"
        )
    if labels.shape != logits.shape[:1] or labels.dtype.kind != "i":
        raise ValueError(f"{part}_labels is {labels.dtype} {[*labels.shape]}, not int [images]")
    if labels.min() < 0 or labels.max() >= logits.shape[1]:
        raise ValueError(f"{part}_labels are not all between 0 and {logits.shape[1] - 1}")
    return Predictions(logits.astype(np.float32), labels.astype(np.int64))
