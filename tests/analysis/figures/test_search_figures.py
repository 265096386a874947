"""The figures about dropout rates and the search, with numbers worked out by hand."""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pandas as pd
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState, create_trial

from analysis.figures.gap import compute_gap, make_gap
from analysis.figures.heatmap import compute_heatmap, make_heatmap
from analysis.figures.importance import compute_importance, make_importance
from analysis.figures.progress import compute_progress, make_progress
from analysis.figures.rates import compute_rates, make_rates
from analysis.figures.rungs import compute_rungs, make_rungs
from analysis.figures.style import Picture, render_file, render_inline
from analysis.frames import StudyFrames, load_frames
from analysis.rundir import RunDir
from tests.support import FIXTURES
from tests.support.fake_frames import article_arms

STUDY = FIXTURES / "study"

Make = Callable[[StudyFrames], Picture | None]

MAKERS: tuple[Make, ...] = (
    make_gap,
    make_rates,
    make_heatmap,
    make_progress,
    make_rungs,
    make_importance,
)

#: As many settings as the space `dose` has, the first without dropout.
DOSES = (0.0, 0.1, 0.2, 0.3)


def trial(arm: str, number: int, score: float, **changes: Any) -> dict[str, Any]:
    """A completed trial that began and ended with its number, in minutes."""
    row = {
        "run_id": f"{arm}-{number:03}",
        "arm": arm,
        "state": "completed",
        "score": score,
        "train_accuracy": 0.9,
        "val_accuracy": score,
        "start": 60.0 * (number - 1),
        "end": 60.0 * number,
        "dropout": 0.0 if arm == "no-dropout" else 0.3,
        "head": "512",
    }
    return row | changes


def confirmation(setting: str, seed: int, test_accuracy: float, **changes: Any) -> dict[str, Any]:
    row = {
        "run_id": f"{setting}-{seed}",
        "recipe": "no-dropout",
        "setting": setting,
        "seed": seed,
        "train_accuracy": 0.9,
        "test_accuracy": test_accuracy,
        "dropout": 0.0 if setting == "no-dropout" else 0.3,
    }
    return row | changes


def epoch(arm: str, number: int, at: int, rung: str) -> dict[str, Any]:
    return {
        "phase": "search",
        "run_id": f"{arm}-{number:03}",
        "arm": arm,
        "epoch": at,
        "rung": rung,
        "start": 60.0 * (number - 1),
    }


def study(
    trials: Sequence[dict[str, Any]] = (),
    confirm: Sequence[dict[str, Any]] = (),
    epochs: Sequence[dict[str, Any]] = (),
    metric: str = "val_accuracy",
) -> StudyFrames:
    """Make the frames of a study; without rows they have the columns of a real study."""
    empty = load_frames(STUDY)
    return replace(
        empty,
        path=Path("none"),
        record={"config": {"metric": metric}},
        trials=pd.DataFrame(trials) if trials else without_rows(empty.trials),
        confirm=pd.DataFrame(confirm) if confirm else without_rows(empty.confirm),
        epochs=pd.DataFrame(epochs) if epochs else without_rows(empty.epochs),
    )


def without_rows(rows: pd.DataFrame) -> pd.DataFrame:
    """Drop all rows, and the hyperparameters, which only rows have."""
    return rows.iloc[:0].drop(columns=["dropout", "head"], errors="ignore")


def doses(seeds: int) -> list[dict[str, Any]]:
    """Make runs in which every rate beats the one before by 0.5 points at each seed."""
    return [
        confirmation(f"dropout-{rate}", seed, 0.8 + 0.01 * seed + 0.05 * rate, dropout=rate)
        for seed in range(seeds)
        for rate in DOSES
    ]


# --- Every figure ---------------------------------------------------------------------------------


@pytest.mark.parametrize("make", MAKERS)
def test_drawn_from_a_real_study(make: Make) -> None:
    frames = load_frames(STUDY)
    picture = make(frames)
    if make is make_importance:
        # Each arm has only three completed trials.
        assert picture is None
        return
    assert picture is not None
    assert picture.caption.endswith(".")
    assert "nan" not in picture.caption
    inline, again = render_inline(picture), make(frames)
    # No pixels: everything drawn takes the colours of the page.
    assert "<image" not in inline
    assert render_file(picture, "inputs", "png").startswith(b"\x89PNG")
    assert again is not None
    assert render_inline(again) == inline


@pytest.mark.parametrize("make", MAKERS)
def test_no_figure_without_rows(make: Make) -> None:
    assert make(study()) is None


