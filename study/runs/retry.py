"""What follows from a run's failure: whether it is tried again, and when the study stops."""

import re
from typing import Literal

from study.errors import StudyStoppedError
from study.runs.failures import FailureKind

#: What happens to a run that failed. "now": it goes on from its last state; "alone": again at the
#: end, without others beside it; "never": it has failed; "stop": the study stops.
Retry = Literal["now", "alone", "never", "stop"]


def choose_retry(kind: FailureKind, *, losses: int, max_failures: int, alone: bool) -> Retry:
    """Decide whether a run is tried again.

    A run that fails by itself would fail again. One that was lost with its process or machine is
    tried again, one that ran out of memory too, but alone; and where nothing can be written any
    more, the study stops, since nothing else would be kept.

    Args:
        kind: How it failed.
        losses: How often it was lost since it last progressed, this time included.
        max_failures: Losses in a row after which it has failed.
        alone: Whether it had no other run beside it, and its device to itself.
    """
    if kind == "storage":
        return "stop"
    if kind == "lost" and losses <= max_failures:
        return "now"
    if kind == "memory" and not alone:
        return "alone"
    return "never"


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
