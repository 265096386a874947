"""The figures of the report: per module a `compute_…`, a `draw_…` and a `make_…`."""

from collections.abc import Callable, Mapping
from functools import partial

from analysis.figures.classes import make_classes
from analysis.figures.confusion import make_confusion
from analysis.figures.curves import make_curves
from analysis.figures.gap import make_gap
from analysis.figures.heatmap import make_heatmap
from analysis.figures.importance import make_importance
from analysis.figures.pairs import make_pairs
from analysis.figures.progress import make_progress
from analysis.figures.rates import make_rates
from analysis.figures.reliability import make_reliability
from analysis.figures.rungs import make_rungs
from analysis.figures.style import Picture, render_file, render_inline
from analysis.figures.timeline import make_timeline
from analysis.frames import StudyFrames

__all__ = ["FIGURES", "Picture", "make_pictures", "render_file", "render_inline"]

#: The figures of each section of the page; a maker returns None if its data is missing.
FIGURES: Mapping[str, tuple[Callable[[StudyFrames], Picture | None], ...]] = {
    "comparison": (
        partial(make_curves, quantity="accuracy"),
        partial(make_curves, quantity="loss"),
        make_pairs,
        make_rates,
        make_gap,
    ),
    "predictions": (make_reliability, make_classes, make_confusion),
    "search": (make_progress, make_rungs, make_heatmap, make_importance),
    "time": (make_timeline,),
}


def make_pictures(frames: StudyFrames) -> Mapping[str, tuple[Picture, ...]]:
    """Return every figure that the study has the data for, by section."""
    made = {section: [make(frames) for make in makers] for section, makers in FIGURES.items()}
    return {name: tuple(p for p in pictures if p is not None) for name, pictures in made.items()}
