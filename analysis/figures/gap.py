"""The generalisation gap against the dropout rate."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from analysis.figures.rates import (
    ASIDE,
    MEAN,
    describe_left_out,
    find_other_settings,
    leave_out,
    name_rate,
    read_rates,
)
from analysis.figures.style import INK, STYLE, Picture, colours, new_figure
from analysis.frames import StudyFrames
from analysis.words import count, signed

#: Kinds of runs with a gap: completed trials and confirmation runs.
Kind = Literal["trials", "confirmation"]

#: Marker of each kind, and the side of its rate on which it is drawn, to avoid overlap.
GAP_MARKERS: Mapping[Kind, tuple[str, float]] = {
    "trials": ("o", -1),
    "confirmation": ("D", 1),
}
GAP_WORDS: Mapping[Kind, tuple[str, str]] = {
    "trials": ("completed trial", "val"),
    "confirmation": ("confirmation run", "test"),
}


@dataclass(frozen=True)
class Gaps:
    """Generalisation gaps: how much better runs are on train than on unseen images.

    Attributes:
        name: The arm of the trials, or the setting of the confirmation runs.
        kind: `trials` for the completed trials of an arm, measured on val; `confirmation`
            for confirmation runs, measured on test.
        rates: [runs], dropout rates.
        gaps: [runs], train accuracy minus accuracy on unseen images, in points, at the best epoch.
    """

    name: str
    kind: Kind
    rates: NDArray[np.float64]
    gaps: NDArray[np.float64]


def make_gap(frames: StudyFrames) -> Picture | None:
    """Make the figure: a point per run, at its dropout rate."""
    gaps = compute_gap(frames)
    rates = [float(rate) for group in gaps for rate in group.rates]
    if len(set(rates)) < 2:
        return None
    with mpl.rc_context(STYLE):
        figure = new_figure()
        ax = figure.subplots()
        draw_gap(gaps, colours(frames), ax)
        ax.set_xlabel(name_rate(frames))
    return Picture(
        "gap",
        "Generalisation gap by dropout rate, one point per run at its best epoch",
        _caption(gaps) + describe_left_out(find_other_settings(frames)),
        figure,
    )


def compute_gap(frames: StudyFrames) -> tuple[Gaps, ...]:
    """Return the gaps of the completed trials by arm, then of the confirmation runs by setting.

    Settings that differ from the first in more than dropout are omitted, as are the arms of the
    same name: the rate alone does not explain their gap.
    """
    frames = leave_out(frames, find_other_settings(frames))
    completed = frames.trials[frames.trials["state"] == "completed"]
    return (
        *_gaps(completed, "trials", "arm", "val_accuracy"),
        *_gaps(frames.confirm, "confirmation", "setting", "test_accuracy"),
    )


def _gaps(runs: pd.DataFrame, kind: Kind, group: str, unseen: str) -> tuple[Gaps, ...]:
    gaps = 100 * (runs["train_accuracy"] - runs[unseen])
    points = pd.DataFrame({"name": runs[group], "rate": read_rates(runs), "gap": gaps}).dropna()
    return tuple(
        Gaps(str(name), kind, rows["rate"].to_numpy(float), rows["gap"].to_numpy(float))
        for name, rows in points.groupby("name", sort=False)
    )


def draw_gap(gaps: tuple[Gaps, ...], ink: Mapping[str, str], ax: Axes) -> None:
    """Draw trials as open circles and confirmation runs as filled diamonds.

    Args:
        gaps: At least one group.
        ink: The colour of every arm and setting.
        ax: The axes to draw on.
    """
    aside = ASIDE * np.ptp(np.concatenate([group.rates for group in gaps]))
    for group in gaps:
        marker, side = GAP_MARKERS[group.kind]
        colour = ink[group.name]
        ax.plot(
            group.rates + side * aside,
            group.gaps,
            marker,
            color=colour,
            markerfacecolor=colour if group.kind == "confirmation" else "none",
            alpha=0.75,
            markersize=5,
        )
        if group.kind == "confirmation":
            _draw_means(group.rates + side * aside, group.gaps, ax)
    ax.set_ylabel("train minus unseen images (points)")
    kinds = [kind for kind in GAP_MARKERS if any(group.kind == kind for group in gaps)]
    keys = [
        Line2D([], [], color=INK, linestyle="", marker=GAP_MARKERS[kind][0], label=_key(kind))
        for kind in kinds
    ]
    for key, kind in zip(keys, kinds, strict=True):
        key.set_markerfacecolor(INK if kind == "confirmation" else "none")
    if "confirmation" in kinds:
        keys.append(Line2D([], [], color=INK, linestyle="", label="mean at each rate", **MEAN))
    ax.legend(handles=keys, loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderaxespad=0)


def _draw_means(places: NDArray[np.float64], gaps: NDArray[np.float64], ax: Axes) -> None:
    for place in np.unique(places):
        ax.plot(place, gaps[places == place].mean(), color=INK, **MEAN)


def _key(kind: Kind) -> str:
    word, images = GAP_WORDS[kind]
    return f"{word}: train minus {images}"


def _caption(gaps: tuple[Gaps, ...]) -> str:
    """Describe the mean gaps without and with dropout."""
    parts = []
    for kind, (word, images) in GAP_WORDS.items():
        groups = [group for group in gaps if group.kind == kind]
        if groups:
            rates = np.concatenate([group.rates for group in groups])
            values = np.concatenate([group.gaps for group in groups])
            means = [
                f"{signed(values[chosen].mean())} points {where}"
                for where, chosen in (("at rate 0", rates == 0), ("above it", rates > 0))
                if chosen.any()
            ]
            parts.append(f"{' and '.join(means)} ({count(len(values), word)}, on {images})")
    return f"The mean gap is {'; '.join(parts)}."
