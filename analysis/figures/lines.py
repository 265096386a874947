"""Lines labelled at their right-hand end instead of in a legend."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from scipy.optimize import isotonic_regression

from analysis.figures.style import DASHES, INK

#: Minimum distance between two labels, as a fraction of the panel's height.
GAP = 0.06


def dashes_of(index: int, count: int) -> Any:
    """Return the line style of one of several lines: two also differ in greyscale print."""
    return DASHES[index] if count == len(DASHES) else "-"


def name_ends(ends: Mapping[str, float], ink: Mapping[str, str], ax: Axes) -> None:
    """Label lines at the right of a panel, without overlap.

    Args:
        ends: By name, the height at which its line ends; NaN is skipped.
        ink: By name, the colour; the text colour by default.
        ax: The axes of the lines, with their final limits.
    """
    drawn = {name: end for name, end in ends.items() if not np.isnan(end)}
    low, high = ax.get_ylim()
    heights = spread(list(drawn.values()), gap=GAP * (high - low))
    for name, height in zip(drawn, heights, strict=True):
        ax.annotate(
            name,
            (1, height),
            xycoords=("axes fraction", "data"),
            xytext=(3, 0),
            textcoords="offset points",
            va="center",
            color=ink.get(name, INK),
            annotation_clip=False,
        )


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Move label heights apart as little as needed, keeping their order.

    Args:
        heights: The desired heights.
        gap: Minimum distance between two labels, above 0.
    """
    order = np.argsort(heights, kind="stable")
    steps = gap * np.arange(len(order))
    # Least squares, subject to each label being at least a gap above the one below.
    moved = isotonic_regression(np.asarray(heights)[order] - steps).x + steps
    result = np.empty_like(moved)
    result[order] = moved
    return [float(height) for height in result]
