"""One study end to end: the real command on real images, real weights and a real Ray.

3,000 images at 32 px keep it short; the command downloads images and weights unless they are in the
user's cache.
"""

import json
import re
import signal
import subprocess
import sys
import time
from datetime import datetime
from itertools import pairwise
from pathlib import Path

import numpy as np
import optuna
import pandas as pd
import pytest

from analysis.report.times import PHASES
from analysis.rundir import RunDir
from study.data.load import load_dataset
from study.data.split import make_split
from study.search.searcher import state_of
from tests.support import ROOT
from tests.support.command import SMALL, Finished, command, start


def test_the_search_ran_the_requested_trials(finished: Finished) -> None:
    trials = finished.rundir.read_trials()
    by_arm = [sum(row.arm == arm for row in trials) for arm in ("no-dropout", "dropout")]
    assert by_arm == [4, 3]
    assert {row.state for row in trials} <= {"completed", "pruned"}
    epochs = finished.rundir.read_epochs()
    for trial in trials:
        rows = [row for row in epochs if row.run_id == trial.run_id]
        assert [row.epoch for row in rows] == list(range(1, trial.epochs + 1))
        assert trial.epochs == (4 if trial.state == "completed" else 3)
        assert trial.score == rows[-1].score == max(row.val_accuracy for row in rows)
        assert [row.rung for row in rows if row.rung] == [
            "continue" if trial.state == "completed" else "stop"
        ]


def test_the_best_runs_keep_their_weights_and_no_checkpoint_is_left(finished: Finished) -> None:
    rundir, expected = finished.rundir, set[str]()
    for arm in ("no-dropout", "dropout"):
        rows = [row for row in rundir.read_trials() if row.arm == arm and row.state == "completed"]
        best = sorted(rows, key=lambda row: (-row.score, row.run_id))[:3]
        expected |= {row.run_id for row in best}
    # The heads of all confirmation runs, for an ensemble.
    expected |= {run.run_id for run in rundir.read_confirm()}
    assert {path.stem for path in rundir.weights("any").parent.iterdir()} == expected
    assert list(rundir.state("any").parent.iterdir()) == []


def test_optuna_agrees_with_the_tables(finished: Finished) -> None:
    trials = {row.run_id: row for row in finished.rundir.read_trials()}
    storage = f"sqlite:///{finished.rundir.optuna_db}"
    seen = 0
    for arm in ("no-dropout", "dropout"):
        for trial in optuna.load_study(study_name=arm, storage=storage).trials:
            row = trials[f"{arm}-{trial.number:03d}"]
            assert state_of(trial) == row.state
            expected = {"completed": "COMPLETE", "pruned": "PRUNED"}[row.state]
            assert trial.state.name == expected
            assert len(trial.intermediate_values) == row.epochs
            assert trial.value == row.score
            seen += 1
    assert seen == 7


def test_confirmation_runs_are_crossed_and_matched(finished: Finished) -> None:
    rows = finished.rundir.read_confirm()
    arms = ("no-dropout", "dropout")
    assert len(rows) == 8
    assert {(row.recipe, row.setting) for row in rows} == {(a, b) for a in arms for b in arms}
    assert len({row.seed for row in rows}) == 2
    searched = {row.seed for row in finished.rundir.read_trials()}
    for row in rows:
        assert row.seed not in searched
        assert (row.hyperparameters["dropout"] == 0) == (row.setting == "no-dropout")
    curves = [row for row in finished.rundir.read_epochs() if row.phase == "confirm"]
    assert len(curves) == 8 * 4


def test_the_predictions_reproduce_the_table(finished: Finished) -> None:
    for row in finished.rundir.read_confirm():
        with np.load(finished.rundir.confirm_dir / f"{row.run_id}.npz") as stored:
            assert stored["test_logits"].dtype == np.float16
            guessed = stored["test_logits"].argmax(axis=1)
            assert np.mean(guessed == stored["test_labels"]) == pytest.approx(
                row.test_accuracy, abs=0.005
            )
            assert len(stored["val_labels"]) == 250


def test_study_json_records_the_inputs(finished: Finished) -> None:
    record = finished.rundir.read_study()
    assert record["data"]["images"] == 3000
    assert (record["split"]["train"], record["split"]["val"], record["split"]["test"]) == (
        2250,
        250,
        500,
    )
    assert re.fullmatch("[0-9a-f]{64}", record["weights"]["sha256"])
    assert record["preprocess"]["image_size"] == 32
    assert record["versions"]["torch"]


def test_each_trial_has_tensorboard_files(finished: Finished) -> None:
    trials = {row.run_id for row in finished.rundir.read_trials()}
    written = {path.parent.name for path in finished.rundir.search.glob("part-1/*/events.*")}
    assert written == trials


