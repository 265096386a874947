"""The verdict: what the matched pairs say about the factor, in numbers and in one sentence."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import pandas as pd

from analysis.frames import StudyFrames
from analysis.stats.effect import Effect, adjust_holm, estimate_effect, interval
from analysis.stats.pairs import Pairs, compute_pairs
from analysis.stats.standard_errors import StandardErrors, compute_standard_errors
from analysis.words import count, p_value, signed

#: A difference is claimed only below this p-value.
ALPHA = 0.05

#: With fewer pairs, no sign-flip test reaches ALPHA: its smallest p-value is 2 / 2^n.
FEWEST_PAIRS = 6


def fewest_pairs(comparisons: int) -> int:
    """Return the fewest pairs that can reach p < ALPHA after Holm's correction for this many."""
    pairs = FEWEST_PAIRS
    while comparisons * 2 / 2**pairs >= ALPHA:
        pairs += 1
    return pairs


Outcome = Literal["helps", "hurts", "no difference shown", "too few pairs", "no pairs"]


@dataclass(frozen=True)
class Comparison:
    """A setting of the factor against the baseline, by matched pairs.

    Effects are the setting's values minus the baseline's, averaged over the recipes at each seed:
    accuracy in points (percent of the images), loss in nats per image.

    Attributes:
        setting: The setting.
        baseline: The space's first setting.
        measure: Name of the accuracy: "test accuracy" or "balanced test accuracy".
        accuracy: Effect on it at the epoch selected on `val`, which the verdict is based on.
        loss: Effect on test loss at the selected epoch.
        last_accuracy: Effect on the accuracy at the last epoch, where the article measured.
        last_loss: Effect on test loss at the last epoch.
        by_recipe: The effect on the accuracy with each recipe.
        recipes: Number of recipes that the effect is averaged over.
        comparisons: Number of comparisons in the study, including this one.
        adjusted_p: `accuracy.p` after Holm's correction for all comparisons of the study.
        correlation: Of test accuracy within pairs; near 1, pairing pays off.
        errors: Standard errors of the effect on test accuracy, by source.
    """

    setting: str
    baseline: str
    measure: str
    accuracy: Effect
    loss: Effect
    last_accuracy: Effect
    last_loss: Effect
    by_recipe: Mapping[str, Effect]
    recipes: int
    comparisons: int
    adjusted_p: float
    correlation: float
    errors: StandardErrors

    @property
    def outcome(self) -> Outcome:
        """The claim that the pairs support."""
        if self.accuracy.n < fewest_pairs(self.comparisons):
            return "too few pairs"
        if self.adjusted_p >= ALPHA:
            return "no difference shown"
        return "helps" if self.accuracy.mean > 0 else "hurts"


@dataclass(frozen=True)
class ChampionsDiffer:
    """The difference between the tuned champions, each with its own recipe and factor value.

    Attributes:
        first: Arm of one champion.
        second: Arm of the other.
        measure: Name of the accuracy, as in `Comparison`.
        accuracy: The second's accuracy minus the first's, paired by seed, in points.
    """

    first: str
    second: str
    measure: str
    accuracy: Effect


@dataclass(frozen=True)
class Verdict:
    """The result of a study.

    Attributes:
        outcome: The claim about the factor that the pairs support.
        sentence: The verdict, for readers who read nothing else.
        comparisons: Every setting against the baseline.
        champions: The champions against each other; None unless there are exactly two arms.
    """

    outcome: Outcome
    sentence: str
    comparisons: tuple[Comparison, ...]
    champions: ChampionsDiffer | None


def compute_verdict(frames: StudyFrames) -> Verdict:
    """Reach a verdict from the confirmation runs of a study."""
    if not len(frames.confirm):
        sentence = (
            "No verdict: there are no confirmation runs yet, and trials do not count as evidence."
        )
        return Verdict("no pairs", sentence, (), None)
    comparisons = _comparisons(frames)
    if not comparisons:
        sentence = "No verdict: there are no matched pairs among the confirmation runs."
        return Verdict("no pairs", sentence, (), _champions_differ(frames))
    if len(comparisons) == 1:
        outcome, sentence = comparisons[0].outcome, describe_comparison(comparisons[0])
    else:
        outcome, sentence = _outcome_of_several(comparisons), describe_several(comparisons)
    return Verdict(outcome, sentence, comparisons, _champions_differ(frames))


def describe_comparison(comparison: Comparison) -> str:
    """Describe the verdict on one setting."""
    name, effect = _name(comparison), comparison.accuracy
    size = f"{signed(effect.mean)} points of {comparison.measure}"
    basis = (
        f"(95 % CI {interval(effect)}, p = {p_value(effect.p)},"
        f" {count(effect.n, 'seed')} × {count(comparison.recipes, 'recipe')})"
    )
    match comparison.outcome:
        case "helps" | "hurts" as outcome:
            return f"{_start(name)} {outcome}: {size} {basis}."
        case "too few pairs":
            return (
                f"Too few pairs for a verdict: {count(effect.n, 'seed')}, but at least"
                f" {FEWEST_PAIRS} are needed to reach p < {ALPHA}. Effect of {name} so far: {size}."
            )
        case _:
            return f"No difference shown: the estimated effect of {name} is {size} {basis}."


