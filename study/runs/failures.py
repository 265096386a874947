"""Why a run failed, and what an error means to the user."""

from dataclasses import dataclass
from typing import Literal

import torch
from ray.exceptions import (
    NodeDiedError,
    OutOfDiskError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
    WorkerCrashedError,
)

from study.errors import StorageError, StudyStoppedError, first_line, storage_error
from study.training.loop import NonFiniteLossError

FailureKind = Literal["diverged", "failed", "memory", "lost", "storage"]

#: How the C and C++ allocators under torch, and CUDA's libraries, say that there is no memory left.
_NO_MEMORY = (
    "can't allocate memory",
    "not enough memory",
    "std::bad_alloc",
    "unable to find an engine to execute this computation",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


@dataclass(frozen=True)
class Failure:
    """How a run ended that did not end well."""

    kind: FailureKind
    reason: str
    """One line."""
    traceback: str


def failure_of(error: BaseException) -> Failure:
    """What became of a run whose worker has raised this, or has died."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    text = first_line(cause)
    if isinstance(cause, NonFiniteLossError):
        return Failure("diverged", text, str(error))
    if isinstance(cause, StorageError):
        return Failure("storage", text, str(error))
    if isinstance(cause, torch.OutOfMemoryError | MemoryError | OutOfMemoryError) or any(
        words in str(cause) for words in _NO_MEMORY
    ):
        return Failure("memory", f"out of memory: {text}", str(error))
    if isinstance(cause, RayError) and not isinstance(cause, RayTaskError):
        return Failure("lost", _loss(cause), str(error))
    return Failure("failed", f"{type(cause).__name__}: {text}", str(error))


def failure_from_text(traceback: str) -> Failure:
    """The same where only a text is left: of an error of Ray's own, or in what Ray calls."""
    lines = traceback.strip().splitlines() or ["nothing is known"]
    if storage := storage_error(traceback, "The run directory"):
        return Failure("storage", str(storage), traceback)
    if "OOM" in traceback or "running low on memory" in traceback:
        return Failure("memory", "out of memory: Ray has stopped it", traceback)
    return Failure("lost", f"Ray has lost it ({lines[-1]})", traceback)


def _loss(error: RayError) -> str:
    if "node has died" in str(error) or isinstance(error, NodeDiedError):
        return "its machine was lost"
    if isinstance(error, RayActorError | WorkerCrashedError):
        return "its process died"
    return f"Ray has lost it ({type(error).__name__}: {first_line(error)})"


def as_user_error(error: BaseException, run_dir: object) -> StudyStoppedError | None:
    """What an error of the disk or of Ray means to the user; None for any other.

    Args:
        error: The error.
        run_dir: The run directory, for the message.
    """
    if isinstance(error, OutOfDiskError):
        return StudyStoppedError(
            "Ray's object store in memory cannot hold the data, and the disk that it lays the rest"
            " on (that of RAY_TMPDIR, else of /tmp) is too full for that: free some space there."
        )
    if isinstance(error, RayError):
        return StudyStoppedError(f"Ray has failed: {type(error).__name__}: {first_line(error)}.")
    if isinstance(error, OSError):
        return storage_error(error, run_dir)
    return None
