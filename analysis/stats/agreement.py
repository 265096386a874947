"""Where a study agrees with the article that it starts from, and where it does not."""

from dataclasses import dataclass

from analysis.frames import StudyFrames, settings_in_order
from analysis.stats.article import ARTICLE_ROWS, find_as_printed
from analysis.stats.effect import Effect, estimate_effect, interval
from analysis.stats.pairs import compute_pairs
from analysis.stats.verdict import ALPHA, FEWEST_PAIRS
from analysis.words import p_value, signed


@dataclass(frozen=True)
class RowAgreement:
    """One of the article's four rows: what its second model changes there, and a setting here.

    Attributes:
        name: Of the row.
        percent: Whether the figures are points; else nats per image.
        article: The article's figure with dropout minus without, one run each.
        setting: This study's counterpart of the article's second model.
        baseline: Of its first.
        effect: The setting's figure minus the baseline's, from this study's matched pairs.
    """

    name: str
    percent: bool
    article: float
    setting: str
    baseline: str
    effect: Effect

    @property
    def shown(self) -> bool:
        """Whether this study shows any change."""
        return self.effect.n >= FEWEST_PAIRS and self.effect.p < ALPHA


def compute_agreement(frames: StudyFrames) -> tuple[RowAgreement, ...]:
    """The four rows; nothing unless the study has the article's two models in matched pairs."""
    if frames.own_images:
        return ()
    setting = _second_model(frames)
    rows = []
    for row in ARTICLE_ROWS:
        matched = {pairs.setting: pairs for pairs in compute_pairs(frames, row.column)}
        if setting not in matched:
            return ()
        pairs = matched[setting]
        scale = 100 if row.percent else 1
        without, with_dropout = row.article
        rows.append(
            RowAgreement(
                name=row.name,
                percent=row.percent,
                article=with_dropout - without,
                setting=pairs.setting,
                baseline=pairs.baseline,
                effect=estimate_effect(list(scale * pairs.by_seed)),
            )
        )
    return tuple(rows)


def describe_agreement(rows: tuple[RowAgreement, ...]) -> str:
    """The paragraph; empty where there is nothing to compare."""
    if not rows:
        return ""
    groups = {
        "agrees with the article on": [
            row for row in rows if row.shown and row.article * row.effect.mean > 0
        ],
        "finds the opposite of the article for": [
            row for row in rows if row.shown and row.article * row.effect.mean < 0
        ],
        "shows no change, where the article reports one, in": [
            row for row in rows if not row.shown
        ],
    }
    found = {verb: rows for verb, rows in groups.items() if rows}
    said = [
        f"{subject} {verb} {'; '.join(map(_describe, rows))}."
        for subject, (verb, rows) in zip(("This study", "It", "It"), found.items(), strict=False)
    ]
    said.append(
        "The article's changes are differences between two single runs on test images; here"
        f" {rows[0].setting} minus {rows[0].baseline}."
    )
    return " ".join(said)


def _second_model(frames: StudyFrames) -> str | None:
    settings = settings_in_order(frames.confirm)
    if len(settings) == 2:
        return settings[1]
    # By its code the article's model "with dropout" holds none, and was trained for twice as long.
    return find_as_printed(frames)


def _describe(row: RowAgreement) -> str:
    digits, unit = (2, " points") if row.percent else (3, "")
    return (
        f"{row.name.lower()} (article {signed(row.article, 2)}{unit}, here"
        f" {signed(row.effect.mean, digits)}{unit}, 95 % CI {interval(row.effect, digits)},"
        f" p = {p_value(row.effect.p)})"
    )
