"""Attribute the article's gain to dropout or to longer training.

The article reports a test accuracy of 78.76 % without dropout and 79.87 % with it, one run each.
Its code does something else: the second model has no dropout layer, and its head is trained on top
of the backbone that the first model has already trained. A study that tests each of the two changes
as a separate setting, against the same baseline, tells them apart.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from analysis.frames import StudyFrames, settings_in_order
from analysis.stats.effect import Effect, adjust_holm, interval
from analysis.stats.pairs import compute_changed
from analysis.stats.verdict import ALPHA, FEWEST_PAIRS, Comparison, Verdict, fewest_pairs
from analysis.words import count, p_value, signed

EpochChoice = Literal["last", "selected"]

DROPOUT, WARM_UP = "dropout", "backbone_warmup_epochs"

#: Epochs at which a run is measured.
EPOCH_CHOICES: tuple[EpochChoice, EpochChoice] = ("last", "selected")


class ArticleFigures(NamedTuple):
    """One quantity that the article reports, and the columns of its counterpart in this study.

    Attributes:
        name: Name of the row.
        percent: True if it is an accuracy, in percent.
        article: The article's values without and with dropout.
        column: Column of a confirmation run.
        images: Split it is measured on.
        trial_column: Column of a trial, used if there are no confirmation runs.
    """

    name: str
    percent: bool
    article: tuple[float, float]
    column: str
    images: str
    trial_column: str


#: The article validated on its test images, so its validation loss is a test loss.
ARTICLE_ROWS = (
    ArticleFigures(
        "Training accuracy", True, (94.5, 97.54), "train_accuracy", "train", "train_accuracy"
    ),
    ArticleFigures(
        "Testing accuracy", True, (78.76, 79.87), "test_accuracy", "test", "val_accuracy"
    ),
    ArticleFigures("Training loss", False, (0.17, 0.08), "train_loss", "train", "train_loss"),
    ArticleFigures("Validation loss", False, (0.86, 1.01), "test_loss", "test", "val_loss"),
)


@dataclass(frozen=True)
class SingleChange:
    """The effect of changing one of the two hyperparameters alone.

    Attributes:
        setting: The setting that differs from the baseline only in this hyperparameter.
        hyperparameter: `dropout` or `backbone_warmup_epochs`.
        value: Its value in this setting; 0 in the baseline.
        last: The effect on test accuracy at the last epoch, in points.
        last_p: Its p-value after Holm's correction.
        selected: The effect on test accuracy at the epoch selected on `val`, in points.
        selected_p: Its p-value after Holm's correction.
    """

    setting: str
    hyperparameter: str
    value: float
    last: Effect
    last_p: float
    selected: Effect
    selected_p: float


@dataclass(frozen=True)
class ArticleGain:
    """The article's gain in test accuracy, and the effects of its two possible causes here.

    Attributes:
        article: The gain that the article reports, in points.
        baseline: The setting without dropout and without warm-up.
        epochs: Length of the baseline's runs; a warm-up this long doubles the backbone's training.
        comparisons: Number of comparisons in the study, which p-values are corrected for.
        parts: At least one change of each hyperparameter, in the study's order.
    """

    article: float
    baseline: str
    epochs: int
    comparisons: int
    parts: tuple[SingleChange, ...]


def find_single_changes(frames: StudyFrames) -> Mapping[str, str]:
    """Return the settings that change dropout alone or the warm-up alone, and which of the two.

    Empty unless the first setting has neither dropout nor warm-up.
    """
    confirm = frames.confirm
    if confirm.empty or not {DROPOUT, WARM_UP} <= set(confirm):
        return {}
    first = confirm[confirm["setting"] == settings_in_order(confirm)[0]]
    # Unknown hyperparameters are read from CSV as text.
    if first[[DROPOUT, WARM_UP]].astype(float).ne(0).to_numpy().any():
        return {}
    changed = compute_changed(frames)
    alone = {setting: next(iter(names)) for setting, names in changed.items() if len(names) == 1}
    return {setting: name for setting, name in alone.items() if name in (DROPOUT, WARM_UP)}


def find_as_printed(frames: StudyFrames) -> str | None:
    """Find the setting that does what the article's code does: a warm-up as long as training."""
    for setting, name in find_single_changes(frames).items():
        runs = frames.confirm[frames.confirm["setting"] == setting]
        if name == WARM_UP and runs[WARM_UP].astype(float).eq(_epochs(frames)).all():
            return setting
    return None


