"""The style of all figures, and rendering to files and inline SVG."""

import html
import io
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from analysis.frames import StudyFrames, settings_in_order

#: Replaced by the page's own colours there, so that figures work in light and dark mode.
INK, MUTED, GRID = "#1b1f24", "#6a737d", "#d8dee4"

#: Two of Okabe and Ito's colours that also differ in greyscale print.
PAIR = ("#0072b2", "#d55e00")
DASHES = ("-", (0, (5, 1.5)))

PAGE_COLOURS = {
    INK: "currentColor",
    MUTED: "var(--soft)",
    GRID: "var(--line)",
    PAIR[0]: "var(--without)",
    PAIR[1]: "var(--with)",
}

#: Inches: width of the page, and height of one row of panels.
WIDTH, HEIGHT = 8.5, 3.6

STYLE: dict[Any, Any] = {
    "axes.edgecolor": INK,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "figure.titlesize": 12,
    "font.size": 9,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "savefig.dpi": 200,
    "svg.fonttype": "none",
    # Together with omitting the date: the same study gives the same file.
    "svg.hashsalt": "analysis",
    "text.color": INK,
    # Names and errors may contain a literal $.
    "text.parse_math": False,
    "xtick.color": INK,
    "ytick.color": INK,
}


@dataclass(frozen=True)
class Picture:
    """A figure with title and caption.

    Attributes:
        name: Name of its files, without the suffix.
        title: What it shows, a phrase.
        caption: What the data shows, in a sentence or two.
        figure: The figure, without a title.
    """

    name: str
    title: str
    caption: str
    figure: Figure


def new_figure(height: float = HEIGHT) -> Figure:
    """Return an empty figure as wide as the page; draw within `mpl.rc_context(STYLE)`."""
    return Figure(figsize=(WIDTH, height), layout="constrained")


def colours(frames: StudyFrames) -> Mapping[str, str]:
    """Return the colour of every arm and setting, the same in all figures of a study."""
    arms = list(frames.record.get("arms", {})) or list(frames.trials["arm"].unique())
    settings = settings_in_order(frames.confirm)
    found = dict(zip(arms, shades(len(arms)), strict=True))
    if not set(settings) <= set(arms):
        found |= dict(zip(settings, shades(len(settings)), strict=True))
    return found


def shades(count: int) -> Sequence[str]:
    """Return this many distinct colours, safe for colour-blind readers."""
    if count <= len(PAIR):
        return PAIR[:count]
    # Many settings are doses of one factor: light to dark, readable on light and dark pages.
    places = np.linspace(0.25, 0.85, count)
    return [mpl.colors.to_hex(colour) for colour in mpl.colormaps["viridis_r"](places)]


def render_file(picture: Picture, inputs: str, file_format: Literal["svg", "png"]) -> bytes:
    """Return the figure as a file, with its title and the inputs of the study."""
    content = io.BytesIO()
    with mpl.rc_context(STYLE):
        figure = picture.figure
        figure.suptitle(picture.title, x=0.01, ha="left")
        figure.supxlabel(textwrap.fill(inputs, 150), x=0.01, ha="left", fontsize=7, color=MUTED)
        metadata = {"Date": None} if file_format == "svg" else {}
        figure.savefig(content, format=file_format, metadata=metadata)
        figure.suptitle("")
        figure.supxlabel("")
    return content.getvalue()


def render_inline(picture: Picture) -> str:
    """Return the figure as an SVG element in the page's colours; the page shows the title."""
    content = io.StringIO()
    with mpl.rc_context(STYLE):
        picture.figure.savefig(content, format="svg", transparent=True, metadata={"Date": None})
    svg = content.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # All figures of the page share one namespace of ids.
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{picture.name}-", svg)
    for colour, of_page in PAGE_COLOURS.items():
        svg = svg.replace(colour, of_page)
    label = f'role="img" aria-label="{html.escape(picture.title)}" '
    return svg.replace("<svg ", f"<svg {label}", 1)
