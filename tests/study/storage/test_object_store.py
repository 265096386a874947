"""Folders in an object store: a real S3 server in its own process, and a disk by URI."""

import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from study.errors import StorageError, UserError
from study.storage import object_store
from study.storage.object_store import Remote, check_uri, is_uri
from study.storage.probe import DRIVER_FILE, probe, probed
from tests.support.servers import s3


@pytest.fixture(params=["s3", "file"])
def remote(request: pytest.FixtureRequest, tmp_path: Path) -> Remote:
    if request.param == "file":
        return Remote((tmp_path / "store" / "runs").as_uri())
    return Remote(request.getfixturevalue("bucket"))


def test_files_survive_a_round_trip(remote: Remote, tmp_path: Path) -> None:
    file = tmp_path / "made" / "here"
    file.parent.mkdir()
    for content in (b"", b"small", os.urandom(12_000_000)):  # S3 takes the last in parts
        file.write_bytes(content)
        remote.upload(file, "folder/a name.bin")
        assert remote.read("folder/a name.bin") == content
        assert remote.download("folder/a name.bin", tmp_path / "new" / "copy")
        assert (tmp_path / "new" / "copy").read_bytes() == content
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["copy"]


def test_folder_listing_has_sizes_and_times(remote: Remote) -> None:
    study = remote.child("a study")
    study.write("study.json", b"{}")
    study.write("confirm/look-1.csv", b"12345")
    study.write(".probe-1", b"-")
    remote.child("another").write("study.json", b"{}")
    assert [(file.name, file.size) for file in study.files()] == [
        ("confirm/look-1.csv", 5),
        ("study.json", 2),
    ]
    assert [file.name for file in study.files("confirm")] == ["confirm/look-1.csv"]
    assert remote.folders() == ["a study", "another"]
    found = study.find("study.json")
    assert found is not None
    assert abs(found.mtime - time.time()) < 60
    study.delete("study.json")
    study.delete("study.json")
    assert not study.exists("study.json")
    assert not study.exists("confirm")


def test_endpoint_may_come_from_the_environment(
    s3_endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in Amazon's own tools."""
    bucket = s3.new_bucket(s3_endpoint).partition("?")[0]
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{s3_endpoint}")
    Remote(bucket).write("file", b"content")
    assert Remote(bucket).read("file") == b"content"
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://{s3_endpoint}")
    assert Remote(f"{bucket}/").read("file") == b"content"


def test_missing_files_and_folders(remote: Remote, tmp_path: Path) -> None:
    assert remote.read("study.json") is None
    assert not remote.download("study.json", tmp_path / "study.json")
    assert not list(tmp_path.glob("study.json"))
    assert remote.files() == []
    assert remote.folders() == []


def test_no_partial_files_are_left_on_disk(tmp_path: Path) -> None:
    remote = Remote(tmp_path.as_uri())
    remote.write("file", b"content")
    (tmp_path / "folder").mkdir()
    with pytest.raises(StorageError):
        remote.write("folder", b"content")
    assert {path.name for path in tmp_path.iterdir()} == {"file", "folder"}


def failing(do: Callable[[], object], within: float = 60) -> str:
    start = time.monotonic()
    with pytest.raises(StorageError) as error:
        do()
    assert time.monotonic() - start < within
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300
    return str(error.value)


def test_errors_are_one_line(s3_endpoint: str, tmp_path: Path) -> None:
    there = f"?endpoint_override={s3_endpoint}&scheme=http"
    message = failing(lambda: Remote(f"s3://no-such-bucket/runs{there}").write("a", b"1"))
    assert message.startswith(
        f"s3://no-such-bucket/runs{there}: the bucket does not exist; create it"
    )
    nobody = f"?endpoint_override=127.0.0.1:{s3.free_port()}&scheme=http"
    message = failing(lambda: Remote(f"s3://bucket/runs{nobody}").read("a"))
    assert "it cannot be reached; check the address and the network" in message
    assert "'colour'" in failing(lambda: Remote("s3://bucket/runs?colour=red").read("a"))
    (tmp_path / "file").touch()
    failing(lambda: Remote((tmp_path / "file").as_uri()).write("a", b"1"))


@pytest.mark.integration
def test_unresponsive_server_times_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_store, "_ANSWER", 1.0)
    process, endpoint = s3.start_s3(tmp_path / "log")
    try:
        remote = Remote(s3.new_bucket(endpoint))
        remote.write("a", b"1")
        process.send_signal(signal.SIGSTOP)
        assert "it cannot be reached" in failing(lambda: remote.read("a"), within=20)
    finally:
        process.kill()
        process.wait()
    assert "it cannot be reached" in failing(lambda: remote.write("a", b"1"))


