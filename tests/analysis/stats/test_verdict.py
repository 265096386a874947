"""The verdict: effects from matched pairs, and the sentences they support."""

import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from analysis import load
from analysis.frames import StudyFrames
from analysis.report.text_tables import show_effects
from analysis.rundir import RunDir
from analysis.rundir.predictions import Predictions, load_predictions
from analysis.stats import standard_errors
from analysis.stats.agreement import compute_agreement, describe_agreement
from analysis.stats.pairs import compute_pairs
from analysis.stats.standard_errors import class_weights, crossed_bootstrap
from analysis.stats.test_set_looks import record_verdict
from analysis.stats.verdict import FEWEST_PAIRS, compute_verdict, describe_champions, fewest_pairs
from tests.support import FIXTURES
from tests.support.fake_frames import article_arms, confirmed, frames

STUDY = FIXTURES / "study"

NOISE = np.array([0.0, 0.002, -0.001, 0.001, -0.002, 0.003, 0.001, -0.001])


def two_arms(first: float, second: float, seeds: int = 8, spread: float = 1.0) -> StudyFrames:
    """Dropout adds about `first` with the other arm's recipe and about `second` with its own."""
    base = 0.7 + NOISE[:seeds]
    wobble = spread * NOISE[::-1][:seeds]
    return confirmed(
        {
            ("no-dropout", "no-dropout"): base,
            ("no-dropout", "dropout"): base + first + wobble,
            ("dropout", "no-dropout"): base + 0.05,
            ("dropout", "dropout"): base + 0.05 + second + wobble,
        }
    )


def test_the_effect_at_each_seed_is_the_mean_over_the_recipes() -> None:
    (comparison,) = compute_verdict(two_arms(0.01, 0.02)).comparisons
    assert comparison.accuracy.mean == pytest.approx(1.5 + 100 * NOISE.mean())
    assert comparison.loss.mean == pytest.approx(-0.015 - NOISE.mean())
    assert comparison.accuracy.n == 8
    assert comparison.recipes == 2
    # All eight differences are positive: 2 of 256 sign patterns are as extreme.
    assert comparison.accuracy.p == 2 / 256
    effects = comparison.by_recipe
    assert effects["dropout"].mean - effects["no-dropout"].mean == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("effect", "seeds", "outcome", "start"),
    [
        (0.006, 8, "helps", "Dropout helps: +0.64 points of test accuracy (95 % CI +"),
        (-0.006, 8, "hurts", "Dropout hurts: \N{MINUS SIGN}0.56 points of test accuracy (95 % CI"),
        (
            0.0,
            8,
            "no difference shown",
            "No difference shown: the estimated effect of dropout is +0.04",
        ),
        (0.006, 5, "too few pairs", "Too few pairs for a verdict: 5 seeds, but at least 6"),
    ],
)
def test_the_sentence_claims_what_the_pairs_support(
    effect: float, seeds: int, outcome: str, start: str
) -> None:
    verdict = compute_verdict(two_arms(effect, effect, seeds))
    assert verdict.outcome == outcome
    assert verdict.sentence.startswith(start)
    if seeds == 8:
        assert "8 seeds × 2 recipes" in verdict.sentence


def test_a_seed_with_a_missing_run_is_skipped() -> None:
    study = two_arms(0.006, 0.006)
    lost = study.confirm["run_id"] != "dropout-recipe-no-dropout-3"
    (comparison,) = compute_verdict(replace(study, confirm=study.confirm[lost])).comparisons
    assert comparison.accuracy.n == 7


def test_a_study_with_one_recipe_is_compared_on_it() -> None:
    base = 0.7 + NOISE
    study = confirmed({("a", "no-dropout"): base, ("a", "dropout"): base + 0.01})
    (comparison,) = compute_verdict(study).comparisons
    assert comparison.recipes == 1
    assert compute_verdict(study).champions is None


