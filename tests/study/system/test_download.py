"""Downloads from a local web server and from stand-ins for npm."""

import base64
import gzip
import hashlib
import io
import random
import re
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal

import pytest

from study.errors import UserError
from study.system.download import (
    NpmPackage,
    SourceError,
    WebFile,
    download,
    first_reachable,
    npm_pack,
    read_members,
)

CONTENT = bytes(range(256)) * 10_000


class Handler(BaseHTTPRequestHandler):
    """Serves /whole, /cut (a truncated response) and /silent (no response for two seconds)."""

    def do_GET(self) -> None:
        if self.path == "/silent":
            time.sleep(2)
        self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        with suppress(BrokenPipeError):
            self.wfile.write(CONTENT[:1000] if self.path == "/cut" else CONTENT)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


@pytest.fixture
def server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_address[1]}"
        httpd.shutdown()


def test_download(server: str, tmp_path: Path) -> None:
    sha256 = hashlib.sha256(CONTENT).hexdigest()
    download(WebFile(f"{server}/whole", "sha256", sha256[:8]), tmp_path / "file", "it")
    assert (tmp_path / "file").read_bytes() == CONTENT


@pytest.mark.parametrize("path", ["whole", "cut"])
def test_file_that_differs_from_the_published_one_is_refused(
    server: str, tmp_path: Path, path: str
) -> None:
    published = hashlib.md5(CONTENT if path == "cut" else b"another").hexdigest()
    with pytest.raises(SourceError, match="does not match the published file"):
        download(WebFile(f"{server}/{path}", "md5", published), tmp_path / "file", "it")


def test_unresponsive_server_times_out(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("study.system.download.TIMEOUT", 0.2)
    started = time.monotonic()
    with pytest.raises(SourceError, match="timed out"):
        download(WebFile(f"{server}/silent", "md5", "0" * 32), tmp_path / "file", "it")
    assert time.monotonic() - started < 1.5


def test_connection_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="Connection refused"):
        download(WebFile("http://127.0.0.1:1/", "md5", "0" * 32), tmp_path / "file", "it")


# --- npm --------------------------------------------------------------------------------------


def package(content: bytes) -> NpmPackage:
    """A package whose published tarball has this content."""
    sha512 = base64.b64encode(hashlib.sha512(content).digest()).decode()
    return NpmPackage("name", "1.0.0", len(content), sha512)


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is the only entry of PATH; there is no npm next to Python either."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python" / "python"))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "folder"
    folder.mkdir()
    return folder


def stand_in(folder: Path, script: str) -> None:
    """Create a shell script that stands in for npm."""
    npm = folder / "npm"
    npm.write_text(f"#!/bin/sh\n{script}\n")
    npm.chmod(0o755)


def test_npm_fetches_the_published_tarball(path: Path, folder: Path) -> None:
    stand_in(path, "printf content > name-1.0.0.tgz")
    assert npm_pack(package(b"content"), folder).read_bytes() == b"content"


@pytest.mark.usefixtures("path")
def test_npm_next_to_python_is_found(folder: Path) -> None:
    Path(sys.executable).parent.mkdir()
    stand_in(Path(sys.executable).parent, "printf content > name-1.0.0.tgz")
    assert npm_pack(package(b"content"), folder).name == "name-1.0.0.tgz"


def test_altered_package_is_refused(path: Path, folder: Path) -> None:
    stand_in(path, "printf altered > name-1.0.0.tgz")
    with pytest.raises(SourceError, match="does not match the published package"):
        npm_pack(package(b"content"), folder)


@pytest.mark.usefixtures("path")
def test_missing_npm(folder: Path) -> None:
    with pytest.raises(SourceError, match="npm is not installed"):
        npm_pack(package(b"content"), folder)