def test_the_best_model_is_chosen_on_val_and_reproduced_in_a_new_process(
    finished: Finished, tmp_path: Path
) -> None:
    config = json.loads((finished.rundir.best_model / "config.json").read_text())
    rows = finished.rundir.read_confirm()
    best = max(rows, key=lambda row: row.score)
    assert config["val_accuracy"] == best.score
    dataset = load_dataset("cifar10", 3000)
    test = make_split(dataset).test
    np.save(tmp_path / "pixels.npy", dataset.pixels[test])
    code = (
        "import sys, numpy as np; from study.export.bundle import predict_pixels as predict;"
        "np.save(sys.argv[2], predict(sys.argv[1], np.load(sys.argv[3])))"
    )
    paths = [finished.rundir.best_model, tmp_path / "out.npy", tmp_path / "pixels.npy"]
    subprocess.run([sys.executable, "-c", code, *map(str, paths)], check=True, cwd=ROOT)
    guessed = np.load(tmp_path / "out.npy").argmax(axis=1)
    assert np.mean(guessed == dataset.labels[test]) == config["test"]["accuracy"]


def test_the_report_is_written_and_shown(finished: Finished) -> None:
    report = finished.rundir.report
    for name in ("accuracy.svg", "accuracy.png", "loss.svg", "loss.png"):
        assert (report / "figures" / name).stat().st_size > 5000
    assert "Testing accuracy" in (report / "tables" / "article.md").read_text()
    assert "Testing accuracy" in finished.output
    assert "Too few pairs for a verdict: 2 seeds" in finished.output
    assert json.loads(finished.rundir.verdict.read_text())["outcome"] == "too few pairs"
    assert "Too few pairs for a verdict" in (report / "index.html").read_text()
    assert str(finished.rundir.best_model) in finished.output


def test_phase_times_are_recorded_and_shown(finished: Finished) -> None:
    rows = finished.rundir.read_phases()
    assert tuple(row.phase for row in rows) == PHASES
    assert {row.start for row in rows} == {1}
    assert all(row.begin < row.end for row in rows)
    assert all(row.end <= after.begin for row, after in pairwise(rows))
    assert len({row.slots for row in rows if row.phase in ("search", "confirm")}) == 1
    (started,) = finished.rundir.read_study()["starts"]
    loaded = datetime.fromisoformat(started["time"]).timestamp()
    by_phase = {row.phase: row for row in rows}
    assert by_phase["features"].end - 1 <= loaded <= by_phase["hand over"].begin
    for epoch in finished.rundir.read_epochs():
        assert by_phase[epoch.phase].begin < epoch.start
        assert epoch.end < by_phase[epoch.phase].end
    page = (finished.rundir.report / "index.html").read_text()
    assert "<h2>Where the time went</h2>" in page
    assert "ASHA trained" in page
    assert "python -m analysis RUN adds them" in page
    assert len(pd.read_csv(finished.rundir.report / "tables" / "time_per_run.csv")) == 7 + 8


def test_a_pipe_gets_one_line_per_run_and_no_ray_output(finished: Finished) -> None:
    lines = finished.output.splitlines()
    trials = [line for line in lines if re.match(r"\s*\d/7  (no-)?dropout-\d{3}  ", line)]
    assert len(trials) == 7
    assert all(line.endswith(")") for line in trials), "a line was truncated"
    assert "\x1b" not in finished.output
    assert not re.search(r"ray|Traceback|WARNING|INFO", re.sub(r"Used: .*", "", finished.output))
    log = finished.rundir.log.read_text()
    assert all(line in log for line in trials)


@pytest.mark.integration
def test_ray_listens_on_loopback_only(tmp_path: Path) -> None:
    """Checked in the kernel's table of listening sockets during a search, then ended by SIGTERM."""
    before = listening()
    rundir = RunDir(tmp_path / "sockets")
    process = start(f"--trials 4 --epochs 4 --seeds 0 {SMALL}", rundir.path)
    opened: set[tuple[str, int]] = set()
    while len(rundir.read_epochs()) < 6:
        assert process.poll() is None
        opened |= listening() - before
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143
    assert opened, "the test saw no socket of Ray"
    assert {address for address, _ in opened} <= {"0100007F", IPV6_LOOPBACK, MAPPED_LOOPBACK}


IPV6_LOOPBACK = "00000000000000000000000001000000"
MAPPED_LOOPBACK = "0000000000000000FFFF00000100007F"


def listening() -> set[tuple[str, int]]:
    """Address (as in /proc) and port of every listening TCP socket on this machine."""
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A":
                address, port = fields[1].split(":")
                found.add((address, int(port, 16)))
    return found


@pytest.mark.parametrize("options", ["--trials 0", "--spce dose", "--name .."])
def test_a_user_error_gives_one_line_and_status_2(options: str, tmp_path: Path) -> None:
    done = subprocess.run(
        command(options), capture_output=True, text=True, timeout=60, cwd=tmp_path, check=False
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_prints_the_plan_and_writes_nothing(tmp_path: Path) -> None:
    done = subprocess.run(
        command("--dry-run --transfer frozen"),
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for words in ("20 trials", "ASHA decides after epochs 3, 9", "32 runs of 15 epochs"):
        assert words in done.stdout
    assert list(tmp_path.iterdir()) == []
