"""Resuming with missing, truncated or garbage files, and concurrent starts."""

import errno
import json
import multiprocessing
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest
import ray

from analysis.report.write import write_report
from analysis.rundir import RunDir, RunDirError
from search_spaces import Fixed
from study import pipeline
from study.errors import StorageError, UserError
from study.storage.lock import lock_directory
from study.study import Study, parse_config, resolve_study
from tests.support import spaces
from tests.support.tiny_study import confirm_study, make_study, search_study

DAMAGES: dict[str, Callable[[bytes], bytes | None]] = {
    "missing": lambda _: None,
    "empty": lambda _: b"",
    "cut after 10 bytes": lambda content: content[:10],
    "cut in the middle": lambda content: content[: len(content) // 2],
    "cut before the end": lambda content: content[:-20],
    "garbage": lambda content: bytes(range(256)) * (len(content) // 256 + 1),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The run directory of a finished study, without its export; Ray keeps running."""
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    study = make_study(tmp_path_factory.mktemp("runs"), seeds=2)
    search_study(study)
    confirm_study(study)
    write_report(study.rundir.path)
    yield study.rundir.path
    ray.shutdown()


@pytest.fixture
def rundir(whole: Path, tmp_path: Path) -> RunDir:
    return RunDir(shutil.copytree(whole, tmp_path / "study"))


def resume(rundir: RunDir, *options: str) -> Study:
    place = ["--storage", str(rundir.path.parent), "--name", rundir.path.name]
    return resolve_study(parse_config(["--resume", *place, *options]))


def damage(file: Path, how: str) -> None:
    content = DAMAGES[how](file.read_bytes())
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content)


def contents(rundir: RunDir) -> dict[Path, bytes]:
    return {
        path: path.read_bytes()
        for path in rundir.path.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


class ResumedError(Exception):
    """All checks passed: the study would be resumed."""


@pytest.fixture(autouse=True)
def no_further(monkeypatch: pytest.MonkeyPatch) -> None:
    """End each start where Ray would start: these tests cover what comes before."""

    def resumed(*_: object, **__: object) -> None:
        raise ResumedError

    monkeypatch.setattr(pipeline, "ray_session", resumed)


def test_an_intact_study_is_resumed(rundir: RunDir) -> None:
    with pytest.raises(ResumedError):
        pipeline.run(resume(rundir))


#: Damage that only loses rows of confirmation runs, which are retrained; and a missing verdict, as
#: after a kill before the report.
HARMLESS = {
    ("epochs.jsonl", "cut in the middle"),
    ("epochs.jsonl", "cut before the end"),
    ("report/verdict.json", "missing"),
}


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("name", ["study.json", "optuna.db", "epochs.jsonl", "report/verdict.json"])
def test_a_damaged_file_that_cannot_be_rebuilt_is_named(
    rundir: RunDir, name: str, how: str
) -> None:
    damage(rundir.path / name, how)
    if (name, how) in HARMLESS:
        with pytest.raises(ResumedError):
            pipeline.run(resume(rundir))
        return
    before = contents(rundir)
    with pytest.raises((UserError, RunDirError)) as error:
        pipeline.run(resume(rundir))
    assert Path(name).name in str(error.value)
    assert "\n" not in str(error.value)
    assert contents(rundir) == before


@pytest.mark.parametrize("content", ["", "garbage\n", '{"start": 1, "phase": "sea'])
def test_damaged_phases_do_not_prevent_resuming(rundir: RunDir, content: str) -> None:
    rundir.phases.write_text(content)
    with pytest.raises(ResumedError):
        pipeline.run(resume(rundir))
    last = [json.loads(line)["phase"] for line in rundir.phases.read_text().splitlines()[-2:]]
    assert last == ["start-up", "ray"]


def test_missing_rows_of_an_ended_trial_are_noticed(rundir: RunDir) -> None:
    """A whole row is missing, and every remaining row is valid."""
    lines = rundir.epochs.read_text().splitlines(keepends=True)
    last = max(i for i, line in enumerate(lines) if '"dropout-001"' in line)
    rundir.epochs.write_text("".join(lines[:last] + lines[last + 1 :]))
    with pytest.raises(UserError, match=r"epochs\.jsonl lacks epoch \d of trial dropout-001"):
        pipeline.run(resume(rundir))


def test_epochs_of_a_trial_unknown_to_optuna_are_noticed(rundir: RunDir) -> None:
    text = rundir.epochs.read_text()
    rundir.epochs.write_text(text.replace('"dropout-001"', '"dropout-099"'))
    with pytest.raises(UserError, match=r"lacks (epoch 1 of )?trial dropout-0(01|99)"):
        pipeline.run(resume(rundir))


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("name", ["trials.csv", "confirm.csv"])
def test_tables_are_rebuilt(
    rundir: RunDir, name: str, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = rundir.path / name
    before = file.read_bytes()
    damage(file, how)
    study = resume(rundir)
    if name == "trials.csv":
        search_study(study)
    else:
        confirm_study(study)
    assert file.read_bytes() == before
    assert not re.search(r"\d runs? in ", capsys.readouterr().out), "something was retrained"


@pytest.mark.integration
@pytest.mark.parametrize("how", ["empty", "cut in the middle", "garbage"])
@pytest.mark.parametrize("kind", ["row", "predictions", "weights", "epochs"])
def test_a_damaged_confirmation_run_is_retrained(
    rundir: RunDir, kind: str, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {row.run_id: row for row in rundir.read_confirm()}
    run_id = next(name for name in before if rundir.weights(name).exists())
    if kind == "epochs":
        lines = rundir.epochs.read_text().splitlines(keepends=True)
        rundir.epochs.write_text("".join(line for line in lines if f'"{run_id}"' not in line))
    else:
        file = {
            "row": rundir.confirm_dir / f"{run_id}.json",
            "predictions": rundir.predictions(run_id),
            "weights": rundir.weights(run_id),
        }[kind]
        damage(file, how)
    confirm_study(resume(rundir))
    output = capsys.readouterr().out
    assert run_id in output
    assert "Confirmation: 1 run in" in output
    for row in rundir.read_confirm():
        same = {**vars(before[row.run_id]), "seconds": row.seconds}
        assert vars(row) == same
    assert rundir.weights(run_id).exists()
    assert rundir.predictions(run_id).exists()


def test_a_directory_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "letter.txt").write_text("do not touch")
    with pytest.raises(UserError, match=r"holds other files but no study\.json"):
        pipeline.run(resume(RunDir(tmp_path / "study")))
    assert [path.name for path in (tmp_path / "study").iterdir() if path.name != ".lock"] == [
        "letter.txt"
    ]


def test_a_start_killed_right_away_can_be_repeated(tmp_path: Path) -> None:
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / ".study.json.part").write_text("{")
    with pytest.raises(ResumedError):
        pipeline.run(resume(RunDir(tmp_path / "study"), "--transfer", "frozen"))


def test_a_full_disk_is_a_one_line_error(rundir: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pipeline, "run_phases", full)
    with pytest.raises(StorageError, match="No space left on device"):
        pipeline.run(resume(rundir))


def hold(path: Path, held: Event, seconds: float) -> None:
    with lock_directory(RunDir(path)):
        held.set()
        time.sleep(seconds)


def test_a_second_start_on_a_run_directory_is_refused(rundir: RunDir) -> None:
    context = multiprocessing.get_context("spawn")
    held = context.Event()
    first = context.Process(target=hold, args=(rundir.path, held, 600))
    first.start()
    try:
        assert held.wait(60)
        before = contents(rundir)
        with pytest.raises(UserError, match="another process is working on this study"):
            pipeline.run(resume(rundir))
        assert contents(rundir) == before
    finally:
        first.kill()
        first.join()
    with lock_directory(rundir):  # the lock of a killed process is released
        pass


def test_a_user_error_in_a_new_study_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(pipeline, "ray_session", lambda *_, **__: nullcontext())
    (tmp_path / "images").mkdir()
    options = ["--data", str(tmp_path / "images"), "--storage", str(tmp_path / "runs")]
    with pytest.raises(UserError, match="no class folders in"):
        pipeline.run(resolve_study(parse_config([*options, "--transfer", "frozen"])))
    assert not list(tmp_path.glob("runs/*"))


def test_a_changed_space_is_refused(rundir: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    changed = replace(spaces.TINY, recipe={**spaces.TINY.recipe, "head": Fixed("64")})
    monkeypatch.setattr(spaces, "TINY", changed)
    with pytest.raises(
        UserError, match="space tiny has changed since this study started: its head"
    ):
        pipeline.run(resume(rundir))


def test_partial_files_and_checkpoints_of_ended_trials_are_deleted(rundir: RunDir) -> None:
    rundir.state("dropout-001").write_bytes(b"stale")
    left = rundir.weights("dropout-001").with_name(".dropout-001.safetensors.part")
    left.write_bytes(b"half")
    rundir.delete_partial()
    rundir.archive_confirm()
    search_study(resume(rundir))
    assert not rundir.state("dropout-001").exists()
    assert not left.exists()


def test_the_earlier_look_is_still_counted_if_its_verdict_is_lost(rundir: RunDir) -> None:
    rundir.archive_confirm()
    rundir.verdict.unlink()
    confirm_study(resume(rundir, "--seeds", "3"))
    write_report(rundir.path)
    assert '"look": 2' in rundir.verdict.read_text()