def test_error_of_npm_is_reported(path: Path, folder: Path) -> None:
    stand_in(path, "echo 'npm error code E404'; echo 'npm error 404 Not Found' >&2; exit 1")
    with pytest.raises(SourceError, match=r"^npm pack failed: 404 Not Found$"):
        npm_pack(package(b"content"), folder)


def test_stalled_npm_is_killed(path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(path, "exec /bin/sleep 30")
    monkeypatch.setattr("study.system.download.STALL", 0.3)
    started = time.monotonic()
    with pytest.raises(SourceError, match="npm has received no data"):
        npm_pack(package(b"content"), folder)
    assert time.monotonic() - started < 10


# --- archives and sources ---------------------------------------------------------------------


def test_members_are_read_without_unpacking(tmp_path: Path) -> None:
    archive = tmp_path / "folder" / "archive.tgz"
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as tar:
        for name in ("../../wanted", "unwanted"):
            member = tarfile.TarInfo(name)
            member.size = 7
            tar.addfile(member, io.BytesIO(b"content"))
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    assert read_members(archive, ["wanted", "link"]) == {"wanted": b"content"}
    assert [path.name for path in tmp_path.rglob("*")] == ["folder", "archive.tgz"]


#: Type and link target of a hostile member that has the name of a wanted file.
SPECIAL = {
    "symlink": (tarfile.SYMTYPE, "/etc/hostname"),
    "link": (tarfile.LNKTYPE, "unwanted"),
    "link to the outside": (tarfile.LNKTYPE, "../../../etc/hostname"),
    "link to itself": (tarfile.LNKTYPE, "folder/wanted"),
    "character device": (tarfile.CHRTYPE, ""),
    "block device": (tarfile.BLKTYPE, ""),
    "pipe": (tarfile.FIFOTYPE, ""),
    "folder": (tarfile.DIRTYPE, ""),
}


@pytest.mark.parametrize("kind", SPECIAL)
def test_only_regular_files_are_read(tmp_path: Path, kind: str) -> None:
    archive = tmp_path / "archive.tar"
    with tarfile.open(archive, "w") as tar:
        add(tar, "unwanted", b"secret")
        member = tarfile.TarInfo("folder/wanted")
        member.type, member.linkname = SPECIAL[kind]
        member.devmajor, member.devminor = 1, 5  # /dev/zero
        tar.addfile(member)
    assert read_members(archive, ["wanted"]) == {}
    assert [path.name for path in tmp_path.iterdir()] == ["archive.tar"]


@pytest.mark.parametrize("name", ["/wanted", "/etc/wanted", "../wanted", "a/../../../wanted"])
def test_paths_outside_the_folder_are_harmless(tmp_path: Path, name: str) -> None:
    archive = tmp_path / "folder" / "archive.tar"
    archive.parent.mkdir()
    with tarfile.open(archive, "w") as tar:
        add(tar, name, b"content")
    assert read_members(archive, ["wanted"]) == {"wanted": b"content"}
    assert [path.name for path in tmp_path.rglob("*")] == ["folder", "archive.tar"]


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def header(
    name: str, size: int, kind: bytes = tarfile.REGTYPE, pax: dict[str, str] | None = None
) -> bytes:
    """Return a member's header without its content, whatever size it claims."""
    member = tarfile.TarInfo(name)
    member.size, member.type, member.pax_headers = size, kind, pax or {}
    return member.tobuf(tarfile.PAX_FORMAT if pax else tarfile.GNU_FORMAT)


BOMBS = {
    "wanted": (header("wanted", 10**12), "it contains a file of 1,000,000,000,000 bytes"),
    "unwanted": (header("unwanted", 10**12), "it contains a file of 1,000,000,000,000 bytes"),
    "size in an extended header": (
        header("wanted", 1, pax={"size": str(10**12)}),
        "it contains a file of 1,000,000,000,000 bytes",
    ),
    "an extended header": (header("x", 10**12, tarfile.XHDTYPE), "it contains a file of 1,000,000"),
    "a long name": (
        header("x", 10**12, tarfile.GNUTYPE_LONGNAME),
        "it contains a file of 1,000,000",
    ),
    "a sparse file": (
        header("wanted", 0, pax={"GNU.sparse.map": "0,0", "GNU.sparse.size": str(10**12)}),
        "it contains a file of 1,000,000,000,000 bytes",
    ),
    "below zero": (header("wanted", -512), "it cannot be read as a tar archive"),
}


@pytest.mark.parametrize("bomb", BOMBS)
@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_bomb_is_refused_before_it_is_read(
    tmp_path: Path, bomb: str, mode: Literal["w", "w:gz"]
) -> None:
    """The archives hold only headers; reading the claimed content would fail differently."""
    content, message = BOMBS[bomb]
    archive = tmp_path / "archive.tar"
    with (gzip.open if mode == "w:gz" else open)(archive, "wb") as file:
        file.write(content + bytes(1024))
    with pytest.raises(ValueError, match=f"^{message}"):
        read_members(archive, ["wanted"])


def test_files_that_are_too_large_in_total(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = tmp_path / "archive.tar"
    with tarfile.open(archive, "w") as tar:
        for number in range(20):
            add(tar, f"{number}/wanted", bytes(10_000))
    assert read_members(archive, ["wanted"]) == {"wanted": bytes(10_000)}
    monkeypatch.setattr("study.system.download.LARGEST_ARCHIVE", 100_000)
    with pytest.raises(ValueError, match=r"^it unpacks to more than 100,000 bytes$"):
        read_members(archive, ["wanted"])


@pytest.mark.parametrize("damage", ["no archive", "cut"])
def test_damaged_archive(tmp_path: Path, damage: str) -> None:
    archive = tmp_path / "archive.tgz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(__file__)
    content = archive.read_bytes()
    archive.write_bytes(b"text" if damage == "no archive" else content[: len(content) // 2])
    with pytest.raises(ValueError, match="cannot be read as a tar archive"):
        read_members(archive, [Path(__file__).name])


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_corrupted_archive_yields_files_or_a_value_error(
    tmp_path: Path, mode: Literal["w", "w:gz", "w:bz2", "w:xz"]
) -> None:
    archive, chance = tmp_path / "archive", random.Random(0)
    with tarfile.open(archive, mode) as tar:
        add(tar, 150 * "n", b"content")
        add(tar, "wanted", chance.randbytes(100_000))
    content = archive.read_bytes()
    reasons = set()
    for number in range(200):
        altered = bytearray(content)
        # Every other change is in the headers.
        altered[chance.randrange(4096 if number % 2 else len(content))] = chance.randrange(256)
        archive.write_bytes(altered)
        try:
            read_members(archive, ["wanted"])
        except ValueError as error:
            reasons.add(re.sub(r"[\d,]+ bytes", "N bytes", str(error)))
    unreadable = "it cannot be read as a tar archive"
    too_large = "it contains a file of N bytes, larger than any expected"
    assert {unreadable} <= reasons <= {unreadable, too_large}


def fail(reason: str) -> str:
    raise SourceError(reason)


def test_first_source_that_works(capsys: pytest.CaptureFixture[str]) -> None:
    tried = {"a web site": lambda: fail("no answer"), "a shelf": lambda: "book"}
    assert first_reachable("The book", tried, "Buy it.") == "book"
    assert capsys.readouterr().out.splitlines() == [
        "The book: trying a web site",
        "The book: a web site failed: no answer",
        "The book: trying a shelf",
    ]


def test_all_sources_failing_is_one_error() -> None:
    tried = {"a web site": lambda: fail("no answer"), "a shelf": lambda: fail("empty")}
    with pytest.raises(UserError) as error:
        first_reachable("The book", tried, "Buy it.")
    assert str(error.value) == (
        "The book could not be downloaded (a web site: no answer; a shelf: empty). Buy it."
    )
