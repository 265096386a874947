"""Folders in an object store, or any other file system that pyarrow supports, by URI.

    s3://bucket/studies?endpoint_override=127.0.0.1:9000&scheme=http

Writes are atomic: a reader sees either the old or the new content. Credentials come from the
environment or the machine's role, never from the URI, since it is recorded and printed.
"""

import contextlib
import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, quote, urlencode, urlsplit, urlunsplit

from study.errors import StorageError, UserError

if TYPE_CHECKING:
    from pyarrow import fs

#: Supported URI schemes, with the form of each URI.
SCHEMES = {
    "s3": "s3://BUCKET/FOLDER",
    "gs": "gs://BUCKET/FOLDER",
    "abfs": "abfs://CONTAINER@ACCOUNT.dfs.core.windows.net/FOLDER",
    "file": "file:///FOLDER",
    "hdfs": "hdfs://HOST:PORT/FOLDER",
}

#: Timeouts in seconds to connect and for a response, and the number of attempts; for a file system
#: opened from a plain URI, pyarrow would wait for minutes.
_CONNECT, _ANSWER, _ATTEMPTS = 3.0, 5.0, 3

#: Query parameters of an S3 URI that `S3FileSystem` accepts under the same name.
_S3_TEXTS = ("region", "scheme", "endpoint_override", "tls_ca_file_path")
_S3_SWITCHES = ("allow_bucket_creation", "allow_bucket_deletion")

_SECRET = re.compile(r"key|secret|token|passw|credential|^sig", re.IGNORECASE)

#: Patterns in pyarrow's messages, each with the reason and the remedy to print.
_REASONS = (
    (
        r"NO_SUCH_BUCKET|bucket does not exist",
        "the bucket does not exist",
        "create it, or fix its name",
    ),
    (
        r"ACCESS_DENIED|INVALID_ACCESS_KEY|SIGNATURE_DOES_NOT_MATCH|INVALID_CLIENT_TOKEN"
        r"|EXPIRED_TOKEN|status 40[13]|[Ff]orbidden|[Uu]nauthorized",
        "access is denied",
        "check the credentials in the environment, or the machine's role",
    ),
    (
        r"Could not resolve host|resolve hostname",
        "its host name cannot be resolved",
        "check the address and the network",
    ),
    (
        r"NETWORK_CONNECTION|curlCode|[Cc]onnect|[Tt]imed? ?out|SLOW_DOWN|SERVICE_UNAVAILABLE"
        r"|status 50[0234]",
        "it cannot be reached",
        "check the address and the network",
    ),
    (r"[Nn]o space left", "no space is left", "free some space"),
    (r"[Rr]ead-only", "it is read-only", "make it writable"),
    (r"[Pp]ermission denied|EACCES", "permission denied", "give this user write access"),
)


@dataclass(frozen=True)
class Entry:
    """A file in an object store."""

    name: str
    """Path relative to the listed folder."""
    size: int
    """Size in bytes."""
    mtime: float
    """Modification time by the store's clock, Unix seconds."""


@dataclass(frozen=True)
class Remote:
    """A folder in an object store.

    If the store fails, every method raises StorageError with a one-line message that names the URI.
    """

    uri: str

    def child(self, name: str) -> "Remote":
        """Return a subfolder."""
        parts = urlsplit(self.uri)
        path = f"{parts.path.rstrip('/')}/{quote(name)}"
        return Remote(urlunsplit(parts._replace(path=path)))

    def upload(self, file: Path, name: str) -> None:
        """Upload a local file atomically."""
        import pyarrow

        if file.stat().st_size == 0:  # an empty file cannot be mapped
            self.write(name, b"")
            return
        with pyarrow.memory_map(str(file)) as mapped:
            self.write(name, mapped.read_buffer())

    def write(self, name: str, content: "bytes | Any") -> None:
        """Write a file atomically.

        Args:
            name: Path relative to this folder; missing parent folders are created.
            content: Bytes or a pyarrow buffer.
        """
        with self._errors():
            system, path = self._at(name)
            if not _has_folders(system):
                with system.open_output_stream(path) as stream:
                    stream.write(content)
                return
            folder, base = path.rsplit("/", 1)
            partial = f"{folder}/.{base}.{uuid.uuid4().hex[:8]}.part"
            system.create_dir(folder)
            try:
                with system.open_output_stream(partial) as stream:
                    stream.write(content)
                system.move(partial, path)
            except OSError:
                with contextlib.suppress(OSError):
                    system.delete_file(partial)
                raise

    def read(self, name: str) -> bytes | None:
        """Return the content of a file; None if it does not exist."""
        with self._errors():
            system, path = self._at(name)
            try:
                with system.open_input_stream(path) as stream:
                    content: bytes = stream.read()
                    return content
            except FileNotFoundError:
                return None

    def download(self, name: str, file: Path) -> bool:
        """Download a file atomically; return whether it exists."""
        partial = file.with_name(f".{file.name}.part")
        with self._errors():
            system, path = self._at(name)
            try:
                stream = system.open_input_stream(path)
            except FileNotFoundError:
                return False
            with stream:
                file.parent.mkdir(parents=True, exist_ok=True)
                with partial.open("wb") as local:
                    while chunk := stream.read(1 << 24):
                        local.write(chunk)
            partial.replace(file)
        return True

    def delete(self, name: str) -> None:
        """Delete a file if it exists."""
        with self._errors(), contextlib.suppress(FileNotFoundError):
            system, path = self._at(name)
            system.delete_file(path)

    def find(self, name: str) -> Entry | None:
        """Return the size and time of a file; None if it does not exist."""
        with self._errors():
            system, path = self._at(name)
            info = system.get_file_info(path)
            return _entry(info, name) if info.is_file else None

    def exists(self, name: str) -> bool:
        """Return whether a file exists."""
        return self.find(name) is not None

    def files(self, folder: str = "") -> list[Entry]:
        """Return all files below a folder, sorted, with paths relative to this one.

        Files whose names begin with a dot are omitted.
        """
        from pyarrow import fs

        with self._errors():
            system, root = self._at("")
            _, path = self._at(folder)
            selector = fs.FileSelector(path, recursive=True, allow_not_found=True)
            found = [
                _entry(info, info.path.removeprefix(f"{root}/"))
                for info in system.get_file_info(selector)
                if info.is_file and not info.base_name.startswith(".")
            ]
        return sorted(found, key=lambda entry: entry.name)

    def folders(self, folder: str = "") -> list[str]:
        """Return the names of a folder's subfolders, sorted."""
        from pyarrow import fs

        with self._errors():
            system, path = self._at(folder)
            selector = fs.FileSelector(path, allow_not_found=True)
            return sorted(
                info.base_name
                for info in system.get_file_info(selector)
                if info.type == fs.FileType.Directory
            )

    def _at(self, name: str) -> "tuple[fs.FileSystem, str]":
        system, root = _open(self.uri)
        return system, f"{root}/{name}" if name else root

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, NotImplementedError) as error:  # all that pyarrow raises
            raise _storage_error(self.uri, error) from error


