"""Lines that carry their names at the right-hand end instead of a legend."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from scipy.optimize import isotonic_regression

from analysis.figures.style import DASHES, INK

#: The least distance between two names, as a share of the panel's height.
GAP = 0.06


def dashes_of(index: int, count: int) -> Any:
    """The dashes of one of several lines: two are told apart in grey print as well."""
    return DASHES[index] if count == len(DASHES) else "-"


def name_ends(ends: Mapping[str, float], ink: Mapping[str, str], ax: Axes) -> None:
    """Write names at the right of a panel, none over another.

    Args:
        ends: By name, the height at which its line ends; one that is NaN is left out.
        ink: By name, the colour; the text's own where there is none.
        ax: Where the lines are drawn, its limits as they will be.
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
    """Move heights as little apart as lets labels stand beside them, in the same order.

    Args:
        heights: Where the labels would stand.
        gap: The least distance between two of them, above 0.
    """
    order = np.argsort(heights, kind="stable")
    steps = gap * np.arange(len(order))
    # Least squares under "each at least a gap above the one below it".
    moved = isotonic_regression(np.asarray(heights)[order] - steps).x + steps
    result = np.empty_like(moved)
    result[order] = moved
    return [float(height) for height in result]
