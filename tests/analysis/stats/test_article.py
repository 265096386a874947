"""Attribution of the article's gain, on synthetic studies with three arms."""

import json
import math
from dataclasses import fields, replace
from pathlib import Path

import pytest

from analysis.figures import make_pictures
from analysis.frames import StudyFrames, load_frames
from analysis.report.health import check_health
from analysis.report.write import Report, write_report
from analysis.rundir import ConfirmRow, EpochRow, RunDir
from analysis.stats.article import compute_article_gain, describe_article_gain, find_as_printed
from analysis.stats.pairs import compute_changed
from analysis.stats.verdict import compute_verdict
from tests.support.fake_frames import article_arms

MINUS = "\N{MINUS SIGN}"


def say(study: StudyFrames) -> str:
    return describe_article_gain(compute_article_gain(study, compute_verdict(study)))


def without(study: StudyFrames, setting: str) -> StudyFrames:
    return replace(study, confirm=study.confirm[study.confirm["setting"] != setting])


def changed(study: StudyFrames, setting: str, **values: float) -> StudyFrames:
    """Return the study with different hyperparameters in one setting."""
    confirm = study.confirm.copy()
    for name, value in values.items():
        confirm.loc[confirm["setting"] == setting, name] = value
    return replace(study, confirm=confirm)


def write_arms(path: Path, study: StudyFrames) -> RunDir:
    """Write a run directory of such a study, with two epochs per run."""
    directory = RunDir(path)
    directory.write_study(
        {"config": {"space": "article"}, "arms": {arm: {"trials": 0} for arm in ARMS}}
    )
    known = {field.name for field in fields(ConfirmRow)}
    rows = []
    for row in study.confirm.to_dict("records"):
        factor = {name: row[name] for name in ("dropout", "backbone_warmup_epochs")}
        measured = {str(name): value for name, value in row.items() if name in known}
        rows.append(
            ConfirmRow(
                **measured,
                hyperparameters={"head": "512-256-512-128", **factor},
                score=row["val_accuracy"],
                seconds=1.0,
            )
        )
    directory.write_confirm(rows)
    directory.append_epochs(
        EpochRow(
            phase="confirm",
            run_id=row.run_id,
            attempt=1,
            arm=row.setting,
            seed=row.seed,
            epoch=epoch,
            train_loss=row.train_loss,
            train_accuracy=row.train_accuracy,
            val_loss=row.val_loss,
            val_accuracy=row.val_accuracy,
            score=row.score,
            rung="",
            start=10.0 * number + epoch,
            end=10.0 * number + epoch + 1,
            worker="test:1",
        )
        for number, row in enumerate(rows)
        for epoch in (1, 2)
    )
    return directory


ARMS = ("without", "with", "as-printed")


@pytest.fixture
def report(tmp_path: Path) -> Report:
    study = article_arms(-0.003, 0.0105, last=(0.004, 0.012))
    return write_report(write_arms(tmp_path / "study", study).path)


def test_both_effects_are_taken_from_the_verdict() -> None:
    study = article_arms(-0.003, 0.0105, last=(0.0, 0.012))
    verdict = compute_verdict(study)
    gain = compute_article_gain(study, verdict)
    assert gain is not None
    assert gain.article == pytest.approx(79.87 - 78.76)
    assert (gain.baseline, gain.epochs, gain.comparisons) == ("without", 15, 2)
    dropout, warm_up = gain.parts
    assert (dropout.setting, dropout.hyperparameter, dropout.value) == ("with", "dropout", 0.3)
    assert warm_up.setting == "as-printed"
    assert (warm_up.hyperparameter, warm_up.value) == ("backbone_warmup_epochs", 15)
    # The wobble of the seeds adds 0.00625 points.
    assert dropout.selected.mean == pytest.approx(-0.3 + 0.00625)
    assert dropout.last.mean == pytest.approx(0.00625)
    assert warm_up.selected.mean == pytest.approx(1.05 + 0.00625)
    assert warm_up.last.mean == pytest.approx(1.2 + 0.00625)
    assert [part.selected for part in gain.parts] == [c.accuracy for c in verdict.comparisons]
    # All 8 differences on one side: 2 of 256 patterns, twice after Holm's correction.
    assert (dropout.selected_p, warm_up.selected_p) == (4 / 256, 4 / 256)
    assert dropout.last_p == dropout.last.p > 0.9
    assert warm_up.last_p == 4 / 256


