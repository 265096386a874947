"""Exclusive access to a run directory, synced to its object store."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from filelock import FileLock, Timeout

from analysis.rundir import RunDir
from study.errors import UserError, storage_error
from study.storage.lease import hold_lease
from study.storage.mirror import DriverMirror
from study.storage.object_store import Remote

#: The file by which a process holds a run directory.
LOCK = ".lock"


@contextmanager
def lock_directory(rundir: RunDir) -> Iterator[None]:
    """Let no other process write to a run directory while a block runs; it is made if need be.

    A process that dies lets go. A directory that is as empty as it was made is removed again.

    Raises:
        UserError: Another process has it, or it cannot be made.
    """
    is_new = not rundir.path.exists()
    try:
        rundir.path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(rundir.path / LOCK)
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"{rundir.path}: another process works on this study; wait for its end, stop it, or"
            " give another --name."
        ) from None
    except OSError as error:
        raise storage_error(error, rundir.path) or error from error
    try:
        yield
    finally:
        lock.release()
        if is_new and {file.name for file in rundir.path.glob("*")} <= {LOCK}:
            shutil.rmtree(rundir.path, ignore_errors=True)


@contextmanager
def exclusive_access(
    rundir: RunDir, remote: Remote | None, notify: Callable[[str], None]
) -> Iterator[RunDir]:
    """Let no other process work on a study while a block runs; yields the run directory to use.

    A study that is kept in a store is downloaded first. What happens to its files is then uploaded,
    and all of it is there when the block ends.

    Args:
        rundir: On this machine's disk.
        remote: The same in its store; None for a study that is kept on a disk.
        notify: Called with a line if another process's lease must be waited for.

    Raises:
        UserError: Another process works on it.
        StorageError: The place where it is kept cannot be read or written to.
    """
    with lock_directory(rundir):
        if remote is None:
            yield rundir
            return
        with hold_lease(remote, notify) as lease:
            mirror = DriverMirror(rundir.path, remote, guard=lease.check)
            try:
                mirror.pull()
                yield RunDir(rundir.path, mirror)
                mirror.finish()
            finally:
                mirror.close()
