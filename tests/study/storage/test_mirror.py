"""A driver's mirror, file by file, without Ray: after a crash, another driver can continue."""

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import optuna
import pytest

from analysis.rundir import ConfirmRow, EpochRow, RunDir
from analysis.rundir.optuna_db import open_storage, read_searches
from study.errors import StorageError, StudyStoppedError, UserError
from study.resume import check_intact
from study.search.searcher import open_study, run_id
from study.storage.location import working_copy
from study.storage.mirror import DriverMirror
from study.storage.object_store import Remote
from study.study import Study
from study.system.phase_timer import PhaseTimer
from tests.support import FIXTURES
from tests.support.tiny_study import make_study

FIXTURE = RunDir(FIXTURES / "run")
EPOCH, CONFIRMED = FIXTURE.read_epochs()[0], FIXTURE.read_confirm()[0]
DRAWN: dict[str, optuna.distributions.BaseDistribution] = {
    "dropout": optuna.distributions.FloatDistribution(0.1, 0.5)
}


class GoneError(Exception):
    """The driver has crashed."""


class Mortal:
    """Lets the store accept a limited number of changes, and records them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, limit: float = float("inf")) -> None:
        self.done: list[str] = []
        self.limit = limit
        for method in ("write", "delete"):
            monkeypatch.setattr(Remote, method, self.wrapped(getattr(Remote, method), method))

    def wrapped(self, do: Callable[..., None], method: str) -> Callable[..., None]:
        def changed(remote: Remote, name: str, *content: object) -> None:
            if len(self.done) >= self.limit:
                raise GoneError
            do(remote, name, *content)
            self.done.append(f"{method} {name}")

        return changed


@pytest.fixture
def remote(tmp_path: Path) -> Remote:
    return Remote((tmp_path / "store" / "study").as_uri())


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return make_study(tmp_path)


@contextmanager
def mirrored(
    study: Study, remote: Remote, **options: object
) -> Iterator[tuple[Study, DriverMirror]]:
    mirror = DriverMirror(study.rundir.path, remote, pauses=(), **options)  # type: ignore[arg-type]
    try:
        yield replace(study, rundir=RunDir(study.rundir.path, mirror)), mirror
    finally:
        mirror.close(wait=0.0)


def pulled(study: Study, remote: Remote, place: Path) -> Study:
    """Return the study as pulled by another machine, checked to be intact."""
    mirror = DriverMirror(place, remote)
    mirror.pull()
    mirror.close()
    there = replace(study, rundir=RunDir(place))
    check_intact(there.rundir)
    return there


def a_trial(study: Study, arm: str = "dropout", epochs: int = 3) -> str:
    """Do what the search does with a trial, except training."""
    ot_study = open_study(open_storage(study.rundir.optuna_db), arm, "max")
    trial = ot_study.ask(DRAWN)
    name = run_id(arm, trial.number)
    study.rundir.snapshot()
    for epoch in range(1, epochs + 1):
        study.rundir.append_epochs([replace(EPOCH, run_id=name, arm=arm, epoch=epoch)])
        trial.report(0.5, epoch)
    ot_study.tell(trial, 0.5)
    study.rundir.snapshot()
    study.rundir.delete(study.rundir.state(name))
    return name


def a_confirmation(study: Study, name: str) -> None:
    """Write what a confirmation run writes."""
    rundir = study.rundir
    rundir.weights(name).parent.mkdir(exist_ok=True)
    rundir.weights(name).write_bytes(b"weights")
    rundir.wrote(rundir.weights(name))
    row: ConfirmRow = replace(CONFIRMED, run_id=name, epochs=2)
    rows: list[EpochRow] = [
        replace(EPOCH, phase="confirm", run_id=name, attempt=1, epoch=epoch) for epoch in (1, 2)
    ]
    rundir.append_epochs(rows)
    logits, labels = np.zeros((2, 2)), np.zeros(2, int)
    rundir.write_confirmation(
        name,
        row,
        val_logits=logits,
        test_logits=logits,
        val_labels=labels,
        test_labels=labels,
    )


def a_study(study: Study, over: list[str]) -> None:
    """Run a small study; add each trial whose end has been saved to `over`."""
    study.rundir.write_study(study.rundir.read_study())
    for _ in range(2):
        over += [a_trial(study)]
    study.rundir.write_trials([])
    a_confirmation(study, "run-0")


def ended(rundir: RunDir) -> set[str]:
    if not rundir.optuna_db.exists():
        return set()
    return {
        run_id(arm, trial.number)
        for arm, ot_study in read_searches(rundir.optuna_db).items()
        for trial in ot_study.get_trials()
        if trial.state.is_finished()
    }


def told(rundir: RunDir) -> set[tuple[str, int]]:
    """Return the epochs reported to Optuna."""
    if not rundir.optuna_db.exists():
        return set()
    return {
        (run_id(arm, trial.number), epoch)
        for arm, ot_study in read_searches(rundir.optuna_db).items()
        for trial in ot_study.get_trials()
        for epoch in trial.intermediate_values
    }


def test_checkpoint_is_deleted_after_its_epochs_are_uploaded(
    study: Study, remote: Remote, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = Mortal(monkeypatch)
    with mirrored(study, remote) as (mine, mirror):
        mine.rundir.append_epochs([replace(EPOCH, run_id="dropout-000", epoch=1)])
        mine.rundir.delete(mine.rundir.state("dropout-000"))
        mirror.flush()
    assert world.done == ["write epochs.jsonl", "delete states/dropout-000.safetensors"]


def test_another_driver_can_continue_after_any_crash(
    study: Study, remote: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver crashes before each change in turn, also between two files of a snapshot."""
    open_study(open_storage(study.rundir.optuna_db), "dropout", "max")
    seen: list[tuple[int, int, int]] = []
    between, died, limit = 0, True, 0
    while died:
        here = replace(study, rundir=RunDir(tmp_path / f"here-{limit}"))
        store = remote.child(str(limit))
        shutil.copytree(study.rundir.path, here.rundir.path)
        with monkeypatch.context() as patch, mirrored(here, store) as (mortal, mirror):
            store_of_one = Mortal(patch, limit)
            over = list[str]()

            def snapshot_and_wait(mirror: DriverMirror = mirror) -> None:
                DriverMirror.snapshot(mirror)
                mirror.flush()

            patch.setattr(mirror, "snapshot", snapshot_and_wait)
            died = False
            try:
                a_study(mortal, over)
                mirror.flush()
            except GoneError:
                died = True
        between += died and store_of_one.done[-1:] == ["write epochs.jsonl"]
        there = pulled(here, store, tmp_path / f"there-{limit}")
        # At most the trial that had just ended is lost.
        assert set(over) <= ended(there.rundir)
        assert told(there.rundir) == {
            (row.run_id, row.epoch) for row in there.rundir.read_epochs() if row.phase == "search"
        }, "epochs.jsonl was not truncated to match the database"
        rows = {row.run_id: row for row in there.rundir.read_epochs()}
        for done in there.rundir.read_confirmations():
            assert rows[done.run_id].epoch == done.epochs, "a row was uploaded before its epochs"
            assert there.rundir.predictions(done.run_id).exists()
            assert store.exists(f"weights/{done.run_id}.safetensors")
        seen.append((len(ended(there.rundir)), len(rows), len(there.rundir.read_confirmations())))
        limit += 1
    assert seen == sorted(seen)
    assert seen[-1] == (2, 3, 1)
    assert between >= 4, "it never crashed between the two files of a snapshot"