def test_the_paragraph_gives_both_effects_at_both_epochs() -> None:
    text = say(article_arms(-0.003, 0.0105, last=(0.0, 0.012)))
    assert text.startswith(
        "The article reports +1.11 points of test accuracy for dropout, based on one run each,"
        " but its code adds no dropout: it trains the backbone for twice as long. Here, at the last"
        " epoch, where the article measured, dropout alone at rate 0.3 (setting with) changes test"
        " accuracy by +0.01 points (95 % CI "
    )
    assert "for twice as long (setting as-printed) by +1.21 points (95 % CI " in text
    assert f"at the epoch selected on val, by {MINUS}0.29 points (95 % CI " in text
    assert text.endswith(
        "Shown at the last epoch: a gain from training the backbone for twice as long; not shown:"
        " any change from dropout alone at rate 0.3. Shown at the selected epoch: a loss from"
        " dropout alone at rate 0.3 and a gain from training the backbone for twice as long."
        " (8 seeds; p-values after Holm's correction, intervals uncorrected.)"
    )


@pytest.mark.parametrize(
    ("dropout", "warm_up", "shown"),
    [
        (0.01, 0.01, "a gain from {0} and a gain from {1}."),
        (-0.01, -0.01, "a loss from {0} and a loss from {1}."),
        (0.01, 0.0, "a gain from {0}; not shown: any change from {1}."),
        (0.0, -0.01, "a loss from {1}; not shown: any change from {0}."),
        (0.0, 0.0, "nothing; not shown: any change from {0} or from {1}."),
    ],
)
def test_only_significant_effects_are_reported_as_shown(
    dropout: float, warm_up: float, shown: str
) -> None:
    names = ("dropout alone at rate 0.3", "training the backbone for twice as long")
    text = say(article_arms(dropout, warm_up))
    assert f"Shown at both epochs: {shown.format(*names)}" in text


def test_too_few_seeds_show_nothing() -> None:
    few = say(article_arms(0.01, 0.02, seeds=5))
    assert "(setting with) changes test accuracy by +1.02 points and" in few
    assert "CI" not in few
    assert few.endswith(
        "No effect is shown: 5 seeds, but at least 7 are needed to reach p < 0.05 in 2 comparisons"
        " after Holm's correction."
    )
    assert "No effect is shown: 6 seeds" in say(article_arms(0.01, 0.02, seeds=6))
    assert "Shown at both epochs: a gain" in say(article_arms(0.01, 0.02, seeds=7))


def test_every_rate_and_every_warm_up_is_described() -> None:
    study = article_arms(0.0, 0.01)
    more = study.confirm[study.confirm["setting"] != "without"].copy()
    more["setting"] = more["setting"].map({"with": "with-more", "as-printed": "warm"})
    more = more.assign(
        dropout=more["setting"].map({"with-more": 0.5, "warm": 0.0}),
        backbone_warmup_epochs=more["setting"].map({"with-more": 0, "warm": 5}),
    )
    both = article_arms(0.0, 0.01).confirm.query("setting == 'with'")
    both = both.assign(setting="both", backbone_warmup_epochs=15)
    rows = [*study.confirm.to_dict("records"), *more.to_dict("records"), *both.to_dict("records")]
    larger = replace(study, confirm=study.confirm.iloc[:0].__class__(rows))
    gain = compute_article_gain(larger, compute_verdict(larger))
    assert gain is not None
    names = [part.setting for part in gain.parts]
    # A setting that changes both says nothing about either.
    assert names == ["with", "as-printed", "with-more", "warm"]
    assert gain.comparisons == 5
    text = describe_article_gain(gain)
    assert "dropout alone at rate 0.5 (setting with-more) by" in text
    assert "training the backbone for 5 epochs beforehand (setting warm) by" in text


