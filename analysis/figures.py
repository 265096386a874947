"""The figures, drawn without a display; blue and orange tell two settings apart for every eye."""

import io
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from scipy.optimize import isotonic_regression

from analysis.curves import Curves

Quantity = Literal["accuracy", "loss"]

STYLE: dict[Any, Any] = {
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "figure.titlesize": 12,
    "font.size": 9,
    "savefig.dpi": 200,
    "svg.fonttype": "none",
    # With the date left out too, the same study gives the same file.
    "svg.hashsalt": "analysis",
}

#: The first and the second of Okabe and Ito's colours that stay apart in grey print as well.
PAIR = ("#0072B2", "#D55E00")
DASHES = ("-", (0, (5, 1.5)))
IMAGES = {"train": "Training images", "val": "Validation images"}
UNITS: Mapping[Quantity, tuple[str, float]] = {
    "accuracy": ("accuracy (%)", 100),
    "loss": ("loss (nats per image)", 1),
}


def make_curves_figure(curves: Curves, quantity: Quantity, inputs: str) -> Figure:
    """Draw one quantity on the training images beside the same on the validation images.

    Args:
        curves: At least one setting.
        quantity: What to draw.
        inputs: What the study used, for the foot of the figure.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.5, 4.2), layout="constrained")
        panels = tuple(zip(IMAGES, figure.subplots(1, 2, sharey=True), strict=True))
        for images, ax in panels:
            draw_curves(curves, f"{images}_{quantity}", ax)
            ax.set_title(IMAGES[images])
            ax.set_xlabel("epoch")
        # Where names must give way depends on the limits, which the panels share.
        for images, ax in panels:
            name_curves(curves, f"{images}_{quantity}", ax)
        figure.axes[0].set_ylabel(UNITS[quantity][0])
        figure.suptitle(_title(curves, quantity), x=0.01, ha="left")
        figure.supxlabel(textwrap.fill(inputs, 150), x=0.01, ha="left", fontsize=7, color="0.4")
    return figure


def draw_curves(curves: Curves, measure: str, ax: Axes) -> None:
    """Draw the mean of every setting as a line, and the extent of its runs as a band.

    Args:
        curves: At least one setting.
        measure: `train_accuracy`, `val_accuracy`, `train_loss` or `val_loss`.
        ax: Where to draw.
    """
    scale = _scale(measure)
    colours = _colours(len(curves.settings))
    for index, (setting, colour) in enumerate(zip(curves.settings, colours, strict=True)):
        band = setting.bands[measure]
        dashes = DASHES[index] if len(curves.settings) == len(DASHES) else "-"
        ax.plot(band.epochs, scale * band.mean, color=colour, linestyle=dashes, linewidth=1.8)
        if setting.n > 1:
            low, high = scale * band.low, scale * band.high
            ax.fill_between(band.epochs, low, high, color=colour, alpha=0.15, linewidth=0)
    ax.grid(axis="y", color="0.9", linewidth=0.6)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))


def name_curves(curves: Curves, measure: str, ax: Axes) -> None:
    """Write the name of every setting at the end of its line, none over another.

    Args:
        curves: As drawn.
        measure: As drawn.
        ax: Where they are drawn, its limits as they will be.
    """
    ends = [_scale(measure) * float(setting.bands[measure].mean[-1]) for setting in curves.settings]
    low, high = ax.get_ylim()
    heights = spread(ends, gap=0.05 * (high - low))
    colours = _colours(len(curves.settings))
    for setting, height, colour in zip(curves.settings, heights, colours, strict=True):
        ax.annotate(
            setting.setting,
            (setting.bands[measure].epochs[-1], height),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            color=colour,
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


def render(figure: Figure, file_format: Literal["svg", "png"]) -> bytes:
    """The file that a figure becomes."""
    content = io.BytesIO()
    with mpl.rc_context(STYLE):
        figure.savefig(
            content, format=file_format, metadata={"Date": None} if file_format == "svg" else {}
        )
    return content.getvalue()


def _scale(measure: str) -> float:
    return UNITS["accuracy" if measure.endswith("accuracy") else "loss"][1]


def _title(curves: Curves, quantity: Quantity) -> str:
    if curves.evidence == "champions":
        return f"{quantity.capitalize()} by epoch of the champions, one run each"
    counts = sorted({setting.n for setting in curves.settings})
    n = " or ".join(str(count) for count in counts)
    return (
        f"{quantity.capitalize()} by epoch: mean of {n} confirmation runs per setting;"
        " band: lowest to highest"
    )


def _colours(count: int) -> Sequence[str]:
    if count <= len(PAIR):
        return PAIR[:count]
    # Many settings are doses of one factor: light to dark, none too light to read.
    shades = mpl.colormaps["viridis_r"](np.linspace(0.25, 1, count))
    return [mpl.colors.to_hex(shade) for shade in shades]