def compute_article_gain(frames: StudyFrames, verdict: Verdict) -> ArticleGain | None:
    """Collect both effects from the verdict's comparisons; None unless the study tests both."""
    if frames.own_images:
        return None
    alone = find_single_changes(frames)
    last_p = adjust_holm([comparison.last_accuracy.p for comparison in verdict.comparisons])
    parts = tuple(
        _part(frames, comparison, alone[comparison.setting], p)
        for comparison, p in zip(verdict.comparisons, last_p, strict=True)
        if comparison.setting in alone
    )
    if {part.hyperparameter for part in parts} != {DROPOUT, WARM_UP}:
        return None
    (figures,) = (row.article for row in ARTICLE_ROWS if row.column == "test_accuracy")
    without, with_dropout = figures
    return ArticleGain(
        article=with_dropout - without,
        baseline=verdict.comparisons[0].baseline,
        epochs=_epochs(frames),
        comparisons=len(verdict.comparisons),
        parts=parts,
    )


def describe_article_gain(gain: ArticleGain | None) -> str:
    """Describe the gain in a paragraph; empty if the study cannot tell its two causes apart."""
    if gain is None:
        return ""
    seeds, fewest = gain.parts[0].selected.n, fewest_pairs(gain.comparisons)
    sentences = [
        f"The article reports {signed(gain.article)} points of test accuracy for dropout, based on"
        " one run each, but its code adds no dropout: it trains the backbone for twice as long."
    ]
    sentences.append(_describe_effects(gain))
    if seeds < fewest:
        sentences.append(
            f"No effect is shown: {count(seeds, 'seed')}, but at least {fewest} are needed to"
            f" reach p < {ALPHA} in {count(gain.comparisons, 'comparison')} after Holm's"
            " correction."
        )
    else:
        last, selected = (_describe_shown(gain, choice) for choice in EPOCH_CHOICES)
        if last == selected:
            sentences.append(f"Shown at both epochs: {last}.")
        else:
            sentences.append(
                f"Shown at the last epoch: {last}. Shown at the selected epoch: {selected}."
            )
        sentences.append(
            f"({count(seeds, 'seed')}; p-values after Holm's correction, intervals uncorrected.)"
        )
    return " ".join(sentences)


def _part(
    frames: StudyFrames, comparison: Comparison, hyperparameter: str, last_p: float
) -> SingleChange:
    runs = frames.confirm[frames.confirm["setting"] == comparison.setting]
    return SingleChange(
        setting=comparison.setting,
        hyperparameter=hyperparameter,
        value=float(runs[hyperparameter].iloc[0]),
        last=comparison.last_accuracy,
        last_p=last_p,
        selected=comparison.accuracy,
        selected_p=comparison.adjusted_p,
    )


def _epochs(frames: StudyFrames) -> int:
    """Return the length of the baseline's runs, which have no warm-up epochs."""
    confirm = frames.confirm
    return int(confirm.loc[confirm["setting"] == settings_in_order(confirm)[0], "epochs"].max())


def _measured(part: SingleChange, choice: EpochChoice) -> tuple[Effect, float]:
    return (part.last, part.last_p) if choice == "last" else (part.selected, part.selected_p)


def _describe_effects(gain: ArticleGain) -> str:
    first, *others = (f"{_name(part, gain)} (setting {part.setting})" for part in gain.parts)
    last, selected = (
        [_describe_effect(part, choice) for part in gain.parts] for choice in EPOCH_CHOICES
    )
    by = [f"{name} by {size}" for name, size in zip(others, last[1:], strict=True)]
    changes = [f"{first} changes test accuracy by {last[0]}", *by]
    return (
        f"Here, at the last epoch, where the article measured, {_enumerate(changes)}; at the epoch"
        f" selected on val, by {_enumerate(selected)}."
    )


def _describe_effect(part: SingleChange, choice: EpochChoice) -> str:
    effect, p = _measured(part, choice)
    size = f"{signed(effect.mean)} points"
    if effect.n < FEWEST_PAIRS:
        return size
    return f"{size} (95 % CI {interval(effect)}, p = {p_value(p)})"


def _describe_shown(gain: ArticleGain, choice: EpochChoice) -> str:
    shown, others = list[str](), list[str]()
    for part in gain.parts:
        effect, p = _measured(part, choice)
        if p < ALPHA:
            shown.append(f"{'a gain' if effect.mean > 0 else 'a loss'} from {_name(part, gain)}")
        else:
            others.append(f"from {_name(part, gain)}")
    missing = f"; not shown: any change {' or '.join(others)}" if others else ""
    return f"{_enumerate(shown) if shown else 'nothing'}{missing}"


def _enumerate(phrases: Sequence[str]) -> str:
    *others, last = phrases
    return f"{', '.join(others)} and {last}" if others else last


def _name(part: SingleChange, gain: ArticleGain) -> str:
    if part.hyperparameter == DROPOUT:
        return f"dropout alone at rate {part.value:g}"
    if part.value == gain.epochs:
        return "training the backbone for twice as long"
    return f"training the backbone for {count(int(part.value), 'epoch')} beforehand"