def test_several_settings_are_holm_corrected() -> None:
    base = 0.7 + NOISE
    rates = {f"dropout-0.{k}": base + shift for k, shift in enumerate((0, 0.01, 0.0002))}
    # The last one alternates between +0.02 and -0.02 points, with a mean effect of zero.
    rates["dropout-0.2"] = base + 0.0002 * np.array([1, -1] * 4)
    verdict = compute_verdict(confirmed({("any", name): row for name, row in rates.items()}))
    assert [c.setting for c in verdict.comparisons] == ["dropout-0.1", "dropout-0.2"]
    assert [c.accuracy.p for c in verdict.comparisons] == [2 / 256, 1.0]
    assert [c.adjusted_p for c in verdict.comparisons] == [4 / 256, 1.0]
    assert verdict.sentence.startswith("1 of 2 settings differs from dropout-0.0 in test accuracy")
    assert "dropout-0.1 by +1.00 points (p = 0.016); 8 seeds" in verdict.sentence


def test_the_champions_difference_is_not_attributed_to_the_factor() -> None:
    champions = compute_verdict(two_arms(0.0, 0.0)).champions
    assert champions is not None
    # The recipe of dropout's champion is 5 points better, which is not due to dropout.
    assert champions.accuracy.mean == pytest.approx(5 + 100 * NOISE.mean())
    sentence = describe_champions(champions)
    assert sentence.startswith("The two champions differ by +5.04 points")
    assert "compares two models, not the factor" in sentence


def test_without_confirmation_runs_there_is_no_verdict() -> None:
    verdict = compute_verdict(frames())
    assert (verdict.outcome, verdict.comparisons) == ("no pairs", ())
    assert verdict.sentence.startswith("No verdict")


def test_the_correlation_within_pairs_subtracts_recipe_means() -> None:
    (pairs,) = compute_pairs(two_arms(0.01, 0.02, spread=0.0), "test_accuracy")
    assert pairs.correlation == pytest.approx(1.0)
    (pairs,) = compute_pairs(two_arms(0.01, 0.02), "test_accuracy")
    with_ = NOISE + NOISE[::-1]
    assert pairs.correlation == pytest.approx(np.corrcoef(NOISE, with_)[0, 1])


def test_the_crossed_bootstrap_adds_the_variances_of_seeds_and_images() -> None:
    random = np.random.default_rng(1)
    seeds, images = random.normal(0, 1, (30, 1)), random.normal(0, 5, (1, 400))
    by_rows, by_columns = seeds.std() / math.sqrt(30), images.std() / math.sqrt(400)
    assert crossed_bootstrap(seeds + 0 * images) == pytest.approx(by_rows, rel=0.1)
    assert crossed_bootstrap(0 * seeds + images) == pytest.approx(by_columns, rel=0.1)
    both = math.hypot(by_rows, by_columns)
    assert crossed_bootstrap(seeds + images) == pytest.approx(both, rel=0.1)


def test_a_real_study_has_all_standard_errors() -> None:
    (comparison,) = compute_verdict(load(STUDY)).comparisons
    errors = comparison.errors
    assert 0 < errors.seeds < errors.both
    # About 500 images are a larger source of error than 6 seeds.
    assert errors.seeds < errors.images < errors.both


def test_agreement_with_the_article_is_described() -> None:
    study = two_arms(0.006, 0.006)
    agreement = {row.name: row for row in compute_agreement(study)}
    accuracy = agreement["Testing accuracy"]
    assert accuracy.article == pytest.approx(79.87 - 78.76)
    assert accuracy.effect.mean == pytest.approx(0.6375)
    text = describe_agreement(tuple(agreement.values()))
    agrees, opposite = text.split("It finds the opposite of the article for")
    assert agrees.startswith("This study agrees with the article on training accuracy")
    assert "testing accuracy (article +1.11 points, here +0.64 points" in agrees
    assert "validation loss (article +0.15, here \N{MINUS SIGN}0.006" in opposite
    still = describe_agreement(compute_agreement(two_arms(0, 0)))
    assert still.startswith("This study shows no change where the article reports one: training")


