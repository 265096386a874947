"""Accuracy and loss by epoch, for every setting of the factor."""

from collections.abc import Mapping
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from analysis.figures.lines import dashes_of, name_ends
from analysis.figures.quantities import UNITS, Quantity, describe_measured, scale_of
from analysis.figures.style import HEIGHT, STYLE, Picture, colours, new_figure
from analysis.frames import Evidence, StudyFrames, compute_compared_runs

MEASURES = ("train_accuracy", "val_accuracy", "train_loss", "val_loss")
IMAGES = {"train": "Training images", "val": "Validation images"}


@dataclass(frozen=True)
class Band:
    """One measure of several runs, epoch by epoch; accuracies are fractions.

    Attributes:
        epochs: [epochs], from 1.
        mean: [epochs], mean over runs.
        low: [epochs], lowest run.
        high: [epochs], highest run.
    """

    epochs: NDArray[np.float64]
    mean: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]


@dataclass(frozen=True)
class SettingCurves:
    """The curves of one setting.

    Attributes:
        setting: Its name.
        n: Number of runs.
        bands: By measure: `train_accuracy`, `val_accuracy`, `train_loss`, `val_loss`.
    """

    setting: str
    n: int
    bands: Mapping[str, Band]


@dataclass(frozen=True)
class Curves:
    """The curves of a study.

    Attributes:
        evidence: The kind of runs behind them.
        settings: In the study's order; those without a row in epochs.jsonl are omitted.
    """

    evidence: Evidence
    settings: tuple[SettingCurves, ...]


def compute_curves(frames: StudyFrames) -> Curves:
    """Return mean and range of every measure over the runs of each setting."""
    compared = compute_compared_runs(frames)
    setting_of = compared.runs[["run_id", "setting"]]
    epochs = frames.epochs.merge(setting_of, on="run_id")
    curves = []
    for setting in compared.settings:
        rows = epochs[epochs["setting"] == setting]
        if len(rows):
            bands = {measure: _band(rows, measure) for measure in MEASURES}
            curves.append(SettingCurves(setting, rows["run_id"].nunique(), bands))
    return Curves(compared.evidence, tuple(curves))


def _band(rows: pd.DataFrame, measure: str) -> Band:
    by_epoch = rows.groupby("epoch")[measure].agg(["mean", "min", "max"])
    return Band(
        epochs=by_epoch.index.to_numpy(dtype=np.float64),
        mean=by_epoch["mean"].to_numpy(dtype=np.float64),
        low=by_epoch["min"].to_numpy(dtype=np.float64),
        high=by_epoch["max"].to_numpy(dtype=np.float64),
    )


def make_curves(frames: StudyFrames, quantity: Quantity) -> Picture | None:
    """Make the figure of one quantity: training images on the left, validation on the right."""
    curves = compute_curves(frames)
    if not curves.settings:
        return None
    ink = colours(frames)
    with mpl.rc_context(STYLE):
        figure = new_figure(HEIGHT + 0.6)
        panels = tuple(zip(IMAGES, figure.subplots(1, 2, sharey=True), strict=True))
        for images, ax in panels:
            draw_curves(curves, f"{images}_{quantity}", ink, ax)
            ax.set_title(IMAGES[images])
            ax.set_xlabel("epoch")
        # The panels share their limits, and the placement of the names depends on them.
        for images, ax in panels:
            name_ends(_ends(curves, f"{images}_{quantity}"), ink, ax)
        figure.axes[0].set_ylabel(UNITS[quantity][0])
    return Picture(quantity, _title(curves, quantity), _caption(curves, quantity), figure)


def draw_curves(curves: Curves, measure: str, ink: Mapping[str, str], ax: Axes) -> None:
    """Draw the mean of every setting as a line, and the range of its runs as a band.

    Args:
        curves: At least one setting.
        measure: `train_accuracy`, `val_accuracy`, `train_loss` or `val_loss`.
        ink: The colour of every setting.
        ax: The axes to draw on.
    """
    scale = scale_of(measure)
    for index, setting in enumerate(curves.settings):
        colour = ink[setting.setting]
        band = setting.bands[measure]
        dashes = dashes_of(index, len(curves.settings))
        ax.plot(band.epochs, scale * band.mean, color=colour, linestyle=dashes, linewidth=1.8)
        if setting.n > 1:
            low, high = scale * band.low, scale * band.high
            ax.fill_between(band.epochs, low, high, color=colour, alpha=0.15, linewidth=0)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))


def _title(curves: Curves, quantity: Quantity) -> str:
    if curves.evidence == "champions":
        return f"{quantity.capitalize()} by epoch of the champions, one run each"
    counts = sorted({setting.n for setting in curves.settings})
    n = " or ".join(str(count) for count in counts)
    return (
        f"{quantity.capitalize()} by epoch: mean of {n} confirmation runs per setting;"
        " band: lowest to highest"
    )


def _ends(curves: Curves, measure: str) -> dict[str, float]:
    scale = scale_of(measure)
    return {s.setting: scale * float(s.bands[measure].mean[-1]) for s in curves.settings}


def _caption(curves: Curves, quantity: Quantity) -> str:
    """Describe best and last mean of every setting on val."""
    measure, parts = f"val_{quantity}", []
    for setting in curves.settings:
        mean = setting.bands[measure].mean
        at = int(mean.argmax() if quantity == "accuracy" else mean.argmin())
        best, last = (describe_measured(measure, float(mean[epoch])) for epoch in (at, -1))
        parts.append(f"{setting.setting} {best} after epoch {at + 1}, {last} at the end")
    return f"On the validation images, best and last mean: {'; '.join(parts)}."
