"""Begin and end times of the phases of a start, written to phases.jsonl as each one ends."""

import contextlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property

from analysis.rundir import PhaseRow, RunDir, RunDirError
from study.errors import StudyStoppedError


class PhaseTimer:
    """Records the phases of one start of a study."""

    def __init__(self, rundir: RunDir, began: float) -> None:
        """Create the timer; nothing is written yet.

        Args:
            rundir: The run directory that holds phases.jsonl.
            began: When the command began, in Unix seconds.
        """
        self._rundir = rundir
        self._began = began

    def record_start_up(self) -> None:
        """Record the end of the start-up."""
        self._write("start-up", self._began, 1)

    @contextmanager
    def phase(self, name: str, slots: int = 1) -> Iterator[None]:
        """Record how long a block takes, even if an error or a signal ends it.

        Args:
            name: As in `PhaseRow`.
            slots: Number of concurrent runs.
        """
        begin = time.time()
        try:
            yield
        except BaseException:
            # Report what ended the phase, not a failure to write its row.
            with contextlib.suppress(OSError, StudyStoppedError):
                self._write(name, begin, slots)
            raise
        self._write(name, begin, slots)

    @cached_property
    def _start(self) -> int:
        """Number of this start of the study, from 1."""
        # A start that was interrupted early is in only one of the two.
        begun = [len(self._rundir.read_study().get("starts", []))]
        with contextlib.suppress(RunDirError):  # unreadable times must not stop the study
            begun += [row.start for row in self._rundir.read_phases()]
        return 1 + max(begun)

    def _write(self, name: str, begin: float, slots: int) -> None:
        self._rundir.append_phase(PhaseRow(self._start, name, begin, time.time(), slots))