@pytest.mark.parametrize("make", MAKERS)
def test_no_figure_while_the_search_is_running(make: Make) -> None:
    assert make(study(epochs=[epoch("dropout", 1, 3, "continue")])) is None


@pytest.mark.parametrize("make", MAKERS)
def test_no_figure_without_a_completed_trial(make: Make) -> None:
    rows = [
        trial("no-dropout", 1, math.nan, state="failed"),
        trial("dropout", 2, 0.5, state="pruned"),
    ]
    assert make(study(rows)) is None


@pytest.mark.parametrize("arms", [["any-dropout"], ["none", "low", "middle", "high"]])
@pytest.mark.parametrize("metric", ["val_accuracy", "val_loss"])
def test_one_arm_or_many(arms: list[str], metric: str) -> None:
    rates = {arm: 0.2 * index for index, arm in enumerate(arms)}
    trials = [
        trial(arm, number, 0.5 + 0.01 * number, dropout=rates[arm] + 0.1 * number)
        for number in (1, 2, 3)
        for arm in arms
    ]
    epochs = [epoch(arm, 1, 3, "continue") for arm in arms]
    frames = study(trials, doses(6), epochs, metric)
    for make in (make_gap, make_rates, make_heatmap, make_progress, make_rungs):
        picture = make(frames)
        assert picture is not None
        assert render_inline(picture)


# --- Rates ----------------------------------------------------------------------------------------


def test_gap_by_hand() -> None:
    trials = [
        trial("no-dropout", 1, 0.7),
        trial("dropout", 2, 0.8, dropout=0.1),
        trial("dropout", 3, 0.85, dropout=0.4),
        trial("dropout", 4, 0.5, dropout=0.6, state="pruned"),
    ]
    frames = study(trials, [confirmation("no-dropout", 1, 0.75), confirmation("dropout", 1, 0.88)])
    gaps = compute_gap(frames)
    assert [(group.kind, group.name) for group in gaps] == [
        ("trials", "no-dropout"),
        ("trials", "dropout"),
        ("confirmation", "no-dropout"),
        ("confirmation", "dropout"),
    ]
    # 90 % on train, minus the accuracy on unseen images.
    assert [list(group.gaps) for group in gaps] == [
        pytest.approx([20]),
        pytest.approx([10, 5]),
        pytest.approx([15]),
        pytest.approx([2]),
    ]
    assert list(gaps[1].rates) == [0.1, 0.4]
    picture = make_gap(frames)
    assert picture is not None
    assert picture.caption == (
        "The mean gap is +20.00 points at rate 0 and +7.50 points above it (3 completed trials, on"
        " val); +15.00 points at rate 0 and +2.00 points above it (2 confirmation runs, on test)."
    )


def test_rates_per_layer_are_averaged_and_labelled() -> None:
    rows = [
        {**trial("dropout", n, 0.8), "dropout_1": rate, "dropout_2": 0.4}
        for n, rate in ((1, 0.2), (2, 0.1))
    ]
    for row in rows:
        del row["dropout"]
    frames = replace(study(rows), hyperparameters=("head", "dropout_1", "dropout_2"))
    assert list(compute_gap(frames)[0].rates) == pytest.approx([0.3, 0.25])
    picture = make_gap(frames)
    assert picture is not None
    assert picture.figure.axes[0].get_xlabel() == "dropout rate, mean of the layers"


def test_no_gap_figure_at_a_single_rate() -> None:
    assert make_gap(study([trial("no-dropout", 1, 0.7), trial("no-dropout", 2, 0.8)])) is None


def test_rates_by_recipe() -> None:
    runs = [
        confirmation(setting, seed, accuracy + 0.01 * seed, recipe=recipe)
        for seed in (0, 1)
        for recipe, setting, accuracy in (
            ("no-dropout", "no-dropout", 0.70),
            ("no-dropout", "dropout", 0.72),
            ("dropout", "no-dropout", 0.71),
            ("dropout", "dropout", 0.69),
        )
    ]
    rates = compute_rates(study(confirm=runs))
    assert [(dose.recipe, dose.rate) for dose in rates.doses] == [
        ("no-dropout", 0.0),
        ("no-dropout", 0.3),
        ("dropout", 0.0),
        ("dropout", 0.3),
    ]
    assert rates.doses[0].accuracies == pytest.approx((70, 71))
    assert [dose.mean for dose in rates.doses] == pytest.approx([70.5, 72.5, 71.5, 69.5])
    # A single difference has its own figure.
    assert rates.effects == ()


