"""Check before the first trial that every node sees the same storage as the driver.

The driver writes a file with a token; a node reads it, and writes and deletes its own file. This
detects a path that exists on two machines but is not shared.
"""

import contextlib
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from study.errors import StorageError
from study.storage.object_store import Remote

#: The driver's file.
DRIVER_FILE = ".probe-driver"


@contextmanager
def probed(place: Remote | Path) -> Iterator[str]:
    """Keep the driver's file in a run directory while a block runs; yield its token.

    Raises:
        StorageError: The file cannot be written to the object store.
        OSError: The file cannot be written to disk.
    """
    token = uuid.uuid4().hex
    _write(place, DRIVER_FILE, token.encode())
    try:
        yield token
    finally:
        with contextlib.suppress(OSError, StorageError):
            _delete(place, DRIVER_FILE)


def probe(place: Remote | Path, token: str) -> str | None:
    """Return why runs on this machine cannot use a run directory; None if they can.

    Args:
        place: The run directory, in an object store or as an absolute path.
        token: Content of the driver's file.
    """
    mine = f".probe-{uuid.uuid4().hex}"
    try:
        found = _read(place, DRIVER_FILE)
        if found is None or found != token.encode():
            shown = place.uri if isinstance(place, Remote) else place
            return f"{shown} is not shared with the driver: the driver's file is missing there"
        _write(place, mine, b"-")
        _delete(place, mine)
    except StorageError as error:
        return str(error)
    except OSError as error:
        return f"{place} cannot be written to ({error.strerror or error})"
    return None


def _write(place: Remote | Path, name: str, content: bytes) -> None:
    if isinstance(place, Remote):
        place.write(name, content)
    else:
        (place / name).write_bytes(content)


def _read(place: Remote | Path, name: str) -> bytes | None:
    if isinstance(place, Remote):
        return place.read(name)
    file = place / name
    return file.read_bytes() if file.exists() else None


def _delete(place: Remote | Path, name: str) -> None:
    if isinstance(place, Remote):
        place.delete(name)
    else:
        (place / name).unlink(missing_ok=True)
