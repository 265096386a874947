"""Crossing recipes with settings, the planned runs, and the champions."""

import math
from pathlib import Path

import pytest

from analysis.rundir import RunDir, TrialRow
from search_spaces import Value, find_space
from study.config import StudyConfig
from study.confirm.design import cross_recipes, planned_runs
from study.errors import UserError
from study.search.champions import Champion, find_champions
from study.search.searcher import trial_seed
from study.search.trials import prune_weights
from study.study import resolve_study

RECIPE_A: dict[str, Value] = {"head": "512", "learning_rate": 1e-3, "batch_size": 128}
RECIPE_B: dict[str, Value] = {"head": "1024-512", "learning_rate": 3e-4, "batch_size": 512}
CHAMPIONS = (
    Champion("no-dropout", {**RECIPE_A, "dropout": 0.0}, "no-dropout-003", 0.8),
    Champion("dropout", {**RECIPE_B, "dropout": 0.4}, "dropout-001", 0.9),
)


def test_recipes_are_crossed_with_settings() -> None:
    crossed = cross_recipes(find_space("dropout"), CHAMPIONS)
    assert [(cell.recipe, cell.setting, cell.hyperparameters) for cell in crossed] == [
        ("no-dropout", "no-dropout", {**RECIPE_A, "dropout": 0.0}),
        ("no-dropout", "dropout", {**RECIPE_A, "dropout": 0.4}),
        ("dropout", "no-dropout", {**RECIPE_B, "dropout": 0.0}),
        ("dropout", "dropout", {**RECIPE_B, "dropout": 0.4}),
    ]


def test_equal_cells_run_once() -> None:
    article = find_space("article")
    found = tuple(
        Champion(arm.name, article.fixed_values(arm), None, math.nan) for arm in article.arms
    )
    assert [cell.setting for cell in cross_recipes(article, found)] == [
        "no-dropout",
        "dropout",
        "as-printed",
    ]


def test_the_dose_space_confirms_seven_rates_of_one_recipe() -> None:
    found = (Champion("any-dropout", {**RECIPE_A, "dropout": 0.37}, "any-dropout-000", 0.8),)
    crossed = cross_recipes(find_space("dose"), found)
    rates = [cell.hyperparameters["dropout"] for cell in crossed]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    assert {cell.hyperparameters["head"] for cell in crossed} == {"512"}


def test_cells_share_seeds_that_the_search_has_not_used() -> None:
    crossed = cross_recipes(find_space("dropout"), CHAMPIONS)
    runs = planned_runs(crossed, seed=0, seeds=8)
    assert len({run.run_id for run in runs}) == len(runs) == 32
    by_index = [{run.seed for run in runs if run.index == index} for index in range(8)]
    assert all(len(seeds) == 1 for seeds in by_index)
    confirmation = {run.seed for run in runs}
    assert len(confirmation) == 8
    arms = ("no-dropout", "dropout")
    searched = {trial_seed(0, arm, number) for arm in arms for number in range(200)}
    assert not confirmation & searched


def trial(run_id: str, arm: str, state: str, score: float, error: str = "") -> TrialRow:
    return TrialRow(
        run_id=run_id,
        arm=arm,
        hyperparameters={**RECIPE_A, "dropout": 0.1},
        seed=1,
        state=state,  # type: ignore[arg-type]
        epochs=15,
        best_epoch=3,
        score=score,
        train_loss=1.0,
        train_accuracy=0.5,
        val_loss=1.0,
        val_accuracy=0.5,
        start=0.0,
        end=1.0,
        attempts=1,
        error=error,
    )


def test_champions_have_reached_the_last_epoch(tmp_path: Path) -> None:
    study = resolve_study(StudyConfig(storage=str(tmp_path), name="run"))
    study.rundir.write_study({"config": {"metric": "val_accuracy"}})
    rows = [
        trial("no-dropout-000", "no-dropout", "pruned", 0.95),
        trial("no-dropout-001", "no-dropout", "completed", 0.8),
        trial("no-dropout-002", "no-dropout", "completed", 0.8),
        trial("dropout-000", "dropout", "completed", 0.7),
    ]
    study.rundir.write_trials(rows)
    assert [champion.run_id for champion in find_champions(study.rundir, study.space)] == [
        "no-dropout-001",
        "dropout-000",
    ]

    study.rundir.write_trials([*rows[:3], trial("dropout-000", "dropout", "diverged", 0.9, "boom")])
    with pytest.raises(UserError, match=r"arm dropout: no trial reached .* boom"):
        find_champions(study.rundir, study.space)


def test_weights_of_the_first_of_equal_trials_are_kept(tmp_path: Path) -> None:
    """The champion is the first of the best."""
    rundir = RunDir(tmp_path)
    names = [f"dropout-{number:03d}" for number in (2, 10, 0, 1, 1001)]
    rundir.weights("any").parent.mkdir()
    for name in names:
        rundir.weights(name).touch()
    prune_weights(rundir, {"dropout": [(0.5, name) for name in names]}, "max")
    kept = {path.stem for path in rundir.weights("any").parent.iterdir()}
    assert kept == {"dropout-000", "dropout-001", "dropout-002"}
    prune_weights(rundir, {"dropout": [(0.5, name) for name in names]}, "min")
    assert {path.stem for path in rundir.weights("any").parent.iterdir()} == kept
