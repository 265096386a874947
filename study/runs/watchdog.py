"""A watchdog that ends its own process when a run hangs."""

import faulthandler
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from study.errors import storage_error


class Watch:
    """Ends this process when it has shown no sign of life for too long.

    It is the interpreter's own watchdog, which needs no cooperation of the code that hangs.
    """

    def __init__(self, seconds: float | None, file: TextIO | None) -> None:
        """Watch for so many seconds and write where it stood; None: do not watch."""
        self._seconds, self._file = seconds, file

    def alive(self) -> None:
        """Show a sign of life."""
        if self._seconds is not None and self._file is not None:
            faulthandler.dump_traceback_later(self._seconds, exit=True, file=self._file)

    def pause(self) -> None:
        """Watch no more until the next sign of life."""
        faulthandler.cancel_dump_traceback_later()


@contextmanager
def watched(file: Path, seconds: float | None) -> Iterator[Watch]:
    """End this process if the block hangs.

    Args:
        file: Where it stood is left there.
        seconds: Without a sign of life; None: wait for ever.

    Raises:
        StorageError: The file cannot be written.
    """
    if seconds is None:
        yield Watch(None, None)
        return
    try:
        file.parent.mkdir(exist_ok=True)
        opened = file.open("w")
    except OSError as error:
        raise storage_error(error, file) or error from error
    with opened:
        watch = Watch(seconds, opened)
        watch.alive()
        try:
            yield watch
        finally:
            watch.pause()
            file.unlink(missing_ok=True)
