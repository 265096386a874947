"""The exceptions that are meant for the person at the keyboard."""

import errno

from analysis.rundir.errors import on_one_line

#: What the operating system says when a place for files is full, read-only, gone or broken.
_STORAGE_ERRNOS = {
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ENOENT, errno.ESTALE, errno.EACCES,
    errno.EPERM, errno.ENOTDIR,
}  # fmt: skip

#: The same in the words of safetensors and SQLite, which wrap it into errors of their own.
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
    """A mistake that the user can mend, or a thing that only the user can provide.

    The message is complete in itself: what is wrong, where, and what to do. `run_study.py` prints
    it without a traceback and exits with status 2. It is one line, whatever the name of a file in
    it.
    """

    def __init__(self, message: str) -> None:
        super().__init__(on_one_line(message))


class StudyStoppedError(UserError):
    """The study had to stop; what it has done is kept, and it can go on."""


class StorageError(StudyStoppedError):
    """The run directory cannot be written to."""


def storage_error(error: BaseException | str, place: object) -> StorageError | None:
    """What an error says about the place that files go to; None where it is about something else.

    Args:
        error: The error, or its traceback as text.
        place: What could not be written to.
    """
    if isinstance(error, OSError) and error.errno in _STORAGE_ERRNOS:
        reason = error.strerror
    elif words := [words for words in _STORAGE_WORDS if words in str(error)]:
        reason = words[0]
    else:
        return None
    return StorageError(
        f"{place} cannot be written to ({reason}): free some space there, or bring it back."
    )
