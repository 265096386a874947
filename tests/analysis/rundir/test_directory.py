"""Run directory layout: files read back as written, even after crashes and interruptions."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from analysis.frames import load_readable_frames
from analysis.rundir import ConfirmRow, EpochRow, RunDir, RunDirError, TrialRow
from tests.support import FIXTURES

FIXTURE = RunDir(FIXTURES / "run")
EPOCH = FIXTURE.read_epochs()[0]
TRIAL = FIXTURE.read_trials()[0]
CONFIRM = FIXTURE.read_confirm()[0]


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    (tmp_path / "run").mkdir()
    return RunDir(tmp_path / "run")


def epoch(run_id: str, attempt: int, number: int, loss: float = 0.5) -> EpochRow:
    return replace(EPOCH, run_id=run_id, attempt=attempt, epoch=number, train_loss=loss)


def keys(rows: list[EpochRow]) -> list[tuple[str, int, int]]:
    return [(row.run_id, row.attempt, row.epoch) for row in rows]


def test_study_record_round_trips_with_its_format(run: RunDir) -> None:
    run.write_study({"config": {"seed": 3}, "nothing": math.nan})
    assert run.read_study() == {"config": {"seed": 3}, "nothing": None, "format": 1}


def test_rows_round_trip_with_their_types(run: RunDir) -> None:
    failed = replace(TRIAL, state="failed", best_epoch=0, error='one, two "three"\nfour')
    run.write_trials([TRIAL, failed])
    run.write_confirm([CONFIRM])
    run.append_epochs([EPOCH])
    assert run.read_trials() == [TRIAL, failed]
    assert run.read_confirm() == [CONFIRM]
    assert run.read_epochs() == [EPOCH]
    assert TRIAL.hyperparameters["head"] == "256"
    assert TRIAL.hyperparameters["batch_size"] == 128


@pytest.mark.parametrize("error", ["one\rtwo", "one\r", "\r\n", "\n", "\N{LINE SEPARATOR}", "\0"])
def test_line_breaks_round_trip(run: RunDir, error: str) -> None:
    run.write_trials([replace(TRIAL, error=error), TRIAL])
    assert run.read_trials() == [replace(TRIAL, error=error), TRIAL]


def test_arms_may_have_different_hyperparameters(run: RunDir) -> None:
    layerwise = replace(TRIAL, hyperparameters={"head": "512-256", "dropout_1": 0.25})
    run.write_trials([TRIAL, layerwise])
    assert run.read_trials() == [TRIAL, layerwise]


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_non_finite_numbers_are_left_empty(run: RunDir, loss: float) -> None:
    run.append_epochs([replace(EPOCH, val_loss=loss)])
    run.write_trials([replace(TRIAL, val_loss=loss)])
    assert json.loads(run.epochs.read_text())["val_loss"] is None
    assert math.isnan(run.read_epochs()[0].val_loss)
    assert math.isnan(run.read_trials()[0].val_loss)


def test_missing_files_read_as_empty(run: RunDir) -> None:
    assert run.read_epochs() == []
    assert run.read_trials() == []
    assert run.read_confirm() == []
    assert run.read_confirmations() == []


def test_epochs_are_appended(run: RunDir) -> None:
    run.append_epochs([epoch("a", 1, 1), epoch("a", 1, 2)])
    run.append_epochs([epoch("b", 1, 1)])
    assert keys(run.read_epochs()) == [("a", 1, 1), ("a", 1, 2), ("b", 1, 1)]


def test_an_incomplete_last_line_is_ignored_and_then_overwritten(run: RunDir) -> None:
    run.append_epochs([epoch("a", 1, 1), epoch("a", 1, 2)])
    run.epochs.write_bytes(run.epochs.read_bytes()[:-20])
    assert keys(run.read_epochs()) == [("a", 1, 1)]
    run.append_epochs([epoch("a", 1, 2)])
    assert keys(run.read_epochs()) == [("a", 1, 1), ("a", 1, 2)]


def test_a_row_without_its_line_break_is_incomplete(run: RunDir) -> None:
    run.append_epochs([epoch("a", 1, 1)])
    run.epochs.write_bytes(run.epochs.read_bytes()[:-1])
    assert run.read_epochs() == []
    run.append_epochs([epoch("a", 1, 1)])
    assert keys(run.read_epochs()) == [("a", 1, 1)]


def test_a_resumed_attempt_continues_the_earlier_one(run: RunDir) -> None:
    run.append_epochs(epoch("a", 1, number) for number in (1, 2, 3))
    run.append_epochs(epoch("a", 2, number) for number in (3, 4))
    assert keys(run.read_epochs()) == [("a", 1, 1), ("a", 1, 2), ("a", 2, 3), ("a", 2, 4)]


def test_an_attempt_from_the_start_replaces_the_earlier_one(run: RunDir) -> None:
    run.append_epochs(epoch("a", 1, number) for number in (1, 2, 3))
    run.append_epochs([epoch("b", 1, 1), epoch("a", 2, 1)])
    assert keys(run.read_epochs()) == [("b", 1, 1), ("a", 2, 1)]


def test_a_late_row_of_an_earlier_attempt_is_skipped(run: RunDir) -> None:
    run.append_epochs([epoch("a", 1, 1), epoch("a", 2, 1), epoch("a", 1, 2), epoch("a", 2, 2)])
    assert keys(run.read_epochs()) == [("a", 2, 1), ("a", 2, 2)]
    run.append_epochs([epoch("a", 1, 3)])
    assert keys(run.read_epochs()) == [("a", 2, 1), ("a", 2, 2)]


def test_the_last_row_of_an_epoch_written_twice_is_kept(run: RunDir) -> None:
    run.append_epochs([epoch("a", 1, 1, loss=0.9), epoch("a", 1, 1, loss=0.1)])
    assert [row.train_loss for row in run.read_epochs()] == [0.1]


def write_confirmation(run: RunDir, run_id: str) -> ConfirmRow:
    row = replace(CONFIRM, run_id=run_id, test_loss=math.nan)
    run.write_confirmation(
        run_id,
        row,
        val_logits=np.full((4, 10), 1.5, dtype=np.float32),
        test_logits=np.zeros((6, 10), dtype=np.float32),
        val_labels=np.arange(4, dtype=np.int32),
        test_labels=np.arange(6, dtype=np.int32),
    )
    return row


def test_a_confirmation_run_is_stored_as_a_row_and_predictions(run: RunDir) -> None:
    for run_id in ("run-2", "run-1"):
        write_confirmation(run, run_id)
    rows = run.read_confirmations()
    assert [row.run_id for row in rows] == ["run-1", "run-2"]
    assert rows[0].hyperparameters == CONFIRM.hyperparameters
    assert math.isnan(rows[0].test_loss)
    with np.load(run.confirm_dir / "run-1.npz") as arrays:
        shapes = {name: (arrays[name].shape, str(arrays[name].dtype)) for name in arrays}
        assert (arrays["val_logits"] == 1.5).all()
    assert shapes == {
        "val_logits": ((4, 10), "float16"),
        "test_logits": ((6, 10), "float16"),
        "val_labels": ((4,), "int64"),
        "test_labels": ((6,), "int64"),
    }


def test_a_confirmation_run_without_its_row_is_not_done(run: RunDir) -> None:
    write_confirmation(run, "run-1")
    (run.confirm_dir / "run-1.json").unlink()
    assert run.read_confirmations() == []


def test_appending_a_row_does_not_recreate_a_vanished_directory(run: RunDir) -> None:
    """If a network file system is gone, nobody would find a row written to the mount point."""
    run.path.rmdir()
    with pytest.raises(FileNotFoundError):
        run.append_epochs([EPOCH])
    assert not run.path.exists()


def test_an_interrupted_write_leaves_the_old_file(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.write_trials([TRIAL])

    def crash(_: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", crash)
    with pytest.raises(OSError, match="disk full"):
        run.write_trials([TRIAL, TRIAL])
    assert run.read_trials() == [TRIAL]


def test_every_trial_state_round_trips(run: RunDir) -> None:
    for state in ("completed", "pruned", "diverged", "failed"):
        row: TrialRow = replace(TRIAL, state=state)
        run.write_trials([row])
        assert run.read_trials() == [row]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("study.json", "{", "study.json: not a JSON object"),
        ("study.json", "[]", "study.json: not a JSON object"),
        ("study.json", "{}", "has format None"),
        ("study.json", '{"format": 2}', "has format 2; this version"),
        ("epochs.jsonl", "hello\n", "epochs.jsonl, line 1: not a JSON object"),
        ("epochs.jsonl", '{"phase": "search"}\n', "epochs.jsonl, line 1: missing or unknown"),
        ("epochs.jsonl", "[" * 100_000 + "\n", "epochs.jsonl, line 1: not a JSON object"),
        ("trials.csv", "a,b\n1,2\n", "trials.csv, row 1: missing or unknown fields: "),
        ("trials.csv", "run_id,arm\n1,2,3\n", "trials.csv, row 1: number of values differs"),
        ("confirm.csv", b"\xff\xfe\x00", "confirm.csv: not a CSV file"),
    ],
)
def test_unreadable_files_raise_a_one_line_error(
    run: RunDir, name: str, content: str | bytes, message: str
) -> None:
    (run.path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    read = {
        "study.json": run.read_study,
        "epochs.jsonl": run.read_epochs,
        "trials.csv": run.read_trials,
        "confirm.csv": run.read_confirm,
    }[name]
    with pytest.raises(RunDirError) as caught:
        read()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("column", "good", "bad"),
    [("state", "completed", "running"), ("epochs", "3", "three"), ("train_loss", "0.2", "x")],
)
def test_an_invalid_value_is_reported(run: RunDir, column: str, good: str, bad: str) -> None:
    row = replace(TRIAL, state="completed", epochs=3, train_loss=0.2)
    run.write_trials([row])
    header, line = run.trials.read_text().splitlines()
    values = line.split(",")
    position = header.split(",").index(column)
    assert values[position] == good
    values[position] = bad
    run.trials.write_text(f"{header}\n{','.join(values)}\n")
    with pytest.raises(RunDirError, match=f"trials.csv, row 1: {column}: '{bad}' is invalid"):
        run.read_trials()


@pytest.mark.parametrize(
    ("field", "value"), [("test_loss", 10**400), ("hyperparameters", {"head": ["256"]})]
)
def test_a_value_of_another_type_is_reported(run: RunDir, field: str, value: object) -> None:
    write_confirmation(run, "run-1")
    file = run.confirm_dir / "run-1.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), field: value}))
    with pytest.raises(RunDirError, match=rf"run-1.json: {field}: .* is invalid"):
        run.read_confirmations()


def test_a_line_break_in_a_path_is_escaped(tmp_path: Path) -> None:
    with pytest.raises(RunDirError) as caught:
        RunDir(tmp_path / "a\nb\udcff").read_study()
    assert str(caught.value) == rf"{tmp_path}/a\nb\udcff: no such directory"


@pytest.mark.parametrize(
    ("arms", "missing"),
    [({"a": {"trials": 0}}, False), ({"a": {"trials": 3}, "b": {"trials": 0}}, True), ({}, True)],
)
def test_missing_trials_are_reported_only_if_there_was_something_to_search(
    arms: dict[str, dict[str, int]], missing: bool, tmp_path: Path
) -> None:
    RunDir(tmp_path).write_study({"arms": arms, "config": {"metric": "val_accuracy"}})
    problems = load_readable_frames(tmp_path).problems
    assert any("trials.csv" in problem for problem in problems) == missing