def test_queued_snapshot_is_replaced_by_the_next(
    study: Study, remote: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = Mortal(monkeypatch)
    gate = threading.Event()
    counted = Remote.write

    def slow(where: Remote, name: str, content: object) -> None:
        gate.wait(30)
        counted(where, name, content)

    monkeypatch.setattr(Remote, "write", slow)
    with mirrored(study, remote) as (mine, mirror):
        names = [a_trial(mine) for _ in range(20)]
        assert len(list(mine.rundir.path.glob(".snapshot-*"))) <= 2
        gate.set()
        mirror.flush()
        assert not list(mine.rundir.path.glob(".snapshot-*"))
    assert world.done.count("write optuna.db") == 2
    assert world.done.count("delete states/dropout-019.safetensors") == 1
    assert ended(pulled(study, remote, tmp_path / "there").rundir) == set(names)


def test_periodic_snapshot_is_taken_only_after_a_change(
    study: Study, remote: Remote, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = Mortal(monkeypatch)
    with mirrored(study, remote, tick=0.5) as (mine, mirror):
        a_trial(mine)
        mirror.flush()
        for step in range(2):
            before = world.done.count("write optuna.db")
            mine.rundir.append_epochs([replace(EPOCH, run_id="dropout-000", epoch=4 + step)])
            end = time.monotonic() + 20
            while world.done.count("write optuna.db") == before and time.monotonic() < end:
                mine.rundir.tick()
                mine.rundir.tick()
                time.sleep(0.01)
            mirror.flush()
            assert world.done.count("write optuna.db") == before + 1
        mirror._next_tick = 0.0
        mine.rundir.tick()
        mirror.flush()
        assert world.done.count("write optuna.db") == before + 1


def test_unreachable_store_stops_the_study(
    study: Study, remote: Remote, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = []

    def failing(where: Remote, name: str, _: object) -> None:
        failures.append(name)
        raise StorageError(f"{where.uri}: it cannot be reached.")

    with monkeypatch.context() as patch, mirrored(study, remote) as (mine, mirror):
        mirror._pauses = (0.01, 0.01)
        patch.setattr(Remote, "write", failing)
        mine.rundir.write_failure("a", 1, "text")
        with pytest.raises(StorageError, match="it cannot be reached"):
            mirror.flush()
        assert failures == ["failures/a-1.txt"] * 3
        for do in (mine.rundir.snapshot, mine.rundir.tick, mirror.finish):
            with pytest.raises(StorageError, match="it cannot be reached"):
                do()
        with pytest.raises(StorageError, match="it cannot be reached"):
            mine.rundir.delete(mine.rundir.state("a"))


def test_short_failure_of_the_store_is_retried(
    study: Study, remote: Remote, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, left = Remote.write, [1, 1]

    def failing(where: Remote, name: str, content: object) -> None:
        if left:
            left.pop()
            raise StorageError(f"{where.uri}: it cannot be reached.")
        write(where, name, content)

    monkeypatch.setattr(Remote, "write", failing)
    with mirrored(study, remote) as (mine, mirror):
        mirror._pauses = (0.01, 0.01)
        mine.rundir.write_failure("a", 1, "text")
        mirror.flush()
    assert remote.read("failures/a-1.txt") == b"text\n"


def test_driver_that_lost_its_lease_stops_writing(study: Study, remote: Remote) -> None:
    lost = threading.Event()

    def guard() -> None:
        if lost.is_set():
            raise StudyStoppedError("it has been taken over.")

    with mirrored(study, remote, guard=guard) as (mine, mirror):
        a_trial(mine)
        mirror.flush()
        before = remote.read("optuna.db")
        lost.set()
        with pytest.raises(StudyStoppedError, match="taken over"):
            mine.rundir.tick()
        a_trial(study)
        mine.rundir.snapshot()
        with pytest.raises(StudyStoppedError, match="taken over"):
            mirror.flush()
    assert remote.read("optuna.db") == before


def test_working_copy_matches_the_store(study: Study, remote: Remote, tmp_path: Path) -> None:
    for name in (
        "study.json", "confirm/a.json", "report/verdict.json", "report/figures/a.svg",
        "states/a.safetensors", "weights/a.safetensors", "search/part-3/a/result.json",
        "best_model/config.json", "lease.json", "log.txt",
    ):  # fmt: skip
        remote.write(name, b"{}")
    place = tmp_path / "there"
    (place / "confirm").mkdir(parents=True)
    (place / "confirm" / "stale.json").touch()
    (place / ".lock").touch()
    with mirrored(replace(study, rundir=RunDir(place)), remote) as (there, mirror):
        mirror.pull()
        files = {p.relative_to(place).as_posix() for p in place.rglob("*") if p.is_file()}
        assert files == {"study.json", "confirm/a.json", "report/verdict.json", "log.txt", ".lock"}
        assert (place / "search" / "part-3").is_dir()
        weights = there.rundir.weights("a")
        assert there.rundir.has(weights)
        assert not there.rundir.has(there.rundir.weights("b"))
        there.rundir.fetch(weights)
        assert weights.read_bytes() == b"{}"
        there.rundir.delete(weights)
        assert not there.rundir.has(weights)
        assert not remote.exists("weights/a.safetensors")


def test_finish_uploads_everything_and_deletes_stale_files(
    study: Study, remote: Remote, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote.write("report/figures/old.svg", b"-")
    with mirrored(study, remote) as (mine, mirror):
        mirror.pull()
        a_trial(mine)
        for name in ("report/index.html", "best_model/config.json", "search/part-1/a/x.json"):
            file = mine.rundir.path / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(name)
        mirror.finish()
        assert remote.read("report/index.html") == b"report/index.html"
        assert remote.exists("search/part-1/a/x.json")
        assert not remote.exists("report/figures/old.svg")
        world = Mortal(monkeypatch)
        mirror.finish()
        assert world.done == [], "something was uploaded again"


def test_deleting_missing_files_makes_no_requests(
    study: Study, remote: Remote, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote.write("weights/dropout-001.safetensors", b"-")
    world = Mortal(monkeypatch)
    with mirrored(study, remote) as (mine, mirror):
        mirror.pull()
        for number in range(100):  # as at the start of a resumed search
            mine.rundir.delete(mine.rundir.state(f"dropout-{number:03d}"))
            mine.rundir.delete(mine.rundir.weights(f"dropout-{number:03d}"))
        mirror.flush()
        assert world.done == ["delete weights/dropout-001.safetensors"]
        mine.rundir.tick()
        for _ in range(3):  # as at the end of each trial
            mine.rundir.delete(mine.rundir.weights("dropout-000"))
            mine.rundir.delete(mine.rundir.weights("dropout-200"))
        mine.rundir.delete(mine.rundir.state("dropout-000"))
        mirror.flush()
        assert world.done[1:] == [
            "delete weights/dropout-200.safetensors",
            "delete states/dropout-000.safetensors",
        ]


def test_archived_run_is_archived_in_the_store_too(study: Study, remote: Remote) -> None:
    with mirrored(study, remote) as (mine, mirror):
        a_confirmation(mine, "run-0")
        mine.rundir.write_confirm([])
        mine.rundir.archive_confirm()
        mine.rundir.archive_confirmation("run-0")
        mirror.flush()
    assert [file.name for file in remote.files("confirm")] == [
        "confirm/before-look-2/run-0.json",
        "confirm/before-look-2/run-0.npz",
        "confirm/look-1.csv",
    ]
    assert not remote.exists("confirm.csv")
    assert not remote.exists("weights/run-0.safetensors")


def test_look_whose_archiving_was_interrupted_is_not_counted_twice(
    study: Study, remote: Remote, tmp_path: Path
) -> None:
    remote.write("confirm.csv", b"rows")
    remote.write("confirm/look-1.csv", b"rows")
    there = pulled(study, remote, tmp_path / "there")
    there.rundir.archive_confirm()
    assert [file.name for file in there.rundir.archived_confirms] == ["look-1.csv"]


def test_phase_times_are_uploaded(study: Study, remote: Remote, tmp_path: Path) -> None:
    with mirrored(study, remote) as (mine, mirror):
        mine.rundir.write_study(mine.rundir.read_study())
        PhaseTimer(mine.rundir, 1.0).record_start_up()
        mirror.flush()
    there = pulled(study, remote, tmp_path / "there")
    PhaseTimer(there.rundir, 2.0).record_start_up()
    rows = there.rundir.read_phases()
    assert [(row.start, row.begin) for row in rows] == [(1, 1.0), (2, 2.0)]


def test_epochs_are_kept_if_the_database_stores_no_length(
    study: Study, remote: Remote, tmp_path: Path
) -> None:
    """For example a run directory that was copied into a store by hand."""
    a_trial(study)
    shutil.copytree(study.rundir.path, tmp_path / "store" / "study")
    there = pulled(study, remote, tmp_path / "there")
    assert there.rundir.epochs.read_bytes() == study.rundir.epochs.read_bytes()


def test_epochs_lost_in_the_store_are_detected(
    study: Study, remote: Remote, tmp_path: Path
) -> None:
    with mirrored(study, remote) as (mine, mirror):
        a_trial(mine)
        mirror.flush()
    content = remote.read("epochs.jsonl")
    assert content
    remote.write("epochs.jsonl", content[: len(content) // 3])
    with pytest.raises(UserError, match=r"epochs\.jsonl lacks epoch"):
        pulled(study, remote, tmp_path / "there")


def test_different_stores_have_different_working_copies(empty_cache: Path) -> None:
    first = working_copy("s3://bucket/runs", "study")
    assert first.is_relative_to(empty_cache)
    assert first.name == "study"
    assert working_copy("s3://bucket/runs/", "study") == first
    assert working_copy("s3://another/runs", "study") != first
