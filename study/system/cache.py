"""The user's cache directory: complete files only, each created by one process at a time."""

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
    """Return this user's cache directory, created on first use.

    It is in the operating system's standard location; `XDG_CACHE_HOME` overrides it.

    Raises:
        UserError: It cannot be created.
    """
    path = platformdirs.user_cache_path("dropout-study", appauthor=False)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _cannot_write(path, error) from error
    return path


def cached(entry: Path, load: Callable[[], T | None], make: Callable[[], T]) -> T:
    """Return a cache entry, made first if it is missing or damaged.

    If two processes need the same entry at once, the second waits for the first to make it.

    Args:
        entry: The file or folder in the cache.
        load: Reads the entry; returns None if it is missing or damaged.
        make: Makes and writes the entry, and returns its content.
    """
    found = load()
    if found is not None:
        return found
    with locked(entry):
        found = load()
        return make() if found is None else found


@contextmanager
def locked(entry: Path) -> Iterator[None]:
    """Hold the lock of a cache entry; print a line and wait while another process holds it.

    The lock of a process that dies is released.
    """
    lock = FileLock(f"{entry}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        console.print(
            f"Waiting for another process to finish with {entry.name} ...", soft_wrap=True
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
    """Write a file atomically. The caller holds the lock of its entry.

    The temporary name is fixed, so the next process overwrites what an interrupted one left behind.

    Yields:
        A temporary path in the same folder to write to; it is renamed to `path` at the end.

    Raises:
        UserError: It cannot be written, for example because the disk is full.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except (OSError, SafetensorError) as error:  # safetensors has its own, even for a full disk
        raise _cannot_write(path.parent, error) from error
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def workspace(entry: Path) -> Iterator[Path]:
    """Provide an empty folder next to a cache entry for downloads; the caller holds its lock.

    The folder is also cleared at the start, since a killed process leaves its files behind.
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
    """Return the SHA-256 of a file or of bytes, in hexadecimal."""
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
