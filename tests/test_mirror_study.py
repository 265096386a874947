"""Whole studies that are kept in a real S3 server, the training itself left tiny."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import ray

from analysis.rundir import RunDir
from study.config import Study
from study.integrity import check_left
from study.mirror import DriverMirror
from study.storage import Remote
from tests.tiny import make_study, run_confirm, run_search


@pytest.fixture(scope="module", autouse=True)
def local_ray(s3_endpoint: str) -> Iterator[None]:  # noqa: ARG001 - workers inherit its environment
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def with_mirror(study: Study, remote: Remote) -> tuple[Study, DriverMirror]:
    mirror = DriverMirror(study.rundir.path, remote, pauses=(0.1, 0.1))
    return replace(study, rundir=RunDir(study.rundir.path, mirror)), mirror


def in_another_place(study: Study, remote: Remote, place: Path) -> tuple[Study, DriverMirror]:
    """The study as another machine has it from the store."""
    mirror = DriverMirror(place, remote, pauses=(0.1, 0.1))
    mirror.pull()
    return replace(study, rundir=RunDir(place, mirror)), mirror


def test_a_study_in_a_store_goes_on_elsewhere_with_nothing_left_to_do(
    bucket: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    remote = Remote(bucket).child("study")
    study, mirror = with_mirror(make_study(tmp_path, seeds=2), remote)
    trials = run_search(study, remote=remote)
    run_confirm(study, remote=remote)
    mirror.finish()
    mirror.close()
    stored = [entry.name for entry in remote.files()]
    assert not [name for name in stored if name.startswith("states/")]
    assert len([name for name in stored if name.startswith("weights/")]) >= 4
    assert not list(study.rundir.path.glob("states/*"))

    there, mirror = in_another_place(study, remote, tmp_path / "elsewhere")
    check_left(there)
    assert there.rundir.trials.read_bytes() == study.rundir.trials.read_bytes()
    assert there.rundir.read_epochs() == study.rundir.read_epochs()
    capsys.readouterr()
    assert run_search(there, remote=remote) == trials
    run_confirm(there, remote=remote)
    assert "runs in" not in capsys.readouterr().out, "something was trained again"
    assert there.rundir.confirm.read_bytes() == study.rundir.confirm.read_bytes()
    mirror.close()
