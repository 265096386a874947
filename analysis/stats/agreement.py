"""Compare a study's effects with the changes that the article reports."""

from dataclasses import dataclass

from analysis.frames import StudyFrames, settings_in_order
from analysis.stats.article import ARTICLE_ROWS, find_as_printed
from analysis.stats.effect import Effect, estimate_effect, interval
from analysis.stats.pairs import compute_pairs
from analysis.stats.verdict import ALPHA, FEWEST_PAIRS
from analysis.words import p_value, signed


@dataclass(frozen=True)
class RowAgreement:
    """One of the article's four rows: the change from its first model to its second, and ours.

    Attributes:
        name: Name of the row.
        percent: True if the differences are in points, else nats per image.
        article: The article's value with dropout minus without, one run each.
        setting: This study's counterpart of the article's second model.
        baseline: This study's counterpart of the article's first model.
        effect: The setting's value minus the baseline's, from this study's matched pairs.
    """

    name: str
    percent: bool
    article: float
    setting: str
    baseline: str
    effect: Effect

    @property
    def shown(self) -> bool:
        """True if this study shows a change."""
        return self.effect.n >= FEWEST_PAIRS and self.effect.p < ALPHA


def compute_agreement(frames: StudyFrames) -> tuple[RowAgreement, ...]:
    """Return the four rows; empty unless matched pairs exist for the article's two models."""
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
    """Describe the agreement in a paragraph; empty if there is nothing to compare."""
    if not rows:
        return ""
    groups = {
        "agrees with the article on": [
            row for row in rows if row.shown and row.article * row.effect.mean > 0
        ],
        "finds the opposite of the article for": [
            row for row in rows if row.shown and row.article * row.effect.mean < 0
        ],
        "shows no change where the article reports one:": [row for row in rows if not row.shown],
    }
    found = {verb: rows for verb, rows in groups.items() if rows}
    sentences = [
        f"{subject} {verb} {'; '.join(map(_describe, rows))}."
        for subject, (verb, rows) in zip(("This study", "It", "It"), found.items(), strict=False)
    ]
    sentences.append(
        "The article's changes compare two single runs on test images; this study's are"
        f" {rows[0].setting} minus {rows[0].baseline}."
    )
    return " ".join(sentences)


def _second_model(frames: StudyFrames) -> str | None:
    settings = settings_in_order(frames.confirm)
    if len(settings) == 2:
        return settings[1]
    # In the article's code, the model "with dropout" has none and was trained twice as long.
    return find_as_printed(frames)


def _describe(row: RowAgreement) -> str:
    digits, unit = (2, " points") if row.percent else (3, "")
    return (
        f"{row.name.lower()} (article {signed(row.article, 2)}{unit}, here"
        f" {signed(row.effect.mean, digits)}{unit}, 95 % CI {interval(row.effect, digits)},"
        f" p = {p_value(row.effect.p)})"
    )
