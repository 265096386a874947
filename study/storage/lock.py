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

#: The lock file in a run directory.
LOCK = ".lock"


@contextmanager
def lock_directory(rundir: RunDir) -> Iterator[None]:
    """Lock a run directory while a block runs; create it if necessary.

    The lock of a process that dies is released. A directory created here that is still empty at the
    end is removed.

    Raises:
        UserError: Another process holds the lock, or the directory cannot be created.
    """
    is_new = not rundir.path.exists()
    try:
        rundir.path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(rundir.path / LOCK)
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"{rundir.path}: another process is working on this study; wait for it to finish, stop"
            " it, or give another --name."
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
    """Hold exclusive access to a study while a block runs; yield the run directory to use.

    A study in an object store is downloaded first. Changes to its files are then uploaded, and all
    of them are in the store when the block ends.

    Args:
        rundir: The run directory on this machine's disk.
        remote: The run directory in the object store; None for a study on disk.
        notify: Called with a message while waiting for another process's lease.

    Raises:
        UserError: Another process is working on the study.
        StorageError: The storage cannot be read or written to.
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