def test_dose_response_has_simultaneous_intervals() -> None:
    rates = compute_rates(study(confirm=doses(seeds=7)))
    assert (rates.baseline, rates.baseline_rate) == ("dropout-0.0", 0)
    assert [effect.rate for effect in rates.effects] == [0.1, 0.2, 0.3]
    assert [effect.effect.mean for effect in rates.effects] == pytest.approx([0.5, 1.0, 1.5])
    assert {effect.effect.level for effect in rates.effects} == {1 - 0.05 / 3}
    # 2^7 patterns leave one in each tail: 128 × 0.05 / 3 / 2 is just above 1.
    assert rates.effects[0].effect.low == pytest.approx(0.5)
    picture = make_rates(study(confirm=doses(seeds=7)))
    assert picture is not None
    assert picture.caption == (
        "The best mean difference from dropout-0.0 is that of dropout-0.3, +1.50 points"
        " (simultaneous 95 % CI +1.50 to +1.50); 3 of 3 intervals exclude zero."
    )


def test_infinite_intervals_are_omitted() -> None:
    # At 6 seeds 64 patterns are too few: 64 × 0.05 / 3 / 2 is below 1.
    picture = make_rates(study(confirm=doses(seeds=6)))
    assert picture is not None
    assert "6 pairs are too few for simultaneous intervals" in picture.caption
    assert "CI" not in picture.figure.axes[1].get_title(loc="left")
    assert "∞" not in picture.caption


@pytest.mark.parametrize(
    "rates", [{"adam": [0.1, 0.5], "adamw": [0.2, 0.6]}, {"adam": [0.3, 0.3], "adamw": [0.3, 0.3]}]
)
def test_no_rates_where_dropout_belongs_to_the_recipe(rates: dict[str, list[float]]) -> None:
    runs = [
        confirmation(setting, 1, 0.7, recipe=recipe, dropout=rate)
        for setting in rates
        for recipe, rate in zip(rates, rates[setting], strict=True)
    ]
    assert compute_rates(study(confirm=runs)).doses == ()
    assert make_rates(study(confirm=runs)) is None


def test_a_setting_that_differs_in_more_than_dropout_is_omitted() -> None:
    arms = [{**row, "backbone_warmup_epochs": 0} for row in doses(seeds=7)]
    others = [
        confirmation("both", seed, 0.9, dropout=0.5, backbone_warmup_epochs=15) for seed in range(7)
    ]
    names = ("dropout", "backbone_warmup_epochs")
    frames = replace(study(confirm=[*arms, *others]), hyperparameters=names)
    alone = replace(study(confirm=arms), hyperparameters=names)
    assert compute_rates(frames) == replace(compute_rates(alone), left_out=("both",))
    assert compute_gap(frames)[0].name == "dropout-0.0"
    assert "both" not in [group.name for group in compute_gap(frames)]
    picture, gap = make_rates(frames), make_gap(frames)
    assert picture is not None
    assert gap is not None
    for caption in (picture.caption, gap.caption):
        assert caption.endswith(" Omitted because it differs in more than dropout: both.")


def test_the_articles_arms_have_two_rates() -> None:
    frames = article_arms(-0.003, 0.0105)
    rates = compute_rates(frames)
    assert [(dose.setting, dose.rate) for dose in rates.doses] == [("without", 0), ("with", 0.3)]
    assert [group.name for group in compute_gap(frames)] == ["without", "with"]


def test_an_arm_that_differs_in_more_than_dropout_has_no_gap() -> None:
    trials = [trial("without", 1, 0.7), trial("as-printed", 2, 0.9, dropout=0.0)]
    frames = article_arms(-0.003, 0.0105)
    gaps = compute_gap(replace(frames, trials=pd.DataFrame(trials)))
    assert [(group.kind, group.name) for group in gaps] == [
        ("trials", "without"),
        ("confirmation", "without"),
        ("confirmation", "with"),
    ]


def test_every_setting_has_a_gap_if_the_factor_is_not_dropout() -> None:
    runs = [confirmation(name, 1, 0.8, dropout=0.3, optimizer=name) for name in ("adam", "adamw")]
    frames = replace(study(confirm=runs), hyperparameters=("dropout", "optimizer"))
    assert [group.name for group in compute_gap(frames)] == ["adam", "adamw"]


