"""Classification of failed runs and of errors the user can fix."""

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

#: Out-of-memory messages of the C and C++ allocators under torch and of CUDA's libraries.
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
    """Why a run failed."""

    kind: FailureKind
    reason: str
    """One line."""
    traceback: str


def failure_of(error: BaseException) -> Failure:
    """Classify the error of a run whose worker raised or died."""
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
        return Failure("lost", _loss_reason(cause), str(error))
    return Failure("failed", f"{type(cause).__name__}: {text}", str(error))


def failure_from_text(traceback: str) -> Failure:
    """Classify an error in Ray, or in code that Ray calls, of which only the traceback is known."""
    lines = traceback.strip().splitlines() or ["no reason given"]
    if storage := storage_error(traceback, "The run directory"):
        return Failure("storage", str(storage), traceback)
    if "OOM" in traceback or "running low on memory" in traceback:
        return Failure("memory", "out of memory: Ray killed it", traceback)
    return Failure("lost", f"Ray lost it ({lines[-1]})", traceback)


def _loss_reason(error: RayError) -> str:
    if "node has died" in str(error) or isinstance(error, NodeDiedError):
        return "its machine was lost"
    if isinstance(error, RayActorError | WorkerCrashedError):
        return "its process died"
    return f"Ray lost it ({type(error).__name__}: {first_line(error)})"


def as_user_error(error: BaseException, run_dir: object) -> StudyStoppedError | None:
    """Return an error of the disk or of Ray as a user error; None for any other.

    Args:
        error: The error.
        run_dir: The run directory, for the message.
    """
    if isinstance(error, OutOfDiskError):
        return StudyStoppedError(
            "The data does not fit into Ray's in-memory object store, and the disk that it spills"
            " to (RAY_TMPDIR, by default /tmp) is too full: free some space there."
        )
    if isinstance(error, RayError):
        return StudyStoppedError(f"Ray failed: {type(error).__name__}: {first_line(error)}.")
    if isinstance(error, OSError):
        return storage_error(error, run_dir)
    return None
