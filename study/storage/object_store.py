"""Folders in an object store or any other file system that pyarrow knows, given by a URI.

    s3://bucket/studies?endpoint_override=127.0.0.1:9000&scheme=http

Files are written whole: a reader meets the old content or the new. Credentials come from the
environment or from the machine's role, never from the URI, since that is recorded and printed.
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

#: What pyarrow opens, and how such a URI looks.
SCHEMES = {
    "s3": "s3://BUCKET/FOLDER",
    "gs": "gs://BUCKET/FOLDER",
    "abfs": "abfs://CONTAINER@ACCOUNT.dfs.core.windows.net/FOLDER",
    "file": "file:///FOLDER",
    "hdfs": "hdfs://HOST:PORT/FOLDER",
}

#: Seconds in which a store has to answer, and how often it is asked; pyarrow would wait for minutes
#: where a URI is all that it has.
_CONNECT, _ANSWER, _ATTEMPTS = 3.0, 5.0, 3

#: Options of an S3 URI that `S3FileSystem` takes under the same name.
_S3_TEXTS = ("region", "scheme", "endpoint_override", "tls_ca_file_path")
_S3_SWITCHES = ("allow_bucket_creation", "allow_bucket_deletion")

_SECRET = re.compile(r"key|secret|token|passw|credential|^sig", re.IGNORECASE)

#: What is wrong, by a pattern in pyarrow's message, and what to do.
_REASONS = (
    (r"NO_SUCH_BUCKET|bucket does not exist", "there is no such bucket", "make it, or name one"),
    (
        r"ACCESS_DENIED|INVALID_ACCESS_KEY|SIGNATURE_DOES_NOT_MATCH|INVALID_CLIENT_TOKEN"
        r"|EXPIRED_TOKEN|status 40[13]|[Ff]orbidden|[Uu]nauthorized",
        "access is denied",
        "check the credentials in the environment, or the machine's role",
    ),
    (
        r"Could not resolve host|resolve hostname",
        "its host is not known",
        "check the address and the network",
    ),
    (
        r"NETWORK_CONNECTION|curlCode|[Cc]onnect|[Tt]imed? ?out|SLOW_DOWN|SERVICE_UNAVAILABLE"
        r"|status 50[0234]",
        "it cannot be reached",
        "check the address and the network",
    ),
    (r"[Nn]o space left", "no space is left", "free some"),
    (r"[Rr]ead-only", "it is read-only", "make it writable"),
    (r"[Pp]ermission denied|EACCES", "permission denied", "let this user write there"),
)


@dataclass(frozen=True)
class Entry:
    """A file in a store."""

    name: str
    """Its path within the folder that was listed from."""
    size: int
    """Bytes."""
    mtime: float
    """When it was written, Unix seconds, by the store's clock."""


@dataclass(frozen=True)
class Remote:
    """A folder in a store.

    Every method raises StorageError, one line with the URI, where the store does not do its part.
    """

    uri: str

    def child(self, name: str) -> "Remote":
        """A folder in this one."""
        parts = urlsplit(self.uri)
        path = f"{parts.path.rstrip('/')}/{quote(name)}"
        return Remote(urlunsplit(parts._replace(path=path)))

    def upload(self, file: Path, name: str) -> None:
        """Write a local file, whole."""
        import pyarrow

        if file.stat().st_size == 0:  # cannot be mapped
            self.write(name, b"")
            return
        with pyarrow.memory_map(str(file)) as mapped:
            self.write(name, mapped.read_buffer())

    def write(self, name: str, content: "bytes | Any") -> None:
        """Write a file, whole.

        Args:
            name: Its path within this folder; folders on the way come into being.
            content: Bytes, or pyarrow's buffer.
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
        """The content of a file; None where there is none."""
        with self._errors():
            system, path = self._at(name)
            try:
                with system.open_input_stream(path) as stream:
                    content: bytes = stream.read()
                    return content
            except FileNotFoundError:
                return None

    def download(self, name: str, file: Path) -> bool:
        """Copy a file from here to a local one, which appears whole; whether there was one."""
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
        """Delete a file; nothing where there is none."""
        with self._errors(), contextlib.suppress(FileNotFoundError):
            system, path = self._at(name)
            system.delete_file(path)

    def find(self, name: str) -> Entry | None:
        """Size and time of a file; None where there is none."""
        with self._errors():
            system, path = self._at(name)
            info = system.get_file_info(path)
            return _entry(info, name) if info.is_file else None

    def exists(self, name: str) -> bool:
        """Whether there is such a file."""
        return self.find(name) is not None

    def files(self, folder: str = "") -> list[Entry]:
        """All files in a folder and the folders within, by their paths in this one, sorted.

        Files whose names begin with a dot are left out.
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
        """Names of the folders in a folder, sorted."""
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
        except (OSError, ValueError, NotImplementedError) as error:  # all of pyarrow's are such
            raise _in_few_words(self.uri, error) from error


def is_uri(storage: str) -> bool:
    """Whether a place for run directories is one in a store, and not a path."""
    return "://" in storage


def check_uri(uri: str) -> None:
    """Make sure that a URI is one that studies can be kept under; nothing is opened.

    Raises:
        UserError: It is not.
    """
    parts = urlsplit(uri)
    secrets = [name for name, _ in parse_qsl(parts.query, True) if _SECRET.search(name)]
    if parts.password or secrets or (parts.scheme == "s3" and parts.username):
        place = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query=""))
        raise UserError(
            f"--storage {place}: credentials stand in the URI, which is recorded and printed; give"
            " them in the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, ...), or let the"
            " machine's role have them."
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
        raise UserError(f"--storage {uri}: {wrong} in it; give {SCHEMES[parts.scheme]}.")


@lru_cache(maxsize=64)
def _open(uri: str) -> "tuple[fs.FileSystem, str]":
    """The file system of a URI and the path in it, opened once per process."""
    from pyarrow import fs

    parts = urlsplit(uri)
    query = dict(parse_qsl(parts.query, True))
    if parts.scheme == "gs":  # else it goes on trying for 15 minutes
        query.setdefault("retry_limit_seconds", "20")
    system, root = fs.FileSystem.from_uri(urlunsplit(parts._replace(query=urlencode(query))))
    if parts.scheme == "s3" and query.keys() <= {*_S3_TEXTS, *_S3_SWITCHES}:
        given = {name: query[name] for name in _S3_TEXTS if name in query}
        given.setdefault("region", system.region)
        # `from_uri` goes by these variables; a file system that is made like this does not.
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
    """Whether folders must be made, and files renamed, as on a disk."""
    return system.type_name in ("local", "hdfs")


def _entry(info: "fs.FileInfo", name: str) -> Entry:
    return Entry(name, info.size, info.mtime_ns / 1e9)


def _in_few_words(uri: str, error: Exception) -> StorageError:
    """What a long message of pyarrow's means."""
    text = str(error)
    for pattern, reason, remedy in _REASONS:
        if re.search(pattern, text):
            return StorageError(f"{uri}: {reason}; {remedy}.")
    first = text.strip().splitlines()[0] if text.strip() else type(error).__name__
    # What a store answers may be a page long.
    short = first if len(first) <= 160 else f"{first[:157]}..."
    return StorageError(
        f"{uri}: the storage failed ({short}); mend that, or give another --storage."
    )
