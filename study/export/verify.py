"""Check in a separate process that an exported file predicts what the model predicts."""

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from study.errors import StudyStoppedError
from study.export import standalone
from study.system.progress import progress

#: Tolerances between an exported file and the model, in fp32, over all test images.
SAME_ANSWERS = 0.999
LARGEST_DIFFERENCE = 1e-3
ACCURACY_DIFFERENCE = 0.001


@dataclass(frozen=True)
class Agreement:
    """Agreement between an exported file and the model."""

    images: int
    same_answers: float
    """Fraction of the images with the same most probable class."""
    largest_difference: float
    """Largest absolute difference of any probability."""
    accuracy: float
    """Accuracy of the file, a fraction."""
    model_accuracy: float
    """Accuracy of the model, a fraction."""

    @property
    def is_good(self) -> bool:
        """True if the file agrees well enough to be exported."""
        return (
            self.same_answers >= SAME_ANSWERS
            and self.largest_difference <= LARGEST_DIFFERENCE
            and abs(self.accuracy - self.model_accuracy) <= ACCURACY_DIFFERENCE
        )


@dataclass(frozen=True)
class ExportedProcess:
    """A process without this project that has loaded, or is loading, an exported file."""

    file: Path
    batch_size: int
    process: "subprocess.Popen[bytes]"
    errors: IO[bytes]
    """The process's standard error."""


@contextmanager
def start_exported(
    file: Path, height: int, width: int, batch_size: int
) -> Iterator[ExportedProcess]:
    """Start a process that loads an exported file and waits for images; it ends with the block.

    Loading takes seconds; the caller can do other work meanwhile.

    Args:
        file: model.onnx or model.pt2.
        height: Height of the images in pixels.
        width: Width of the images in pixels.
        batch_size: Images per batch.
    """
    # -I: ignores the current folder, environment variables and the user's site-packages.
    numbers = [str(number) for number in (height, width, batch_size)]
    command = [sys.executable, "-I", standalone.__file__, str(file), *numbers]
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors
        ) as process,
    ):
        try:
            yield ExportedProcess(file, batch_size, process, errors)
        finally:
            process.kill()  # it may still be loading, but is no longer needed


def check_agreement(
    running: ExportedProcess,
    pixels: np.ndarray,
    rows: np.ndarray,
    labels: np.ndarray,
    expected: np.ndarray,
) -> Agreement:
    """Compare an exported file's predictions with the model's.

    Args:
        running: The process of the file; usable once.
        pixels: Images, uint8 [N, height, width, 3], RGB.
        rows: Indices of the images to use.
        labels: True classes, int64 [rows].
        expected: The model's probabilities, fp32 [rows, classes].

    Raises:
        StudyStoppedError: The file cannot be run, or disagrees with the model.
    """
    found = compute_probabilities(running, pixels, rows, expected.shape[1])
    agreement = Agreement(
        images=len(rows),
        same_answers=float((found.argmax(axis=1) == expected.argmax(axis=1)).mean()),
        largest_difference=float(np.abs(found - expected).max()),
        accuracy=float((found.argmax(axis=1) == labels).mean()),
        model_accuracy=float((expected.argmax(axis=1) == labels).mean()),
    )
    if not agreement.is_good:
        raise StudyStoppedError(
            f"{running.file.name} disagrees with the model: on {len(rows)} test images,"
            f" {100 * agreement.same_answers:.2f} % of the predicted classes are the same,"
            f" probabilities differ by up to {agreement.largest_difference:.2g}, and accuracy is"
            f" {100 * agreement.accuracy:.2f} % instead of {100 * agreement.model_accuracy:.2f} %."
            " Nothing was exported; try another version of torch or onnxruntime."
        )
    return agreement


def compute_probabilities(
    running: ExportedProcess, pixels: np.ndarray, rows: np.ndarray, classes: int
) -> np.ndarray:
    """Return the probabilities that an exported file predicts, fp32 [rows, classes].

    Args:
        running: The process of the file; usable once.
        pixels: Images, uint8 [N, height, width, 3], RGB.
        rows: Indices of the images to use.
        classes: Number of classes.

    Raises:
        StudyStoppedError: The process fails.
    """
    process, batch_size, found = running.process, running.batch_size, []
    assert process.stdin is not None
    assert process.stdout is not None
    with progress(f"Checking {running.file.name}", len(rows), "images") as advance:
        try:
            for first in range(0, len(rows), batch_size):
                batch = pixels[rows[first : first + batch_size]]
                process.stdin.write(batch.tobytes())
                process.stdin.flush()
                if len(batch) < batch_size:
                    process.stdin.close()
                size = 4 * classes * len(batch)
                content = process.stdout.read(size)
                if len(content) < size:
                    break
                found.append(np.frombuffer(content, np.float32).reshape(-1, classes))
                advance(len(batch))
            process.stdin.close()
        except BrokenPipeError:
            pass
        status = process.wait()
    if status != 0 or sum(map(len, found)) < len(rows):
        running.errors.seek(0)
        lines = running.errors.read().decode(errors="replace").strip().splitlines()
        raise StudyStoppedError(
            f"{running.file} cannot be run outside this project"
            f" ({lines[-1] if lines else 'no message'}); try another version of torch or"
            " onnxruntime."
        )
    return np.concatenate(found)
