"""Real faults during runs, under a real Ray: what is lost, and what is reported."""

import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from analysis.rundir import RunDir
from study import pipeline
from study.errors import StorageError, StudyStoppedError
from study.study import parse_config, resolve_study
from study.system import signals
from study.training.loop import train
from tests.support.disks import small_disk
from tests.support.faults import (
    VICTIM,
    confirmation_with,
    hanging_trial,
    kill_the_worker,
    raise_an_error,
    trial_that_dies_with_every_epoch,
    trial_with,
)
from tests.support.tiny_study import (
    TRAINING,
    confirm_study,
    make_study,
    one_thread,
    search_study,
    start_ray,
)


@pytest.fixture(scope="module", autouse=True)
def local_ray() -> Iterator[None]:
    start_ray()
    yield
    ray.shutdown()


def healthy(arms: tuple[str, ...] = ("no-dropout", "dropout")) -> set[str]:
    return {f"{arm}-{number:03d}" for arm in arms for number in range(3)}


@pytest.fixture
def fault(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that injects a fault into trials."""

    def set_fault(what: Callable[[], None], **options: Any) -> None:
        monkeypatch.setattr("study.search.tune.run_trial", trial_with(what, **options))

    return set_fault


def check_rows(rundir: RunDir) -> None:
    """Check that every epoch is recorded once, with the results of uninterrupted training."""
    rows = rundir.read_epochs()
    for trial in rundir.read_trials():
        mine = [row for row in rows if row.run_id == trial.run_id]
        assert [row.epoch for row in mine] == list(range(1, trial.epochs + 1))
        if trial.epochs:
            with one_thread():
                run = train(
                    trial.hyperparameters,
                    TRAINING.to(torch.device("cpu")),
                    seed=trial.seed,
                    epochs=trial.epochs,
                    metric="val_accuracy",
                )
            assert [row.val_loss for row in mine] == [epoch.val_loss for epoch in run.epochs]
    assert not list(rundir.path.glob("states/*"))


def test_a_trial_resumes_from_its_checkpoint_after_its_process_was_killed(
    tmp_path: Path, fault: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    fault(kill_the_worker)
    study = make_study(tmp_path)
    trials = search_study(study)
    assert trials.pop("dropout-001")[1] == 2
    assert {attempts for _, attempts in trials.values()} == {1}
    check_rows(study.rundir)
    printed = capsys.readouterr().out.splitlines()
    assert printed.count("dropout-001  its process died; resuming from its last checkpoint") == 1
    lines = study.rundir.epochs.read_text().splitlines()
    assert len(lines) == len(study.rundir.read_epochs()), "an epoch was trained twice"


def test_a_trial_that_is_lost_too_often_fails(tmp_path: Path, fault: Callable[..., None]) -> None:
    fault(kill_the_worker, attempts=9, victim=".*-001")
    study = make_study(tmp_path, max_failures=1)

    trials = search_study(study)
    assert {name for name, end in trials.items() if end == ("failed", 2)} == {
        "no-dropout-001",
        "dropout-001",
    }
    errors = [row.error for row in study.rundir.read_trials() if row.error]
    assert all(error.startswith("lost 2 times; last cause: its process died") for error in errors)


def test_a_trial_that_progresses_may_be_lost_often(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only losses without a finished epoch in between count, as on preemptible machines."""
    monkeypatch.setattr("study.search.tune.run_trial", trial_that_dies_with_every_epoch)
    study = make_study(tmp_path, epochs=3, max_failures=1)
    assert search_study(study)[VICTIM] == ("completed", 4)


def test_a_trial_that_raises_fails_and_the_others_continue(
    tmp_path: Path, fault: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    fault(raise_an_error)
    study = make_study(tmp_path)
    trials = search_study(study)
    assert trials.pop("dropout-001") == ("failed", 1)
    assert {state for state, _ in trials.values()} <= {"completed", "pruned"}
    traceback = study.rundir.failure("dropout-001", 1).read_text()
    assert "in raise_an_error" in traceback
    assert "and a second line" in traceback
    lines = [line for line in capsys.readouterr().out.splitlines() if "nothing works" in line]
    assert len(lines) == 1
    assert "dropout-001  failed" in lines[0]


def test_a_study_in_which_everything_fails_stops_early(
    tmp_path: Path, fault: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The messages contain different addresses but have the same cause."""
    fault(raise_an_error, victim=".*")
    study = make_study(tmp_path, trials=20, stop_after_failures=3)
    with pytest.raises(StudyStoppedError, match=r"^3 runs in a row failed with the same cause"):
        search_study(study)
    assert not study.rundir.trials.exists()
    monkeypatch.undo()
    trials = search_study(study)
    assert len(trials) == 20
    assert sum(state == "failed" for state, _ in trials.values()) == 3


def test_a_hanging_trial_is_ended_and_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("study.search.tune.run_trial", hanging_trial)
    study = make_study(tmp_path, trial_timeout=0.4)  # a busy machine is slow, too
    trials = search_study(study)
    assert trials.pop("dropout-001")[1] == 2
    assert {attempts for _, attempts in trials.values()} == {1}
    check_rows(study.rundir)
    assert "no epoch ended within --trial-timeout (traceback:" in capsys.readouterr().out
    assert "in hang_for_good" in study.rundir.failure("dropout-001", 1).read_text()


def test_a_full_disk_stops_the_study_and_nothing_is_lost(
    tmp_path: Path, fault: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = tmp_path / "disk"
    with small_disk(disk, "30m"):
        filler = disk / "filler"

        def fill_the_disk() -> None:
            with filler.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(1 << 12))

        def fill() -> None:
            try:
                fill_the_disk()
            except OSError:
                return

        fault(fill)
        study = make_study(disk)
        with pytest.raises(StorageError, match=r"No space left on device|disk is full|StorageFull"):
            search_study(study)
        filler.unlink()
        monkeypatch.undo()
        trials = search_study(study)
        assert trials.keys() == healthy()
        assert {state for state, _ in trials.values()} <= {"completed", "pruned"}
        check_rows(study.rundir)


def test_a_storage_that_vanishes_stops_the_study(
    tmp_path: Path, fault: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Like a lost network file system; nothing is written to the old path."""
    disk = tmp_path / "disk"
    disk.mkdir()
    fault(lambda: subprocess.run(["mv", str(disk), f"{disk}-gone"], check=True) and None)
    study = make_study(disk)
    with pytest.raises(StorageError, match=r"cannot be written to \("):
        search_study(study)
    assert not disk.exists() or not list(disk.rglob("*.jsonl"))
    monkeypatch.undo()
    shutil.rmtree(disk, ignore_errors=True)
    Path(f"{disk}-gone").rename(disk)
    trials = search_study(study)
    assert trials.keys() == healthy()
    check_rows(study.rundir)


def test_a_read_only_storage_is_reported_at_the_start(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    with small_disk(disk, "10m"):
        study = make_study(disk)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        place = ["--storage", str(disk), "--name", "study"]
        with pytest.raises(StorageError, match=r"cannot be written to \(Read-only file system\)"):
            pipeline.run(resolve_study(parse_config(["--resume", *place])))
        place = ["--storage", str(disk), "--name", "another"]
        with pytest.raises(StorageError, match=r"cannot be written to \(Read-only file system\)"):
            pipeline.run(resolve_study(parse_config(["--transfer", "frozen", *place])))
        assert study.rundir.read_epochs() == []


@pytest.mark.parametrize("what", [kill_the_worker, raise_an_error])
def test_a_lost_confirmation_run_is_retried_and_one_that_raises_is_skipped(
    what: Callable[[], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    victim = "dropout-recipe-no-dropout-1"
    monkeypatch.setattr("study.confirm.run.run_confirmation", confirmation_with(what, victim))
    study = make_study(tmp_path, seeds=3)
    confirm_study(study)
    rows = {row.run_id: row for row in study.rundir.read_confirm()}
    attempts = {row.run_id: row.attempt for row in study.rundir.read_epochs()}
    assert len(rows) == (12 if what is kill_the_worker else 11)
    assert (victim in rows) == (what is kill_the_worker)
    if victim in rows:
        assert attempts[victim] == 2
    else:
        assert "in raise_an_error" in study.rundir.failure(victim, 1).read_text()
    assert not list(study.rundir.path.glob("states/*")) or victim not in rows


def test_a_swallowed_interrupt_still_ends_the_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Third-party code may swallow the exception, but the signal is remembered."""
    study = make_study(tmp_path, seeds=2)
    with monkeypatch.context() as lost:
        lost.setattr(signals, "received", [signal.SIGINT])
        for phase in (confirm_study, search_study):
            with pytest.raises(KeyboardInterrupt):
                phase(study)
        assert signals.exit_status() == 130
    assert not study.rundir.trials.exists()
    assert not study.rundir.confirm.exists()
    # The command would shut down Ray, and with it any running trial.
    ray.shutdown()
    start_ray()
    assert search_study(study).keys() == healthy()
