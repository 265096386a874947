"""Every health check passes and warns where it should."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd
import pytest

from analysis import load
from analysis.frames import StudyFrames
from analysis.report.health import Finding, check_health
from analysis.rundir.optuna_db import SearchedRange
from analysis.stats.verdict import compute_verdict
from tests.support import FIXTURES
from tests.support.fake_frames import confirmed, searched

STUDY = FIXTURES / "study"
ARMS = ("no-dropout", "dropout")


def findings(study: StudyFrames) -> Mapping[str, Finding]:
    return {finding.check: finding for finding in check_health(study, compute_verdict(study))}


def trials(**counts: Sequence[int]) -> list[dict[str, Any]]:
    """Rows of trials: per state, the number in each of the two arms."""
    rows = []
    for state, of_arms in counts.items():
        for arm, number in zip(ARMS, of_arms, strict=True):
            rows += [
                {"arm": arm, "state": state, "epochs": 5 if state == "completed" else 3}
            ] * number
    return rows


@pytest.mark.parametrize(
    ("rows", "check", "passed"),
    [
        (trials(completed=(5, 5)), "too few completed trials", True),
        (trials(completed=(5, 4)), "too few completed trials", False),
        (trials(completed=(6, 5), pruned=(4, 5)), "uneven early stopping", True),
        (trials(completed=(9, 5), pruned=(1, 5)), "uneven early stopping", False),
        (trials(completed=(6, 5), pruned=(4, 5)), "uneven search effort", True),
        (trials(completed=(10, 5), pruned=(10, 5)), "uneven search effort", False),
    ],
)
def test_checks_of_trial_counts(rows: list[dict[str, Any]], check: str, passed: bool) -> None:
    finding = findings(searched(rows))[check]
    assert finding.passed is passed
    assert bool(finding.remedy) is not passed


@pytest.mark.parametrize("value", ["text", None, 0.0, 3.0])
def test_the_optuna_storage_of_other_trials_raises_no_warning(
    monkeypatch: pytest.MonkeyPatch, value: object
) -> None:
    ranges = {"dropout": {"learning_rate": SearchedRange(1e-4, 1e-2, log=True)}}
    monkeypatch.setattr("analysis.report.health.searched_ranges", lambda _: ranges)
    study = searched([{"arm": "dropout", "learning_rate": value}])
    assert findings(study)["a champion at the edge of its search range"].passed
    at_edge = searched([{"arm": "dropout", "learning_rate": 1e-2}])
    assert not findings(at_edge)["a champion at the edge of its search range"].passed


def test_trials_cut_by_a_budget_raise_a_warning() -> None:
    planned = {arm: {"trials": 5} for arm in ARMS}
    assert findings(searched(trials(completed=(5, 5)), arms=planned))["missing trials"].passed
    cut = findings(searched(trials(completed=(5, 4)), arms=planned))["missing trials"]
    assert not cut.passed
    assert cut.seen == "no-dropout: 5 of 5 trials; dropout: 4 of 5 trials"


def test_failures_clustered_in_a_region_raise_a_warning() -> None:
    rates = [0.001 * (1 + k % 10) for k in range(20)]
    clustered = [
        {"arm": "a", "learning_rate": rate, "state": "diverged" if rate > 0.007 else "completed"}
        for rate in rates
    ]
    check = "failures in one region of the search space"
    finding = findings(searched(clustered))[check]
    assert not finding.passed
    assert finding.seen.startswith(
        "6 of 20 trials diverged or failed, mostly at high learning_rate"
    )
    scattered = [
        {**row, "state": "failed" if k in (3, 8) else "completed"}
        for k, row in enumerate(clustered)
    ]
    assert findings(searched(scattered))[check].passed


def test_a_champion_at_the_edge_of_its_range_raises_a_warning() -> None:
    study = load(STUDY)
    # The champion without dropout has a learning rate of 0.00292 in 0.0001 to 0.003.
    finding = findings(study)["a champion at the edge of its search range"]
    assert not finding.passed
    assert finding.seen == "no-dropout: learning_rate 0.00292 in 0.0001 to 0.003"
    inside = study.trials.assign(learning_rate=5e-4, weight_decay=1e-3, dropout=0.3)
    found = findings(replace(study, trials=inside))
    assert found["a champion at the edge of its search range"].passed


def test_runs_that_peak_at_the_last_epoch_raise_a_warning() -> None:
    cells = {("a", "no-dropout"): [0.7] * 6, ("a", "dropout"): [0.71] * 6}
    check = "runs still improving at the last epoch"
    assert findings(confirmed(cells))[check].passed
    assert not findings(confirmed(cells, best_epoch=5))[check].passed


def test_a_champion_that_cannot_repeat_its_score_raises_a_warning() -> None:
    again = [0.70, 0.71, 0.72, 0.70, 0.71, 0.72]
    study = confirmed({("a", "a"): again})
    for score, passed in ((0.72, True), (0.75, False)):
        champion = {"arm": "a", "state": "completed", "score": score, "val_accuracy": score}
        found = findings(
            replace(study, trials=pd.DataFrame([{**champion, "run_id": "a-0", "epochs": 5}]))
        )
        finding = found["winner's curse"]
        assert finding.passed is passed
    assert finding.seen == "a: +4.00 points better than its confirmation runs (sd 0.89)"


def test_recipes_that_disagree_raise_a_warning() -> None:
    base = [0.7, 0.701, 0.702, 0.699, 0.7, 0.7]
    up, down = [x + 0.01 for x in base], [x - 0.01 for x in base]
    cells = {("a", "a"): base, ("a", "b"): up, ("b", "a"): base}
    check = "disagreement between recipes for b"
    assert findings(confirmed({**cells, ("b", "b"): up}))[check].passed
    finding = findings(confirmed({**cells, ("b", "b"): down}))[check]
    assert not finding.passed
    assert finding.seen == "recipe a: +1.00 points; recipe b: \N{MINUS SIGN}1.00 points"


def test_val_and_test_that_disagree_raise_a_warning() -> None:
    base = [0.7, 0.701, 0.702, 0.699, 0.7, 0.7]
    study = confirmed({("a", "a"): base, ("a", "b"): [x + 0.01 for x in base]})
    check = "disagreement between val and test for b"
    assert findings(study)[check].passed
    swapped = study.confirm.assign(val_accuracy=1 - study.confirm["val_accuracy"])
    assert not findings(replace(study, confirm=swapped))[check].passed


def test_a_study_that_has_just_started_has_no_findings() -> None:
    study = load(STUDY)
    nothing = replace(study, trials=study.trials[:0], confirm=study.confirm[:0])
    assert findings(nothing) == {}


def of_images(metric: str = "val_accuracy", **data: Any) -> Mapping[str, Finding]:
    """Return the findings of a study of images of two classes."""
    nothing = replace(load(STUDY), trials=load(STUDY).trials[:0], confirm=load(STUDY).confirm[:0])
    record = {"config": {"metric": metric}, "data": {"classes": ["cat", "dog"], **data}}
    return findings(replace(nothing, record=record))


def test_imbalanced_classes_raise_a_warning() -> None:
    check = "class imbalance"
    even = of_images(images_per_class={"train": [50, 50]})[check]
    assert (even.passed, even.seen) == (True, "50 training images per class")
    assert of_images(images_per_class={"train": [50, 26]})[check].passed
    finding = of_images(images_per_class={"train": [50, 25]})[check]
    assert not finding.passed
    assert finding.seen == "50 training images of cat, 25 of dog"
    assert "--metric val_balanced_accuracy" in finding.remedy
    assert of_images("val_balanced_accuracy", images_per_class={"train": [50, 25]})[check].passed


def test_images_in_two_splits_are_listed() -> None:
    check = "near-duplicate images across splits"
    assert check not in of_images()  # not compared for CIFAR-10
    assert of_images(duplicates=[])[check].passed
    pair = {"part": "test", "file": "test/cat/1.png", "like_part": "train", "like": "cat/2.png"}
    finding = of_images(duplicates=[pair] * 12)[check]
    assert not finding.passed
    assert finding.seen.startswith("12 test and 0 val images look like an image of another split:")
    assert "test/cat/1.png is like cat/2.png" in finding.seen
    assert finding.seen.endswith("; and 2 more")


def test_unreadable_files_are_listed() -> None:
    check = "unreadable files"
    assert of_images(unreadable=[])[check].passed
    finding = of_images(unreadable=["cat/1.png: truncated"])[check]
    assert not finding.passed
    assert finding.seen == "1 file skipped: cat/1.png: truncated"