def test_several_settings_need_more_pairs() -> None:
    # 2 of 64 sign patterns, twice for two comparisons, is above 0.05; 2 of 128 is not.
    few, enough = (compute_verdict(article_arms(0.02, 0.02, seeds)) for seeds in (6, 7))
    assert few.outcome == "too few pairs"
    assert few.sentence == (
        "Too few pairs for a verdict: 6 seeds, but at least 7 are needed to reach p < 0.05 in 2"
        " comparisons."
    )
    assert [c.adjusted_p for c in enough.comparisons] == [4 / 128, 4 / 128]
    assert enough.outcome == "helps"
    assert [fewest_pairs(comparisons) for comparisons in (1, 2, 3, 6)] == [FEWEST_PAIRS, 7, 7, 8]


def test_settings_named_with_and_without_make_readable_sentences() -> None:
    study = article_arms(0.0, 0.0)
    two = replace(study, confirm=study.confirm[study.confirm["setting"] != "as-printed"])
    assert compute_verdict(two).sentence.startswith(
        "No difference shown: the estimated effect of setting with (vs. without) is +0.01 points"
    )
    clear = replace(two, confirm=article_arms(0.01, 0.0).confirm.query("setting != 'as-printed'"))
    assert compute_verdict(clear).sentence.startswith("Setting with (vs. without) helps: +1.01")
    assert compute_verdict(study).sentence == (
        "No difference shown (2 settings vs. without, 8 seeds); the largest effect is +0.01 points"
        " of test accuracy, for setting with (p = 1 after Holm's correction)."
    )


def test_a_settings_name_keeps_its_capitals() -> None:
    base = 0.7 + NOISE
    study = confirmed({("any", "Adam"): base, ("any", "AdamW"): base})
    sentence = compute_verdict(study).sentence
    assert sentence.startswith(
        "No difference shown: the estimated effect of setting AdamW (vs. Adam) is +0.00"
    )


def test_no_pairs_exist_if_every_seed_lacks_a_run() -> None:
    study = article_arms(0.0, 0.0)
    setting, odd = study.confirm["setting"], study.confirm["seed"] % 2 == 1
    lost = ((setting == "with") & odd) | ((setting == "as-printed") & ~odd)
    left = replace(study, confirm=study.confirm[~lost])
    assert compute_verdict(left).outcome == "no pairs"
    assert compute_agreement(left) == ()


def test_settings_without_a_common_recipe_have_no_agreement() -> None:
    study = confirmed({("a", "a"): 0.7 + NOISE, ("b", "b"): 0.8 + NOISE})
    assert compute_agreement(study) == ()


def test_the_article_is_compared_with_what_its_code_does() -> None:
    rows = {row.name: row for row in compute_agreement(article_arms(-0.003, 0.0105))}
    accuracy = rows["Testing accuracy"]
    assert (accuracy.setting, accuracy.baseline) == ("as-printed", "without")
    assert accuracy.effect.mean == pytest.approx(1.05625)
    text = describe_agreement(tuple(rows.values()))
    assert text.endswith("on test images; this study's are as-printed minus without.")


@pytest.mark.parametrize("epochs", [5, 30])
def test_a_warm_up_of_another_length_is_not_the_articles(epochs: int) -> None:
    study = article_arms(-0.003, 0.0105)
    assert compute_agreement(replace(study, confirm=study.confirm.assign(epochs=epochs))) == ()


def test_looks_at_the_test_set_are_counted(tmp_path: Path) -> None:
    path = Path(shutil.copytree(STUDY, tmp_path / "study"))
    first = compute_verdict(load(path))
    assert [record_verdict(path, first) for _ in range(2)] == [1, 1]
    # Fewer rows: the confirmation runs are no longer the same.
    directory = RunDir(path)
    directory.write_confirm(directory.read_confirm()[:-4])
    assert record_verdict(path, compute_verdict(load(path))) == 2
    content = directory.verdict.read_text()
    assert first.sentence.split("points")[0].encode("unicode_escape").decode() in content
    assert content.count('"evidence"') == 2


