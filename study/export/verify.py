"""Whether an exported file predicts what the model predicts, in a process of its own."""

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

#: What an exported file must keep of the model, in fp32, over all test images.
SAME_ANSWERS = 0.999
LARGEST_DIFFERENCE = 1e-3
ACCURACY_DIFFERENCE = 0.001


@dataclass(frozen=True)
class Agreement:
    """How far an exported file and the model agree."""

    images: int
    same_answers: float
    """Fraction of the images for which the most probable class is the same."""
    largest_difference: float
    """Of any probability."""
    accuracy: float
    """Of the file, a fraction."""
    model_accuracy: float

    @property
    def is_good(self) -> bool:
        """Whether the file may be shipped."""
        return (
            self.same_answers >= SAME_ANSWERS
            and self.largest_difference <= LARGEST_DIFFERENCE
            and abs(self.accuracy - self.model_accuracy) <= ACCURACY_DIFFERENCE
        )


@dataclass(frozen=True)
class Running:
    """An exported file in a process without this project, which has loaded it or is about to."""

    file: Path
    batch_size: int
    process: "subprocess.Popen[bytes]"
    errors: IO[bytes]
    """What it writes to its standard error."""


@contextmanager
def start(file: Path, height: int, width: int, batch_size: int) -> Iterator[Running]:
    """Start a process that loads an exported file and waits for images; it ends with the block.

    Loading takes seconds, in which the caller can do something else.

    Args:
        file: model.onnx or model.pt2.
        height: Of the images, in pixels.
        width: Of the images, in pixels.
        batch_size: How many images it computes at a time.
    """
    # -I: nothing from the current folder, the environment or the user's own packages.
    numbers = [str(number) for number in (height, width, batch_size)]
    command = [sys.executable, "-I", standalone.__file__, str(file), *numbers]
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors
        ) as process,
    ):
        try:
            yield Running(file, batch_size, process, errors)
        finally:
            process.kill()  # it may still be loading, and nobody needs it any more


def verify(
    running: Running, pixels: np.ndarray, rows: np.ndarray, labels: np.ndarray, expected: np.ndarray
) -> Agreement:
    """Hold an exported file's answers against the model's.

    Args:
        running: The file, in its process; it can be asked once.
        pixels: Images, uint8 [N, height, width, 3], RGB.
        rows: Which of them.
        labels: int64 [rows].
        expected: The model's probabilities, fp32 [rows, classes].

    Raises:
        StudyStoppedError: The file cannot be run, or its answers are others.
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
            f"{running.file.name} does not predict what the model does: on {len(rows)} test images"
            f" {100 * agreement.same_answers:.2f} % of the answers are the same, probabilities"
            f" differ by {agreement.largest_difference:.2g} at most, accuracy is"
            f" {100 * agreement.accuracy:.2f} % against {100 * agreement.model_accuracy:.2f} %. It"
            " is not exported; other versions of torch or onnxruntime may do better."
        )
    return agreement


def compute_probabilities(
    running: Running, pixels: np.ndarray, rows: np.ndarray, classes: int
) -> np.ndarray:
    """Probabilities by an exported file, fp32 [rows, classes].

    Args:
        running: The file, in its process; it can be asked once.
        pixels: Images, uint8 [N, height, width, 3], RGB.
        rows: Which of them.
        classes: How many there are.

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
        said = running.errors.read().decode(errors="replace").strip().splitlines() or ["no message"]
        raise StudyStoppedError(f"{running.file} cannot be run on its own: {said[-1]}.")
    return np.concatenate(found)
