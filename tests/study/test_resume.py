"""A run directory whose files are missing, cut short or garbage, each in turn, and two starts."""

import errno
import json
import multiprocessing
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
    """The run directory of a study that has ended, export left aside; Ray goes on running."""
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


def go_on(rundir: RunDir, *options: str) -> Study:
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


class WentOnError(Exception):
    """The study was found to be fit to go on."""


@pytest.fixture(autouse=True)
def no_further(monkeypatch: pytest.MonkeyPatch) -> None:
    """Starts end where Ray would be started: these tests are about what comes before."""

    def went_on(*_: object, **__: object) -> None:
        raise WentOnError

    monkeypatch.setattr(pipeline, "ray_session", went_on)


def test_a_whole_study_goes_on(rundir: RunDir) -> None:
    with pytest.raises(WentOnError):
        pipeline.run(go_on(rundir))


#: What loses no more than rows of confirmation runs, which are trained again; and a study that was
#: killed before its report has no verdict either.
HARMLESS = {
    ("epochs.jsonl", "cut in the middle"),
    ("epochs.jsonl", "cut before the end"),
    ("report/verdict.json", "missing"),
}


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("name", ["study.json", "optuna.db", "epochs.jsonl", "report/verdict.json"])
def test_what_cannot_be_made_anew_is_refused_by_name(rundir: RunDir, name: str, how: str) -> None:
    damage(rundir.path / name, how)
    if (name, how) in HARMLESS:
        with pytest.raises(WentOnError):
            pipeline.run(go_on(rundir))
        return
    before = contents(rundir)
    with pytest.raises((UserError, RunDirError)) as error:
        pipeline.run(go_on(rundir))
    assert Path(name).name in str(error.value)
    assert "\n" not in str(error.value)
    assert contents(rundir) == before


@pytest.mark.parametrize("content", ["", "garbage\n", '{"start": 1, "phase": "sea'])
def test_when_phases_ran_is_no_reason_not_to_go_on(rundir: RunDir, content: str) -> None:
    rundir.phases.write_text(content)
    with pytest.raises(WentOnError):
        pipeline.run(go_on(rundir))
    last = [json.loads(line)["phase"] for line in rundir.phases.read_text().splitlines()[-2:]]
    assert last == ["start-up", "ray"]


def test_rows_of_a_trial_that_ended_are_missed(rundir: RunDir) -> None:
    """Cut between two rows, where every line that is left makes sense."""
    lines = rundir.epochs.read_text().splitlines(keepends=True)
    last = max(i for i, line in enumerate(lines) if '"dropout-001"' in line)
    rundir.epochs.write_text("".join(lines[:last] + lines[last + 1 :]))
    with pytest.raises(UserError, match=r"epochs\.jsonl lacks epoch \d of trial dropout-001"):
        pipeline.run(go_on(rundir))


def test_the_epochs_of_a_trial_that_optuna_does_not_know_are_noticed(rundir: RunDir) -> None:
    text = rundir.epochs.read_text()
    rundir.epochs.write_text(text.replace('"dropout-001"', '"dropout-099"'))
    with pytest.raises(UserError, match=r"lacks (epoch 1 of )?trial dropout-0(01|99)"):
        pipeline.run(go_on(rundir))


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("name", ["trials.csv", "confirm.csv"])
def test_tables_are_made_anew(
    rundir: RunDir, name: str, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = rundir.path / name
    before = file.read_bytes()
    damage(file, how)
    study = go_on(rundir)
    if name == "trials.csv":
        search_study(study)
    else:
        confirm_study(study)
    assert file.read_bytes() == before
    assert "runs in" not in capsys.readouterr().out, "something was trained again"


@pytest.mark.integration
@pytest.mark.parametrize("how", ["empty", "cut in the middle", "garbage"])
@pytest.mark.parametrize("kind", ["row", "predictions", "weights", "epochs"])
def test_a_damaged_confirmation_run_is_trained_again(
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
    confirm_study(go_on(rundir))
    said = capsys.readouterr().out
    assert run_id in said
    assert "Confirmation: 1 runs in" in said
    for row in rundir.read_confirm():
        same = {**vars(before[row.run_id]), "seconds": row.seconds}
        assert vars(row) == same
    assert rundir.weights(run_id).exists()
    assert rundir.predictions(run_id).exists()


def test_files_beside_a_missing_record_are_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "letter.txt").write_text("do not touch")
    with pytest.raises(UserError, match=r"holds no study\.json, but other files"):
        pipeline.run(go_on(RunDir(tmp_path / "study")))
    assert [path.name for path in (tmp_path / "study").iterdir() if path.name != ".lock"] == [
        "letter.txt"
    ]


def test_a_start_that_was_killed_in_its_first_moment_begins_anew(tmp_path: Path) -> None:
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / ".study.json.part").write_text("{")
    with pytest.raises(WentOnError):
        pipeline.run(go_on(RunDir(tmp_path / "study"), "--transfer", "frozen"))


def test_a_disk_that_is_full_at_the_end_is_said_in_one_line(
    rundir: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pipeline, "run_phases", full)
    with pytest.raises(StorageError, match="No space left on device"):
        pipeline.run(go_on(rundir))


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
        with pytest.raises(UserError, match="another process works on this study"):
            pipeline.run(go_on(rundir))
        assert contents(rundir) == before
    finally:
        first.kill()
        first.join()
    with lock_directory(rundir):  # a process that was killed has let go
        pass


def test_a_mistake_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(pipeline, "ray_session", lambda *_, **__: nullcontext())
    (tmp_path / "images").mkdir()
    options = ["--data", str(tmp_path / "images"), "--storage", str(tmp_path / "runs")]
    with pytest.raises(UserError, match="no class folders in"):
        pipeline.run(resolve_study(parse_config([*options, "--transfer", "frozen"])))
    assert not list(tmp_path.glob("runs/*"))


def test_a_space_that_was_changed_is_noticed(
    rundir: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = replace(spaces.TINY, recipe={**spaces.TINY.recipe, "head": Fixed("64")})
    monkeypatch.setattr(spaces, "TINY", changed)
    with pytest.raises(UserError, match="space tiny changed since this study's start: its head"):
        pipeline.run(go_on(rundir))


def test_halves_of_files_and_states_of_ended_trials_are_cleared_away(rundir: RunDir) -> None:
    rundir.state("dropout-001").write_bytes(b"stale")
    left = rundir.weights("dropout-001").with_name(".dropout-001.safetensors.part")
    left.write_bytes(b"half")
    rundir.delete_partial()
    rundir.put_confirm_away()
    search_study(go_on(rundir))
    assert not rundir.state("dropout-001").exists()
    assert not left.exists()


def test_the_earlier_look_stays_on_record_where_its_verdict_is_lost(rundir: RunDir) -> None:
    rundir.put_confirm_away()
    rundir.verdict.unlink()
    confirm_study(go_on(rundir, "--seeds", "3"))
    write_report(rundir.path)
    assert '"look": 2' in rundir.verdict.read_text()
