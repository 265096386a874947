"""Tables, curves and the report of the made-up run directory in fixtures/run (see make_run.py)."""

import csv
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from analysis import load
from analysis.figures import make_pictures, render_file, render_inline
from analysis.figures.curves import compute_curves, make_curves
from analysis.figures.lines import spread
from analysis.frames import StudyFrames, compute_champions, load_frames
from analysis.report.health import check_health
from analysis.report.provenance import describe_inputs
from analysis.report.tables import compute_article_table, compute_search_table
from analysis.report.text_tables import show_article_table, show_search_table
from analysis.report.write import write_report
from analysis.rundir import RunDir
from analysis.stats.verdict import compute_verdict
from tests.support import FIXTURES, ROOT
from tests.support.fake_frames import article_arms

FIXTURE = FIXTURES / "run"
STUDY = FIXTURES / "study"


@pytest.fixture
def frames() -> StudyFrames:
    return load_frames(FIXTURE)


@pytest.fixture
def unconfirmed(frames: StudyFrames) -> StudyFrames:
    return replace(frames, confirm=frames.confirm.iloc[:0])


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A writable copy of the fixture."""
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
    # Three seeds are too few for an interval.
    assert (without.low, without.high) == (-math.inf, math.inf)
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


def test_article_table_as_text(frames: StudyFrames) -> None:
    grid = show_article_table(compute_article_table(frames))
    assert grid.header[1:3] == ("no-dropout (n = 6)", "dropout (n = 6)")
    assert grid.rows[1] == (
        "Testing accuracy (test)",
        "69.25 %",
        "71.25 %",
        "78.76 %",
        "79.87 %",
    )
    assert "2 recipes, 3 seeds" in grid.note
    assert "too few for a confidence interval" in grid.note
    assert "| Testing accuracy (test) " in grid.to_markdown()


def test_champions_are_shown_without_confirmation_runs(unconfirmed: StudyFrames) -> None:
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
    assert grid.rows[1][:2] == ("Validation accuracy (val)", "66.00 %")
    assert "No confirmation runs" in grid.note
    assert "no test figures" in grid.note


def test_the_table_with_intervals_fits_a_terminal(frames: StudyFrames) -> None:
    # Nine seeds instead of three.
    more = [frames.confirm.assign(seed=frames.confirm["seed"] + shift) for shift in (0, 10, 20)]
    grid = show_article_table(compute_article_table(replace(frames, confirm=pd.concat(more))))
    assert re.fullmatch(r"69\.25 % \(\d\d\.\d\d to \d\d\.\d\d\)", grid.rows[1][1])
    console = Console(width=120)
    with console.capture() as captured:
        console.print(grid.to_rich())
    assert sum(" to " in line for line in captured.get().splitlines()) == 4


def test_many_settings_become_rows_and_fit_a_terminal(frames: StudyFrames) -> None:
    doses = [f"dropout-0.{row // 3}" for row in range(len(frames.confirm))]  # three seeds each
    table = compute_article_table(replace(frames, confirm=frames.confirm.assign(setting=doses)))
    assert table.settings == ("dropout-0.0", "dropout-0.1", "dropout-0.2", "dropout-0.3")
    assert [cell.n for cell in table.rows[0].cells] == [3, 3, 3, 3]
    grid = show_article_table(table)
    assert grid.header[:3] == ("", "Training accuracy (train)", "Testing accuracy (test)")
    assert [row[0] for row in grid.rows[3:]] == [
        "dropout-0.3 (n = 3)",
        "article, without",
        "article, with",
    ]
    assert grid.rows[-1][1:] == ("97.54 %", "79.87 %", "0.08", "1.01")
    console = Console(width=120)
    with console.capture() as captured:
        console.print(grid.to_rich())
    assert "…" not in captured.get()
    assert all(f"dropout-0.{dose} (n = 3) " in captured.get() for dose in range(4))


def test_three_settings_with_intervals_fit_a_terminal() -> None:
    grid = show_article_table(compute_article_table(article_arms(-0.003, 0.0105)))
    console = Console(width=120)
    with console.capture() as captured:
        console.print(grid.to_rich())
    # Four intervals per setting, none broken over two lines.
    assert len(re.findall(r"\(\d+\.\d+ to \d+\.\d+\)", captured.get())) == 12


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


def test_a_pruned_trial_is_never_a_champion(frames: StudyFrames) -> None:
    trials = frames.trials.copy()
    trials.loc[trials["state"] == "pruned", "score"] = 0.99
    champions = compute_champions(replace(frames, trials=trials))
    assert list(champions["run_id"]) == ["no-dropout-000", "dropout-000"]


def test_an_arm_without_a_champion_shows_none(frames: StudyFrames) -> None:
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


def test_title_and_caption_describe_the_data(frames: StudyFrames) -> None:
    picture = make_curves(frames, "accuracy")
    assert picture is not None
    assert picture.title.startswith("Accuracy by epoch: mean of 6 confirmation runs")
    # The mean of the seeds without dropout at epoch 3; 0.01 more with dropout.
    assert "no-dropout 67.00 % after epoch 3" in picture.caption
    assert "dropout 68.00 % after epoch 3" in picture.caption
    train, val = picture.figure.axes
    assert (train.get_xlabel(), train.get_ylabel()) == ("epoch", "accuracy (%)")
    assert {text.get_text() for text in val.texts} == {"no-dropout", "dropout"}
    file = render_file(picture, "made-up data", "svg").decode()
    assert "made-up data" in file
    assert picture.title in file


def test_an_inline_figure_has_the_colours_of_the_page_and_its_own_ids(
    frames: StudyFrames,
) -> None:
    for picture in make_pictures(frames)["comparison"]:
        svg = render_inline(picture)
        assert svg.startswith("<svg ")
        assert not re.search("#0072b2|#d55e00", svg)
        assert "var(--with)" in svg
        names = re.findall(r'\bid="([^"]+)"', svg)
        assert all(name.startswith(f"{picture.name}-") for name in names)
        assert set(re.findall(r'(?:url\(|href=")#([^")]+)', svg)) <= set(names)


def test_labels_move_apart_only_where_they_overlap() -> None:
    assert spread([5.0, 1.0, 1.0], gap=1.0) == pytest.approx([5.0, 0.5, 1.5])
    assert spread([3.0, 1.0], gap=1.0) == pytest.approx([3.0, 1.0])


def test_inputs_are_named_or_marked_as_missing() -> None:
    record = RunDir(FIXTURE).read_study()
    assert describe_inputs(record) == (
        "data: made-up test data, weights: made-up test weights, images of 96 px, transfer"
        " not recorded, torch 0.0, ray 0.0"
    )
    assert "data: not recorded" in describe_inputs({})


def test_report_writes_tables_and_figures(run_dir: Path) -> None:
    report = write_report(run_dir)
    written = {path.relative_to(run_dir / "report").as_posix() for path in _files(report.path)}
    assert written == {
        "index.html",
        "verdict.json",
        *(
            f"tables/{name}.{suffix}"
            for name in ("article", "effects", "search", "health", "time")
            for suffix in ("csv", "md")
        ),
        "tables/time_per_run.csv",
        *(
            f"figures/{picture.name}.{kind}"
            for section in make_pictures(load_frames(run_dir)).values()
            for picture in section
            for kind in ("svg", "png")
        ),
    }
    assert {"figures/accuracy.svg", "figures/loss.svg", "figures/pairs.svg"} <= written
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


def test_report_of_a_study_that_has_just_started(run_dir: Path) -> None:
    for name in ("trials.csv", "confirm.csv", "epochs.jsonl"):
        (run_dir / name).unlink()
    report = write_report(run_dir)
    assert report.figures == ()
    page = report.path.read_text()
    for words in ("No runs to compare yet", "No verdict", "0 confirmation runs done"):
        assert words in page


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


def test_command_prints_plain_tables_in_a_pipe(run_dir: Path) -> None:
    result = analyse(run_dir)
    assert result.returncode == 0, result.stderr
    assert "69.25 %" in result.stdout
    assert "Too few pairs for a verdict: 3 seeds" in result.stdout
    assert f"Report: {run_dir / 'report' / 'index.html'}" in result.stdout
    assert "\x1b" not in result.stdout


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda run: shutil.rmtree(run), "no such directory"),
        (lambda run: (run / "study.json").unlink(), "is not a run directory: it has no study.json"),
        (lambda run: (run / "study.json").write_text("garbage"), "not a JSON object"),
        (lambda run: (run / "study.json").write_text('{"format": 99}'), "reads format 1"),
        (lambda run: (run / "report").write_text("in the way"), "report"),
    ],
)
def test_command_rejects_unreadable_run_directories(
    run_dir: Path, break_it: object, message: str
) -> None:
    assert callable(break_it)
    break_it(run_dir)
    result = analyse(run_dir)
    assert result.returncode == 2
    assert result.stdout == ""
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_damaged_files_are_reported_and_skipped(run_dir: Path) -> None:
    (run_dir / "trials.csv").write_text("a\n1\n")
    result = analyse(run_dir)
    assert result.returncode == 0
    assert "Skipped a damaged file" in result.stdout
    assert "trials.csv, row 1" in result.stdout
    assert "71.25 %" in result.stdout
    assert "Skipped a damaged file" in (run_dir / "report" / "index.html").read_text()


def test_damaged_predictions_and_searches_are_reported(tmp_path: Path) -> None:
    run_dir = Path(shutil.copytree(STUDY, tmp_path / "study"))
    (run_dir / "optuna.db").write_bytes(b"not a database, but long enough to look at" * 100)
    (run_dir / "confirm" / "dropout-recipe-dropout-0.npz").write_bytes(b"cut")
    report = write_report(run_dir)
    assert len(report.problems) == 2
    for file, problem in zip(("optuna.db", "dropout-0.npz"), report.problems, strict=True):
        assert file in problem
        assert "\n" not in problem
    assert "importance" not in {path.stem for path in report.figures}
    # Without one run's predictions there is no standard error from the images.
    assert math.isnan(report.verdict.comparisons[0].errors.images)


def test_several_studies_are_compared_in_one_page(run_dir: Path, tmp_path: Path) -> None:
    other = shutil.copytree(STUDY, tmp_path / "other")
    command = [sys.executable, "-m", "analysis", str(run_dir), str(other)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
    page = (tmp_path / "comparison.html").read_text()
    for name, size in (("run", 96), ("other", 32)):
        assert f'<td class="short">{name}</td>' in page
        assert f'<td class="short">{size}</td>' in page
    assert page.count("<h2>") == 3
    assert not (run_dir / "report").exists()


def test_load_gives_the_frames_of_a_study() -> None:
    frames = load(STUDY)
    assert (len(frames.trials), len(frames.confirm)) == (16, 24)
    assert {"test_accuracy", "recipe", "setting", "dropout"} <= set(frames.confirm)


def test_analysis_imports_no_heavy_package() -> None:
    check = (
        "import sys, analysis.report;"
        " print({'torch', 'ray', 'study', 'matplotlib.pyplot'} & set(sys.modules))"
    )
    result = subprocess.run(
        [sys.executable, "-c", check], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "set()"


def test_trials_that_failed_in_their_first_epoch_break_no_figure() -> None:
    study = load(STUDY)
    trials = study.trials.copy()
    broken = trials.index % 3 == 2
    trials.loc[broken, "state"] = "diverged"
    trials.loc[broken, ["epochs", "best_epoch"]] = 0
    for column in ("score", "val_accuracy", "val_loss", "train_accuracy", "start", "end"):
        trials.loc[broken, column] = math.nan
    gone = set(trials.loc[broken, "run_id"])
    epochs = study.epochs[~study.epochs["run_id"].isin(gone)]
    damaged = replace(study, trials=trials, epochs=epochs)
    names = {p.name for pictures in make_pictures(damaged).values() for p in pictures}
    # All figures of the undamaged study, except one that needs more completed trials.
    whole = {p.name for pictures in make_pictures(study).values() for p in pictures}
    assert whole - names <= {"importance"}
    assert check_health(damaged, compute_verdict(damaged))
    (progress,) = [p for p in make_pictures(damaged)["search"] if p.name == "progress"]
    assert "of 8" in progress.caption
    assert "nan" not in progress.caption
