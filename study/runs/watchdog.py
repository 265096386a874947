"""Watchdog that exits its process when a run hangs."""

import faulthandler
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from study.errors import storage_error


class Watchdog:
    """Exits this process if it shows no sign of life for too long.

    Uses the interpreter's faulthandler, which works whatever the hung code does.
    """

    def __init__(self, seconds: float | None, file: TextIO | None) -> None:
        """Exit after `seconds` without a sign of life, with a traceback in `file`; None: never."""
        self._seconds, self._file = seconds, file

    def alive(self) -> None:
        """Show a sign of life."""
        if self._seconds is not None and self._file is not None:
            faulthandler.dump_traceback_later(self._seconds, exit=True, file=self._file)

    def pause(self) -> None:
        """Stop watching until the next sign of life."""
        faulthandler.cancel_dump_traceback_later()


@contextmanager
def watched(file: Path, seconds: float | None) -> Iterator[Watchdog]:
    """Exit this process if the block hangs.

    Args:
        file: File for the traceback of a hang.
        seconds: Timeout without a sign of life; None: wait forever.

    Raises:
        StorageError: The file cannot be written.
    """
    if seconds is None:
        yield Watchdog(None, None)
        return
    try:
        file.parent.mkdir(exist_ok=True)
        opened = file.open("w")
    except OSError as error:
        raise storage_error(error, file) or error from error
    with opened:
        watch = Watchdog(seconds, opened)
        watch.alive()
        try:
            yield watch
        finally:
            watch.pause()
            file.unlink(missing_ok=True)