@pytest.mark.parametrize("make", [make_gap, make_rates, make_heatmap])
def test_no_figure_if_dropout_is_not_a_hyperparameter(make: Make) -> None:
    frames = load_frames(STUDY)
    assert make(frames) is not None
    trials, confirm = frames.trials.drop(columns="dropout"), frames.confirm.drop(columns="dropout")
    assert make(replace(frames, trials=trials, confirm=confirm)) is None


# --- Heatmap --------------------------------------------------------------------------------------


def test_heatmap_by_hand() -> None:
    rows = [
        trial("no-dropout", 1, 0.70),
        trial("no-dropout", 2, 0.80),
        trial("no-dropout", 3, 0.95, state="pruned"),
        trial("dropout", 4, 0.60, dropout=0.1, head="512-256"),
        trial("dropout", 5, 0.65, dropout=0.05, head="2048"),
        trial("dropout", 6, 0.40, dropout=3 * 0.1, head="2048", state="diverged"),
    ]
    heatmap = compute_heatmap(study(rows))
    assert heatmap is not None
    assert heatmap.heads == ("512", "2048", "512-256")
    # An edge belongs to the bin below, even if rounding puts it slightly above: 3 × 0.1.
    assert heatmap.rates == ("0", "up to 0.1", "0.1–0.2", "0.2–0.3")
    nan = math.nan
    np.testing.assert_allclose(
        heatmap.scores, [[0.75, nan, nan, nan], [nan, 0.65, nan, nan], [nan, 0.60, nan, nan]]
    )
    assert heatmap.completed.tolist() == [[2, 0, 0, 0], [0, 1, 0, 0], [0, 1, 0, 0]]
    assert heatmap.trials.tolist() == [[3, 0, 0, 0], [0, 1, 0, 1], [0, 1, 0, 0]]


def test_heatmap_counts_empty_cells() -> None:
    rows = [
        trial("dropout", 1, 0.5, dropout=0.15),
        trial("dropout", 2, 0.4, dropout=0.15, head="1024"),
        trial("dropout", 3, 0.3, dropout=0.25, state="pruned"),
    ]
    best = {"val_accuracy": "50.00 % with head 512", "val_loss": "0.400 nats with head 1024"}
    for metric, words in best.items():
        picture = make_heatmap(study(rows, metric=metric))
        assert picture is not None
        assert picture.caption == (
            f"The best mean is {words} and dropout rate 0.1–0.2 (1 of 1 trials completed)."
            " Cells without trials: 1 of 4; with trials but none completed: 1."
        )
        texts = [text.get_text() for text in picture.figure.axes[0].texts]
        assert len(texts) == 3
        assert "0 of 1" in texts


# --- Progress -------------------------------------------------------------------------------------


def test_progress_by_hand() -> None:
    # Not in the order in which they finished.
    rows = [
        trial("no-dropout", 3, 0.6),
        trial("no-dropout", 1, 0.9, state="pruned"),
        trial("no-dropout", 2, 0.7),
        trial("no-dropout", 4, 0.8),
        trial("dropout", 2, 0.5, start=100.0),
        trial("dropout", 5, 0.4, start=100.0),
    ]
    # The first attempt at a trial began a minute before the attempt that its row covers.
    early = {**epoch("no-dropout", 1, 1, ""), "start": -60.0}
    progress = compute_progress(study(rows, epochs=[early]))
    assert progress.equal_n == 2
    without, with_dropout = progress.arms
    assert list(without.minutes) == [2, 3, 4, 5]
    np.testing.assert_allclose(without.best, [math.nan, 0.7, 0.7, 0.8])
    assert list(with_dropout.minutes) == [3, 6]
    assert list(with_dropout.best) == [0.5, 0.5]


def test_progress_of_a_loss_goes_down() -> None:
    rows = [trial("dropout", 1, 0.5), trial("dropout", 2, 0.7), trial("dropout", 3, 0.4)]
    frames = study(rows, metric="val_loss")
    assert list(compute_progress(frames).arms[0].best) == [0.5, 0.5, 0.4]
    picture = make_progress(frames)
    assert picture is not None
    assert picture.caption == (
        "In the order in which trials finished, dropout reaches 0.400 nats at trial 3 of 3, after"
        " 3.0 of 3.0 minutes."
    )
    assert picture.figure.axes[0].get_ylabel() == "best val loss (nats per image)"


def test_progress_omits_an_arm_without_a_completed_trial() -> None:
    rows = [
        trial("no-dropout", 1, 0.5),
        trial("no-dropout", 2, 0.6),
        trial("dropout", 1, 0.5, state="failed"),
    ]
    progress = compute_progress(study(rows))
    assert [arm.arm for arm in progress.arms] == ["no-dropout"]
    assert progress.equal_n == 1
    assert make_progress(study(rows)) is not None


