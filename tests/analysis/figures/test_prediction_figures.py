"""The figures of test predictions, and the timeline."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis.figures import Picture, classes, render_file, render_inline
from analysis.figures.classes import choose_classes, class_names, compute_classes, make_classes
from analysis.figures.confusion import compute_confusion, make_confusion
from analysis.figures.reliability import compute_reliability, make_reliability
from analysis.figures.timeline import compute_timeline, make_timeline
from analysis.frames import StudyFrames, load_frames
from analysis.rundir import ConfirmRow, EpochRow, RunDir
from analysis.rundir.predictions import Predictions
from analysis.stats.calibration import bin_predictions
from analysis.words import MINUS
from tests.support import FIXTURES

FIXTURE = FIXTURES / "study"

MEASURES = [
    f"{epoch}{images}_{measure}"
    for epoch in ("", "last_")
    for images in ("train", "val", "test")
    for measure in ("accuracy", "loss")
]

Maker = Callable[[StudyFrames], Picture | None]

MAKERS = (make_confusion, make_classes, make_reliability, make_timeline)


@pytest.fixture
def frames() -> StudyFrames:
    """A real study: two settings, two recipes, six seeds."""
    return load_frames(FIXTURE)


def confirmation(
    run_dir: RunDir,
    setting: str,
    seed: int,
    labels: Sequence[int],
    guesses: Sequence[int] | None,
    *,
    recipe: str = "first",
    score: float = 0.5,
    classes: int = 3,
) -> ConfirmRow:
    """A confirmation run that is fully confident; without guesses, no predictions are stored."""
    row = ConfirmRow(
        run_id=f"{recipe}-{setting}-{seed}",
        recipe=recipe,
        setting=setting,
        hyperparameters={},
        seed=seed,
        best_epoch=1,
        score=score,
        **dict.fromkeys(MEASURES, math.nan),
        epochs=1,
        seconds=1.0,
    )
    if guesses is not None:
        logits = 100 * np.eye(classes)[list(guesses)]
        run_dir.write_confirmation(
            row.run_id,
            row,
            val_logits=logits,
            test_logits=logits,
            val_labels=np.array(labels),
            test_labels=np.array(labels),
        )
    return row


def study(run_dir: RunDir, rows: Sequence[ConfirmRow], **record: object) -> StudyFrames:
    run_dir.write_study({"arms": {"without": {}, "with": {}}, **record})
    run_dir.write_confirm(rows)
    return load_frames(run_dir.path)


def epoch(
    run_id: str, minutes: tuple[float, float], worker: str, phase: str = "search", number: int = 1
) -> EpochRow:
    return EpochRow(
        phase="search" if phase == "search" else "confirm",
        run_id=run_id,
        attempt=1,
        arm="without",
        seed=1,
        epoch=number,
        train_loss=1.0,
        train_accuracy=0.5,
        val_loss=1.0,
        val_accuracy=0.5,
        score=0.5,
        rung="",
        start=1e9 + 60 * minutes[0],
        end=1e9 + 60 * minutes[1],
        worker=worker,
    )


def timeline_of(run_dir: RunDir, *epochs: EpochRow) -> StudyFrames:
    run_dir.append_epochs(epochs)
    return study(run_dir, ())


# --- by class -----------------------------------------------------------------------------


def test_class_names_come_from_the_record(frames: StudyFrames) -> None:
    assert class_names(frames, 10)[3] == "cat"
    assert class_names(frames, 3) == ("class 0", "class 1", "class 2")
    own = replace(frames, record={"data": {"name": "cifar10", "classes": ["a", "b"]}})
    assert class_names(own, 2) == ("a", "b")
    assert class_names(replace(frames, record={}), 1) == ("class 0",)


def test_accuracy_by_class_by_hand(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    labels = [0, 0, 0, 0, 1, 1]
    rows = [
        confirmation(run_dir, "without", 1, labels, [0, 0, 0, 0, 1, 0]),
        confirmation(run_dir, "with", 1, labels, [0, 1, 1, 1, 1, 1]),
        confirmation(run_dir, "without", 2, labels, [0, 0, 1, 1, 1, 2]),
        confirmation(run_dir, "with", 2, labels, None),
    ]
    frames = study(run_dir, rows)
    found = compute_classes(frames)
    assert found is not None
    without, with_ = found.settings
    assert (without.setting, without.n, with_.setting, with_.n) == ("without", 2, "with", 1)
    # Without: 4 and 2 of 4 images of class 0, 1 and 1 of 2 of class 1; class 2 has no images.
    np.testing.assert_allclose(without.mean, [0.75, 0.5, math.nan])
    np.testing.assert_allclose(without.sd, [math.sqrt(0.125), 0, math.nan])
    np.testing.assert_allclose(with_.mean, [0.25, 1, math.nan])
    assert np.isnan(with_.sd).all()
    # Mean of the settings: 0.5 and 0.75.
    assert choose_classes(found) == [1, 0]
    picture = make_classes(frames)
    assert picture is not None
    assert "2 of 3 classes" in picture.title
    # Of two equal differences, 0.75 to 0.25 and 0.5 to 1, the first is named.
    assert picture.caption == (
        f"The settings differ most on class 0: without 75.0 %, with 25.0 %, {MINUS}50.0 points."
    )


def test_of_many_classes_those_that_differ_most_between_settings_are_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(classes, "CLASSES_DRAWN", 2)
    run_dir = RunDir(tmp_path)
    labels = [0, 0, 1, 1, 2, 2]
    rows = [
        confirmation(run_dir, "without", 1, labels, [0, 0, 1, 1, 0, 0]),
        confirmation(run_dir, "with", 1, labels, [1, 1, 1, 1, 2, 0]),
    ]
    found = compute_classes(study(run_dir, rows))
    assert found is not None
    # They differ by 1, 0 and 0.5; class 0 has an accuracy of 0.5, class 2 of 0.25.
    assert choose_classes(found) == [0, 2]
    alone = replace(found, settings=found.settings[:1])
    assert choose_classes(alone) == [0, 2]


# --- confusions ---------------------------------------------------------------------------------


def test_confusions_of_the_cell_that_is_best_on_val(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    labels = [0, 0, 0, 0, 1, 1]
    rows = [
        # Best on test, and one of them has the best single score.
        confirmation(run_dir, "without", 1, labels, labels, score=0.9),
        confirmation(run_dir, "without", 2, labels, labels, score=0.3),
        confirmation(run_dir, "with", 1, labels, [0, 0, 0, 1, 1, 0], score=0.7),
        confirmation(run_dir, "with", 2, labels, [0, 1, 1, 1, 0, 0], score=0.7),
        confirmation(run_dir, "with", 3, labels, None, score=0.7),
    ]
    frames = study(run_dir, rows)
    found = compute_confusion(frames)
    assert found is not None
    assert (found.recipe, found.setting, found.n) == ("first", "with", 2)
    # Class 0 is classified as 1 in 1 and 3 of 4 images, class 1 as class 0 in 1 and 2 of 2.
    np.testing.assert_allclose(found.shares[:2], [[50, 50, 0], [75, 25, 0]])
    assert np.isnan(found.shares[2]).all()
    picture = make_confusion(frames)
    assert picture is not None
    assert picture.caption == (
        "The most frequent confusion: 75.0 % of the images of class 1 are classified as class 0,"
        " and 50.0 % the other way round (recipe first, setting with, the best on val; mean of 2"
        " runs)."
    )
    by_loss = replace(frames, record={"config": {"metric": "val_loss"}})
    lowest = compute_confusion(by_loss)
    assert lowest is not None
    assert lowest.setting == "without"
    perfect = make_confusion(by_loss)
    assert perfect is not None
    assert perfect.caption.startswith("No test image is misclassified")


# --- confidence ---------------------------------------------------------------------------------


def test_expected_calibration_error_by_hand() -> None:
    # Four predictions with confidence 3/4, two of them right; one with 9/10, right.
    logits = np.log([[3, 1], [3, 1], [1, 3], [1, 3], [9, 1]]).astype(np.float32)
    bins = bin_predictions(Predictions(logits, np.array([0, 0, 0, 0, 0])))
    # Bins are 1/15 wide: 3/4 lies in the twelfth, 9/10 in the fourteenth.
    assert np.flatnonzero(bins.images).tolist() == [11, 13]
    assert bins.images[[11, 13]].tolist() == [4, 1]
    assert bins.right[[11, 13]].tolist() == [2, 1]
    assert bins.confidence[[11, 13]] == pytest.approx([3, 0.9])
    # 4/5 of the images are 0.25 off, 1/5 are 0.1 off.
    assert bins.ece == pytest.approx(22)
    assert (bins + bins).ece == pytest.approx(22)


def test_full_confidence_is_in_the_last_bin() -> None:
    bins = bin_predictions(Predictions(np.array([[100, 0]], np.float32), np.array([1])))
    assert np.flatnonzero(bins.images).tolist() == [14]
    assert bins.ece == 100


def test_reliability_is_compared_by_matched_pairs(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    labels = [0, 0, 0, 0]
    guesses: dict[int | None, list[int]] = {
        0: labels,
        1: [0, 0, 0, 1],
        2: [0, 0, 1, 1],
        3: [0, 1, 1, 1],
        4: [1, 1, 1, 1],
    }
    # At full confidence, the calibration error is the error rate: wrong answers per run.
    wrong: dict[tuple[str, str], Sequence[int | None]] = {
        ("first", "without"): (None, 2, 4),
        ("first", "with"): (0, 1, 2),
        ("second", "without"): (1, 3, 3),
        ("second", "with"): (1, 2, 3),
    }
    rows = [
        confirmation(run_dir, setting, seed, labels, guesses.get(cell[seed]), recipe=recipe)
        for seed in range(3)
        for (recipe, setting), cell in wrong.items()
    ]
    frames = study(run_dir, rows)
    found = compute_reliability(frames)
    assert found is not None
    without, with_ = found.settings
    assert (without.setting, with_.setting) == ("without", "with")
    assert sorted(without.eces) == pytest.approx([25, 50, 75, 75, 100])
    assert sorted(with_.eces) == pytest.approx([0, 25, 25, 50, 50, 75])
    # All 20 images are in one bin, 13 of them wrong.
    assert without.bins.ece == pytest.approx(65)
    # Seed 0 lacks a run. Seed 1: -25 and -25; seed 2: -50 and 0.
    assert found.effect is not None
    assert found.effect.n == 2
    assert found.effect.mean == pytest.approx(-25)
    picture = make_reliability(frames)
    assert picture is not None
    assert "without 65.00 ± 28.50 %, with 37.50 ± 26.22 %" in picture.caption
    assert f"with changes it by {MINUS}25.00 points" in picture.caption
    assert "p = 0.5, 2 seeds" in picture.caption


def test_reliability_of_one_or_three_settings_claims_no_effect(frames: StudyFrames) -> None:
    one = replace(frames, confirm=frames.confirm[frames.confirm["setting"] == "dropout"])
    again = one.confirm.assign(setting="more-dropout")
    three = replace(frames, confirm=pd.concat([frames.confirm, again], ignore_index=True))
    for study_frames, settings in ((one, 1), (three, 3)):
        found = compute_reliability(study_frames)
        assert found is not None
        assert (len(found.settings), found.effect) == (settings, None)
        picture = make_reliability(study_frames)
        assert picture is not None
        assert "changes" not in picture.caption


# --- time ---------------------------------------------------------------------------------------


def test_timeline_by_hand(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    run_dir.append_epochs(
        [
            epoch("t-0", (0, 2), "host:1"),
            epoch("t-1", (1, 4), "host:2"),
            epoch("t-0", (2, 3), "host:1", number=2),
            # Resumed by the other worker.
            epoch("t-0", (4, 6), "host:2", number=3),
            epoch("first-with-1", (6, 10), "host:1", "confirm"),
            epoch("first-with-2", (6, 9), "host:2", "confirm"),
        ]
    )
    frames = study(run_dir, [confirmation(run_dir, "with", 1, [], None)])
    timeline = compute_timeline(frames)
    assert timeline is not None
    bars = [(bar.run_id, bar.group, bar.lane, bar.start, bar.end) for bar in timeline.bars]
    assert bars == [
        ("t-0", "without", 0, 0, 3),
        ("t-1", "without", 1, 1, 4),
        ("t-0", "without", 1, 4, 6),
        ("first-with-1", "with", 0, 6, 10),
        ("first-with-2", "setting not recorded yet", 1, 6, 9),
    ]
    assert (timeline.lanes, timeline.by_worker, timeline.pauses) == (2, True, ())
    # 3 + 3 + 2 + 4 + 3 minutes of two times ten.
    assert (timeline.at_once, timeline.minutes, timeline.busy) == (2, 10, 0.75)
    assert timeline.longest == ("t-0", 5)
    picture = make_timeline(frames)
    assert picture is not None
    assert picture.caption == (
        "Up to 2 runs trained at once, using 75 % of that capacity over 10 min 00 s; the longest"
        " run, t-0, took 5 min 00 s."
    )


def test_runs_of_many_workers_share_rows(tmp_path: Path) -> None:
    runs = [epoch(f"t-{n}", (n, n + 1.5), f"host:{n}") for n in range(17)]
    timeline = compute_timeline(timeline_of(RunDir(tmp_path), *runs))
    assert timeline is not None
    assert [bar.lane for bar in timeline.bars] == [n % 2 for n in range(17)]
    assert (timeline.lanes, timeline.by_worker) == (2, False)


def test_concurrent_runs_of_one_worker_do_not_overlap(tmp_path: Path) -> None:
    runs = [epoch(f"t-{n}", (0, 1), "host:1") for n in range(3)]
    timeline = compute_timeline(timeline_of(RunDir(tmp_path), *runs))
    assert timeline is not None
    assert ([bar.lane for bar in timeline.bars], timeline.by_worker) == ([0, 1, 2], False)


def test_a_pause_of_the_study_is_cut_out(tmp_path: Path) -> None:
    frames = timeline_of(
        RunDir(tmp_path),
        epoch("t-0", (0, 8), "host:1"),
        epoch("t-1", (1, 3), "host:2"),
        # Nine minutes after the last end are no pause, 83 are.
        epoch("t-2", (17, 17.5), "host:2"),
        epoch("t-3", (100.5, 102.5), "host:1"),
    )
    timeline = compute_timeline(frames)
    assert timeline is not None
    assert [(bar.start, bar.end) for bar in timeline.bars] == [
        (0, 8),
        (1, 3),
        (17, 17.5),
        (17.5, 19.5),
    ]
    assert timeline.pauses == ((17.5, 83),)
    picture = make_timeline(frames)
    assert picture is not None
    assert b"excluding 1 h 23 min without training" in render_file(picture, "", "svg")


# --- every figure -------------------------------------------------------------------------------


@pytest.mark.parametrize("make", MAKERS)
def test_no_figure_without_data(make: Maker, tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    assert make(study(run_dir, ())) is None
    assert make(study(run_dir, [confirmation(run_dir, "with", 1, [0], None)])) is None


@pytest.mark.parametrize("make", MAKERS)
def test_a_real_study_is_drawn(make: Maker, frames: StudyFrames) -> None:
    picture = make(frames)
    assert picture is not None
    assert picture.caption.endswith(".")
    assert render_file(picture, "inputs", "png").startswith(b"\x89PNG")
    assert len(render_inline(picture)) < 150_000


@pytest.mark.parametrize("make", MAKERS)
def test_many_settings_and_classes_are_drawn(make: Maker, tmp_path: Path) -> None:
    run_dir, random = RunDir(tmp_path), np.random.default_rng(0)
    labels = list(range(40)) * 2
    rows = [
        confirmation(run_dir, f"dose-{n}", 1, labels, list(random.permutation(labels)), classes=40)
        for n in range(7)
    ]
    run_dir.append_epochs([epoch(row.run_id, (0, 1), row.run_id, "confirm") for row in rows])
    picture = make(study(run_dir, rows))
    assert picture is not None
    assert len(render_inline(picture)) < 150_000
