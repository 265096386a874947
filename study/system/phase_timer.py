"""When the phases of a start begin and end, written to phases.jsonl as they end."""

import contextlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property

from analysis.rundir import PhaseRow, RunDir, RunDirError
from study.errors import StudyStoppedError


class PhaseTimer:
    """Writes down the phases of one start of a study."""

    def __init__(self, rundir: RunDir, began: float) -> None:
        """Write nothing yet.

        Args:
            rundir: Where phases.jsonl is.
            began: When the command began, in Unix seconds.
        """
        self._rundir = rundir
        self._began = began

    def started(self) -> None:
        """Write down that the start-up has ended."""
        self._write("start-up", self._began, 1)

    @contextmanager
    def phase(self, name: str, slots: int = 1) -> Iterator[None]:
        """Write down how long a block took, also where an error or a signal ends it.

        Args:
            name: As `PhaseRow` has it.
            slots: Runs at once.
        """
        begin = time.time()
        try:
            yield
        except BaseException:
            # What ended the phase is to be heard of, not that there is no room for its row.
            with contextlib.suppress(OSError, StudyStoppedError):
                self._write(name, begin, slots)
            raise
        self._write(name, begin, slots)

    @cached_property
    def _start(self) -> int:
        """Which start of the study this is."""
        # A start that was interrupted early is in one of the two only, as is one of an earlier
        # version of this project.
        begun = [len(self._rundir.read_study().get("starts", []))]
        with contextlib.suppress(RunDirError):  # times are no reason not to go on
            begun += [row.start for row in self._rundir.read_phases()]
        return 1 + max(begun)

    def _write(self, name: str, begin: float, slots: int) -> None:
        self._rundir.append_phase(PhaseRow(self._start, name, begin, time.time(), slots))
