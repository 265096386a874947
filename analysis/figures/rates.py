"""Test accuracy against the dropout rate; with several settings, the dose-response curve."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import cycle
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from analysis.figures.lines import name_ends
from analysis.figures.pairs import MARKERS
from analysis.figures.style import INK, MUTED, STYLE, Picture, colours, new_figure
from analysis.frames import StudyFrames
from analysis.stats.effect import Effect, estimate_effect, interval
from analysis.stats.pairs import compute_changed, compute_pairs
from analysis.words import signed

#: Offset between runs of one rate, to avoid overlap; a fraction of the range of rates.
ASIDE = 0.006

#: Marker of the mean of several runs.
MEAN: Any = {"marker": "_", "markersize": 16, "markeredgewidth": 1.6}

#: With fewer settings there is a single difference, which has its own figure (seed by seed).
FEWEST_SETTINGS = 3


def read_rates(runs: pd.DataFrame) -> "pd.Series[float]":
    """Return the dropout rate of every run (mean of per-layer rates); NaN without a rate."""
    columns = [n for n in runs if _is_layers(n)] or [n for n in runs if n == "dropout"]
    return runs[columns].astype(float).mean(axis=1)


def name_rate(frames: StudyFrames) -> str:
    """Return the axis label for `read_rates`."""
    layered = any(_is_layers(name) for name in frames.hyperparameters)
    return "dropout rate, mean of the layers" if layered else "dropout rate"


def _is_layers(name: object) -> bool:
    return re.fullmatch(r"dropout_\d+", str(name)) is not None


def find_other_settings(frames: StudyFrames) -> tuple[str, ...]:
    """Return the settings that differ from the first in more than the dropout rate.

    Empty if dropout is not part of the factor: the rate then belongs to the recipe.
    """
    changed = compute_changed(frames)
    rates = {n for names in changed.values() for n in names if n == "dropout" or _is_layers(n)}
    return tuple(setting for setting, names in changed.items() if rates and names - rates)


def leave_out(frames: StudyFrames, settings: tuple[str, ...]) -> StudyFrames:
    """Return the study without some settings and without the trials of the arms of that name."""
    confirm, trials = frames.confirm, frames.trials
    if not settings:
        return frames
    return replace(
        frames,
        confirm=confirm[~confirm["setting"].isin(settings)],
        trials=trials[~trials["arm"].isin(settings)],
    )


def describe_left_out(settings: tuple[str, ...]) -> str:
    """Return the sentence on omitted settings for the end of a caption; empty without any."""
    if not settings:
        return ""
    differ = "it differs" if len(settings) == 1 else "they differ"
    return f" Omitted because {differ} in more than dropout: {', '.join(settings)}."


@dataclass(frozen=True)
class Dose:
    """The confirmation runs of one recipe at one dropout rate.

    Attributes:
        recipe: The recipe.
        setting: The setting.
        rate: The dropout rate.
        accuracies: Test accuracy of every run, in per cent.
    """

    recipe: str
    setting: str
    rate: float
    accuracies: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean accuracy over the runs, in per cent."""
        return float(np.mean(self.accuracies))


@dataclass(frozen=True)
class DoseEffect:
    """The effect of a dropout rate relative to the baseline.

    Attributes:
        setting: The setting.
        rate: Its dropout rate.
        effect: The mean difference in test accuracy, in points. The level of its interval is such
            that the intervals of all settings hold simultaneously at 95 %.
    """

    setting: str
    rate: float
    effect: Effect


@dataclass(frozen=True)
class Rates:
    """Test accuracy by dropout rate.

    Attributes:
        doses: By recipe, then by rate.
        effects: Every setting relative to the baseline, by rate; empty with fewer than two.
        baseline: The first setting.
        baseline_rate: Its dropout rate.
        left_out: Omitted settings, which differ from the first in more than dropout.
    """

    doses: tuple[Dose, ...]
    effects: tuple[DoseEffect, ...]
    baseline: str
    baseline_rate: float
    left_out: tuple[str, ...] = ()


#: Nothing to show.
NO_RATES = Rates((), (), "", np.nan)


def make_rates(frames: StudyFrames) -> Picture | None:
    """Make the figure: confirmation runs by rate and, with several settings, their differences."""
    rates = compute_rates(frames)
    if len({dose.rate for dose in rates.doses}) < 2:
        return None
    ink = colours(frames)
    with mpl.rc_context(STYLE):
        figure = new_figure()
        panels = figure.subplots(1, 2 if rates.effects else 1, squeeze=False)[0]
        draw_doses(rates, ink, panels[0])
        if rates.effects:
            panels[0].set_title("Confirmation runs and their mean")
            draw_effects(rates, ink, panels[1])
        for ax in panels:
            ax.set_xlabel(name_rate(frames))
    return Picture(
        "rates",
        "Test accuracy by dropout rate, one point per confirmation run",
        _caption_rates(rates) + describe_left_out(rates.left_out),
        figure,
    )


