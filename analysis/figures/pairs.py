"""The paired differences that the verdict rests on, seed by seed."""

from collections.abc import Mapping
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes

from analysis.figures.style import INK, MUTED, STYLE, Picture, colours, new_figure
from analysis.frames import StudyFrames
from analysis.stats.effect import Effect, estimate_effect, interval
from analysis.stats.pairs import compute_pairs
from analysis.words import signed

MARKERS = "os^Dv"


@dataclass(frozen=True)
class PairedDifferences:
    """The differences of a setting from the baseline, in points.

    Attributes:
        setting: The setting.
        baseline: The setting it is compared with.
        by_recipe: Per recipe, the difference at each seed, in seed order.
        effect: The mean over recipes and seeds, with its interval.
        measure: Name of the measure, for labels.
    """

    setting: str
    baseline: str
    by_recipe: Mapping[str, tuple[float, ...]]
    effect: Effect
    measure: str = "test accuracy"


def make_pairs(frames: StudyFrames) -> Picture | None:
    """Make the figure: the differences of every setting, with their mean and its interval."""
    compared = compute_differences(frames)
    if not compared:
        return None
    ink = colours(frames)
    with mpl.rc_context(STYLE):
        figure = new_figure(1.6 + 0.55 * sum(len(c.by_recipe) + 1 for c in compared))
        draw_differences(compared, ink, figure.subplots())
    return Picture(
        "pairs",
        f"{compared[0].measure.capitalize()} minus that of {compared[0].baseline}, seed by seed",
        _caption(compared),
        figure,
    )


def compute_differences(frames: StudyFrames) -> tuple[PairedDifferences, ...]:
    """Return the differences of every setting from the first; empty without matched pairs."""
    if frames.confirm.empty:
        return ()
    return tuple(
        PairedDifferences(
            setting=pairs.setting,
            baseline=pairs.baseline,
            by_recipe={
                str(recipe): tuple(map(float, 100 * pairs.by_recipe[recipe]))
                for recipe in pairs.by_recipe
            },
            effect=estimate_effect(list(100 * pairs.by_seed)),
            measure=frames.test_accuracy_words,
        )
        for pairs in compute_pairs(frames, f"test_{frames.accuracy}")
    )


def draw_differences(
    compared: tuple[PairedDifferences, ...], ink: Mapping[str, str], ax: Axes
) -> None:
    """Draw a row of points per recipe, and below it the mean with its interval."""
    labels: list[str] = []
    for pairs in compared:
        for marker, (recipe, values) in zip(MARKERS, pairs.by_recipe.items(), strict=False):
            # A seed has the same height within every row, so that its pairs can be matched by eye.
            heights = len(labels) + np.linspace(-0.22, 0.22, len(values))
            ax.plot(values, heights, marker, color=ink[pairs.setting], alpha=0.75, markersize=5)
            labels.append(f"{pairs.setting}, recipe {recipe}")
        effect, row = pairs.effect, len(labels)
        if np.isfinite([effect.low, effect.high]).all():
            ax.plot([effect.low, effect.high], [row, row], color=INK, linewidth=2.5)
        ax.plot(effect.mean, row, "o", color=INK, markersize=8)
        labels.append(f"{pairs.setting}, mean and 95 % CI")
    ax.axvline(0, color=MUTED, linewidth=1)
    ax.set_yticks(range(len(labels)), labels)
    ax.invert_yaxis()
    ax.grid(visible=False, axis="y")
    ax.grid(visible=True, axis="x")
    ax.set_xlabel(f"difference in {compared[0].measure} from {compared[0].baseline} (points)")


def _caption(compared: tuple[PairedDifferences, ...]) -> str:
    parts = []
    for pairs in compared:
        values = [value for row in pairs.by_recipe.values() for value in row]
        above = sum(value > 0 for value in values)
        parts.append(
            f"{above} of {len(values)} are in favour of {pairs.setting}; the mean of all is"
            f" {signed(pairs.effect.mean)} points (95 % CI {interval(pairs.effect)})"
        )
    return f"Each point is a matched pair: {'; '.join(parts)}."
