"""What the confirmation runs predicted, image by image."""

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from analysis.rundir import RunDir
from analysis.rundir.errors import RunDirError

#: Bytes; a hundred thousand images of a thousand classes have a fifth of it.
LARGEST = 1 << 30


@dataclass(frozen=True)
class Predictions:
    """A confirmation run's answers on the images of val or test, at its selected epoch.

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


def load_predictions(run_dir: Path, run_id: str) -> Predictions | None:
    """A confirmation run's predictions; None where its file is not there or cannot be read."""
    file = RunDir(run_dir).predictions(run_id)
    try:
        return read_predictions(file) if file.is_file() else None
    except RunDirError:
        return None


def read_predictions(file: Path, part: Literal["val", "test"] = "test") -> Predictions:
    """Read a file of predictions.

    Args:
        file: In confirm/.
        part: Whose images.

    Raises:
        RunDirError: It cannot be read, or holds no predictions.
    """
    try:
        # Of what is no archive numpy would say how to load it as a pickle.
        with zipfile.ZipFile(file) as archive:
            size = sum(member.file_size for member in archive.infolist())
        if size > LARGEST:
            raise ValueError(f"it unpacks to {size:,} bytes, which no predictions have")
        # Without allow_pickle, as here, no array can hold code.
        with np.load(file) as stored:
            return _predictions(stored[f"{part}_logits"], stored[f"{part}_labels"], part)
    # A damaged archive or array can raise nearly anything.
    except Exception as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise RunDirError(f"{file} cannot be read: {reason}") from error


def _predictions(logits: NDArray[Any], labels: NDArray[Any], part: str) -> Predictions:
    """Check that the arrays belong together.

    Raises:
        ValueError: They do not.
    """
    if logits.ndim != 2 or logits.dtype.kind != "f" or not logits.size:
        raise ValueError(
            f"{part}_logits are {logits.dtype} {[*logits.shape]}, not [images, classes]"
        )
    if labels.shape != logits.shape[:1] or labels.dtype.kind != "i":
        raise ValueError(f"{part}_labels are {labels.dtype} {[*labels.shape]}, not one per image")
    if labels.min() < 0 or labels.max() >= logits.shape[1]:
        raise ValueError(f"{part}_labels are not all among the {logits.shape[1]} classes")
    return Predictions(logits.astype(np.float32), labels.astype(np.int64))
