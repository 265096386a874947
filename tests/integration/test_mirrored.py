"""Complete studies in a real S3 store, under a real Ray, with tiny training runs."""

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import ray

from analysis.rundir import RunDir
from analysis.rundir.optuna_db import read_searches
from study.errors import StorageError
from study.export.select import _weights
from study.resume import check_intact
from study.search.searcher import run_id
from study.storage.mirror import DriverMirror
from study.storage.object_store import Remote
from study.study import Study
from tests.integration.test_faults import check_rows
from tests.support import ROOT
from tests.support.faults import confirmation_with, hanging_trial, kill_the_worker, trial_with
from tests.support.servers import s3
from tests.support.tiny_study import confirm_study, in_store, make_study, search_study


@pytest.fixture(scope="module", autouse=True)
def local_ray(s3_endpoint: str) -> Iterator[None]:  # noqa: ARG001 - workers inherit its environment
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def with_mirror(study: Study, storage: str) -> tuple[Study, DriverMirror]:
    return in_store(study, storage, pauses=(0.1, 0.1))


def elsewhere(study: Study, storage: str, place: Path) -> tuple[Study, DriverMirror]:
    """Open the study from the store, as another machine would."""
    there = replace(study, config=replace(study.config, storage=storage))
    assert there.remote is not None
    mirror = DriverMirror(place, there.remote, pauses=(0.1, 0.1))
    mirror.pull()
    there = replace(there, rundir=RunDir(place, mirror))
    check_intact(there.rundir)
    return there, mirror


def test_a_finished_study_in_a_store_has_nothing_left_to_do_elsewhere(
    bucket: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Two runs lose their processes on the way and resume from their checkpoints in the store."""
    victim = "dropout-recipe-no-dropout-1"
    monkeypatch.setattr("study.search.tune.run_trial", trial_with(kill_the_worker))
    monkeypatch.setattr(
        "study.confirm.run.run_confirmation", confirmation_with(kill_the_worker, victim)
    )
    remote = Remote(bucket).child("study")
    study, mirror = with_mirror(make_study(tmp_path, seeds=2), bucket)
    trials = search_study(study)
    assert trials["dropout-001"][1] == 2
    check_rows(study.rundir)
    rows = map(json.loads, study.rundir.epochs.read_text().splitlines())
    again = [r["epoch"] for r in rows if (r["run_id"], r["attempt"]) == ("dropout-001", 2)]
    assert again[0] > 1, "it started over"
    confirm_study(study)
    mirror.finish()
    mirror.close()
    stored = [entry.name for entry in remote.files()]
    assert not [name for name in stored if name.startswith("states/")]
    weights = {Path(name).stem for name in stored if name.startswith("weights/")}
    # All heads are kept, for an ensemble.
    assert len(weights & {row.run_id for row in study.rundir.read_confirm()}) == 8
    assert len(weights & {row.run_id for row in study.rundir.read_trials()}) >= 2

    there, mirror = elsewhere(study, bucket, tmp_path / "elsewhere")
    assert there.rundir.trials.read_bytes() == study.rundir.trials.read_bytes()
    assert there.rundir.read_epochs() == study.rundir.read_epochs()
    capsys.readouterr()
    assert search_study(there) == trials
    confirm_study(there)
    assert not re.search(r"\d runs? in ", capsys.readouterr().out), "something was retrained"
    assert there.rundir.confirm.read_bytes() == study.rundir.confirm.read_bytes()
    assert _weights(there.rundir, min(weights)), "the export finds no weights"
    mirror.close()


def test_the_stack_of_a_hanging_trial_is_uploaded_to_the_store(
    bucket: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("study.search.tune.run_trial", hanging_trial)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))  # for this process, not for the workers
    remote = Remote(bucket).child("study")
    # Minutes; long enough for a busy machine.
    study, mirror = with_mirror(make_study(tmp_path, trial_timeout=0.4), bucket)
    assert search_study(study)["dropout-001"][1] == 2
    mirror.finish()
    mirror.close()
    where = remote.child("failures").child("dropout-001-1.txt").uri
    assert f"no epoch ended within --trial-timeout (traceback: {where})" in (
        capsys.readouterr().out
    )
    assert b"in hang_for_good" in (remote.read("failures/dropout-001-1.txt") or b"")


def test_a_search_resumes_elsewhere_after_the_driver_was_killed(
    bucket: str, tmp_path: Path
) -> None:
    remote = Remote(bucket).child("study")
    here = tmp_path / "here"
    here.mkdir()
    command = [sys.executable, "-m", "tests.support.mirror_driver", bucket, str(here), "20"]
    with (tmp_path / "output").open("wb") as output:
        driver = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output)
    try:
        end = time.monotonic() + 120
        while (remote.read("epochs.jsonl") or b"").count(b"\n") < 20:
            assert driver.poll() is None, (tmp_path / "output").read_text()[-3000:]
            assert time.monotonic() < end
            time.sleep(0.05)
    finally:
        driver.kill()
        driver.wait()
    study = make_study(tmp_path, trials=20)
    there, mirror = elsewhere(study, bucket, tmp_path / "there")
    known, before = ended(there.rundir), ended(RunDir(here / "study"))
    assert known
    assert len(known) < 20, "the study ended before it was killed"
    assert known <= before
    assert len(before - known) <= 2, "more was lost than the trials that had just ended"
    rows = there.rundir.epochs.read_bytes()
    trials = search_study(there)
    assert len(trials) == 20
    assert there.rundir.epochs.read_bytes().startswith(rows)
    assert {name for name, (_, attempts) in trials.items() if attempts == 1} >= known
    assert max(attempts for _, attempts in trials.values()) == 2, "no trial was running"
    check_rows(there.rundir)
    mirror.finish()
    mirror.close()
    assert not [file.name for file in remote.files("states")]
    assert remote.read("trials.csv") == there.rundir.trials.read_bytes()


def ended(rundir: RunDir) -> set[str]:
    return {
        run_id(arm, trial.number)
        for arm, ot_study in read_searches(rundir.optuna_db).items()
        for trial in ot_study.get_trials()
        if trial.state.is_finished()
    }


def test_a_store_failure_in_the_search_stops_the_study_which_can_be_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store is killed while trials run, and comes back with its contents."""
    process, endpoint = s3.start_s3(tmp_path / "log")
    bucket = s3.new_bucket(endpoint)
    remote = Remote(bucket).child("study")
    study, mirror = with_mirror(make_study(tmp_path, trials=12), bucket)
    append = RunDir.append_epochs

    def append_and_kill(rundir: RunDir, rows: object) -> None:
        append(rundir, rows)  # type: ignore[arg-type]
        if rundir.epochs.read_bytes().count(b"\n") == 20:
            mirror.flush()
            held.update({file.name: remote.read(file.name) for file in remote.files()})
            process.kill()
            process.wait()

    held: dict[str, bytes | None] = {}
    with monkeypatch.context() as patch:
        patch.setattr(RunDir, "append_epochs", append_and_kill)
        with pytest.raises(StorageError, match="it cannot be reached; check the address"):
            search_study(study)
    mirror.close(wait=0.0)
    process, _ = s3.start_s3(tmp_path / "log", port=int(endpoint.rpartition(":")[2]))
    try:
        s3.make_bucket(endpoint, remote.uri.split("/")[2])
        for name, content in held.items():
            remote.write(name, content or b"")
        there, mirror = elsewhere(study, bucket, tmp_path / "there")
        assert len(search_study(there)) == 12
        check_rows(there.rundir)
        mirror.close()
    finally:
        process.kill()
        process.wait()