def test_a_study_without_confirmation_runs_has_no_look(tmp_path: Path) -> None:
    path = Path(shutil.copytree(STUDY, tmp_path / "study"))
    (path / "confirm.csv").unlink()
    assert record_verdict(path, compute_verdict(load(path))) == 0


def test_a_recipe_that_one_setting_never_finished_is_skipped() -> None:
    study = two_arms(0.006, 0.006)
    lost = (study.confirm["recipe"] == "dropout") & (study.confirm["setting"] == "no-dropout")
    (comparison,) = compute_verdict(replace(study, confirm=study.confirm[~lost])).comparisons
    assert list(comparison.by_recipe) == ["no-dropout"]
    assert (comparison.recipes, comparison.accuracy.n) == (1, 8)


def test_a_failed_first_run_does_not_reverse_the_comparison() -> None:
    study = two_arms(0.006, 0.006)
    lost = study.confirm["run_id"] == "no-dropout-recipe-no-dropout-0"
    ordered = study.confirm[~lost].sort_values("seed", kind="stable")
    (comparison,) = compute_verdict(replace(study, confirm=ordered)).comparisons
    assert (comparison.baseline, comparison.setting) == ("no-dropout", "dropout")
    assert comparison.outcome == "helps"


def test_a_study_of_balanced_accuracy_is_judged_by_it() -> None:
    study = two_arms(-0.02, -0.02)
    gain = 0.03 * (study.confirm["setting"] == "dropout")
    confirm = study.confirm.assign(
        test_balanced_accuracy=0.6 + gain + 0.1 * study.confirm["seed"],
        last_test_balanced_accuracy=0.6 + gain,
    )
    study = replace(study, confirm=confirm, record={"config": {"metric": "val_balanced_accuracy"}})
    verdict = compute_verdict(study)
    assert verdict.sentence.startswith("Dropout helps: +3.00 points of balanced test accuracy (")
    assert verdict.comparisons[0].last_accuracy.mean == pytest.approx(3)
    assert verdict.champions is not None
    assert "points of balanced test accuracy" in describe_champions(verdict.champions)
    assert show_effects(verdict).rows[0][1] == "balanced test accuracy, selected epoch"


def test_class_weights_make_the_mean_balanced_over_the_classes() -> None:
    labels = np.array([0, 0, 0, 0, 2, 2])
    right = np.array([1, 1, 1, 0, 1, 0])
    weights = class_weights(labels)
    assert weights.mean() == pytest.approx(1)
    assert (weights * right).mean() == pytest.approx((0.75 + 0.5) / 2)


def test_standard_errors_of_balanced_accuracy_weigh_images_by_class(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def uneven(run_dir: Path, run_id: str) -> Predictions:
        stored = load_predictions(run_dir, run_id)
        assert stored is not None
        kept = np.flatnonzero((stored.labels != 0) | (np.arange(len(stored.labels)) % 3 == 0))
        return Predictions(stored.logits[kept], stored.labels[kept])

    def balanced_accuracy(study: StudyFrames, run_id: str) -> float:
        stored = uneven(study.path, run_id)
        hits = stored.guesses == stored.labels
        return float(np.mean([hits[stored.labels == c].mean() for c in np.unique(stored.labels)]))

    monkeypatch.setattr(standard_errors, "load_predictions", uneven)
    study = load(STUDY)
    study = replace(study, record={"config": {"metric": "val_balanced_accuracy"}})
    (pairs,) = compute_pairs(study, "test_accuracy")
    gains = standard_errors._gains(study, pairs)
    assert gains is not None
    for row, seed in zip(gains, pairs.by_recipe.index, strict=True):
        runs = study.confirm[study.confirm["seed"] == seed]
        of: dict[str, list[float]] = {pairs.setting: [], pairs.baseline: []}
        for run_id, setting in zip(runs["run_id"], runs["setting"], strict=True):
            of[setting].append(balanced_accuracy(study, run_id))
        expected = 100 * (np.mean(of[pairs.setting]) - np.mean(of[pairs.baseline]))
        assert row.mean() == pytest.approx(expected)