@pytest.mark.parametrize(
    "study",
    [
        without(article_arms(0, 0), "with"),
        without(article_arms(0, 0), "as-printed"),
        without(article_arms(0, 0), "without"),
        changed(article_arms(0, 0), "without", dropout=0.1),
        changed(article_arms(0, 0), "without", backbone_warmup_epochs=5),
        # Each setting changes one hyperparameter, but the first setting already has dropout.
        replace(
            changed(article_arms(0, 0), "with", dropout=0.5),
            confirm=changed(article_arms(0, 0), "with", dropout=0.5).confirm.assign(
                dropout=lambda runs: runs["dropout"] + 0.1
            ),
        ),
        changed(article_arms(0, 0), "as-printed", dropout=0.3),
        changed(article_arms(0, 0), "with", batch_size=50),
        replace(article_arms(0, 0), confirm=article_arms(0, 0).confirm.drop(columns="dropout")),
        replace(article_arms(0, 0), confirm=article_arms(0, 0).confirm.iloc[:0]),
    ],
)
def test_a_study_that_cannot_tell_them_apart_has_no_paragraph(study: StudyFrames) -> None:
    known = ("dropout", "backbone_warmup_epochs", "batch_size")
    study = replace(study, hyperparameters=known)
    assert compute_article_gain(study, compute_verdict(study)) is None
    assert say(study) == ""


def test_as_printed_is_a_warm_up_as_long_as_training() -> None:
    study = article_arms(0, 0)
    assert find_as_printed(study) == "as-printed"
    assert find_as_printed(changed(study, "as-printed", backbone_warmup_epochs=14)) is None
    # The length of training is that of the baseline's runs, whatever its own rows say.
    assert find_as_printed(changed(study, "as-printed", epochs=30)) == "as-printed"


def test_the_paragraph_is_on_the_page_on_screen_and_in_verdict_json(report: Report) -> None:
    text = report.sentences[1]
    assert text.startswith("The article reports +1.11 points")
    assert text in report.path.read_text().replace("&lt;", "<").replace("&#39;", "'")
    assert text in map(str, report.as_rich())
    record = json.loads((report.path.parent / "verdict.json").read_text())["article_gain"]
    assert record["sentence"] == text
    assert [part["setting"] for part in record["parts"]] == ["with", "as-printed"]
    assert record["parts"][1]["last"]["mean"] == pytest.approx(1.2 + 0.00625)


def test_a_study_of_another_question_has_no_paragraph(tmp_path: Path) -> None:
    study = without(article_arms(0.01, 0.01), "as-printed")
    report = write_report(write_arms(tmp_path / "study", study).path)
    assert json.loads((report.path.parent / "verdict.json").read_text())["article_gain"] is None
    assert "The article reports" not in " ".join(report.sentences)


def test_every_part_of_the_report_handles_three_arms(tmp_path: Path) -> None:
    directory = write_arms(tmp_path / "study", article_arms(-0.003, 0.0105))
    frames = load_frames(directory.path)
    pictures = {p.name: p for found in make_pictures(frames).values() for p in found}
    assert {"accuracy", "loss", "pairs", "rates", "gap", "timeline"} <= set(pictures)
    for picture in pictures.values():
        assert "nan" not in picture.caption
    for name in ("rates", "gap"):
        assert pictures[name].caption.endswith("more than dropout: as-printed.")
    checks = {finding.check for finding in check_health(frames, compute_verdict(frames))}
    names = {f"disagreement between val and test for {name}" for name in ("with", "as-printed")}
    assert names <= checks
    errors = [comparison.errors for comparison in compute_verdict(frames).comparisons]
    assert all(error.seeds > 0 and math.isnan(error.images) for error in errors)


def test_a_hyperparameter_that_no_run_has_does_not_count_as_changed() -> None:
    study = article_arms(0, 0)
    blank = replace(study, confirm=study.confirm.assign(batch_size=math.nan))
    assert compute_changed(replace(blank, hyperparameters=("dropout", "batch_size"))) == {
        "with": {"dropout"},
        "as-printed": set(),
    }
