"""The user's cache directory: whole files only, and one process at a time to make them."""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import platformdirs
from filelock import FileLock, Timeout
from safetensors import SafetensorError

from study.errors import UserError
from study.system.progress import console

T = TypeVar("T")


def cache_dir() -> Path:
    """The cache directory of this user, created on first use.

    It is the place that the operating system sets aside for such files; `XDG_CACHE_HOME` moves it.

    Raises:
        UserError: If it cannot be created.
    """
    path = platformdirs.user_cache_path("dropout-study", appauthor=False)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _cannot_write(path, error) from error
    return path


def cached(entry: Path, load: Callable[[], T | None], make: Callable[[], T]) -> T:
    """What the cache holds, or else what `make` makes.

    Two processes that want the same entry at once make it once: the second waits for the first.

    Args:
        entry: The file or folder in the cache.
        load: Reads the entry; None if it is not there or damaged.
        make: Makes the thing and writes the entry.
    """
    found = load()
    if found is not None:
        return found
    with locked(entry):
        found = load()
        return make() if found is None else found


@contextmanager
def locked(entry: Path) -> Iterator[None]:
    """Hold the lock of a cache entry; while another process holds it, say so once and wait.

    A process that dies lets go of its lock.
    """
    lock = FileLock(f"{entry}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        console.print(
            f"Waiting for another process, which is busy with {entry.name} ...", soft_wrap=True
        )
        lock.acquire()
    except OSError as error:
        raise _cannot_write(entry.parent, error) from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Write a file that appears whole or not at all. The caller holds the lock of its entry.

    What an interrupted process has left behind is overwritten by the next one, since the temporary
    name is always the same.

    Yields:
        A temporary path in the same folder, to be written to; it takes its real name at the end.

    Raises:
        UserError: If it cannot be written, for example because the disk is full.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except (OSError, SafetensorError) as error:  # safetensors raises its own, for a full disk too
        raise _cannot_write(path.parent, error) from error
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def workspace(entry: Path) -> Iterator[Path]:
    """An empty folder beside a cache entry, for downloads; the caller holds the entry's lock.

    It is emptied at the start as well as removed at the end, since a killed process leaves its
    files behind.
    """
    folder = entry.with_name(f"{entry.name}.download")
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise _cannot_write(entry.parent, error) from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def sha256_of(content: Path | bytes | memoryview) -> str:
    """The SHA-256 of a file or of bytes, in hexadecimal."""
    if isinstance(content, Path):
        with content.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    return hashlib.sha256(content).hexdigest()


def _cannot_write(folder: Path, error: OSError | SafetensorError) -> UserError:
    reason = getattr(error, "strerror", None) or error
    return UserError(
        f"The cache directory {folder} cannot be written to ({reason}): free some "
        "space there, or set XDG_CACHE_HOME to another directory."
    )
