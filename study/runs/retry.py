"""Retries of failed runs, and when the study stops."""

import re
from typing import Literal

from study.errors import StudyStoppedError
from study.runs.failures import FailureKind

#: How a failed run is retried. "now": resumed from its last checkpoint; "alone": at the end of the
#: phase, one at a time; "never": not at all; "stop": the study stops.
Retry = Literal["now", "alone", "never", "stop"]


def choose_retry(kind: FailureKind, *, losses: int, max_failures: int, exclusive: bool) -> Retry:
    """Decide whether and when to retry a failed run.

    A run that raised an error would raise it again. A run lost with its process or machine is
    retried, and so is one that ran out of memory, but alone. If nothing can be written any more,
    the study stops, since further results would be lost too.

    Args:
        kind: How it failed.
        losses: Losses since its last progress, including this one.
        max_failures: Maximum consecutive losses that are retried.
        exclusive: Whether it ran alone, with its device to itself.
    """
    if kind == "storage":
        return "stop"
    if kind == "lost" and losses <= max_failures:
        return "now"
    if kind == "memory" and not exclusive:
        return "alone"
    return "never"


class FailureStreak:
    """Consecutive failures with the same cause."""

    def __init__(self, limit: int) -> None:
        """Start empty; the study stops after `limit` failures."""
        self._limit = limit
        self._cause, self._length = "", 0

    def end(self) -> None:
        """Record a run that did not fail."""
        self._cause, self._length = "", 0

    def add(self, reason: str) -> StudyStoppedError | None:
        """Record a failed run; return an error if the study should stop."""
        # Addresses, sizes and PIDs differ even if the cause is the same.
        cause = re.sub(r"0x[0-9a-f]+|\d+", "", reason)
        self._length = self._length + 1 if cause == self._cause else 1
        self._cause = cause
        if self._length < self._limit:
            return None
        return StudyStoppedError(
            f"{self._length} runs in a row failed with the same cause: {reason}. Their tracebacks"
            " are in failures/ in the run directory. Fix the cause, or allow more failures with"
            " --stop-after-failures."
        )