def test_unknown_user_is_denied_access(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in s3.ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("INITIAL_NO_AUTH_ACTION_COUNT", "3")  # until the bucket is made
    process, endpoint = s3.start_s3(tmp_path / "log")
    try:
        remote = Remote(s3.new_bucket(endpoint))
        message = failing(lambda: remote.write("a", b"1"))
        assert "access is denied; check the credentials in the environment" in message
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("ftp://host/runs", "give a path, or a URI of the form s3://BUCKET/FOLDER, gs://"),
        ("https://host/runs", "give a path, or a URI"),
        ("s3://", "no bucket in the URI; give s3://BUCKET/FOLDER"),
        ("s3:///runs", "no bucket in the URI"),
        ("gs://?scheme=http", "no bucket in the URI"),
        ("file://runs", "no absolute path in the URI; give file:///FOLDER"),
        ("file:///", "no absolute path in the URI"),
    ],
)
def test_invalid_uri_is_refused(uri: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        check_uri(uri)


@pytest.mark.parametrize(
    "uri",
    [
        "s3://AKIAME:hunter2@bucket/runs",
        "s3://hunter2@bucket/runs",
        "s3://bucket/runs?access_key=AKIAME&secret_key=hunter2",
        "s3://bucket/runs?session_token=hunter2",
        "abfs://container:hunter2@account.dfs.core.windows.net/runs",
        "abfs://container@account/runs?sig=hunter2",
    ],
)
def test_credentials_in_a_uri_are_refused_and_not_repeated(uri: str) -> None:
    with pytest.raises(UserError, match="the URI contains credentials") as error:
        check_uri(uri)
    assert "hunter2" not in str(error.value)
    assert "AKIAME" not in str(error.value)


def test_valid_uris() -> None:
    for uri in (
        "s3://bucket/runs?endpoint_override=127.0.0.1:9000&scheme=http&region=eu-west-1",
        "gs://bucket",
        "gs://anonymous@bucket/runs",
        "abfs://container@account.dfs.core.windows.net/runs",
        "file:///runs",
        "hdfs://host:8020/runs",
    ):
        assert is_uri(uri)
        check_uri(uri)
    assert not is_uri("runs/a:b")


def test_storage_not_shared_with_a_node_is_detected(bucket: str, tmp_path: Path) -> None:
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    here.mkdir()
    elsewhere.mkdir()
    remote = Remote(bucket)
    for place, other in ((here, elsewhere), (remote.child("a"), remote.child("b"))):
        with probed(place) as token:
            assert probe(place, token) is None
            assert "is not shared with the driver" in str(probe(other, token))
        with probed(other) as another:
            assert another != token
            assert "is not shared with the driver" in str(probe(other, token))
    assert not list(here.iterdir())
    assert not remote.exists(f"a/{DRIVER_FILE}")
    assert remote.files() == []
    gone = tmp_path / "gone"
    assert "is not shared with the driver" in str(probe(gone, token))
    nobody = f"s3://bucket/runs?endpoint_override=127.0.0.1:{s3.free_port()}&scheme=http"
    assert "it cannot be reached" in str(probe(Remote(nobody), token))
