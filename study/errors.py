"""Exceptions whose messages are meant for the user."""

import errno

from analysis.rundir.errors import on_one_line

#: Error numbers of storage that is full, read-only, missing, inaccessible or broken.
_STORAGE_ERRNOS = {
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ENOENT, errno.ESTALE, errno.EACCES,
    errno.EPERM, errno.ENOTDIR,
}  # fmt: skip

#: The same as text, for safetensors and SQLite, which raise their own errors.
_STORAGE_WORDS = (
    "No space left on device", "Disk quota exceeded", "Read-only file system",
    "database or disk is full", "attempt to write a readonly database",
    "unable to open database file", "disk I/O error", "StorageFull", "ReadOnlyFilesystem",
)  # fmt: skip


def first_line(error: BaseException | None) -> str:
    """Return the first line of an error's message."""
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else "no reason given"


class UserError(Exception):
    """An error the user can fix.

    The message is self-contained: what is wrong, where, and what to do. `run_study.py` prints it
    without a traceback and exits with status 2. It is always one line: unprintable characters, for
    example in file names, are escaped.
    """

    def __init__(self, message: str) -> None:
        super().__init__(on_one_line(message))


class StudyStoppedError(UserError):
    """The study had to stop; its work is kept, and it can be resumed."""


class StorageError(StudyStoppedError):
    """The run directory cannot be written to."""


def storage_error(error: BaseException | str, place: object) -> StorageError | None:
    """Return the StorageError for an error caused by storage; None for any other error.

    Args:
        error: The error, or its traceback as text.
        place: The folder or URI being written to.
    """
    if isinstance(error, OSError) and error.errno in _STORAGE_ERRNOS:
        reason = error.strerror
    elif words := [words for words in _STORAGE_WORDS if words in str(error)]:
        reason = words[0]
    else:
        return None
    return StorageError(
        f"{place} cannot be written to ({reason}): free some space there, or restore access to it."
    )