def describe_loss(comparison: Comparison) -> str:
    """Describe the setting's effect on test loss, at the selected and the last epoch."""
    shown = {
        where: f"{signed(effect.mean, 3)} (95 % CI {interval(effect, 3)}, p = {p_value(effect.p)})"
        for where, effect in (("selected", comparison.loss), ("last", comparison.last_loss))
    }
    return (
        f"Test loss changes by {shown['selected']} at the selected epoch and by {shown['last']} at"
        " the last; lower is better."
    )


def describe_several(comparisons: tuple[Comparison, ...]) -> str:
    """Describe the verdict on several settings, after Holm's correction."""
    baseline, seeds = comparisons[0].baseline, comparisons[0].accuracy.n
    fewest = fewest_pairs(len(comparisons))
    if seeds < fewest:
        return (
            f"Too few pairs for a verdict: {count(seeds, 'seed')}, but at least {fewest} are needed"
            f" to reach p < {ALPHA} in {len(comparisons)} comparisons."
        )
    largest = max(comparisons, key=lambda c: abs(c.accuracy.mean))
    claimed = [c for c in comparisons if c.outcome in ("helps", "hurts")]
    if not claimed:
        return (
            f"No difference shown ({len(comparisons)} settings vs. {baseline},"
            f" {count(seeds, 'seed')}); the largest effect is"
            f" {signed(largest.accuracy.mean)} points of {largest.measure}, for setting"
            f" {largest.setting}"
            f" (p = {p_value(largest.adjusted_p)} after Holm's correction)."
        )
    each = ", ".join(
        f"{c.setting} by {signed(c.accuracy.mean)} points (p = {p_value(c.adjusted_p)})"
        for c in claimed
    )
    verb = "differs" if len(claimed) == 1 else "differ"
    return (
        f"{len(claimed)} of {len(comparisons)} settings {verb} from {baseline} in"
        f" {largest.measure}: {each}; {count(seeds, 'seed')}, p-values after Holm's correction."
    )


def describe_champions(champions: ChampionsDiffer) -> str:
    """Describe the champions' difference without attributing it to the factor."""
    effect = champions.accuracy
    return (
        f"The two champions differ by {signed(effect.mean)} points of {champions.measure}"
        f" ({champions.second} minus {champions.first}, 95 % CI {interval(effect)}). Their recipes"
        " differ too, so this compares two models, not the factor."
    )


def _comparisons(frames: StudyFrames) -> tuple[Comparison, ...]:
    accuracy = compute_pairs(frames, f"test_{frames.accuracy}")
    others = [
        compute_pairs(frames, column)
        for column in ("test_loss", f"last_test_{frames.accuracy}", "last_test_loss")
    ]
    effects = [_effect(pairs, 100) for pairs in accuracy]
    adjusted = adjust_holm([effect.p for effect in effects])
    return tuple(
        Comparison(
            setting=pairs.setting,
            baseline=pairs.baseline,
            measure=frames.test_accuracy_words,
            accuracy=effect,
            loss=_effect(loss, 1),
            last_accuracy=_effect(last_accuracy, 100),
            last_loss=_effect(last_loss, 1),
            by_recipe={
                str(recipe): estimate_effect(list(100 * pairs.by_recipe[recipe]))
                for recipe in pairs.by_recipe
            },
            recipes=len(pairs.by_recipe.columns),
            comparisons=len(accuracy),
            adjusted_p=p,
            correlation=pairs.correlation,
            errors=compute_standard_errors(frames, pairs),
        )
        for pairs, effect, p, loss, last_accuracy, last_loss in zip(
            accuracy, effects, adjusted, *others, strict=True
        )
    )


def _effect(pairs: Pairs, scale: float) -> Effect:
    return estimate_effect(list(scale * pairs.by_seed))


def _champions_differ(frames: StudyFrames) -> ChampionsDiffer | None:
    own = frames.confirm[frames.confirm["recipe"] == frames.confirm["setting"]]
    arms = list(own["setting"].unique())
    if len(arms) != 2:
        return None
    column = f"test_{frames.accuracy}"
    by_seed = own.pivot_table(index="seed", columns="setting", values=column).dropna()
    if by_seed.empty:
        return None
    differences: pd.Series = 100 * (by_seed[arms[1]] - by_seed[arms[0]])
    effect = estimate_effect(list(differences))
    return ChampionsDiffer(arms[0], arms[1], frames.test_accuracy_words, effect)


def _outcome_of_several(comparisons: tuple[Comparison, ...]) -> Outcome:
    outcomes = [comparison.outcome for comparison in comparisons]
    for outcome in ("too few pairs", "helps", "hurts"):
        if outcome in outcomes:
            return outcome
    return "no difference shown"


def _name(comparison: Comparison) -> str:
    """Return the setting's name within a sentence; just "dropout" for dropout vs. no-dropout."""
    if comparison.baseline == f"no-{comparison.setting}":
        return comparison.setting
    return f"setting {comparison.setting} (vs. {comparison.baseline})"


def _start(name: str) -> str:
    """Return the name as it starts a sentence."""
    return name[:1].upper() + name[1:]