# --- Rungs ----------------------------------------------------------------------------------------


def test_rungs_by_hand() -> None:
    trials = [
        trial("no-dropout", 1, 0.7),
        trial("no-dropout", 2, 0.5, state="pruned"),
        trial("dropout", 3, 0.6, state="pruned"),
        trial("dropout", 4, 0.6, state="diverged"),
        trial("dropout", 5, 0.6, state="failed"),
    ]
    epochs = [
        epoch("no-dropout", 1, 1, ""),
        epoch("no-dropout", 1, 3, "continue"),
        epoch("no-dropout", 2, 3, "stop"),
        epoch("no-dropout", 1, 9, "continue"),
        epoch("dropout", 3, 3, "continue"),
        epoch("dropout", 4, 3, "continue"),
        epoch("dropout", 3, 9, "stop"),
    ]
    rungs = compute_rungs(study(trials, epochs=epochs))
    assert rungs.epochs == (3, 9)
    without, with_dropout = rungs.arms
    assert (without.trials, without.completed) == (2, 1)
    assert (without.reached, without.survived) == ((2, 1), (1, 1))
    # One failed before the first rung, one diverged after it.
    assert (with_dropout.trials, with_dropout.completed) == (3, 0)
    assert (with_dropout.reached, with_dropout.survived) == ((2, 1), (2, 0))
    picture = make_rungs(study(trials, epochs=epochs))
    assert picture is not None
    assert picture.caption == (
        "Promoted by ASHA: no-dropout 1 at epoch 3 and 1 at epoch 9, of 2 trials (1 reached the"
        " last epoch); dropout 2 at epoch 3 and 0 at epoch 9, of 3 trials (0 reached the last"
        " epoch)."
    )


def test_no_rungs_in_a_study_too_short_for_them() -> None:
    frames = study([trial("dropout", 1, 0.5)], epochs=[epoch("dropout", 1, 1, "")])
    assert make_rungs(frames) is None


# --- Importance -----------------------------------------------------------------------------------


def write_search(path: Path, arm: str, scores: Sequence[float], pruned: int = 0) -> None:
    """Write an Optuna study whose scores follow the learning rate; batch sizes alternate."""
    storage = optuna.storages.RDBStorage(f"sqlite:///{RunDir(path).optuna_db}")
    search = optuna.create_study(storage=storage, study_name=arm, direction="maximize")
    for number, score in enumerate([*scores, *[0.1] * pruned]):
        search.add_trial(
            create_trial(
                state=TrialState.COMPLETE if number < len(scores) else TrialState.PRUNED,
                value=score,
                params={"learning_rate": 0.1 * score, "batch_size": (256, 512)[number % 2]},
                distributions={
                    "learning_rate": FloatDistribution(0.0, 0.1),
                    "batch_size": CategoricalDistribution((256, 512)),
                },
            )
        )


def test_importance_rests_on_completed_trials(tmp_path: Path) -> None:
    write_search(tmp_path, "no-dropout", [0.1 * n for n in range(1, 9)], pruned=3)
    write_search(tmp_path, "dropout", [0.4, 0.5, 0.6, 0.7], pruned=9)
    trials = [trial("no-dropout", 1, 0.5), trial("dropout", 2, 0.5)]
    frames = replace(study(trials), path=tmp_path)
    verbosity = optuna.logging.get_verbosity()
    filters = list(warnings.filters)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (arm,) = compute_importance(frames)
    assert (optuna.logging.get_verbosity(), list(warnings.filters)) == (verbosity, filters)
    # Half of the eight, since five would exceed that; the other arm has too few trials.
    assert (arm.arm, arm.completed, arm.top) == ("no-dropout", 8, 4)
    assert sum(arm.shares.values()) == pytest.approx(1)
    # Both batch sizes are as common among the best half as among all.
    assert arm.shares["learning_rate"] == pytest.approx(1)
    picture = make_importance(frames)
    assert picture is not None
    assert picture.caption.startswith(
        "The most important hyperparameter is learning_rate in no-dropout (100 %, best 4 against"
        " all 8 completed trials); with few trials this is only a hint"
    )


def test_no_importance_if_all_trials_are_equally_good(tmp_path: Path) -> None:
    write_search(tmp_path, "dropout", [0.5] * 6)
    frames = replace(study([trial("dropout", 1, 0.5)]), path=tmp_path)
    assert compute_importance(frames) == ()