def compute_rates(frames: StudyFrames) -> Rates:
    """Return the runs at each rate and, with three or more settings, their effects.

    Empty unless each setting has one rate and each rate one setting: otherwise dropout belongs to
    the recipe, and a difference between two rates may be one between recipes.
    """
    left_out = find_other_settings(frames)
    frames = leave_out(frames, left_out)
    runs = frames.confirm.assign(rate=read_rates(frames.confirm))
    runs = runs.dropna(subset=["rate", "test_accuracy"])
    pairings = runs[["setting", "rate"]].drop_duplicates()
    if pairings.empty or not (pairings["setting"].is_unique and pairings["rate"].is_unique):
        return NO_RATES
    rate_of = dict(zip(pairings["setting"].map(str), pairings["rate"].map(float), strict=True))
    recipes = list(runs["recipe"].unique())
    doses = [
        Dose(str(recipe), str(setting), rate_of[str(setting)], tuple(map(float, 100 * accuracies)))
        for (recipe, setting), accuracies in runs.groupby(["recipe", "setting"])["test_accuracy"]
    ]
    doses.sort(key=lambda dose: (recipes.index(dose.recipe), dose.rate))
    baseline = next(iter(rate_of))
    effects = _effects(frames, rate_of) if len(rate_of) >= FEWEST_SETTINGS else ()
    return Rates(tuple(doses), effects, baseline, rate_of[baseline], left_out)


def _effects(frames: StudyFrames, rate_of: Mapping[str, float]) -> tuple[DoseEffect, ...]:
    differences = {
        pairs.setting: (100 * pairs.by_seed).dropna()
        for pairs in compute_pairs(frames, "test_accuracy")
    }
    matched = {setting: values for setting, values in differences.items() if len(values)}
    effects = [
        # Bonferroni: each interval gets an equal share of the total error rate.
        DoseEffect(
            setting, rate_of[setting], estimate_effect(list(values), 1 - 0.05 / len(matched))
        )
        for setting, values in matched.items()
    ]
    return tuple(sorted(effects, key=lambda effect: effect.rate))


def draw_doses(rates: Rates, ink: Mapping[str, str], ax: Axes) -> None:
    """Draw the runs as points, and the means of each recipe as a labelled line.

    Args:
        rates: At least one dose.
        ink: The colour of every setting.
        ax: The axes to draw on.
    """
    recipes = list(dict.fromkeys(dose.recipe for dose in rates.doses))
    aside = 4 * ASIDE * float(np.ptp([dose.rate for dose in rates.doses]))
    ends: dict[str, float] = {}
    for index, (marker, recipe) in enumerate(zip(cycle(MARKERS), recipes, strict=False)):
        doses = [dose for dose in rates.doses if dose.recipe == recipe]
        places = [dose.rate + (index - (len(recipes) - 1) / 2) * aside for dose in doses]
        for dose, place in zip(doses, places, strict=True):
            colour, runs = ink[dose.setting], len(dose.accuracies)
            ax.plot([place] * runs, dose.accuracies, marker, color=colour, alpha=0.6, markersize=5)
        means = [dose.mean for dose in doses]
        ax.plot(places, means, color=INK, linewidth=1.2, **MEAN)
        ends[f"recipe {recipe}"] = means[-1]
    ax.set_ylabel("test accuracy (%)")
    if len(recipes) > 1:
        name_ends(ends, {}, ax)


def draw_effects(rates: Rates, ink: Mapping[str, str], ax: Axes) -> None:
    """Draw the differences from the baseline, with their intervals where finite.

    Args:
        rates: At least one effect.
        ink: The colour of every setting.
        ax: The axes to draw on.
    """
    ax.axhline(0, color=MUTED, linewidth=1)
    ax.plot(rates.baseline_rate, 0, "o", color=ink[rates.baseline], markersize=7)
    for dose in rates.effects:
        colour = ink[dose.setting]
        if _is_finite(dose.effect):
            ax.plot([dose.rate] * 2, [dose.effect.low, dose.effect.high], color=colour, linewidth=2)
        ax.plot(dose.rate, dose.effect.mean, "o", color=colour, markersize=7)
    any_finite = any(_is_finite(dose.effect) for dose in rates.effects)
    ax.set_title("Mean difference" + (", with simultaneous 95 % CIs" if any_finite else ""))
    ax.set_ylabel(f"difference from {rates.baseline} (points)")


def _is_finite(effect: Effect) -> bool:
    return bool(np.isfinite([effect.low, effect.high]).all())


def _caption_rates(rates: Rates) -> str:
    if rates.effects:
        return _caption_effects(rates)
    parts = []
    for recipe in dict.fromkeys(dose.recipe for dose in rates.doses):
        doses = [dose for dose in rates.doses if dose.recipe == recipe]
        means = ", ".join(f"{dose.mean:.2f} % at rate {dose.rate:.2g}" for dose in doses)
        parts.append(f"with recipe {recipe} {means}")
    return f"Mean test accuracy {'; '.join(parts)}."


def _caption_effects(rates: Rates) -> str:
    best = max(rates.effects, key=lambda dose: dose.effect.mean)
    finite = [dose for dose in rates.effects if _is_finite(dose.effect)]
    clear = [dose for dose in finite if dose.effect.low > 0 or dose.effect.high < 0]
    text = (
        f"The best mean difference from {rates.baseline} is that of {best.setting},"
        f" {signed(best.effect.mean)} points"
    )
    if not finite:
        return f"{text}; {best.effect.n} pairs are too few for simultaneous intervals."
    where = f" (simultaneous 95 % CI {interval(best.effect)})" if _is_finite(best.effect) else ""
    return (
        f"{text}{where}; {len(clear)} of {len(rates.effects)} intervals"
        f" {'excludes' if len(clear) == 1 else 'exclude'} zero."
    )
