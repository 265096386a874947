"""The cache: complete files, each created by one process at a time."""

import errno
import hashlib
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors import SafetensorError

from study.errors import UserError
from study.system.cache import cache_dir, sha256_of, whole_file, workspace

#: A process that needs an entry which takes some seconds to make.
WANT = """
import sys, time
from pathlib import Path
from study.system.cache import cached, whole_file
entry = Path(sys.argv[1])

def load():
    return entry.read_text() if entry.exists() else None

def make():
    print("making", flush=True)
    with whole_file(entry) as partial:
        partial.write_text("half")
        time.sleep(float(sys.argv[2]))
        partial.write_text("whole")
    return "whole"

print(cached(entry, load, make))
"""


def want(entry: Path, seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WANT, str(entry), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_cache_dir_is_created_where_xdg_says(empty_cache: Path) -> None:
    assert not empty_cache.exists()
    assert cache_dir() == empty_cache
    assert empty_cache.is_dir()


def test_cache_dir_that_cannot_be_created(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"cannot be written to.*XDG_CACHE_HOME"):
        cache_dir()


def test_file_is_written_atomically(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "entry"
    with whole_file(path) as partial:
        partial.write_text("half")
        assert not path.exists()
        partial.write_text("whole")
    assert path.read_text() == "whole"
    assert list(path.parent.iterdir()) == [path]


def write_half(path: Path, error: Exception) -> None:
    with whole_file(path) as partial:
        partial.write_text("half")
        raise error


def test_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "entry"
    path.write_text("old")
    with pytest.raises(KeyError):
        write_half(path, KeyError())
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "full",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("I/O error: No space left on device (os error 28)"),
    ],
    ids=["system", "safetensors"],
)
def test_full_disk_is_a_user_error(tmp_path: Path, full: Exception) -> None:
    with pytest.raises(UserError, match=r"No space left on device.*XDG_CACHE_HOME"):
        write_half(tmp_path / "entry", full)


def test_workspace_starts_and_ends_empty(tmp_path: Path) -> None:
    left_behind = tmp_path / "entry.download" / "npm" / "tarball"
    left_behind.parent.mkdir(parents=True)
    left_behind.touch()
    with workspace(tmp_path / "entry") as folder:
        assert list(folder.iterdir()) == []
        (folder / "tarball").touch()
    assert list(tmp_path.iterdir()) == []


def test_two_processes_make_an_entry_once(tmp_path: Path) -> None:
    entry = tmp_path / "entry"
    first = want(entry, 2)
    wait_for(tmp_path / "entry.partial")
    second = want(entry, 2)
    assert first.communicate()[0].split("\n") == ["making", "whole", ""]
    waited, found, _ = second.communicate()[0].split("\n")
    assert waited == "Waiting for another process to finish with entry ..."
    assert found == "whole"


def test_leftovers_of_a_killed_process_are_overwritten(tmp_path: Path) -> None:
    entry = tmp_path / "entry"
    killed = want(entry, 60)
    wait_for(tmp_path / "entry.partial")
    killed.kill()
    killed.communicate()
    assert (tmp_path / "entry.partial").exists()
    assert want(entry, 0).communicate()[0].split("\n") == ["making", "whole", ""]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["entry", "entry.lock"]


def test_sha256_of_bytes_and_files(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    assert sha256_of(b"content") == hashlib.sha256(b"content").hexdigest()
    assert sha256_of(tmp_path / "file") == sha256_of(b"content")