def is_uri(storage: str) -> bool:
    """Return whether a storage location is a URI rather than a path."""
    return "://" in storage


def check_uri(uri: str) -> None:
    """Check that a URI is valid for storing studies; no connection is opened.

    Raises:
        UserError: It is not valid.
    """
    parts = urlsplit(uri)
    secrets = [name for name, _ in parse_qsl(parts.query, True) if _SECRET.search(name)]
    if parts.password or secrets or (parts.scheme == "s3" and parts.username):
        place = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query=""))
        raise UserError(
            f"--storage {place}: the URI contains credentials, but it is recorded and printed; put"
            " them in the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, ...), or use the"
            " machine's role."
        )
    if parts.scheme not in SCHEMES:
        known = ", ".join(SCHEMES.values())
        raise UserError(f"--storage {uri}: give a path, or a URI of the form {known}.")
    host = parts.netloc.rpartition("@")[2]
    if parts.scheme == "file":
        wrong = "no absolute path" if parts.netloc or len(parts.path) < 2 else ""
    else:
        wrong = "" if host else "no bucket"
    if wrong:
        raise UserError(f"--storage {uri}: {wrong} in the URI; give {SCHEMES[parts.scheme]}.")


@lru_cache(maxsize=64)
def _open(uri: str) -> "tuple[fs.FileSystem, str]":
    """Open the file system of a URI, once per process; return it with the path in it."""
    from pyarrow import fs

    parts = urlsplit(uri)
    query = dict(parse_qsl(parts.query, True))
    if parts.scheme == "gs":  # the default is 15 minutes of retries
        query.setdefault("retry_limit_seconds", "20")
    system, root = fs.FileSystem.from_uri(urlunsplit(parts._replace(query=urlencode(query))))
    if parts.scheme == "s3" and query.keys() <= {*_S3_TEXTS, *_S3_SWITCHES}:
        given = {name: query[name] for name in _S3_TEXTS if name in query}
        given.setdefault("region", system.region)
        # `from_uri` honours these variables; the `S3FileSystem` constructor does not.
        for variable in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"):
            if address := os.environ.get(variable):
                given.setdefault("endpoint_override", address)
        system = fs.S3FileSystem(
            **given,
            **{
                name: query[name].lower() in ("true", "1") for name in _S3_SWITCHES if name in query
            },
            connect_timeout=_CONNECT,
            request_timeout=_ANSWER,
            retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=_ATTEMPTS),
            allow_delayed_open=True,  # a small file is one request instead of three
        )
    return system, root.rstrip("/")


def _has_folders(system: "fs.FileSystem") -> bool:
    """Return whether folders must be created, and files renamed, as on a disk."""
    return system.type_name in ("local", "hdfs")


def _entry(info: "fs.FileInfo", name: str) -> Entry:
    return Entry(name, info.size, info.mtime_ns / 1e9)


def _storage_error(uri: str, error: Exception) -> StorageError:
    """Summarise one of pyarrow's long messages."""
    text = str(error)
    for pattern, reason, remedy in _REASONS:
        if re.search(pattern, text):
            return StorageError(f"{uri}: {reason}; {remedy}.")
    first = text.strip().splitlines()[0] if text.strip() else type(error).__name__
    # A store's response may be a page long.
    short = first if len(first) <= 160 else f"{first[:157]}..."
    return StorageError(
        f"{uri}: the storage failed ({short}); fix the cause, or give another --storage."
    )
