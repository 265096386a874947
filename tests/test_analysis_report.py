"""Tables, curves and the report of the made-up run directory in fixtures/run (see make_run.py)."""

import csv
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from analysis.curves import compute_curves
from analysis.figures import make_curves_figure, spread
from analysis.frames import StudyFrames, compute_champions, load_frames
from analysis.grid import show_article_table, show_search_table
from analysis.provenance import describe_inputs
from analysis.report import write_report
from analysis.rundir import RunDir
from analysis.tables import compute_article_table, compute_search_table

FIXTURE = Path(__file__).parent / "fixtures" / "run"


@pytest.fixture
def frames() -> StudyFrames:
    return load_frames(FIXTURE)


@pytest.fixture
def unconfirmed(frames: StudyFrames) -> StudyFrames:
    return replace(frames, confirm=frames.confirm.iloc[:0])


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A copy of the fixture that may be written to."""
    return Path(shutil.copytree(FIXTURE, tmp_path / "run"))


def test_article_table_by_hand(frames: StudyFrames) -> None:
    table = compute_article_table(frames)
    rows = {row.name: row for row in table.rows}
    assert list(rows) == [
        "Training accuracy",
        "Testing accuracy",
        "Training loss",
        "Validation loss",
    ]
    assert table.settings == ("no-dropout", "dropout")
    assert (table.recipes, table.seeds) == (2, 3)
    # Without dropout: 68, 69, 70 with one recipe, half a point more with the other. The deviations
    # from 69.25 are ±1.25, ±0.75 and ±0.25, each twice but for sign; their squares add up to 4.375.
    without, with_dropout = rows["Testing accuracy"].cells
    assert without.mean == pytest.approx(69.25)
    assert without.sd == pytest.approx(math.sqrt(4.375 / 5))
    assert without.n == 6
    assert with_dropout.mean == pytest.approx(71.25)
    assert [cell.mean for cell in rows["Training accuracy"].cells] == pytest.approx([86, 80])
    assert [cell.mean for cell in rows["Training loss"].cells] == pytest.approx([0.35, 0.45])
    assert [cell.mean for cell in rows["Validation loss"].cells] == pytest.approx([1.1, 1.0])
    assert [row.article for row in table.rows] == [
        (94.5, 97.54),
        (78.76, 79.87),
        (0.17, 0.08),
        (0.86, 1.01),
    ]


def test_article_table_in_words(frames: StudyFrames) -> None:
    grid = show_article_table(compute_article_table(frames))
    assert grid.header[2:4] == ("no-dropout (n = 6)", "dropout (n = 6)")
    assert grid.rows[1] == (
        "Testing accuracy",
        "test",
        "69.25 ± 0.94 %",
        "71.25 ± 0.94 %",
        "78.76 %",
        "79.87 %",
    )
    assert "2 recipes, 3 seeds" in grid.note
    assert "| Testing accuracy  | test " in grid.to_markdown()


def test_without_confirmation_runs_the_champions_stand_in(unconfirmed: StudyFrames) -> None:
    table = compute_article_table(unconfirmed)
    assert table.evidence == "champions"
    assert [row.measured_on for row in table.rows] == [
        "part of train",
        "val",
        "part of train",
        "val",
    ]
    accuracy = table.rows[1]
    assert [cell.mean for cell in accuracy.cells] == pytest.approx([66, 67])
    assert all(cell.n == 1 and math.isnan(cell.sd) for cell in accuracy.cells)
    grid = show_article_table(table)
    assert grid.rows[1][:3] == ("Validation accuracy", "val", "66.00 %")
    assert "No confirmation runs" in grid.note
    assert "no test figures" in grid.note


def test_a_column_per_setting(frames: StudyFrames) -> None:
    doses = [f"dropout-0.{row % 4}" for row in range(len(frames.confirm))]
    table = compute_article_table(replace(frames, confirm=frames.confirm.assign(setting=doses)))
    assert table.settings == ("dropout-0.0", "dropout-0.1", "dropout-0.2", "dropout-0.3")
    assert [cell.n for cell in table.rows[0].cells] == [3, 3, 3, 3]


def test_search_table_counts_states_and_names_champions(frames: StudyFrames) -> None:
    table = compute_search_table(frames)
    counts = [(r.arm, r.completed, r.pruned, r.diverged, r.failed) for r in table.rows]
    assert counts == [("no-dropout", 2, 1, 1, 0), ("dropout", 2, 1, 1, 0)]
    assert [row.champion for row in table.rows] == ["no-dropout-000", "dropout-000"]
    assert table.rows[1].hyperparameters["head"] == "1024"
    assert show_search_table(table).rows[0][5:] == (
        "66.00 %",
        "no-dropout-000: head 256, learning_rate 0.0003, weight_decay 0.001, batch_size 128,"
        " optimizer adamw, dropout 0",
    )


def test_champion_of_a_loss_is_the_lowest(frames: StudyFrames) -> None:
    by_loss = replace(frames, record={"config": {"metric": "val_loss"}})
    assert list(compute_champions(by_loss)["run_id"]) == ["no-dropout-001", "dropout-001"]


def test_a_trial_cut_short_is_no_champion(frames: StudyFrames) -> None:
    trials = frames.trials.copy()
    trials.loc[trials["state"] == "pruned", "score"] = 0.99
    champions = compute_champions(replace(frames, trials=trials))
    assert list(champions["run_id"]) == ["no-dropout-000", "dropout-000"]


def test_an_arm_without_champion_is_said_to_have_none(frames: StudyFrames) -> None:
    table = compute_search_table(replace(frames, trials=frames.trials.assign(state="pruned")))
    assert [row.champion for row in table.rows] == ["", ""]
    assert show_search_table(table).rows[0][5:] == ("none", "none")


def test_curves_by_hand(frames: StudyFrames) -> None:
    curves = compute_curves(frames)
    assert [(setting.setting, setting.n) for setting in curves.settings] == [
        ("no-dropout", 6),
        ("dropout", 6),
    ]
    # Without dropout val accuracy is 0.60 + 0.02 epoch + 0.01 seed (0 to 2), whatever the recipe.
    band = curves.settings[0].bands["val_accuracy"]
    np.testing.assert_array_equal(band.epochs, [1, 2, 3])
    np.testing.assert_allclose(band.mean, [0.63, 0.65, 0.67])
    np.testing.assert_allclose(band.low, [0.62, 0.64, 0.66])
    np.testing.assert_allclose(band.high, [0.64, 0.66, 0.68])


def test_curves_without_confirmation_runs_are_the_champions(unconfirmed: StudyFrames) -> None:
    curves = compute_curves(unconfirmed)
    assert curves.evidence == "champions"
    assert [setting.n for setting in curves.settings] == [1, 1]
    np.testing.assert_allclose(curves.settings[0].bands["train_loss"].mean, [0.7, 0.35, 0.7 / 3])


def test_a_setting_without_epochs_has_no_curve(frames: StudyFrames) -> None:
    of_dropout = frames.epochs["run_id"].str.contains("with-dropout")
    curves = compute_curves(replace(frames, epochs=frames.epochs[~of_dropout]))
    assert [setting.setting for setting in curves.settings] == ["no-dropout"]


def test_figure_says_what_is_seen(frames: StudyFrames) -> None:
    figure = make_curves_figure(compute_curves(frames), "accuracy", "made-up data")
    train, val = figure.axes
    assert figure.get_suptitle().startswith("Accuracy by epoch: mean of 6 confirmation runs")
    assert (train.get_xlabel(), train.get_ylabel()) == ("epoch", "accuracy (%)")
    assert {text.get_text() for text in val.texts} == {"no-dropout", "dropout"}
    assert figure.get_supxlabel() == "made-up data"


def test_labels_move_apart_only_where_they_must() -> None:
    assert spread([5.0, 1.0, 1.0], gap=1.0) == pytest.approx([5.0, 0.5, 1.5])
    assert spread([3.0, 1.0], gap=1.0) == pytest.approx([3.0, 1.0])


def test_inputs_are_named_or_said_to_be_missing() -> None:
    record = RunDir(FIXTURE).read_study()
    assert describe_inputs(record) == (
        "data: made-up test data, weights: made-up test weights, images of 96 px, torch 0.0,"
        " ray 0.0"
    )
    assert "data: not recorded" in describe_inputs({})


def test_report_writes_tables_and_figures(run_dir: Path) -> None:
    report = write_report(run_dir)
    written = {path.relative_to(run_dir / "report").as_posix() for path in _files(report.path)}
    assert written == {
        "report.md",
        *(f"tables/{name}.{suffix}" for name in ("article", "search") for suffix in ("csv", "md")),
        *(f"figures/{name}.{kind}" for name in ("accuracy", "loss") for kind in ("svg", "png")),
    }
    assert set(_files(report.path)) == {report.path, *report.tables, *report.figures}
    with (run_dir / "report/tables/article.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4
    assert float(rows[1]["dropout mean"]) == pytest.approx(71.25)
    assert rows[1]["dropout n"] == "6"
    for path in (report.path, run_dir / "report/tables/article.md"):
        assert "made-up test data" in path.read_text()


def test_the_same_study_gives_the_same_files(run_dir: Path) -> None:
    report = write_report(run_dir)
    before = {path: path.read_bytes() for path in _files(report.path)}
    write_report(run_dir)
    assert {path: path.read_bytes() for path in _files(report.path)} == before


def test_report_of_a_study_that_has_only_begun(run_dir: Path) -> None:
    for name in ("trials.csv", "confirm.csv", "epochs.jsonl"):
        (run_dir / name).unlink()
    report = write_report(run_dir)
    assert report.figures == ()
    assert "No run can be compared yet" in report.path.read_text()


def test_report_of_a_study_without_a_search(run_dir: Path) -> None:
    (run_dir / "trials.csv").unlink()
    report = write_report(run_dir)
    assert report.search.rows == ()
    assert report.article.settings == ("no-dropout", "dropout")


def _files(page: Path) -> list[Path]:
    return [path for path in page.parent.rglob("*") if path.is_file()]


def analyse(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "analysis", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_command_prints_the_tables_plain_in_a_pipe(run_dir: Path) -> None:
    result = analyse(run_dir)
    assert result.returncode == 0, result.stderr
    assert "69.25 ± 0.94 %" in result.stdout
    assert f"Report: {run_dir / 'report' / 'report.md'}" in result.stdout
    assert "\x1b" not in result.stdout


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda run: shutil.rmtree(run), "no such directory"),
        (lambda run: (run / "study.json").unlink(), "it is not a run directory"),
        (lambda run: (run / "study.json").write_text("garbage"), "not a JSON object"),
        (lambda run: (run / "confirm.csv").write_text("a\n1\n"), "confirm.csv, row 1"),
        (lambda run: (run / "report").write_text("in the way"), "report"),
    ],
)
def test_command_refuses_what_it_cannot_read(run_dir: Path, break_it: object, message: str) -> None:
    assert callable(break_it)
    break_it(run_dir)
    result = analyse(run_dir)
    assert result.returncode == 2
    assert result.stdout == ""
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_analysis_needs_no_heavy_package() -> None:
    check = (
        "import sys, analysis.report;"
        " print({'torch', 'ray', 'optuna', 'matplotlib.pyplot'} & set(sys.modules))"
    )
    result = subprocess.run(
        [sys.executable, "-c", check], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "set()"
