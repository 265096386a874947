"""Why a run failed, and what follows from that.

A run that fails by itself would fail again. A run that was lost with its process or its machine is
tried again, one that ran out of memory too, but alone; and where nothing can be written any more,
the study stops, since nothing else would be kept.
"""

import re
from dataclasses import dataclass
from typing import Literal

import torch
from ray import tune
from ray.exceptions import (
    NodeDiedError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
    WorkerCrashedError,
)

from study.errors import StorageError, StudyStoppedError, first_line, storage_error
from study.training.loop import NonFiniteLossError

Kind = Literal["diverged", "failed", "memory", "lost", "storage"]

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

    kind: Kind
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


class EmergencyStop(tune.Stopper):
    """Ends the search early where going on makes no sense; trials under way stay interrupted."""

    def __init__(self) -> None:
        self.reason: StudyStoppedError | None = None

    def __call__(self, trial_id: str, result: dict[str, object]) -> bool:
        """Whether to stop one trial: never."""
        return False

    def stop_all(self) -> bool:
        """Whether to stop everything."""
        return self.reason is not None


class FailureStreak:
    """Runs that fail one after the other for the same cause."""

    def __init__(self, limit: int) -> None:
        """Start with none; `limit` is how many are too many."""
        self._limit = limit
        self._cause, self._length = "", 0

    def end(self) -> None:
        """A run ended well."""
        self._cause, self._length = "", 0

    def add(self, reason: str) -> StudyStoppedError | None:
        """A run failed: why the study should stop, if it should."""
        # Addresses, sizes and process numbers differ where the cause is the same.
        cause = re.sub(r"0x[0-9a-f]+|\d+", "", reason)
        self._length = self._length + 1 if cause == self._cause else 1
        self._cause = cause
        if self._length < self._limit:
            return None
        return StudyStoppedError(
            f"{self._length} runs in a row have failed for the same cause: {reason}. Their"
            " tracebacks are in failures/ of the run directory. Mend the cause, or let more of them"
            " fail with --stop-after-failures."
        )


def _loss(error: RayError) -> str:
    if "node has died" in str(error) or isinstance(error, NodeDiedError):
        return "its machine was lost"
    if isinstance(error, RayActorError | WorkerCrashedError):
        return "its process died"
    return f"Ray has lost it ({type(error).__name__}: {first_line(error)})"
