"""Reliability diagram: how well the confidence of each setting is calibrated."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes

from analysis.figures.lines import dashes_of
from analysis.figures.style import HEIGHT, MUTED, STYLE, Picture, colours, new_figure
from analysis.frames import StudyFrames, settings_in_order
from analysis.rundir.predictions import load_predictions
from analysis.stats.calibration import BINS, Bins, bin_predictions
from analysis.stats.effect import Effect, estimate_effect, interval
from analysis.stats.pairs import compute_pairs
from analysis.words import count, p_value, signed

#: Bins with fewer images are too noisy to draw; they still count in the calibration error.
FEWEST_IMAGES = 20


@dataclass(frozen=True)
class SettingReliability:
    """The reliability of one setting.

    Attributes:
        setting: Its name.
        bins: The test images of all its runs, by confidence.
        eces: The expected calibration error of each run, in points.
    """

    setting: str
    bins: Bins
    eces: tuple[float, ...]


@dataclass(frozen=True)
class Reliability:
    """The reliability of a study's settings.

    Attributes:
        settings: In the study's order; those without stored predictions are omitted.
        effect: The second setting's expected calibration error minus the first's, averaged over the
            recipes at each seed; None unless there are two settings with matched pairs.
    """

    settings: tuple[SettingReliability, ...]
    effect: Effect | None


def make_reliability(frames: StudyFrames) -> Picture | None:
    """Make the figure: accuracy by confidence, and the histogram of confidences below."""
    reliability = compute_reliability(frames)
    if reliability is None:
        return None
    ink = colours(frames)
    with mpl.rc_context(STYLE):
        figure = new_figure(HEIGHT + 1.9)
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
        draw_reliability(reliability, ink, above)
        draw_confidences(reliability, ink, below)
    return Picture("reliability", _title(reliability), _caption(reliability), figure)


def compute_reliability(frames: StudyFrames) -> Reliability | None:
    """Pool the predictions of each setting's confirmation runs; None without stored ones."""
    binned: dict[str, Bins] = {}
    for run_id in frames.confirm["run_id"]:
        predictions = load_predictions(frames.path, run_id)
        if predictions is not None:
            binned[run_id] = bin_predictions(predictions)
    if not binned:
        return None
    stored = frames.confirm[frames.confirm["run_id"].isin(list(binned))]
    # Keep the first setting as the baseline, whichever predictions are missing.
    order = {setting: place for place, setting in enumerate(settings_in_order(frames.confirm))}
    stored = stored.sort_values("setting", key=lambda names: names.map(order), kind="stable")
    settings = []
    for setting, runs in stored.groupby("setting", sort=False):
        of_setting = [binned[run_id] for run_id in runs["run_id"]]
        eces = tuple(bins.ece for bins in of_setting)
        settings.append(SettingReliability(str(setting), reduce(Bins.__add__, of_setting), eces))
    measured = stored.assign(ece=[binned[run_id].ece for run_id in stored["run_id"]])
    effect = _effect(replace(frames, confirm=measured)) if len(settings) == 2 else None
    return Reliability(tuple(settings), effect)


def _effect(frames: StudyFrames) -> Effect | None:
    """Estimate the effect of the second setting on the column `ece`, paired by seed."""
    for pairs in compute_pairs(frames, "ece"):
        by_seed = pairs.by_seed.dropna()
        if len(by_seed):
            return estimate_effect(by_seed.to_numpy(dtype=np.float64))
    return None


def draw_reliability(reliability: Reliability, ink: Mapping[str, str], ax: Axes) -> None:
    """Draw accuracy by mean confidence, a line per setting, and the diagonal.

    Args:
        reliability: At least one setting.
        ink: The colour of every setting.
        ax: The axes to draw on.
    """
    ax.plot([0, 100], [0, 100], color=MUTED, linewidth=1, linestyle=":")
    for index, setting in enumerate(reliability.settings):
        bins = setting.bins
        drawn = bins.images >= FEWEST_IMAGES
        images = bins.images[drawn]
        ax.plot(
            100 * bins.confidence[drawn] / images,
            100 * bins.right[drawn] / images,
            marker="o",
            markersize=4,
            linestyle=dashes_of(index, len(reliability.settings)),
            color=ink.get(setting.setting, MUTED),
            label=f"{setting.setting}, ECE {_mean_sd(setting.eces)}",
        )
    ax.text(98, 8, "overconfident", ha="right", color=MUTED)
    ax.text(42, 90, "underconfident", color=MUTED)
    ax.set(xlim=(0, 100.5), ylim=(0, 102), ylabel="accuracy (%)")
    ax.legend(loc="upper left")


def draw_confidences(reliability: Reliability, ink: Mapping[str, str], ax: Axes) -> None:
    """Draw the histogram of confidences of every setting.

    Args:
        reliability: As drawn above.
        ink: As drawn above.
        ax: The axes to draw on.
    """
    edges = np.linspace(0, 100, BINS + 1)
    for index, setting in enumerate(reliability.settings):
        dashes = dashes_of(index, len(reliability.settings))
        share = 100 * setting.bins.images / setting.bins.images.sum()
        colour = ink.get(setting.setting, MUTED)
        ax.stairs(share, edges, color=colour, linestyle=dashes, linewidth=1.4)
    ax.set(xlabel="confidence: probability of the predicted class (%)", ylabel="images (%)")


def _mean_sd(values: Sequence[float]) -> str:
    mean = f"{np.mean(values):.2f}"
    return f"{mean} ± {np.std(values, ddof=1):.2f} %" if len(values) > 1 else f"{mean} %"


def _title(reliability: Reliability) -> str:
    runs = sorted({len(setting.eces) for setting in reliability.settings})
    return (
        "Accuracy by confidence on the test images, pooled over"
        f" {' or '.join(map(str, runs))} confirmation runs per setting"
    )


def _caption(reliability: Reliability) -> str:
    """Describe the calibration error of every setting, and the effect of the factor on it."""
    eces = ", ".join(f"{s.setting} {_mean_sd(s.eces)}" for s in reliability.settings)
    text = f"Expected calibration error (ECE), mean ± sd over runs, lower is better: {eces}"
    effect = reliability.effect
    if effect is None:
        return f"{text}."
    return (
        f"{text}; {reliability.settings[1].setting} changes it by {signed(effect.mean)} points"
        f" (95 % CI {interval(effect)}, p = {p_value(effect.p)}, {count(effect.n, 'seed')})."
    )
