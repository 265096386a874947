"""Heatmap of scores by dropout rate and head."""

from collections.abc import Iterable
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from numpy.typing import NDArray

from analysis.figures.quantities import UNITS, describe_measured, quantity_of, scale_of
from analysis.figures.rates import name_rate, read_rates
from analysis.figures.style import GRID, MUTED, STYLE, Picture, new_figure
from analysis.frames import StudyFrames

#: Width of the bins of the dropout rate; a rate of 0 has its own bin.
BIN = 0.1

#: Text on coloured cells, which do not change in dark mode: distinct from the page's colours.
ON_DARK, ON_LIGHT = "#fefefe", "#101010"


@dataclass(frozen=True)
class Heatmap:
    """The trials of all arms by head and dropout rate.

    Attributes:
        metric: The study's metric: `val_accuracy` (a fraction) or `val_loss`.
        heads: Names of the rows, smallest head first.
        rates: Names of the columns.
        scores: [heads, rates], mean score of the completed trials; NaN without any.
        completed: [heads, rates], number of completed trials.
        trials: [heads, rates], number of all trials.
    """

    metric: str
    heads: tuple[str, ...]
    rates: tuple[str, ...]
    scores: NDArray[np.float64]
    completed: NDArray[np.int64]
    trials: NDArray[np.int64]


def make_heatmap(frames: StudyFrames) -> Picture | None:
    """Make the figure: a cell per head and range of rates, coloured by the mean score."""
    heatmap = compute_heatmap(frames)
    if heatmap is None or heatmap.scores.size < 2 or not heatmap.completed.any():
        return None
    with mpl.rc_context(STYLE):
        figure = new_figure(1.4 + 0.5 * len(heatmap.heads))
        ax = figure.subplots()
        mesh = draw_heatmap(heatmap, ax)
        ax.set_xlabel(name_rate(frames))
        bar = figure.colorbar(mesh, ax=ax, pad=0.02)
        bar.set_label(f"mean score: val {UNITS[quantity_of(heatmap.metric)][0]}")
        bar.outline.set_visible(False)
    return Picture(
        "heatmap",
        "Mean score by dropout rate and head, with the number of completed trials",
        _caption(heatmap),
        figure,
    )


def compute_heatmap(frames: StudyFrames) -> Heatmap | None:
    """Count the trials and average their scores; None without trials, heads or dropout rates."""
    if "head" not in frames.trials:
        return None
    # Right-closed bins, so that 0 has its own bin and 0.6 does not need one.
    bins = np.ceil((read_rates(frames.trials) / BIN).round(9))
    trials = frames.trials.assign(bin=bins).dropna(subset=["head", "bin"])
    if trials.empty:
        return None
    trials = trials.astype({"bin": int, "head": str})
    heads = sorted(trials["head"].unique(), key=_size)
    columns = range(trials["bin"].min(), trials["bin"].max() + 1)
    completed = trials[trials["state"] == "completed"]

    def table(rows: pd.DataFrame, what: str) -> pd.DataFrame:
        cells = rows.groupby(["head", "bin"])["score"].agg(what).unstack()  # noqa: PD010
        return cells.reindex(index=heads, columns=list(columns))

    return Heatmap(
        metric=frames.metric,
        heads=tuple(heads),
        rates=tuple(_name_bin(column) for column in columns),
        scores=table(completed, "mean").to_numpy(float),
        completed=table(completed, "size").fillna(0).to_numpy(int),
        trials=table(trials, "size").fillna(0).to_numpy(int),
    )


def _size(head: str) -> tuple[int, list[int]]:
    widths = [int(width) if width.isdigit() else 0 for width in head.split("-")]
    return len(widths), widths


def _name_bin(column: int) -> str:
    if column <= 1:
        return f"up to {BIN}" if column else "0"
    return f"{BIN * (column - 1):.1f}–{BIN * column:.1f}"


def draw_heatmap(heatmap: Heatmap, ax: Axes) -> QuadMesh:
    """Draw the cells: no colour without a completed trial, no text without any trial.

    Args:
        heatmap: At least one completed trial.
        ax: The axes to draw on.

    Returns:
        The mesh, for a colour bar.
    """
    quantity = quantity_of(heatmap.metric)
    scores = scale_of(heatmap.metric) * heatmap.scores
    # Few shades, so that the colour bar stays a vector graphic; lighter is better.
    shades = mpl.colormaps["viridis" if quantity == "accuracy" else "viridis_r"].resampled(32)
    mesh = ax.pcolormesh(np.ma.masked_invalid(scores), cmap=shades, edgecolors=GRID, linewidth=1)
    for row, column in np.argwhere(heatmap.trials):
        done, among = heatmap.completed[row, column], heatmap.trials[row, column]
        text, colour = f"{done} of {among}", MUTED
        if done:
            score = scores[row, column]
            text = f"{score:.{2 if quantity == 'accuracy' else 3}f}\n{text}"
            colour = _readable(mesh.to_rgba(score))
        ax.text(column + 0.5, row + 0.5, text, color=colour, ha="center", va="center", fontsize=8)
    ax.set_xticks(np.arange(len(heatmap.rates)) + 0.5, heatmap.rates)
    ax.set_yticks(np.arange(len(heatmap.heads)) + 0.5, heatmap.heads)
    ax.set_ylabel("head")
    ax.tick_params(length=0)
    ax.grid(visible=False)
    return mesh


def _readable(background: Iterable[float]) -> str:
    """Return white or black, whichever has more contrast (relative luminance as in WCAG)."""
    red, green, blue, _ = (
        c / 12.92 if c < 0.04 else ((c + 0.055) / 1.055) ** 2.4 for c in background
    )
    return ON_LIGHT if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.18 else ON_DARK


def _caption(heatmap: Heatmap) -> str:
    scores = heatmap.scores if quantity_of(heatmap.metric) == "accuracy" else -heatmap.scores
    row, column = np.unravel_index(np.nanargmax(scores), scores.shape)
    best = describe_measured(heatmap.metric, float(heatmap.scores[row, column]))
    among = f"{heatmap.completed[row, column]} of {heatmap.trials[row, column]}"
    no_trial = int((heatmap.trials == 0).sum())
    none_completed = int(((heatmap.trials > 0) & (heatmap.completed == 0)).sum())
    return (
        f"The best mean is {best} with head {heatmap.heads[row]} and dropout rate"
        f" {heatmap.rates[column]} ({among} trials completed). Cells without trials: {no_trial}"
        f" of {heatmap.trials.size}; with trials but none completed: {none_completed}."
    )
